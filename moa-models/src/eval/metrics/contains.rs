/// Whether a prediction contains a reference, in upper or lower case.
pub fn contains(prediction: &str, reference: &str) -> bool {
    prediction.to_lowercase().contains(&reference.to_lowercase())
}

/// RULER's `string_match_all`: share of the references that the prediction contains; 0 if there is
/// none.
pub fn string_match_all(prediction: &str, references: &[impl AsRef<str>]) -> f64 {
    let found = references.iter().filter(|r| contains(prediction, r.as_ref())).count();
    found as f64 / references.len().max(1) as f64
}

/// RULER's `string_match_part`: 1 if the prediction contains any of the references.
pub fn string_match_part(prediction: &str, references: &[impl AsRef<str>]) -> f64 {
    f64::from(references.iter().any(|r| contains(prediction, r.as_ref())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_does_not_matter_and_parts_count() {
        let references = ["QXV", "abc", "tree", "12"];
        assert_eq!(string_match_all("qxv, ABC and 4123", &references), 0.75);
        assert_eq!(string_match_part("a Tree", &references), 1.0);
        assert_eq!(string_match_part("none", &references), 0.0);
        assert_eq!(string_match_all("none", &[] as &[&str]), 0.0);
    }
}
