use super::{Task, TaskSources};
use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::eval::Question;
use crate::{Error, Result};

impl<D: Math> Checkpoint<D> {
    /// The longest question of a task whose messages and answers take at most `length` tokens, from
    /// built-in sources. Draws of different `case` share nothing.
    ///
    /// # Errors
    /// As [`task_question_from`](Self::task_question_from).
    pub fn task_question(
        &self,
        task: Task,
        length: usize,
        max_new_tokens: usize,
        draw: (u64, usize),
    ) -> Result<Question> {
        self.task_question_from(&TaskSources::default(), task, length, max_new_tokens, draw)
    }

    /// [`task_question`](Self::task_question) from sources of one's own.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shortest question of the task takes more than `length` tokens, or a
    /// task about documents has none; those of [`question_context`](Self::question_context).
    pub fn task_question_from(
        &self,
        sources: &TaskSources,
        task: Task,
        length: usize,
        max_new_tokens: usize,
        (seed, case): (u64, usize),
    ) -> Result<Question> {
        let seed = seed.rotate_left(32) ^ (length as u64).rotate_left(24) ^ case as u64;
        let build = |units| self.built(sources, task, units, (length, case), seed);
        let takes = |units: usize| self.question_context(&build(units)?, max_new_tokens);
        let shortest = task.shortest(sources, case);
        let least = takes(shortest)?;
        if least > length {
            let enough = self.enough(sources, task, max_new_tokens)?.max(least);
            let expected = format!("at least {enough} tokens for {}", task.name());
            return Err(Error::invalid("length", expected, length));
        }
        build(longest(length, (shortest, least), takes)?)
    }

    /// A question of so many units.
    fn built(
        &self,
        sources: &TaskSources,
        task: Task,
        units: usize,
        (length, case): (usize, usize),
        seed: u64,
    ) -> Result<Question> {
        let mut question = task.build(units, sources, (length, case), seed)?;
        // A model without a chat template is led to the answer, by its beginning where there is one.
        if question.answer_prefix.is_empty() {
            for turn in &mut question.turns {
                turn.text = self.question_text(std::mem::take(&mut turn.text));
            }
        }
        Ok(question)
    }

    /// Tokens that the shortest questions of a task take in any draw: a little more than the most of some.
    fn enough(&self, sources: &TaskSources, task: Task, max_new_tokens: usize) -> Result<usize> {
        const DRAWS: usize = 16;
        let mut most = 0;
        for case in 0..DRAWS {
            let shortest = task.shortest(sources, case);
            let question = self.built(sources, task, shortest, (1, case), case as u64)?;
            most = most.max(self.question_context(&question, max_new_tokens)?);
        }
        Ok(most + most.div_ceil(32))
    }
}

/// The most units that take at most `length` tokens, given that some take so many. A unit has at
/// least one token, and units are alike: a few measurements are enough, each of which encodes a text.
fn longest(
    length: usize,
    first: (usize, usize),
    takes: impl Fn(usize) -> Result<usize>,
) -> Result<usize> {
    // The most that are known to fit, and the fewest that are known not to.
    let (mut fits, mut over) = (first, (first.0.max(length) + 1, None));
    for round in 0.. {
        let (units, tokens) = fits;
        let open = over.0 - units;
        if open <= 1 {
            break;
        }
        // Tokens of a unit: between what fits and what does not, else on average, which counts the
        // question itself as well and so does not overshoot.
        let each = match over.1 {
            Some(more) => (more - tokens) as f64 / open as f64,
            None => tokens as f64 / units as f64,
        };
        let step = match round % 4 {
            3 if over.1.is_some() => open / 2,
            _ => ((length - tokens) as f64 / each.max(1e-3)) as usize,
        };
        let probe = units + step.clamp(1, open - 1);
        match takes(probe)? {
            tokens if tokens <= length => fits = (probe, tokens),
            tokens => over = (probe, Some(tokens)),
        }
    }
    Ok(fits.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_longest_that_fits_is_found_in_a_few_measurements() {
        for (own, each, length) in
            [(100, 23.7, 4096), (9, 1.1, 512), (40, 4.0, 131_072), (0, 300.0, 1000), (5, 1.0, 8)]
        {
            let count = Cell::new(0);
            let tokens = |units: usize| own + (units as f64 * each) as usize;
            let takes = |units| {
                count.set(count.get() + 1);
                Ok(tokens(units))
            };
            let found = longest(length, (1, tokens(1)), takes).unwrap();
            assert!(tokens(found) <= length && tokens(found + 1) > length, "{length}: {found}");
            assert!(count.get() <= 14, "{length}: {}", count.get());
        }
    }
}
