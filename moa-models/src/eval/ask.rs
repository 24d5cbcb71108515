use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use moa_core::Plan;
use serde_json::{Map, Value, json};

use super::item_log::ItemLog;
use super::question::{Prompting, Question};
use super::report::{RetrievalItem, RetrievalReport};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::fingerprint::fingerprint;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::engine::chat_session::ChatSession;
use crate::engine::request::{Event, GenerateOptions};
use crate::engine::serve::EngineOptions;
use crate::eval::retrieval::RetrievalCase;
use crate::evict::Eviction;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// A template may write an answer of the model with a few tokens more than it was made of.
const REWRITTEN: usize = 8;

/// One question of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct SizedQuestion {
    /// Size that it was made for, in the evaluation's unit: record lines or tokens.
    pub size: Option<usize>,
    /// Index in the file, or of the draw; with the size it tells questions apart.
    pub case: usize,
    /// The question.
    pub question: Question,
    /// Where it comes from, for messages.
    pub place: String,
}

impl SizedQuestion {
    fn error(&self, source: Error) -> Error {
        Error::Question { place: self.place.clone(), source: Box::new(source) }
    }
}

/// The plan, the length of answers and the file of results of one evaluation
/// ([`Checkpoint::evaluate`]).
#[derive(Clone, Debug)]
pub struct Evaluation<'a> {
    /// The plan under which the questions are answered.
    pub plan: &'a Plan,
    /// Answers come of what this leaves of the questions ([`Checkpoint::ask_evicting`]), and the plan is not used.
    pub eviction: Option<Eviction>,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// File for every answer, written as they come ([`ItemLog`]): an evaluation with the same settings
    /// goes on where the file ends. `None` for no file.
    pub items: Option<&'a Path>,
    /// What answers depend on beside model, plan and `max_new_tokens`, with a name for each: where the
    /// questions come from, the seed, the device.
    pub settings: Map<String, Value>,
}

impl<'a> Evaluation<'a> {
    /// An evaluation whose answers are kept in no file.
    pub fn new(plan: &'a Plan, max_new_tokens: usize) -> Self {
        Self { plan, eviction: None, max_new_tokens, items: None, settings: Map::new() }
    }
}

impl<D: Math> Checkpoint<D> {
    /// Context length that a question is opened for: its messages and room for every answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the question has no message, or several and the beginning of an answer;
    /// those of [`Checkpoint::prompt_tokens`].
    pub fn question_context(&self, question: &Question, max_new_tokens: usize) -> Result<usize> {
        if question.turns.len() == 1 {
            return Ok(self.asked_tokens(question)?.len() + max_new_tokens);
        }
        let Some((last, before)) = question.turns.split_last() else {
            return Err(Error::invalid("question", "at least 1 message", 0));
        };
        if !question.answer_prefix.is_empty() || question.prompting == Prompting::Text {
            let got = format!("{} messages", question.turns.len());
            return Err(Error::invalid("question with a given beginning", "one message", got));
        }
        let mut messages = Vec::new();
        for turn in before {
            messages.extend([Message::user(turn.text.trim()), Message::assistant("")]);
        }
        messages.push(Message::user(last.text.trim()));
        let tokens = self.prompt_tokens(&messages)?.len();
        Ok(tokens + max_new_tokens + before.len() * (max_new_tokens + REWRITTEN))
    }

    /// What the model reads of a question of one message, the beginning of the answer included.
    fn asked_tokens(&self, question: &Question) -> Result<Vec<u32>> {
        let (prompt, special) = self.first_prompt(question)?;
        self.tokenizer.encode(&prompt, special)
    }

    /// Checks that the model's context holds a question, without asking it.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`], or as [`Checkpoint::question_context`].
    pub fn check_question(&self, question: &Question, max_new_tokens: usize) -> Result<()> {
        let asked = self.question_context(question, max_new_tokens)?;
        self.model.config().check_context(asked)
    }

    /// Asks a question: each message, trimmed, goes through the chat template, unless prompts are raw, and
    /// is answered with at most `max_new_tokens` greedy tokens. The plan's spans are those of a context of all
    /// messages and answers together. The item's `size` and `case` are for the caller to fill.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if the question and its answers are longer than the model's
    /// context, [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan
    /// is for a model of other dimensions; those of [`question_context`](Self::question_context)
    /// and [`ChatSession::answer`].
    pub fn ask(
        &self,
        question: &Question,
        plan: &Plan,
        max_new_tokens: usize,
    ) -> Result<RetrievalItem> {
        let context = self.question_context(question, max_new_tokens)?;
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        self.model.reset_peak_memory()?;
        let mut item = RetrievalItem {
            context,
            density: self.model.config().windowed(plan)?.density(context),
            kv_footprint: Some(self.model.config().windowed(plan)?.kv_footprint(context)),
            kv_bytes_dense: self.model.dense_bytes(context)?,
            ..RetrievalItem::default()
        };
        match question.turns.as_slice() {
            [_] => {
                let sequence = self.model.open(plan, context, 0)?;
                let mut engine = self.engine(EngineOptions::default());
                let id = engine.resume(sequence, self.asked_tokens(question)?, options);
                let answer = loop {
                    match engine.step()? {
                        Some(Event::Done { completion, .. }) => break completion.text,
                        Some(Event::Failed { error, .. }) => return Err(error),
                        Some(_) => {}
                        None => return Err(Error::Cancelled),
                    }
                };
                item.add(&engine.take_usage());
                item.kv_bytes = engine.reclaim(id).map_or(0, |s| self.model.kv_bytes(&s));
                item.answers.push(answer);
            }
            turns => {
                let mut chat = ChatSession::new(self, plan, context)?;
                for turn in turns {
                    item.answers.push(chat.answer(turn.text.trim(), options.clone())?.text);
                    item.add(&chat.take_usage());
                }
                item.kv_bytes = chat.kv_bytes();
            }
        }
        item.peak_bytes = self.model.peak_memory()?;
        item.grade(question);
        Ok(item)
    }

    /// Asks all questions, but those that the file of items holds the answers of. Each answer is in that
    /// file before the next question is asked. Where several devices share the model, rank 0 alone has the file.
    ///
    /// # Errors
    /// [`Error::Question`] naming the question that is wrong or too long, where possible before the first
    /// is asked; [`Error::OtherSettings`], [`Error::Line`] or [`Error::Io`] of the file of items;
    /// [`Error::Invalid`] if there is no question; [`Error::Cancelled`].
    pub fn evaluate(
        &self,
        questions: &[SizedQuestion],
        evaluation: &Evaluation<'_>,
        progress: &mut dyn Progress,
    ) -> Result<RetrievalReport> {
        let Evaluation { plan, max_new_tokens, .. } = *evaluation;
        // All of them before the first is asked, which may take hours, and before the file of items is made.
        for asked in questions {
            let checked = match &evaluation.eviction {
                Some(eviction) => self.check_evicting(&asked.question, eviction, max_new_tokens),
                None => self.check_question(&asked.question, max_new_tokens),
            };
            checked.map_err(|error| asked.error(error))?;
        }
        let (mut log, mut known) = (None, HashMap::new());
        if let Some(path) = evaluation.items {
            // All ranks have to leave out the same questions.
            let items = self.model.agree(|| {
                let (opened, items) = ItemLog::open(path, &self.settings(evaluation))?;
                log = Some(opened);
                Ok::<_, Error>(Arc::new(items))
            })?;
            let items = items.iter().map(|i: &RetrievalItem| ((i.size, i.case), i.clone()));
            known = items.collect();
        }
        let (mut items, mut score) = (Vec::with_capacity(questions.len()), 0.0);
        for asked in questions {
            let SizedQuestion { size, case, .. } = *asked;
            let item = match known.remove(&(size, case)) {
                Some(item) => item,
                None => {
                    let item = match &evaluation.eviction {
                        Some(eviction) => {
                            self.ask_evicting(&asked.question, eviction, max_new_tokens)
                        }
                        None => self.ask(&asked.question, plan, max_new_tokens),
                    };
                    let item = item.map_err(|error| asked.error(error))?;
                    let item = RetrievalItem { size, case, ..item };
                    if let Some(log) = &mut log {
                        log.push(&item)?;
                    }
                    item
                }
            };
            score += item.score;
            items.push(item);
            progress.remark(&format!("{score:.4} right"));
            progress.advance(Stage::Evaluate, items.len(), questions.len())?;
        }
        RetrievalReport::new(items)
    }

    /// Asks LongEval cases: the last integer of an answer must be the expected number.
    ///
    /// # Errors
    /// As [`Checkpoint::evaluate`].
    pub fn retrieval(
        &self,
        cases: &[RetrievalCase],
        plan: &Plan,
        max_new_tokens: usize,
        progress: &mut dyn Progress,
    ) -> Result<RetrievalReport> {
        let question = |(case, of): (usize, &RetrievalCase)| {
            let place = format!("case {}", case + 1);
            SizedQuestion { size: None, case, question: of.question(), place }
        };
        let questions: Vec<_> = cases.iter().enumerate().map(question).collect();
        self.evaluate(&questions, &Evaluation::new(plan, max_new_tokens), progress)
    }

    /// What answers depend on, as the first line of a file of items says it.
    fn settings(&self, evaluation: &Evaluation<'_>) -> Value {
        let mut settings = evaluation.settings.clone();
        let plan = fingerprint(evaluation.plan.to_json().as_bytes());
        settings.insert("model".into(), json!(self.model.fingerprint()));
        settings.insert("plan".into(), json!(plan));
        settings.insert("max_new_tokens".into(), json!(evaluation.max_new_tokens));
        if let Some(Eviction { kind, density, before_question }) = evaluation.eviction {
            let of = json!({"kind": kind.name(), "density": density, "before_question": before_question});
            settings.insert("eviction".into(), of);
        }
        // Logs of before there was a choice say nothing.
        if self.model.ranks() > 1 {
            settings.insert("ranks".into(), json!(self.model.ranks()));
        }
        if self.prompt_style() == PromptStyle::Raw {
            settings.insert("prompts".into(), json!("raw"));
        } else if let Some(template) = &self.own_template {
            settings.insert("template".into(), json!(template));
        }
        Value::Object(settings)
    }
}
