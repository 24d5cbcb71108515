use std::cell::LazyCell;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use moa_core::Plan;
use moa_models::{ChatSession, Checkpoint, EngineOptions, Event, GenerateOptions, Math, Message};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::ChosenPlan;
use crate::output::{Context, bytes, percent};
use crate::terminal::ask;

/// Longest conversation where `--context` does not say: caches are allocated for all of it.
const DEFAULT_CONTEXT: usize = 8192;

/// What becomes of a turn that the conversation has no room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum OnOverflow {
    /// The conversation ends, with exit code 2
    #[default]
    Stop,
    /// The oldest turns are dropped until there is room
    DropOldest,
    /// The conversation is kept, and goes on without the turn
    Keep,
}

/// What the flags say of a conversation.
pub(super) struct Conversation<'a> {
    pub(super) options: &'a GenerateOptions,
    /// Instructions before the first turn.
    pub(super) system: Option<&'a str>,
    /// Most tokens.
    pub(super) capacity: Option<usize>,
    pub(super) on_overflow: OnOverflow,
    pub(super) engine: EngineOptions,
    /// A saved conversation to go on with, and where to save this one.
    pub(super) load: Option<&'a Path>,
    pub(super) save: Option<&'a Path>,
}

/// A conversation on one cache, a turn per line of stdin.
pub(super) fn run<D: Math>(
    model: &Checkpoint<D>,
    chosen: &ChosenPlan,
    conversation: &Conversation<'_>,
    context: &Context,
) -> Result<()> {
    let limit = model.model.config().context_length();
    let capacity = conversation.capacity.unwrap_or(limit.min(DEFAULT_CONTEXT));
    if let Some(path) = conversation.save
        && model.model.device().saved_cache_type().is_none()
    {
        // The end of the conversation would be late to say so.
        let expected = "left out on a device that does not give its caches back";
        return Err(Error::argument("--save-state", expected, path.display()));
    }
    let engine = conversation.engine;
    let mut session = match conversation.load {
        Some(path) => {
            let io = |source| moa_models::Error::Io { path: path.to_path_buf(), source };
            let bytes = std::fs::read(path).map_err(io)?;
            ChatSession::restore(model, &chosen.plan, &bytes, engine)
                .map_err(|error| Error::from(error).at(path.display().to_string()))?
        }
        None => {
            let mut new = ChatSession::with_options(model, &chosen.plan, capacity, engine)?;
            new.set_messages(conversation.system.into_iter().map(Message::system).collect())?;
            new
        }
    };
    let capacity = session.capacity();
    let asks = io::stdin().is_terminal() && !context.json;
    let (mut turns, mut ended) = (Vec::new(), Ok(()));
    if conversation.save.is_some() {
        interrupt::watch();
    }
    let lines = LazyCell::new(read_lines);
    for number in 1.. {
        // Where several GPUs share the model, one thread reads for all.
        let line = model.model.agree(|| {
            if asks {
                ask("> ");
            }
            next_line(&lines, number)
        });
        let turn = match line {
            Ok(None) => break,
            Ok(Some(line)) => match line.trim_start_matches('\u{feff}').trim() {
                "" => Ok(None),
                line => answer(line, &mut session, model, conversation, context)
                    .map(Some)
                    .map_err(|error| error.at(format!("stdin, line {number}"))),
            },
            Err(error) => Err(error),
        };
        match turn {
            Ok(turn) => turns.extend(turn),
            Err(error) if is_overflow(&error) && conversation.on_overflow == OnOverflow::Keep => {
                context.note(format_args!("{error}; the conversation goes on without it"));
                turns.push(json!({ "error": error.to_string() }));
            }
            // What was answered is not lost.
            Err(error) => {
                ended = Err(error);
                break;
            }
        }
    }
    if let Some(path) = conversation.save {
        // An answer that was cut off is no part of it.
        session.cancel()?;
        moa_core::write_atomic(path, &session.save()?)?;
    }
    let shape = chosen.plan.shape();
    let slot_bytes = context.cache.slot_bytes(shape.head_dim);
    // Of all GPUs that share the model.
    let bytes_of = |plan: &Plan, slot_bytes| -> Result<u64> {
        Ok(model.model.config().windowed(plan)?.kv_bytes(capacity, slot_bytes))
    };
    let kv_bytes = bytes_of(&chosen.plan, slot_bytes)?;
    let dense = bytes_of(&Plan::full(shape)?, shape.dense_slot_bytes(slot_bytes))?;
    context.note(format_args!(
        "{}: KV cache for {capacity} tokens {} of {} dense ({}); {} tokens held",
        chosen.name,
        bytes(kv_bytes),
        bytes(dense),
        percent(kv_bytes as f64 / dense.max(1) as f64),
        session.cached_tokens(),
    ));
    let mut result = json!({
        "turns": turns,
        "plan": chosen.name,
        "context": capacity,
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": dense,
    });
    if let Err(error) = &ended {
        result["error"] = error.to_string().into();
    }
    context.json(&result)?;
    ended
}

/// The lines of stdin, read on a thread of its own: waiting for one can be interrupted.
fn read_lines() -> Receiver<io::Result<String>> {
    let (sender, lines) = sync_channel(0);
    std::thread::spawn(move || {
        for line in io::stdin().lines() {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// Time between two looks at whether the conversation is to end.
const LOOK: Duration = Duration::from_millis(100);

/// The next line of stdin; none at its end.
fn next_line(lines: &Receiver<io::Result<String>>, number: usize) -> Result<Option<String>> {
    loop {
        if interrupt::is_asked() {
            return Err(moa_models::Error::Cancelled.into());
        }
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                let stream = format!("stdin, line {number}").into();
                return line.map(Some).map_err(|source| Error::Stream { stream, source });
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// One turn, as it is told to programs.
fn answer<D: Math>(
    line: &str,
    session: &mut ChatSession<D>,
    model: &Checkpoint<D>,
    conversation: &Conversation<'_>,
    context: &Context,
) -> Result<Value> {
    let begin = Instant::now();
    let mut dropped = 0;
    if conversation.on_overflow == OnOverflow::DropOldest {
        dropped = make_room(line, session, model, conversation.options.max_new_tokens)?;
        if dropped > 0 {
            context.note(format_args!("the conversation is full; {dropped} messages were dropped"));
        }
    }
    session.say(line, conversation.options.clone())?;
    let mut completion = None;
    while let Some(event) = session.step()? {
        match event {
            Event::Done { completion: done, .. } => completion = Some(done),
            _ if interrupt::is_asked() => return Err(moa_models::Error::Cancelled.into()),
            Event::Text { piece, .. } => context.stream(piece)?,
            _ => {}
        }
    }
    let completion = completion.ok_or(moa_models::Error::Cancelled)?;
    context.print("")?;
    let mut turn = json!({
        "user": line,
        "text": completion.text,
        "finish": completion.finish.name(),
        "cached_tokens": session.cached_tokens(),
        "seconds": begin.elapsed().as_secs_f64(),
    });
    if dropped > 0 {
        turn["dropped_messages"] = dropped.into();
    }
    Ok(turn)
}

/// Drops the oldest turns until a message and an answer have room; the number of messages that went.
fn make_room<D: Math>(
    line: &str,
    session: &mut ChatSession<D>,
    model: &Checkpoint<D>,
    max_new_tokens: usize,
) -> Result<usize> {
    // A long answer that was allowed for is no reason to forget everything.
    let room = max_new_tokens.min(session.capacity() / 4);
    let mut messages = session.messages().to_vec();
    let (before, kept) =
        (messages.len(), messages.iter().take_while(|m| m.role == "system").count());
    loop {
        let all: Vec<_> = messages.iter().cloned().chain([Message::user(line)]).collect();
        let fits = model.prompt_tokens(&all)?.len() + room <= session.capacity();
        if fits || messages.len() < kept + 2 {
            break;
        }
        messages.drain(kept..kept + 2);
    }
    let dropped = before - messages.len();
    if dropped > 0 {
        session.set_messages(messages)?;
    }
    Ok(dropped)
}

fn is_overflow(error: &Error) -> bool {
    match error {
        Error::At { source, .. } => is_overflow(source),
        error => matches!(error, Error::Model(moa_models::Error::ContextExceeded { .. })),
    }
}
