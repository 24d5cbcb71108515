//! Calibration items of the built-in tasks: what the dense model answers of them.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::find_plan::calibrate::{Calibration, CalibrationOptions};
use crate::find_plan::profile::Item;
use crate::find_plan::tasks::{Task, TaskPrompt};
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// Short questions of each built-in task, and of one that few are answered of.
const PROBES: usize = 4;
const MOST: usize = 8;

/// Their tokens, if calibration is no shorter.
const SHORT: usize = 512;

/// Answers that are written together at most, unless one context has more questions: each has a dense cache.
const TOGETHER: usize = 8;

impl<D: Math> Checkpoint<D> {
    /// Items of the records and of `others`, in turn, as far as the dense model answers them.
    pub(super) fn task_items(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<Calibration> {
        let total = options.lengths.iter().map(|length| options.samples_at(*length)).sum();
        progress.advance(Stage::Calibrate, 0, total)?;
        let (tasks, tried) = self.answered_tasks(others, options)?;
        let questions = tasks.iter().map(|(_, of_right)| *of_right).max().unwrap_or(1).min(PROBES);
        let mut done = 0;
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            let (mut own, mut contexts) = (Vec::new(), 0);
            let samples = options.samples_at(length);
            // Contexts with many questions each are enough when they are half as many.
            let enough = samples.max(samples * options.questions / 2);
            // What is answered when short may be too hard at this length.
            let mut misses = vec![0; tasks.len()];
            let is_missed = |misses: &[usize], place: usize| {
                misses[place] >= 4 && misses.iter().any(|m| *m < 4)
            };
            // A model that answers a quarter of its calibration prompts still fills the set.
            let mut attempts = (0..4 * samples * usize::from(!tasks.is_empty()))
                .map(|attempt| (attempt % tasks.len(), attempt as u64));
            while contexts < samples && own.len() < enough {
                // Where few answers are right, several are asked about a context, so that one of them is.
                let questions = options.questions.max(questions);
                // Some more than are needed would be asked in vain.
                let room = (samples - contexts).min((TOGETHER / questions).max(1));
                let asked: Vec<(usize, u64)> = attempts
                    .by_ref()
                    .filter(|(place, _)| !is_missed(&misses, *place))
                    .take(room)
                    .collect();
                if asked.is_empty() {
                    break;
                }
                let with_seeds: Vec<(Task, u64)> = asked
                    .iter()
                    .map(|(place, attempt)| {
                        let seed = options.seed.wrapping_mul(0x1_0000);
                        (tasks[*place].0, seed.wrapping_add(attempt ^ (length as u64) << 32))
                    })
                    .collect();
                let more = CalibrationOptions { questions, ..options.clone() };
                let items = self.answered_items(&with_seeds, length, &more)?;
                for ((place, attempt), mut items) in asked.into_iter().zip(items) {
                    if items.len() > options.questions {
                        let turn = attempt as usize % items.len();
                        items.rotate_left(turn);
                        items.truncate(options.questions);
                    }
                    if own.len() >= enough || is_missed(&misses, place) {
                        continue;
                    }
                    if items.is_empty() {
                        misses[place] += 1;
                        continue;
                    }
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
            if own.len() < options.least_at(length) {
                tracing::warn!(
                    "calibration items of about {length} tokens: {} of {samples} asked for, so few that what is \
                     measured on them may depend on chance (the dense model answers, of short questions: {tried})",
                    own.len()
                );
            }
            items.insert(length, own);
        }
        let names: Vec<_> = tasks.iter().map(|(task, _)| task.name()).collect();
        Ok(Calibration { items, data: format!("built-in tasks ({})", names.join(", ")) })
    }

    /// The tasks that the dense model answers when they are short, with the number of questions that it takes for one
    /// right answer, and what it answered of each that was tried. Of the records it is the phrasing that is answered
    /// best. The questions do not depend on the seed: which tasks are used is a matter of the model.
    fn answered_tasks(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
    ) -> Result<(Vec<(Task, usize)>, String)> {
        let length = options.lengths.iter().copied().min().unwrap_or(SHORT).min(SHORT);
        let length = length.max(2 * options.max_response + 64);
        let options = CalibrationOptions { questions: 1, ..options.clone() };
        // Of a task that seems out of reach only the first questions, unless all of them are: then more of records, the
        // easiest, and last of the others.
        let steps = [
            (PROBES, [2, 2], [0, 0]),
            (MOST, [MOST, PROBES], [2, 2]),
            (MOST, [MOST; 2], [MOST, PROBES]),
        ];
        for (questions, at_first, before) in steps {
            // By name: of the records, which are several, what was answered best.
            let mut tried: Vec<(&str, usize, usize)> = Vec::new();
            let mut right_of = |task: Task| -> Result<(usize, usize)> {
                let kind = usize::from(!matches!(task, Task::Record(_)));
                // None of those asked before was answered.
                let (mut right, mut asked) = (0, before[kind]);
                for most in [at_first[kind], questions] {
                    if asked < most && (asked == before[kind] || right > 0) {
                        let seeds = (asked..most).map(|at| (task, 0xca11_b000 + at as u64));
                        let seeds: Vec<_> = seeds.collect();
                        let items = self.answered_items(&seeds, length, &options)?;
                        right += items.iter().map(Vec::len).sum::<usize>();
                        asked = most;
                    }
                }
                tracing::debug!(?task, right, asked, "calibration task");
                match tried.iter_mut().find(|(name, ..)| *name == task.name()) {
                    Some(best) if right > best.1 => (best.1, best.2) = (right, asked),
                    Some(_) => {}
                    None => tried.push((task.name(), right, asked)),
                }
                Ok((right, asked))
            };
            let mut answered: Vec<(usize, usize, Task)> = Vec::new();
            for task in Task::records() {
                let (right, asked) = right_of(task)?;
                if right > answered.first().map_or(0, |best| best.0) {
                    answered = vec![(right, asked, task)];
                }
                if right == questions {
                    break;
                }
            }
            for &task in others {
                let (right, asked) = right_of(task)?;
                if right > 0 {
                    answered.push((right, asked, task));
                }
            }
            // A task that is answered once by chance wastes attempts, if there are others.
            let most = answered.iter().map(|(right, ..)| *right).max().unwrap_or(0);
            answered.retain(|(right, ..)| 2 * right >= most);
            if !answered.is_empty() || before[1] == PROBES {
                let of_right = |(right, asked, task): (usize, usize, Task)| (task, asked / right);
                let told = |(name, right, asked)| format!("{name} {right} of {asked}");
                let tried: Vec<String> = tried.into_iter().map(told).collect();
                return Ok((answered.into_iter().map(of_right).collect(), tried.join(", ")));
            }
        }
        Ok((Vec::new(), String::new()))
    }

    /// Contexts of about `length` tokens, one for each task and seed, with the dense model's answers: those that are
    /// right.
    fn answered_items(
        &self,
        asked: &[(Task, u64)],
        length: usize,
        options: &CalibrationOptions,
    ) -> Result<Vec<Vec<Item>>> {
        let (mut tasks, mut contexts) = (Vec::new(), Vec::new());
        for (task, seed) in asked {
            let (own, prompts) = self.fill(length - options.max_response, |bytes| {
                task.prompts(bytes, *seed, options.questions)
            })?;
            tasks.push(own);
            contexts.push(prompts);
        }
        let responses = self.dense_answers(&contexts, options.max_response)?;
        let mut of_contexts = Vec::with_capacity(asked.len());
        let answered = asked.iter().zip(&contexts).zip(tasks).zip(responses);
        for ((((kind, _), prompts), tasks), responses) in answered {
            let mut items = Vec::with_capacity(prompts.len());
            for ((prompt, task), response) in prompts.iter().zip(tasks).zip(responses) {
                let Some(answer) = self.answer(&task, &response)? else { continue };
                // What is said behind the answer depends on nothing far away.
                let item = Item::new(prompt, &response[..answer.end])?;
                // A sentence about a fact must not make its one word count for less than the digits of a key. All
                // records of a model are asked about in one wording.
                items.push(match kind {
                    Task::Record(_) => item,
                    _ => item.with_answer(answer.len())?,
                });
            }
            of_contexts.push(items);
        }
        Ok(of_contexts)
    }

    /// The first tokens of a response that hold the right answers; `None` if it is wrong.
    fn answer(&self, task: &TaskPrompt, response: &[u32]) -> Result<Option<Range<usize>>> {
        let is_in = |tokens: Range<usize>| {
            let text = self.tokenizer.decode(&response[tokens], true)?;
            Ok::<_, Error>(task.is_answered_by(&text))
        };
        if !is_in(0..response.len())? {
            return Ok(None);
        }
        let mut end = 1;
        while end < response.len() && !is_in(0..end)? {
            end += 1;
        }
        let mut start = end - 1;
        while start > 0 && !is_in(start..end)? {
            start -= 1;
        }
        Ok(Some(start..end))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn answers_are_found_in_their_sentences() -> Result<()> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
        let checkpoint = Checkpoint::open(Cpu::default(), folder)?;
        let answers = vec!["4711".to_string(), "garden".to_string()];
        let task = TaskPrompt { messages: Vec::new(), answers };
        let of = |text: &str| -> Result<Option<String>> {
            let response = checkpoint.tokenizer.encode(text, false)?;
            let answer = checkpoint.answer(&task, &response)?;
            answer.map(|answer| checkpoint.tokenizer.decode(&response[answer], true)).transpose()
        };
        let text = "There are 4712 sheep of 4711, in the garden of Martha, 4711 and garden.";
        assert_eq!(of(text)?.as_deref().map(str::trim), Some("4711, in the garden"));
        assert_eq!(of("There are 4711 sheep in the yard.")?, None);
        Ok(())
    }
}
