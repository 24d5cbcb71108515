use moa_core::Plan;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::checkpoint::template::Message;
use crate::decoder::saved_sequence::wrong;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::engine::request::{Completion, Event, GenerateOptions, RequestId, Usage};
use crate::engine::serve::{Engine, EngineOptions};
use crate::{Error, Result};

/// A conversation on one cache: each turn reads only what is new.
///
/// Templates may write history differently from what the model produced (trimmed, closed by an end
/// token): the cache is then rolled back to the common prefix, and where a wrapped ring no longer
/// allows that, the conversation is read again from its start. A turn that fails or is cancelled is
/// not part of the conversation.
///
/// ```no_run
/// use moa_core::Plan;
/// use moa_models::{ChatSession, Checkpoint, Cpu, Event, GenerateOptions};
///
/// let checkpoint = Checkpoint::open(Cpu::default(), "model")?;
/// let mut chat = ChatSession::new(&checkpoint, &Plan::load("plan.json")?, 4096)?;
/// chat.say("What is in line 7?", GenerateOptions::default())?;
/// while let Some(event) = chat.step()? {
///     if let Event::Text { piece, .. } = event {
///         print!("{piece}");
///     }
/// }
/// let second = chat.answer("And in line 8?", GenerateOptions::default())?;
/// println!("{}", second.text);
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatSession<D: Math> {
    checkpoint: Checkpoint<D>,
    engine: Engine<D>,
    plan: Plan,
    capacity: usize,
    /// Of the sequence's rings.
    slack: usize,
    /// The engine has it while a turn runs; a device that failed has destroyed it.
    sequence: Option<Sequence<D>>,
    /// Tokens that the sequence holds.
    cached: Vec<u32>,
    messages: Vec<Message>,
    turn: Option<Turn>,
}

/// A message that is being answered.
#[derive(Debug)]
struct Turn {
    id: RequestId,
    /// The conversation up to the message.
    messages: Vec<Message>,
    /// Its tokens.
    tokens: Vec<u32>,
}

impl<D: Math> ChatSession<D> {
    /// An empty conversation of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Core`] if the plan is for another model, [`Error::ContextExceeded`] if the capacity is
    /// beyond the model's context, [`Error::OutOfMemory`] or [`Error::Backend`] if
    /// the device has no room for the caches.
    pub fn new(checkpoint: &Checkpoint<D>, plan: &Plan, capacity: usize) -> Result<Self> {
        Self::with_options(checkpoint, plan, capacity, EngineOptions::default())
    }

    /// [`new`](Self::new), with options for the engine that runs the turns.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_options(
        checkpoint: &Checkpoint<D>,
        plan: &Plan,
        capacity: usize,
        options: EngineOptions,
    ) -> Result<Self> {
        let slack = options.speculation.draft_tokens();
        Ok(Self {
            sequence: Some(checkpoint.model.open(plan, capacity, slack)?),
            slack,
            engine: checkpoint.engine(options),
            checkpoint: checkpoint.clone(),
            plan: plan.clone(),
            capacity,
            cached: Vec::new(),
            messages: Vec::new(),
            turn: None,
        })
    }

    /// The conversation and its cache as bytes for a file; see [`restore`](Self::restore).
    ///
    /// # Errors
    /// [`Error::Invalid`] if a turn is not over, [`Error::NoChatTemplate`] if there is none, or as [`Decoder::save_sequence`](crate::Decoder::save_sequence).
    pub fn save(&self) -> Result<Vec<u8>> {
        let Some(sequence) = self.sequence.as_ref().filter(|_| self.turn.is_none()) else {
            let expected = "one between turns, whose device did not fail";
            return Err(Error::invalid("conversation", expected, "another"));
        };
        let messages = self.messages.iter().map(|m| (m.role.clone(), m.content.clone())).collect();
        let template = Some(written_by(&self.checkpoint)?);
        self.checkpoint.model.save_with(sequence, &self.cached, messages, template)
    }

    /// The conversation that was [saved](Self::save): its next turn reads only what is new.
    ///
    /// # Errors
    /// [`Error::SavedSequence`] also if it was written by another chat template, [`Error::NoChatTemplate`] if there is
    /// none, or as [`Decoder::restore_sequence`](crate::Decoder::restore_sequence).
    pub fn restore(
        checkpoint: &Checkpoint<D>,
        plan: &Plan,
        bytes: &[u8],
        options: EngineOptions,
    ) -> Result<Self> {
        let saved = checkpoint.model.restore_with(plan, bytes)?;
        let own = written_by(checkpoint)?;
        if saved.template.as_ref() != Some(&own) {
            let got = saved.template.unwrap_or_else(|| "none, as it is no conversation".to_owned());
            return Err(wrong("chat template", own, got));
        }
        Ok(Self {
            capacity: saved.sequence.capacity(),
            sequence: Some(saved.sequence),
            slack: options.speculation.draft_tokens(),
            engine: checkpoint.engine(options),
            checkpoint: checkpoint.clone(),
            plan: plan.clone(),
            cached: saved.tokens,
            messages: saved.messages.into_iter().map(|(of, text)| Message::new(of, text)).collect(),
            turn: None,
        })
    }

    /// The conversation so far, without a turn that is not over.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Takes another conversation, such as one with instructions before its first turn, or one without
    /// its oldest turns. The next turn reads what the cache does not hold of it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a turn is not over.
    pub fn set_messages(&mut self, messages: Vec<Message>) -> Result<()> {
        if self.turn.is_some() {
            return Err(Error::invalid("messages", "set between turns", "a turn that is not over"));
        }
        self.messages = messages;
        Ok(())
    }

    /// Most tokens of the conversation.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that the cache holds, without those of a turn that is not over.
    pub fn cached_tokens(&self) -> usize {
        self.cached.len()
    }

    /// Bytes of keys and values that the cache holds between turns.
    pub fn kv_bytes(&self) -> u64 {
        self.sequence.as_ref().map_or(0, |sequence| self.checkpoint.model.kv_bytes(sequence))
    }

    /// What was read and written since this was last asked.
    pub fn take_usage(&mut self) -> Usage {
        self.engine.take_usage()
    }

    /// Begins a turn: adds a user's message, which [`step`](Self::step) answers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the turn before is not over, [`Error::ContextExceeded`] if the
    /// conversation is full, [`Error::NoChatTemplate`], [`Error::Template`] and [`Error::Tokenizer`]
    /// for the text. The conversation is as before then.
    pub fn say(&mut self, content: &str, options: GenerateOptions) -> Result<()> {
        if self.turn.is_some() {
            return Err(Error::invalid("turn", "begun after the last one has ended", "another"));
        }
        let mut messages = self.messages.clone();
        messages.push(Message::user(content));
        let tokens = self.checkpoint.prompt_tokens(&messages)?;
        if tokens.len() > self.capacity {
            return Err(Error::ContextExceeded { asked: tokens.len(), limit: self.capacity });
        }
        let mut sequence = match self.sequence.take() {
            Some(sequence) => sequence,
            None => self.checkpoint.model.open(&self.plan, self.capacity, self.slack)?,
        };
        let common = self.cached.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        // At least one token must be read to have logits to answer from.
        self.roll_back(&mut sequence, common.min(tokens.len().saturating_sub(1)))?;
        let id = self.engine.submit_in(sequence, tokens.clone(), options);
        self.turn = Some(Turn { id, messages, tokens });
        Ok(())
    }

    /// What happened next in the turn; `None` if no turn is running. The answer becomes part of the
    /// conversation with [`Event::Done`].
    ///
    /// # Errors
    /// [`Error::Invalid`] for the options of the turn, [`Error::Logits`] if no token can be chosen,
    /// [`Error::Tokenizer`] if a token has no text, [`Error::Backend`] or [`Error::OutOfMemory`] if
    /// the device fails, [`Error::Rank`] if another rank does. The turn is then over and not part
    /// of the conversation.
    pub fn step(&mut self) -> Result<Option<Event>> {
        match self.engine.step() {
            Ok(Some(Event::Failed { error, .. })) | Err(error) => {
                // What failed first is the cause; the next turn then reads all again.
                let _ = self.cancel();
                Err(error)
            }
            Ok(event) => {
                if let Some(Event::Done { completion, .. }) = &event {
                    self.end(completion);
                }
                Ok(event)
            }
        }
    }

    /// A whole turn.
    ///
    /// # Errors
    /// As [`say`](Self::say) and [`step`](Self::step).
    pub fn answer(&mut self, content: &str, options: GenerateOptions) -> Result<Completion> {
        self.say(content, options)?;
        loop {
            match self.step()? {
                Some(Event::Done { completion, .. }) => return Ok(completion),
                Some(_) => {}
                None => return Err(Error::Cancelled),
            }
        }
    }

    /// Ends a turn that is not over; it is not part of the conversation.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device fails while the turn is rolled back.
    pub fn cancel(&mut self) -> Result<()> {
        let Some(turn) = self.turn.take() else { return Ok(()) };
        self.engine.cancel(turn.id);
        match self.engine.reclaim(turn.id) {
            Some(mut sequence) => {
                // Some of the turn may have been read: the next one starts from a known state.
                self.roll_back(&mut sequence, self.cached.len())?;
                self.sequence = Some(sequence);
            }
            None => self.cached.clear(),
        }
        Ok(())
    }

    /// Takes the answer into the conversation.
    fn end(&mut self, completion: &Completion) {
        let Some(Turn { id, mut messages, tokens }) = self.turn.take() else { return };
        self.sequence = self.engine.reclaim(id);
        self.cached = tokens;
        self.cached.extend(&completion.tokens);
        self.cached.truncate(self.sequence.as_ref().map_or(0, Sequence::len));
        messages.push(Message::assistant(&completion.text));
        self.messages = messages;
    }

    /// Rolls back to `len` tokens, or to none where that cannot be.
    fn roll_back(&mut self, sequence: &mut Sequence<D>, len: usize) -> Result<()> {
        let model = &self.checkpoint.model;
        match model.truncate(sequence, len) {
            Ok(()) => self.cached.truncate(len),
            Err(_) => {
                self.cached.clear();
                model.truncate(sequence, 0)?;
            }
        }
        Ok(())
    }
}

/// What tells the way in which a conversation becomes tokens from others.
fn written_by<D: Math>(checkpoint: &Checkpoint<D>) -> Result<String> {
    Ok(match checkpoint.prompt_style() {
        PromptStyle::Chat => checkpoint.template()?.fingerprint(),
        PromptStyle::Raw => "none: texts as they are".to_owned(),
    })
}
