//! SentencePiece's byte-pair encoding, whose vocabulary has scores and no merges.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Value as Json, json};

/// The merges that give the same tokens as scores do: every way to put a piece together out of two, the
/// pieces of high scores first.
///
/// `pieces` are those that text is merged to, not control or byte tokens.
pub(super) fn merges(pieces: &[(&str, f32)]) -> Vec<[String; 2]> {
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
        let by_score = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
        by_score.then(b.1.cmp(&a.1)).then(a.3.cmp(&b.3))
    });
    merges.into_iter().map(|(.., parts, _)| parts.map(str::to_owned)).collect()
}

/// Spaces become `▁`, and one goes before each text where the vocabulary wants that.
pub(super) fn normalizer(space_prefix: bool) -> Json {
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    match space_prefix {
        true => json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, spaces]}),
        false => json!({"type": "Sequence", "normalizers": [spaces]}),
    }
}

/// The way back.
pub(super) fn decoder(space_prefix: bool) -> Json {
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
}
