use std::io::{self, BufRead, IsTerminal};
use std::time::Instant;

use moa_models::{ChatSession, Checkpoint, GenerateOptions, Math, Next, TextProgress};
use serde_json::json;

use super::generate::{Args, finish};
use crate::error::{Error, Result};
use crate::model::ChosenPlan;
use crate::output::{Context, bytes, percent};

/// Longest conversation where `--context` does not say: caches are allocated for all of it.
const DEFAULT_CONTEXT: usize = 8192;

/// A conversation on one cache, a turn per line of stdin.
pub(super) fn run<D: Math>(
    args: &Args,
    model: &Checkpoint<D>,
    chosen: &ChosenPlan,
    options: &GenerateOptions,
    context: &Context,
) -> Result<()> {
    let limit = model.model.config().context_length();
    let capacity = args.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
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
        let mut failed = None;
        let result = session.say(line.trim(), options, &args.stop, &mut |progress| {
            if let TextProgress::Text { piece, .. } = progress
                && let Err(error) = context.stream(piece)
            {
                failed = Some(error);
                return Next::Cancel;
            }
            Next::Continue
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let completion =
            result.map_err(|e| Error::from(e).at(format!("stdin, line {}", number + 1)))?;
        context.print("")?;
        turns.push(json!({
            "user": line.trim(),
            "text": completion.text,
            "finish": finish(completion.finish),
            "cached_tokens": session.cached_tokens(),
            "seconds": begin.elapsed().as_secs_f64(),
        }));
        prompt();
    }
    let slot_bytes = context.cache.slot_bytes(chosen.plan.shape().head_dim);
    let kv_bytes = chosen.plan.kv_bytes(capacity, slot_bytes);
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
