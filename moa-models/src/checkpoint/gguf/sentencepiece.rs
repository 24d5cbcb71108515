//! SentencePiece's byte-pair encoding, whose vocabulary has scores and no merges.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

/// Most bytes of a piece. The library's own limit is 16 characters, but where someone asked for more; the ways to put
/// a piece together, each with its text, are as many as it has characters.
pub(crate) const MOST_BYTES: usize = 512;

/// Characters of a piece that a message shows.
const SHOWN: usize = 24;

/// The first of some pieces, with their numbers, that is too long for [`merges`], as messages name it.
pub(crate) fn too_long<'a>(mut pieces: impl Iterator<Item = (usize, &'a str)>) -> Option<String> {
    let (id, piece) = pieces.find(|(_, piece)| piece.len() > MOST_BYTES)?;
    let begin: String = piece.chars().take(SHOWN).collect();
    Some(format!("piece {id}, `{begin}..`, of {} bytes", piece.len()))
}

/// The merges that give the same tokens as scores do: every way to put a piece together out of two, the
/// pieces of high scores first.
///
/// `pieces` are those that text is merged to, not control or byte tokens.
pub(crate) fn merges(pieces: &[(&str, f32)]) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> =
        pieces.iter().enumerate().map(|(id, (piece, _))| (*piece, id)).collect();
    let mut merges: Vec<(f32, usize, [&str; 2], [usize; 2])> = Vec::new();
    for (piece, score) in pieces {
        for (count, (cut, _)) in piece.char_indices().enumerate().skip(1) {
            let (left, right) = piece.split_at(cut);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((*score, count, [left, right], [l, r]));
            }
        }
    }
    // Of equal scores those with the longer left part first, as the converters to tokenizer.json have it.
    merges.sort_by(|a, b| {
        // Adding 0 makes -0 one with it. A file may have scores that are no numbers: an order that is not total
        // makes sorting panic.
        let by_score = (b.0 + 0.0).total_cmp(&(a.0 + 0.0));
        by_score.then(b.1.cmp(&a.1)).then(a.3.cmp(&b.3))
    });
    merges.into_iter().map(|(.., parts, _)| parts.map(str::to_owned)).collect()
}

/// Spaces become `▁`, and one goes before each text where the vocabulary wants that.
pub(crate) fn normalizer(space_prefix: bool) -> Json {
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    match space_prefix {
        true => json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, spaces]}),
        false => json!({"type": "Sequence", "normalizers": [spaces]}),
    }
}

/// The way back.
pub(crate) fn decoder(space_prefix: bool) -> Json {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

#[cfg(test)]
mod tests {
    #[test]
    fn merges_come_by_score() {
        let pieces =
            [("a", -9.0), ("b", -9.0), ("c", -9.0), ("bc", -1.0), ("ab", -2.0), ("abc", -3.0)];
        let merges = super::merges(&pieces);
        let expected = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]];
        assert_eq!(merges, expected.map(|pair| pair.map(str::to_owned)));
    }

    #[test]
    fn scores_that_are_no_numbers_have_an_order() {
        let letters: Vec<String> = ('a'..='z').map(String::from).collect();
        let pairs = letters.iter().flat_map(|a| letters.iter().map(move |b| format!("{a}{b}")));
        let pairs: Vec<String> = pairs.collect();
        let score = |i: usize| if i.is_multiple_of(3) { f32::NAN } else { (i * 7919 % 101) as f32 };
        let single = letters.iter().map(|letter| (letter.as_str(), 0.0));
        let pieces: Vec<(&str, f32)> =
            single.chain(pairs.iter().zip(0..).map(|(p, i)| (p.as_str(), score(i)))).collect();
        let merges = super::merges(&pieces);
        assert_eq!(merges.len(), pairs.len());
        // Positive ones that are none come first, and the others by their size.
        let places: Vec<usize> = merges
            .iter()
            .map(|pair| pairs.iter().position(|p| *p == pair.concat()).unwrap())
            .collect();
        let count = pairs.len().div_ceil(3);
        assert!(places[..count].iter().all(|place| place % 3 == 0));
        assert!(places[count..].is_sorted_by(|a, b| score(*a) >= score(*b)));
        // Both zeros are one.
        let zeros = super::merges(&[("a", 0.0), ("b", 0.0), ("ab", -0.0), ("ba", 0.0)]);
        assert_eq!(zeros, [["a", "b"], ["b", "a"]].map(|pair| pair.map(str::to_owned)));
    }
}
