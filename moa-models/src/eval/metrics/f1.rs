use std::collections::HashMap;

/// Token F1 of question answering: harmonic mean of precision and recall over words, after both
/// texts were normalised as SQuAD does (lower case, no ASCII punctuation, no articles).
pub fn f1(prediction: &str, reference: &str) -> f64 {
    of_words(&normalise(prediction), &normalise(reference))
}

/// F1 over words.
pub(super) fn of_words(prediction: &[String], reference: &[String]) -> f64 {
    let same = common(prediction, reference).count();
    if same == 0 {
        return 0.0;
    }
    let precision = same as f64 / prediction.len() as f64;
    let recall = same as f64 / reference.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// Words that LV-Eval does not count as keywords.
const COMMON_WORDS: [&str; 38] = [
    "and", "to", "of", "in", "her", "was", "with", "for", "it", "from", "is", "that", "his", "he",
    "by", "she", "they", "or", "at", "because", "be", "on", "are", "their", "what", "as", "had",
    "were", "about", "being", "this", "who", "but", "have", "has", "when", "which", "does",
];

/// LV-Eval's F1: 0 where the prediction has less than a fifth of the words of `keywords`, of which
/// common ones are never found; else [`f1`]. Without keywords it is `f1`.
pub fn keyword_f1(prediction: &str, reference: &str, keywords: &str) -> f64 {
    let keywords = normalise(keywords);
    let words = normalise(prediction);
    let found = common(&words, &keywords).filter(|word| !COMMON_WORDS.contains(word)).count();
    if 5 * found < keywords.len() { 0.0 } else { f1(prediction, reference) }
}

/// The words that two texts share, each as often as in both.
pub(super) fn common<'a>(words: &'a [String], of: &[String]) -> impl Iterator<Item = &'a str> {
    let mut left: HashMap<String, usize> = HashMap::new();
    for word in of {
        *left.entry(word.clone()).or_default() += 1;
    }
    words.iter().map(String::as_str).filter(move |word| {
        let count = left.get_mut(*word).filter(|count| **count > 0);
        count.map(|count| *count -= 1).is_some()
    })
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
    fn an_answer_without_the_keywords_is_worth_nothing() {
        let score =
            |prediction, keywords| keyword_f1(prediction, "it was in Lima of Peru", keywords);
        assert_eq!(score("it was in Peru", "Lima"), 0.0);
        assert!((score("it was in Peru", "") - 0.8).abs() < 1e-12);
        // One of five keywords is enough, one of six is not; "of" is never one that is found.
        assert!(score("in Lima", "Lima a1 b2 c3 d4") > 0.0);
        assert_eq!(score("in Lima of", "Lima of a1 b2 c3 d4"), 0.0);
    }

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
