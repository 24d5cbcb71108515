use moa_core::Plan;

use super::retrieval::RetrievalCase;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::find_plan::records::{PHRASINGS, Phrasing};

/// English prose of another author than that of calibration: the beginning of "A Voyage to Lilliput" from Jonathan
/// Swift's Gulliver's Travels (1726, in the public domain), some 10,000 words.
pub const HELD_OUT_TEXT: &str = include_str!("essay.txt");

/// Seeds of calibration are multiples of 2^16 plus small numbers; these lie apart from them.
const SEED: u64 = 0x7e57_0000_0000_8000;

impl<D: Math> Checkpoint<D> {
    /// `count` questions about built-in records that calibration never uses, each of at most `length`
    /// tokens with its answer of at most `max_new_tokens`. Of the ways to phrase a record, the one is
    /// used whose short questions the dense model answers best.
    ///
    /// # Errors
    /// [`Error::Question`](crate::Error::Question) as [`Checkpoint::retrieval`];
    /// [`Error::NoChatTemplate`](crate::Error::NoChatTemplate),
    /// [`Error::Template`](crate::Error::Template) or [`Error::Tokenizer`](crate::Error::Tokenizer)
    /// as [`Checkpoint::prompt_tokens`].
    pub fn held_out_cases(
        &self,
        length: usize,
        max_new_tokens: usize,
        count: usize,
        seed: u64,
    ) -> Result<Vec<RetrievalCase>> {
        let phrasing = self.answered_best(max_new_tokens, seed)?;
        let room = length.saturating_sub(max_new_tokens);
        (0..count as u64).map(|index| self.filled(phrasing, room, draw(seed, index))).collect()
    }

    /// The longest record prompt of at most `room` tokens.
    fn filled(&self, phrasing: &Phrasing, room: usize, seed: u64) -> Result<RetrievalCase> {
        let fits = |lines: usize| -> Result<bool> {
            let text = self.case(phrasing, lines, seed).prompt;
            Ok(self.prompt_tokens(&[Message::user(&text)])?.len() <= room)
        };
        // A line has more than 4 tokens in any tokenizer.
        let (mut low, mut high) = (1, (room / 4).max(2));
        while high - low > 1 {
            let middle = low.midpoint(high);
            if fits(middle)? { low = middle } else { high = middle }
        }
        Ok(self.case(phrasing, low, seed))
    }

    fn answered_best(&self, max_new_tokens: usize, seed: u64) -> Result<&'static Phrasing> {
        let dense = Plan::full(self.model.shape())?;
        let mut best = (0, &PHRASINGS[0]);
        for phrasing in PHRASINGS {
            let probes: Vec<_> = (0..2).map(|i| self.case(phrasing, 12, draw(!seed, i))).collect();
            let report = self.retrieval(&probes, &dense, max_new_tokens, &mut ())?;
            if report.correct > best.0 {
                best = (report.correct, phrasing);
            }
            if report.correct == probes.len() {
                break;
            }
        }
        Ok(best.1)
    }

    fn case(&self, phrasing: &Phrasing, lines: usize, seed: u64) -> RetrievalCase {
        let record = phrasing.prompt(lines, seed);
        RetrievalCase {
            prompt: self.question_text(record.text),
            expected_number: i64::from(record.answer),
            correct_line: None,
        }
    }
}

fn draw(seed: u64, index: u64) -> u64 {
    seed.rotate_left(32) ^ SEED ^ index
}
