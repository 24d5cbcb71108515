//! How well a text answers: the metrics of LongBench, and RULER's string match.
//!
//! Every metric compares one prediction with one reference and gives a score from 0 to 1. Where a
//! question has several references, the best counts:
//!
//! ```
//! use moa_models::metrics::{best, f1};
//!
//! assert_eq!(best(f1, "The Eiffel Tower.", &["Louvre", "eiffel tower"]), 1.0);
//! ```
//!
//! | metric | LongBench's tasks |
//! |---|---|
//! | [`f1`] | narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa, musique, triviaqa |
//! | [`rouge_l`] | gov_report, qmsum, multi_news, samsum |
//! | [`classification`] | trec |
//! | [`paragraph`] | passage_retrieval_en |
//! | [`count`] | passage_count |
//! | [`code_similarity`] | lcc, repobench-p |
//!
//! LongBench cuts the predictions of trec, triviaqa and samsum to their [`first_line`] before it
//! compares. Its scores are means over questions, times 100.

mod code;
mod contains;
mod f1;
mod labels;
mod lcs;
mod rouge;

pub use code::code_similarity;
pub use contains::{contains, string_match_all, string_match_part};
pub use f1::f1;
pub use labels::{classification, count, paragraph};
pub use rouge::rouge_l;

/// The best score of a prediction over several references; 0 if there is none.
pub fn best(
    metric: impl Fn(&str, &str) -> f64,
    prediction: &str,
    references: &[impl AsRef<str>],
) -> f64 {
    references.iter().map(|r| metric(prediction, r.as_ref())).fold(0.0, f64::max)
}

/// The first line of a text that does not begin with line ends.
pub fn first_line(text: &str) -> &str {
    text.trim_start_matches('\n').split('\n').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_reference_counts() {
        assert_eq!(best(f1, "blue", &["red", "blue", "green"]), 1.0);
        assert_eq!(best(f1, "blue", &[] as &[&str]), 0.0);
        assert_eq!(first_line("\n\nNUM\nQuestion: more"), "NUM");
    }
}
