use super::Task;
use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::eval::Question;
use crate::{Error, Result};

impl<D: Math> Checkpoint<D> {
    /// The longest question of a task whose messages and answers take at most `length` tokens.
    /// Draws of different `case` share nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shortest question of the task takes more than `length` tokens;
    /// those of [`question_context`](Self::question_context).
    pub fn task_question(
        &self,
        task: Task,
        length: usize,
        max_new_tokens: usize,
        (seed, case): (u64, usize),
    ) -> Result<Question> {
        let seed = seed.rotate_left(32) ^ (length as u64).rotate_left(24) ^ case as u64;
        let build = |units: usize| {
            let mut question = task.build(units, seed);
            for turn in &mut question.turns {
                turn.text = self.question_text(std::mem::take(&mut turn.text));
            }
            question
        };
        let takes = |units: usize| self.question_context(&build(units), max_new_tokens);
        let mut fits = task.shortest();
        let least = takes(fits)?;
        if least > length {
            let expected = format!("at least {least} tokens for {}", task.name());
            return Err(Error::invalid("length", expected, length));
        }
        // Doubling first: a text of as many units as tokens would take long to encode. A unit has at
        // least one token.
        let mut over = 2 * fits;
        while over <= length && takes(over)? <= length {
            (fits, over) = (over, 2 * over);
        }
        while over - fits > 1 {
            let middle = fits.midpoint(over);
            *(if takes(middle)? <= length { &mut fits } else { &mut over }) = middle;
        }
        Ok(build(fits))
    }
}
