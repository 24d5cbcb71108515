use std::collections::HashMap;

/// Token F1 of question answering: harmonic mean of precision and recall over words, after both
/// texts were normalised as SQuAD does (lower case, no ASCII punctuation, no articles).
pub fn f1(prediction: &str, reference: &str) -> f64 {
    let (prediction, reference) = (normalise(prediction), normalise(reference));
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &reference {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in &prediction {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / prediction.len() as f64;
    let recall = f64::from(same) / reference.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

fn normalise(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // An article is one by word boundaries, not by spaces alone, but without ASCII punctuation the
    // two differ only at other symbols, as in "a–b".
    text.split(|c: char| c.is_whitespace())
        .flat_map(without_articles)
        .filter(|word| !word.is_empty())
        .collect()
}

/// A word without the articles in it; those stand between characters that are part of no word.
fn without_articles(word: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = word;
    while let Some(first) = rest.chars().next() {
        let inside = is_word(first);
        let end = rest.find(|c| is_word(c) != inside).unwrap_or(rest.len());
        let (run, more) = rest.split_at(end);
        match run {
            "a" | "an" | "the" => parts.push(String::new()),
            run => {
                if let Some(part) = parts.last_mut() {
                    part.push_str(run);
                }
            }
        }
        rest = more;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_scores() {
        for (prediction, reference, score) in [
            ("The Eiffel Tower.", "eiffel tower", 1.0),
            ("It was built in 1889 by the company of Gustave Eiffel", "Gustave Eiffel", 1.0 / 3.0),
            ("a cat sat on a mat, a cat", "the cat on the cat mat", 8.0 / 9.0),
            ("yes", "no", 0.0),
            ("", "", 0.0),
            ("the", "a", 0.0),
            ("U.S.A.", "usa", 1.0),
            ("a\u{2013}b", "b", 0.0),
            ("x\u{2013}the\u{2013}y z", "x\u{2013} \u{2013}y", 0.8),
        ] {
            assert!(
                (f1(prediction, reference) - score).abs() < 1e-12,
                "{prediction} / {reference}"
            );
        }
    }
}
