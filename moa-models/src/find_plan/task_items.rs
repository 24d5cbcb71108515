//! Calibration items of the built-in tasks: what the dense model answers of them.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::find_plan::calibrate::{Calibration, CalibrationOptions, FEW};
use crate::find_plan::profile::Item;
use crate::find_plan::tasks::{Task, TaskPrompt};
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// Short questions of each built-in task.
const PROBES: usize = 4;

impl<D: Math> Checkpoint<D> {
    /// Items of the records and of `others`, in turn, as far as the dense model answers them.
    pub(super) fn task_items(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<Calibration> {
        let (tasks, tried) = self.answered_tasks(others, options)?;
        let total = options.lengths.iter().map(|length| options.samples_at(*length)).sum();
        let mut done = 0;
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            let (mut own, mut contexts) = (Vec::new(), 0);
            let samples = options.samples_at(length);
            // Contexts with many questions each are enough when they are half as many.
            let enough = samples.max(samples * options.questions / 2);
            // What is answered when short may be too hard at this length.
            let mut misses = vec![0; tasks.len()];
            // A model that answers a quarter of its calibration prompts still fills the set.
            for attempt in 0..4 * samples {
                let place = attempt % tasks.len().max(1);
                if contexts == samples || own.len() >= enough || tasks.is_empty() {
                    break;
                }
                if misses[place] >= 4 && misses.iter().any(|m| *m < 4) {
                    continue;
                }
                let seed = options
                    .seed
                    .wrapping_mul(0x1_0000)
                    .wrapping_add(attempt as u64 ^ (length as u64) << 32);
                let items = self.answered_items(tasks[place], length, seed, options)?;
                if items.is_empty() {
                    misses[place] += 1;
                } else {
                    own.extend(items);
                    contexts += 1;
                    done += 1;
                    progress.advance(Stage::Calibrate, done, total)?;
                }
            }
            if own.is_empty() {
                let reason =
                    format!("the dense model answered none of the built-in tasks ({tried})");
                return Err(Error::NoCalibration { length, reason });
            }
            if own.len() < FEW.min(samples) {
                tracing::warn!(
                    length,
                    items = own.len(),
                    "the dense model answers few of the built-in tasks ({tried}); the plan may depend on chance"
                );
            }
            items.insert(length, own);
        }
        let names: Vec<_> = tasks.iter().map(|task| task.name()).collect();
        Ok(Calibration { items, data: format!("built-in tasks ({})", names.join(", ")) })
    }

    /// The tasks that the dense model answers when they are short, and what it answered of each that was
    /// tried. Of the records it is the phrasing that is answered best. The questions do not depend on the
    /// seed: which tasks are used is a matter of the model.
    fn answered_tasks(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
    ) -> Result<(Vec<Task>, String)> {
        let length = options.lengths.iter().copied().min().unwrap_or(1024).min(1024);
        let options = CalibrationOptions { questions: 1, ..options.clone() };
        // Of a task that seems out of reach only the first questions, unless all of them are.
        for (questions, at_first) in [(PROBES, 2), (2 * PROBES, 2 * PROBES)] {
            let mut tried = Vec::new();
            let mut right_of = |task: Task| -> Result<usize> {
                let (mut right, mut asked) = (0, 0);
                let most = |right| if right == 0 { at_first } else { questions };
                while asked < most(right) {
                    let seed = 0xca11_b000 + asked as u64;
                    right += self.answered_items(task, length, seed, &options)?.len();
                    asked += 1;
                }
                tracing::debug!(?task, right, asked, "calibration task");
                tried.push(format!("{} {right} of {asked}", task.name()));
                Ok(right)
            };
            let mut answered: Vec<(usize, Task)> = Vec::new();
            for task in Task::records() {
                let right = right_of(task)?;
                if right > answered.first().map_or(0, |best| best.0) {
                    answered = vec![(right, task)];
                }
                if right == questions {
                    break;
                }
            }
            for &task in others {
                let right = right_of(task)?;
                if right > 0 {
                    answered.push((right, task));
                }
            }
            // A task that is answered once by chance wastes attempts, if there are others.
            let most = answered.iter().map(|(right, _)| *right).max().unwrap_or(0);
            answered.retain(|(right, _)| 2 * right >= most);
            if !answered.is_empty() || questions > PROBES {
                return Ok((
                    answered.into_iter().map(|(_, task)| task).collect(),
                    tried.join(", "),
                ));
            }
        }
        Ok((Vec::new(), String::new()))
    }

    /// A task's context of about `length` tokens with the dense model's answers, those that are right.
    fn answered_items(
        &self,
        task: Task,
        length: usize,
        seed: u64,
        options: &CalibrationOptions,
    ) -> Result<Vec<Item>> {
        let (tasks, prompts) = self.fill(length - options.max_response, |bytes| {
            task.prompts(bytes, seed, options.questions)
        })?;
        let responses = self.dense_answers(&prompts, options.max_response)?;
        let mut items = Vec::with_capacity(prompts.len());
        for ((prompt, task), response) in prompts.iter().zip(tasks).zip(responses) {
            if !task.is_answered_by(&self.tokenizer.decode(&response, true)?) {
                continue;
            }
            // What is said behind the answer depends on nothing far away.
            let mut end = 1;
            while end < response.len()
                && !task.is_answered_by(&self.tokenizer.decode(&response[..end], true)?)
            {
                end += 1;
            }
            items.push(Item::new(prompt, &response[..end])?);
        }
        Ok(items)
    }

    /// The largest prompts that `build` makes of a number of bytes, all of at most `room` tokens.
    fn fill(
        &self,
        room: usize,
        build: impl Fn(usize) -> Vec<TaskPrompt>,
    ) -> Result<(Vec<TaskPrompt>, Vec<Vec<u32>>)> {
        let made = |bytes: usize| -> Result<_> {
            let tasks = build(bytes);
            let tokens: Result<Vec<_>> =
                tasks.iter().map(|task| self.question_tokens(&task.messages)).collect();
            let tokens = tokens?;
            let most = tokens.iter().map(Vec::len).max().unwrap_or(0);
            Ok((tasks, tokens, most))
        };
        let mut bytes = 4 * room;
        let mut best = None;
        // Tokens grow nearly as bytes do: a few steps of the rule of three come close.
        for _ in 0..6 {
            let (tasks, tokens, most) = made(bytes)?;
            let fits = most <= room;
            if fits {
                best = Some((tasks, tokens));
                if most + room / 32 >= room {
                    break;
                }
            }
            let next = bytes * room / most.max(1);
            // What does not fit yields a little more than the rule of three says.
            bytes = if fits { next.saturating_sub(room / 64) } else { next * 63 / 64 };
        }
        let least = || made(1).map(|(tasks, tokens, _)| (tasks, tokens));
        best.map_or_else(least, Ok)
    }

    /// Tokens of a built-in question.
    fn question_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let mut messages = messages.to_vec();
        if let Some(last) = messages.last_mut() {
            last.content = self.question_text(std::mem::take(&mut last.content));
        }
        self.prompt_tokens(&messages)
    }
}
