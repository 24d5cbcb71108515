use moa_core::Plan;

use super::question::Question;
use super::report::{Asked, RetrievalItem, RetrievalReport};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::engine::chat_session::ChatSession;
use crate::engine::request::GenerateOptions;
use crate::eval::retrieval::RetrievalCase;
use crate::progress::Next;
use crate::{Error, Result};

/// A template may write an answer of the model with a few tokens more than it was made of.
const REWRITTEN: usize = 8;

impl<D: Math> Checkpoint<D> {
    /// Context length that a question is opened for: its messages and room for every answer.
    ///
    /// # Errors
    /// If it has no message, or the template refuses it.
    pub fn question_context(&self, question: &Question, max_new_tokens: usize) -> Result<usize> {
        let Some((last, before)) = question.turns.split_last() else {
            return Err(Error::invalid("question", "at least 1 message", 0));
        };
        let mut messages = Vec::new();
        for turn in before {
            messages.extend([Message::user(turn.text.trim()), Message::assistant("")]);
        }
        messages.push(Message::user(last.text.trim()));
        let tokens = self.chat_tokens(&messages)?.len();
        Ok(tokens + max_new_tokens + before.len() * (max_new_tokens + REWRITTEN))
    }

    /// Checks that the model's context holds a question, without asking it.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`], or as [`Checkpoint::question_context`].
    pub fn check_question(&self, question: &Question, max_new_tokens: usize) -> Result<()> {
        let asked = self.question_context(question, max_new_tokens)?;
        self.model.config().check_context(asked)
    }

    /// Asks a question: each message, trimmed, goes through the chat template and is answered with
    /// at most `max_new_tokens` greedy tokens. The plan's spans are those of a context of all
    /// messages and answers together. The item's `size` and `case` are for the caller to fill.
    ///
    /// # Errors
    /// If the question is longer than the model's context or the plan is for another model.
    pub fn ask(
        &self,
        question: &Question,
        plan: &Plan,
        max_new_tokens: usize,
    ) -> Result<RetrievalItem> {
        let context = self.question_context(question, max_new_tokens)?;
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let mut chat = ChatSession::new(self, plan, context)?;
        let mut item = RetrievalItem {
            context,
            density: plan.density(context),
            kv_bytes_dense: self.model.dense_bytes(context)?,
            ..RetrievalItem::default()
        };
        for turn in &question.turns {
            let completion = chat.answer(turn.text.trim(), options.clone())?;
            let usage = chat.take_usage();
            item.prompt_tokens += usage.prompt_tokens;
            item.new_tokens += usage.decoded_tokens;
            item.prefill_seconds += usage.prefill.as_secs_f64();
            item.decode_seconds += usage.decode.as_secs_f64();
            item.references.extend(turn.references.iter().map(|reference| Asked {
                found: question.scoring.holds(&completion.text, &reference.text),
                text: reference.text.clone(),
                depth: reference.depth,
            }));
            item.answers.push(completion.text);
        }
        item.kv_bytes = chat.kv_bytes();
        let found = item.references.iter().filter(|r| r.found).count();
        item.score = found as f64 / item.references.len().max(1) as f64;
        Ok(item)
    }

    /// Asks LongEval cases: the last integer of an answer must be the expected number. `on_case`
    /// gets each item and whether it is right.
    ///
    /// # Errors
    /// As [`Checkpoint::ask`]; [`Error::Cancelled`].
    pub fn retrieval(
        &self,
        cases: &[RetrievalCase],
        plan: &Plan,
        max_new_tokens: usize,
        on_case: &mut dyn FnMut(&RetrievalItem, bool) -> Next,
    ) -> Result<RetrievalReport> {
        let mut items = Vec::with_capacity(cases.len());
        for (case, question) in cases.iter().map(RetrievalCase::question).enumerate() {
            let item = RetrievalItem { case, ..self.ask(&question, plan, max_new_tokens)? };
            if on_case(&item, item.is_right()) != Next::Continue {
                return Err(Error::Cancelled);
            }
            items.push(item);
        }
        RetrievalReport::new(items)
    }
}
