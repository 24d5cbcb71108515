use std::io::{self, BufRead, IsTerminal};
use std::time::Instant;

use moa_models::{ChatSession, Checkpoint, Event, GenerateOptions, Math};
use serde_json::json;

use crate::error::{Error, Result};
use crate::model::ChosenPlan;
use crate::output::{Context, bytes, percent};

/// Longest conversation where `--context` does not say: caches are allocated for all of it.
const DEFAULT_CONTEXT: usize = 8192;

/// A conversation on one cache, a turn per line of stdin.
pub(super) fn run<D: Math>(
    model: &Checkpoint<D>,
    chosen: &ChosenPlan,
    options: &GenerateOptions,
    capacity: Option<usize>,
    context: &Context,
) -> Result<()> {
    let limit = model.model.config().context_length();
    let capacity = capacity.unwrap_or(limit.min(DEFAULT_CONTEXT));
    let mut session = ChatSession::new(model, &chosen.plan, capacity)?;
    let is_terminal = io::stdin().is_terminal();
    let prompt = || {
        if is_terminal && !context.json {
            eprint!("> ");
        }
    };
    let mut turns = Vec::new();
    prompt();
    for (number, line) in io::stdin().lock().lines().enumerate() {
        let line = line.map_err(|source| Error::Stream { stream: "stdin", source })?;
        if line.trim().is_empty() {
            prompt();
            continue;
        }
        let begin = Instant::now();
        let at_line = |e| Error::from(e).at(format!("stdin, line {}", number + 1));
        session.say(line.trim(), options.clone()).map_err(at_line)?;
        let mut answer = None;
        while let Some(event) = session.step().map_err(at_line)? {
            match event {
                Event::Text { piece, .. } => context.stream(piece)?,
                Event::Done { completion, .. } => answer = Some(completion),
                _ => {}
            }
        }
        let Some(completion) = answer else { continue };
        context.print("")?;
        turns.push(json!({
            "user": line.trim(),
            "text": completion.text,
            "finish": completion.finish.name(),
            "cached_tokens": session.cached_tokens(),
            "seconds": begin.elapsed().as_secs_f64(),
        }));
        prompt();
    }
    let slot_bytes = context.cache.slot_bytes(chosen.plan.shape().head_dim);
    let plan = model.model.config().windowed(&chosen.plan)?;
    let kv_bytes = plan.kv_bytes(capacity, slot_bytes);
    let dense = model.model.dense_bytes(capacity)?;
    context.note(format_args!(
        "{}: KV cache for {capacity} tokens {} of {} dense ({}); {} tokens held",
        chosen.name,
        bytes(kv_bytes),
        bytes(dense),
        percent(kv_bytes as f64 / dense.max(1) as f64),
        session.cached_tokens(),
    ));
    context.json(&json!({
        "turns": turns,
        "plan": chosen.name,
        "context": capacity,
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": dense,
    }))
}
