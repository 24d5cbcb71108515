//! Running text for calibration: what heads do for the words around them, which no question asks for.

use moa_core::SplitMix64;

use crate::book::BOOK;
use crate::find_plan::calibrate::Part;

/// At least `len` bytes of text from a sentence on that is drawn with `rng`, up to the end of a
/// sentence. Behind the last paragraph the text goes on with the first.
pub(crate) fn excerpt(rng: &mut SplitMix64, len: usize) -> String {
    excerpt_of(rng, len, Part::All)
}

/// The same of a part of the text: its last third, which is held out, or the rest.
pub(crate) fn excerpt_of(rng: &mut SplitMix64, len: usize, part: Part) -> String {
    let mut sentences: Vec<&str> = BOOK.split_inclusive(['.', '!', '?', '\n']).collect();
    let middle = sentences.len() * 2 / 3;
    match part {
        Part::All => {}
        Part::Profiled => sentences.truncate(middle),
        Part::HeldOut => drop(sentences.drain(..middle)),
    }
    let from = rng.below(sentences.len());
    let mut text = String::with_capacity(len + 256);
    for sentence in sentences[from..].iter().chain(sentences.iter().cycle()) {
        if text.len() >= len {
            break;
        }
        text.push_str(if text.is_empty() { sentence.trim_start() } else { sentence });
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_repeat_with_their_seed_have_their_length_and_may_be_longer_than_the_book() {
        for len in [1, 100, 5_000, 2 * BOOK.len()] {
            let text = excerpt(&mut SplitMix64::new(7), len);
            assert_eq!(text, excerpt(&mut SplitMix64::new(7), len));
            assert!(text.len() + 2 >= len && text.len() < len + 2_000, "{len}: {}", text.len());
        }
        let starts = |seed| excerpt(&mut SplitMix64::new(seed), 100);
        assert_ne!(starts(1), starts(2));
    }
}
