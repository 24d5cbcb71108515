use moa_core::Plan;
use moa_models::{Checkpoint, Math, Message, PHRASINGS, Phrasing, RetrievalCase};

use crate::error::Result;

/// Seeds of calibration are multiples of 2^16 plus small numbers; these lie apart from them.
const SEED: u64 = 0x7e57_0000_0000_8000;

/// Questions about records of about `length` tokens with their answer of at most `max_new_tokens`,
/// none of which calibration uses.
pub(crate) fn cases<D: Math>(
    model: &Checkpoint<D>,
    length: usize,
    max_new_tokens: usize,
    count: usize,
    seed: u64,
) -> Result<Vec<RetrievalCase>> {
    let phrasing = best_phrasing(model, max_new_tokens, seed)?;
    let room = length.saturating_sub(max_new_tokens);
    (0..count as u64).map(|index| filled(model, phrasing, room, draw(seed, index))).collect()
}

fn draw(seed: u64, index: u64) -> u64 {
    seed.rotate_left(32) ^ SEED ^ index
}

/// The longest record prompt of at most `room` tokens.
fn filled<D: Math>(
    model: &Checkpoint<D>,
    phrasing: &Phrasing,
    room: usize,
    seed: u64,
) -> Result<RetrievalCase> {
    let fits = |lines: usize| -> Result<bool> {
        let text = phrasing.prompt(lines, seed).text;
        Ok(model.chat_tokens(&[Message::user(&text)])?.len() <= room)
    };
    // A line has more than 4 tokens in any tokenizer.
    let (mut low, mut high) = (1, (room / 4).max(2));
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle)? { low = middle } else { high = middle }
    }
    Ok(case(phrasing, low, seed))
}

fn case(phrasing: &Phrasing, lines: usize, seed: u64) -> RetrievalCase {
    let record = phrasing.prompt(lines, seed);
    RetrievalCase {
        prompt: record.text,
        expected_number: i64::from(record.answer),
        correct_line: None,
    }
}

/// The phrasing whose short questions the dense model answers best.
fn best_phrasing<D: Math>(
    model: &Checkpoint<D>,
    max_new_tokens: usize,
    seed: u64,
) -> Result<&'static Phrasing> {
    let dense = Plan::full(model.model.shape())?;
    let mut best = (0, &PHRASINGS[0]);
    for phrasing in PHRASINGS {
        let probes: Vec<_> = (0..2).map(|i| case(phrasing, 12, draw(!seed, i))).collect();
        let report = model.retrieval(&probes, &dense, max_new_tokens, &mut ())?;
        if report.correct > best.0 {
            best = (report.correct, phrasing);
        }
        if report.correct == probes.len() {
            break;
        }
    }
    Ok(best.1)
}
