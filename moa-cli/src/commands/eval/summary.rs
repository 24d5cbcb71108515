use std::fmt;

use moa_models::{DepthBin, EFFECTIVE_ACCURACY, RetrievalReport, effective_context};
use serde::Serialize;

use crate::output::{bytes, percent, table};

/// A [`RetrievalReport`] without its items.
#[derive(Debug, Serialize)]
pub(in crate::commands) struct Scores {
    cases: usize,
    correct: usize,
    accuracy: f64,
    standard_error: f64,
    prompt_tokens_mean: f64,
    density: f64,
    kv_footprint: Option<f64>,
    kv_bytes: u64,
    kv_bytes_dense: u64,
    peak_bytes: Option<u64>,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    seconds: f64,
}

impl From<&RetrievalReport> for Scores {
    fn from(report: &RetrievalReport) -> Self {
        Self {
            cases: report.cases,
            correct: report.correct,
            accuracy: report.accuracy,
            standard_error: report.standard_error,
            prompt_tokens_mean: report.prompt_tokens_mean,
            density: report.density,
            kv_footprint: report.kv_footprint,
            kv_bytes: report.kv_bytes,
            kv_bytes_dense: report.kv_bytes_dense,
            peak_bytes: report.peak_bytes,
            prefill_tokens_per_second: report.prefill_tokens_per_second,
            decode_tokens_per_second: report.decode_tokens_per_second,
            seconds: report.seconds,
        }
    }
}

impl Scores {
    /// Columns of [`row`](Self::row).
    pub(in crate::commands) const HEAD: [&str; 8] = [
        "cache",
        "right",
        "accuracy",
        "prompt tokens",
        "density",
        "KV bytes",
        "prefill tok/s",
        "decode tok/s",
    ];

    /// The scores as a row of a table.
    pub(in crate::commands) fn row(&self, name: &str) -> Vec<String> {
        vec![
            name.to_string(),
            format!("{}/{}", self.correct, self.cases),
            percent(self.accuracy),
            format!("{:.0}", self.prompt_tokens_mean),
            percent(self.density),
            bytes(self.kv_bytes),
            format!("{:.0}", self.prefill_tokens_per_second),
            format!("{:.1}", self.decode_tokens_per_second),
        ]
    }
}

/// How large the questions of a report are, in the unit of their evaluation; `None` for whole cases.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Size {
    Lines(Option<usize>),
    Tokens(Option<usize>),
}

impl Size {
    fn unit(self) -> &'static str {
        match self {
            Self::Lines(_) => "lines",
            Self::Tokens(_) => "tokens",
        }
    }

    fn label(self) -> String {
        let (Self::Lines(size) | Self::Tokens(size)) = self;
        size.map_or("all".to_string(), |size| size.to_string())
    }
}

/// Answers to questions, by their size and by the depth of what they ask for.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    plan: &'a str,
    #[serde(flatten)]
    scores: Scores,
    sizes: Vec<OfSize>,
    /// Context at which enough answers are right; `None` where none is.
    effective_context: Option<f64>,
    /// Keys that a KV head keeps there, on average.
    average_span: Option<f64>,
    ratio: Option<f64>,
    /// Shorter contexts at which too few answers are right.
    missed: Option<Vec<f64>>,
    #[serde(skip)]
    depth_bins: usize,
}

#[derive(Debug, Serialize)]
struct OfSize {
    #[serde(flatten)]
    size: Size,
    #[serde(flatten)]
    scores: Scores,
    context_mean: f64,
    average_span: f64,
    depths: Vec<DepthBin>,
}

impl<'a> Summary<'a> {
    /// The summary of `report`, which `plan` names; `size` makes a size of what a question was made for.
    pub(super) fn new(
        plan: &'a str,
        report: &RetrievalReport,
        size: fn(Option<usize>) -> Size,
        depth_bins: usize,
    ) -> Self {
        let sizes = report.by_size();
        let effective = effective_context(&sizes);
        let of_size = |report: &RetrievalReport| OfSize {
            size: size(report.items.first().and_then(|item| item.size)),
            scores: Scores::from(report),
            context_mean: report.context_mean,
            average_span: report.average_span,
            depths: report.by_depth(depth_bins),
        };
        Self {
            plan,
            scores: Scores::from(report),
            sizes: sizes.iter().map(of_size).collect(),
            effective_context: effective.as_ref().map(|e| e.context),
            average_span: effective.as_ref().map(|e| e.average_span),
            ratio: effective.as_ref().map(|e| e.ratio),
            missed: effective.map(|e| e.missed),
            depth_bins,
        }
    }

    /// Accuracy by size and depth; `None` where no depth is known, or all are one.
    fn depths(&self) -> Option<String> {
        let bins = self.depth_bins;
        let unit = self.sizes.first()?.size.unit();
        if bins == 1 || self.sizes.iter().all(|size| size.depths.is_empty()) {
            return None;
        }
        let mut head = vec![unit.to_string()];
        let edge = |bin: usize| format!("{:.0}", 100.0 * bin as f64 / bins as f64);
        head.extend((0..bins).map(|bin| format!("{}-{} %", edge(bin), edge(bin + 1))));
        let row = |of: &OfSize| {
            let mut row = vec![of.size.label()];
            row.resize(bins + 1, "-".to_string());
            for bin in &of.depths {
                // Edges are multiples of 1 / bins.
                let index = (bin.from * bins as f64).round() as usize;
                row[index + 1] = format!("{}/{}", bin.found, bin.asked);
            }
            row
        };
        let rows: Vec<_> = self.sizes.iter().map(row).collect();
        Some(table(&head.iter().map(String::as_str).collect::<Vec<_>>(), &rows))
    }

    /// The effective context as a sentence.
    fn effective(&self) -> String {
        let goal = percent(EFFECTIVE_ACCURACY);
        let (Some(context), Some(span), Some(ratio), Some(missed)) =
            (self.effective_context, self.average_span, self.ratio, &self.missed)
        else {
            return format!("none; no length reaches {goal}");
        };
        let mut text = format!(
            "{context:.0} tokens, {ratio:.2} times the average span of {span:.0} keys there"
        );
        if !missed.is_empty() {
            let missed: Vec<_> = missed.iter().map(|m| format!("{m:.0}")).collect();
            text.push_str(&format!("; but {} tokens are below {goal}", missed.join(", ")));
        }
        text
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = Scores::HEAD;
        head[0] = self.sizes.first().map_or(head[0], |of| of.size.unit());
        let rows: Vec<_> = self.sizes.iter().map(|of| of.scores.row(&of.size.label())).collect();
        write!(f, "Cache: {}\n\n{}", self.plan, table(&head, &rows))?;
        if let Some(depths) = self.depths() {
            write!(f, "\n\nFound, by depth in the context:\n{depths}")?;
        }
        if self.sizes.len() > 1 {
            write!(f, "\n\nEffective context: {}", self.effective())?;
        }
        Ok(())
    }
}
