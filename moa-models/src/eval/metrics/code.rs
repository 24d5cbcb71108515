use super::lcs;

/// Similarity of a line of code: `2 * common / (all)` characters in percent, rounded (the indel ratio
/// that `fuzz.ratio` gives), of the prediction's first line without a backtick, `#` or `//`.
pub fn code_similarity(prediction: &str, reference: &str) -> f64 {
    let is_code = |line: &&str| !["`", "#", "//"].iter().any(|mark| line.contains(mark));
    let line = prediction.trim_start_matches('\n').split('\n').find(is_code).unwrap_or_default();
    (100.0 * ratio(line, reference)).round_ties_even() / 100.0
}

/// 1 for equal texts; 0 where one is empty or nothing is common.
fn ratio(a: &str, b: &str) -> f64 {
    if a == b {
        return 1.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let total = (a.len() + b.len()) as f64;
    if a.is_empty() || b.is_empty() { 0.0 } else { 2.0 * lcs::length(&a, &b) as f64 / total }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_scores() {
        // Scores of `fuzz.ratio` of fuzzywuzzy 0.18 with Levenshtein 0.27.
        for (prediction, reference, score) in [
            ("    return self.count + 1", "    return self.count + 1", 1.0),
            (
                "\n# comment\n```python\nfor i in range(10):\n    print(i)",
                "for index in range(10):",
                0.90,
            ),
            ("x = foo(bar)", "y = foo(baz, 1)", 0.74),
            ("abcd", "dcba", 0.25),
            ("let na\u{ef}ve = 1;", "let naive = 1;", 0.93),
            ("kitten", "sitting", 0.62),
            ("", "x", 0.0),
            ("", "", 1.0),
        ] {
            assert_eq!(code_similarity(prediction, reference), score, "{prediction}");
        }
    }
}
