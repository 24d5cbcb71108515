//! Questions answered from what an eviction leaves of a prompt.

use std::time::Instant;

use super::question::{Prompting, Question};
use super::report::RetrievalItem;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::checkpoint::template::Message;
use crate::decoder::logits::{check_logits, likeliest};
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::engine::serve::EngineOptions;
use crate::evict::{Eviction, EvictionKind, Method};
use crate::{Error, Result};

/// A conversation on one cache, and the tokens that it holds.
struct Held<D: Math> {
    sequence: Sequence<D>,
    tokens: Vec<u32>,
}

impl<D: Math> Checkpoint<D> {
    /// [`ask`](Self::ask) by a rival of plans: dense attention reads the first message, some keys are kept
    /// ([`Eviction`]), and answers, as later messages, come of those. The first token of an answer is dense
    /// attention's, unless the question is read after the eviction.
    ///
    /// Bytes are those of the caches with the kept keys; the whole prompt's, or one layer's, were held before, which
    /// the peak of memory has.
    ///
    /// # Errors
    /// As [`ask`](Self::ask); [`Error::Invalid`] if the density leaves room for no key, the model is one rank's part
    /// or has sliding windows shorter than the context, or the message has no last line to read later;
    /// [`Error::ContextExceeded`] also if there is no room to repeat the context for KVzip.
    pub fn ask_evicting(
        &self,
        question: &Question,
        eviction: &Eviction,
        max_new_tokens: usize,
    ) -> Result<RetrievalItem> {
        let context = self.question_context(question, max_new_tokens)?;
        self.model.config().check_context(context)?;
        self.model.reset_peak_memory()?;
        let mut item = RetrievalItem {
            context,
            kv_bytes_dense: self.model.dense_bytes(context)?,
            ..RetrievalItem::default()
        };
        let (mut messages, mut held) = (Vec::new(), None);
        for turn in &question.turns {
            messages.push(Message::user(turn.text.trim()));
            let begin = Instant::now();
            let (tokens, state, logits) = match held.take() {
                None => self.first(question, context, eviction, &mut item)?,
                Some(Held { mut sequence, tokens: before }) => {
                    let tokens = self.prompt_tokens(&messages)?;
                    let common = before.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
                    let common = common.min(tokens.len().saturating_sub(1));
                    self.model.truncate(&mut sequence, common)?;
                    let chunk = EngineOptions::default().prefill_chunk;
                    let logits = self.model.prefill(&mut sequence, &tokens[common..], chunk)?;
                    item.prompt_tokens += tokens.len() - common;
                    (tokens, sequence, logits)
                }
            };
            item.prefill_seconds += begin.elapsed().as_secs_f64();
            let begin = Instant::now();
            let (new, sequence) = self.greedy(state, &logits, max_new_tokens)?;
            item.decode_seconds += begin.elapsed().as_secs_f64();
            item.new_tokens += new.len();
            let answer = self.answer_text(&tokens, &new)?;
            messages.push(Message::assistant(&answer));
            item.answers.push(answer);
            item.kv_bytes = self.model.kv_bytes(&sequence);
            let mut tokens = [tokens, new].concat();
            tokens.truncate(sequence.len());
            held = Some(Held { sequence, tokens });
        }
        let all = self.model.unevicted_bytes(item.context)?;
        item.density = item.kv_bytes as f64 / all.max(1) as f64;
        item.peak_bytes = self.model.peak_memory()?;
        item.grade(question);
        Ok(item)
    }

    /// Checks that a question can be asked so, without asking it.
    ///
    /// # Errors
    /// As [`ask_evicting`](Self::ask_evicting), but for those of the device.
    pub fn check_evicting(
        &self,
        question: &Question,
        eviction: &Eviction,
        max_new_tokens: usize,
    ) -> Result<()> {
        let context = self.question_context(question, max_new_tokens)?;
        let (tokens, read) = self.evicted_part(question, eviction)?;
        self.model.check_evicting(&tokens, context - tokens.len())?;
        eviction.budget(read, context)?;
        if eviction.kind == EvictionKind::KvZip {
            self.repeats(&tokens[..read])?;
        }
        Ok(())
    }

    /// The tokens of the first message, and how many of them are read before the eviction.
    fn evicted_part(&self, question: &Question, eviction: &Eviction) -> Result<(Vec<u32>, usize)> {
        let (prompt, special) = self.first_prompt(question)?;
        let tokens = self.tokenizer.encode(&prompt, special)?;
        let read = match eviction.before_question {
            false => tokens.len(),
            true => self.before_last_line(question, &prompt, special, &tokens)?,
        };
        Ok((tokens, read))
    }

    /// Reads the first message and evicts: its tokens, the sequence, and the logits of the last.
    fn first(
        &self,
        question: &Question,
        context: usize,
        eviction: &Eviction,
        item: &mut RetrievalItem,
    ) -> Result<(Vec<u32>, Sequence<D>, Vec<f32>)> {
        let (tokens, read) = self.evicted_part(question, eviction)?;
        let (known, later) = tokens.split_at(read);
        let kept = eviction.budget(read, context)?;
        let repeats;
        let method = match eviction.kind {
            EvictionKind::SnapKv => Method::SnapKv,
            EvictionKind::AdaKv => Method::AdaKv,
            EvictionKind::KvZip => {
                repeats = self.repeats(known)?;
                Method::KvZip(&repeats)
            }
        };
        let room = context - read;
        let (mut sequence, mut logits) = self.model.prefill_evicting(known, room, kept, &method)?;
        if !later.is_empty() {
            let chunk = EngineOptions::default().prefill_chunk;
            logits = self.model.prefill(&mut sequence, later, chunk)?;
        }
        item.prompt_tokens += tokens.len();
        // All keys of what is read first are held while it is read, and then those kept and the later ones.
        let held = |count: usize| (count * (count + 1) / 2) as f64;
        let after = room as f64 * kept as f64 + held(room);
        item.kv_footprint = Some((held(read) + after) / held(context));
        Ok((tokens, sequence, logits))
    }

    /// Tokens before the last line of a question's first message, where it asks.
    fn before_last_line(
        &self,
        question: &Question,
        prompt: &str,
        special: bool,
        tokens: &[u32],
    ) -> Result<usize> {
        let message = question.turns.first().map_or("", |turn| turn.text.trim());
        // A last line such as "Answer:" belongs to the one before.
        let cue =
            message.rsplit_once('\n').filter(|(_, last)| last.len() < 16 && last.ends_with(':'));
        let asked = cue.map_or(message, |(asked, _)| asked).trim_end();
        let line = asked.rsplit_once('\n').map(|(before, _)| &message[before.len() + 1..]);
        let none = || {
            let expected = "a message of several lines, of which the last asks";
            Error::invalid("question", expected, "one without a context before it")
        };
        let at = line.and_then(|line| prompt.rfind(line)).ok_or_else(none)?;
        let before = self.tokenizer.encode(&prompt[..at], special)?;
        // The tokens of the whole prompt, so that both uses read the same ones.
        match before.iter().zip(tokens).take_while(|(a, b)| a == b).count() {
            0 => Err(none()),
            read => Ok(read),
        }
    }

    /// The likeliest tokens after these logits, without an end-of-sequence token.
    fn greedy(
        &self,
        sequence: Sequence<D>,
        logits: &[f32],
        max_new_tokens: usize,
    ) -> Result<(Vec<u32>, Sequence<D>)> {
        let ends = self.eos_token_ids();
        let mut new = Vec::new();
        check_logits(logits)?;
        let mut next = likeliest(logits).0;
        let mut session = self.model.session(vec![sequence])?;
        while new.len() < max_new_tokens && !ends.contains(&next) {
            new.push(next);
            if new.len() < max_new_tokens {
                let chosen = session.step_greedy(&self.model, &[next])?;
                next = chosen.first().copied().unwrap_or(next);
            }
        }
        let none = || Error::invalid("session", "its sequence", "none");
        Ok((new, session.into_sequences().pop().ok_or_else(none)?))
    }

    /// New tokens as the engine writes them.
    fn answer_text(&self, prompt: &[u32], new: &[u32]) -> Result<String> {
        let mut stream = match self.prompt_style() {
            PromptStyle::Raw => self.tokenizer.stream_after(prompt)?,
            PromptStyle::Chat => self.tokenizer.stream(),
        };
        let mut text = String::new();
        for token in new {
            text.push_str(&stream.push(*token)?.unwrap_or_default());
        }
        text.push_str(&stream.finish()?.unwrap_or_default());
        Ok(text)
    }

    /// The prompt of a question's first message, the beginning of the answer included, and whether the tokenizer
    /// adds its special tokens to it.
    pub(super) fn first_prompt(&self, question: &Question) -> Result<(String, bool)> {
        let text = question.turns.first().map_or("", |turn| turn.text.as_str());
        if question.prompting == Prompting::Text || self.prompt_style() == PromptStyle::Raw {
            return Ok((format!("{text}{}", question.answer_prefix), true));
        }
        let mut prompt = self.template()?.render(&[Message::user(text.trim())], true)?;
        prompt.push_str(&question.answer_prefix);
        // The template writes the begin-of-sequence token itself.
        Ok((prompt, false))
    }
}
