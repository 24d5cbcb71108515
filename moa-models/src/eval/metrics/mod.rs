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
//! | [`f1_zh`] | multifieldqa_zh |
//! | [`rouge_zh`] | dureader, vcsum |
//! | [`f1`] | narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa, musique, triviaqa |
//! | [`rouge_l`] | gov_report, qmsum, multi_news, samsum |
//! | [`classification`] | trec, lsht |
//! | [`paragraph`] | passage_retrieval_en |
//! | [`paragraph_zh`] | passage_retrieval_zh |
//! | [`count`] | passage_count |
//! | [`code_similarity`] | lcc, repobench-p |
//!
//! LongBench cuts the predictions of trec, triviaqa, samsum and lsht to their [`first_line`] before it
//! compares. Its scores are means over questions, times 100. [`keyword_f1`], [`keyword_f1_zh`] and
//! [`content_rouge_zh`] are LV-Eval's. Chinese texts are cut into words by a rule, [`chinese_words`], where the
//! benchmarks have a dictionary. A [`Metric`] is one of them as a value.

mod chinese;
mod code;
mod contains;
mod f1;
mod labels;
mod lcs;
mod rouge;

pub use chinese::{chinese_words, content_rouge_zh, f1_zh, keyword_f1_zh, rouge_zh};
pub use code::code_similarity;
pub use contains::{contains, string_match_all, string_match_part};
pub use f1::{f1, keyword_f1};
pub use labels::{classification, count, paragraph, paragraph_zh};
pub use rouge::rouge_l;

/// A metric as a value, with what it needs beside a prediction and a reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metric {
    /// [`f1`].
    F1,
    /// [`keyword_f1`] with these keywords.
    KeywordF1(String),
    /// [`f1_zh`].
    F1Zh,
    /// [`keyword_f1_zh`] with these keywords.
    KeywordF1Zh(String),
    /// [`rouge_l`].
    RougeL,
    /// [`rouge_zh`].
    RougeZh,
    /// [`content_rouge_zh`].
    ContentRougeZh,
    /// [`classification`] among these classes.
    Classification(Vec<String>),
    /// [`paragraph`].
    Paragraph,
    /// [`paragraph_zh`].
    ParagraphZh,
    /// [`count`].
    Count,
    /// [`code_similarity`].
    Code,
    /// A metric of the prediction's [`first_line`].
    FirstLine(Box<Self>),
}

impl Metric {
    /// The score of a prediction, from 0 to 1.
    pub fn score(&self, prediction: &str, reference: &str) -> f64 {
        match self {
            Self::F1 => f1(prediction, reference),
            Self::KeywordF1(keywords) => keyword_f1(prediction, reference, keywords),
            Self::F1Zh => f1_zh(prediction, reference),
            Self::KeywordF1Zh(keywords) => keyword_f1_zh(prediction, reference, keywords),
            Self::RougeL => rouge_l(prediction, reference),
            Self::RougeZh => rouge_zh(prediction, reference),
            Self::ContentRougeZh => content_rouge_zh(prediction, reference),
            Self::Classification(classes) => classification(prediction, reference, classes),
            Self::Paragraph => paragraph(prediction, reference),
            Self::ParagraphZh => paragraph_zh(prediction, reference),
            Self::Count => count(prediction, reference),
            Self::Code => code_similarity(prediction, reference),
            Self::FirstLine(metric) => metric.score(first_line(prediction), reference),
        }
    }
}

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

    #[test]
    fn a_metric_as_a_value_is_the_function() {
        let score = |metric: Metric, prediction| metric.score(prediction, "Paragraph 4");
        assert_eq!(score(Metric::Paragraph, "4"), 1.0);
        assert_eq!(score(Metric::Count, "4"), 0.0);
        assert_eq!(score(Metric::F1, "the paragraph"), 2.0 / 3.0);
        assert_eq!(score(Metric::KeywordF1("5".into()), "the paragraph"), 0.0);
        assert_eq!(score(Metric::Code, "Paragraph 4\nmore"), 1.0);
        assert!(score(Metric::RougeL, "Paragraph 4") > 0.999);
        let classes = Metric::Classification(vec!["Paragraph 4".into(), "Other".into()]);
        assert_eq!(score(classes.clone(), "Paragraph 4\nOther"), 0.5);
        assert_eq!(score(Metric::FirstLine(Box::new(classes)), "\nParagraph 4\nOther"), 1.0);
    }
}
