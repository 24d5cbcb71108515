use std::collections::HashSet;

use super::lcs;

/// ROUGE-L, F value, of summaries: the words that each sentence of the reference has in common and in
/// order with any sentence of the prediction, over the words of both.
///
/// Sentences end at full stops, and repeated words count once, as in the `rouge` 1.0 package with
/// which LongBench's figures are made. 0 if a text has no sentence.
pub fn rouge_l(prediction: &str, reference: &str) -> f64 {
    let (prediction, reference) = (sentences(prediction), sentences(reference));
    if prediction.is_empty() || reference.is_empty() {
        return 0.0;
    }
    let mut common = HashSet::new();
    for theirs in &reference {
        for ours in &prediction {
            common.extend(common_words(theirs, ours));
        }
    }
    let distinct = |text: &[Vec<&str>]| text.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let precision = common.len() as f64 / distinct(&prediction);
    let recall = common.len() as f64 / distinct(&reference);
    2.0 * precision * recall / (precision + recall + 1e-8)
}

/// Words of each sentence. White space between two full stops is a sentence of one empty word there,
/// and so it is here.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    text.split('.')
        .filter(|sentence| !sentence.is_empty())
        .map(|sentence| match sentence.trim().is_empty() {
            true => vec![""],
            false => sentence.split_whitespace().collect(),
        })
        .collect()
}

/// One longest common subsequence, last word first; of several the one that takes words late in `y`
/// away first.
fn common_words<'a>(x: &[&'a str], y: &[&str]) -> Vec<&'a str> {
    let table = lcs::table(x, y);
    let (mut i, mut j) = (x.len(), y.len());
    let mut words = Vec::new();
    while i > 0 && j > 0 {
        if x[i - 1] == y[j - 1] {
            (i, j) = (i - 1, j - 1);
            words.push(x[i]);
        } else if table[i - 1][j] > table[i][j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_scores() {
        // Scores of the `rouge` 1.0.1 package.
        for (prediction, reference, score) in [
            ("the cat sat on the mat", "the cat was on the mat", 0.799_999_995),
            (
                "The river rose in spring. Farmers moved their herds to the hills.",
                "In spring the river rose. The farmers moved herds uphill. Nobody was hurt.\n",
                0.461_538_456_568,
            ),
            ("a b c d e", "e d c b a", 0.199_999_995),
            ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5.", "w1 w2 w3 w4 w5", 0.615_384_610_651),
            ("one two. one two. . three", "two one three. three one", 0.571_428_566_531),
            ("b a c a b d", "a b c b a d b", 0.749_999_995),
            ("nothing shared", "words apart", 0.0),
            ("", "words", 0.0),
            ("...", "words", 0.0),
        ] {
            let got = rouge_l(prediction, reference);
            assert!((got - score).abs() < 1e-11, "{prediction} / {reference}: {got}");
        }
    }
}
