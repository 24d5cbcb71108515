use moa_models::{EFFECTIVE_ACCURACY, EffectiveContext, RetrievalReport, effective_context};
use serde_json::{Value, json};

use crate::error::Result;
use crate::output::{Context, bytes, percent, table};

/// Columns of [`row`].
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

/// A report as a row of a table.
pub(in crate::commands) fn row(name: &str, report: &RetrievalReport) -> Vec<String> {
    vec![
        name.to_string(),
        format!("{}/{}", report.correct, report.cases),
        percent(report.accuracy),
        format!("{:.0}", report.prompt_tokens_mean),
        percent(report.density),
        bytes(report.kv_bytes),
        format!("{:.0}", report.prefill_tokens_per_second),
        format!("{:.1}", report.decode_tokens_per_second),
    ]
}

/// A report without its items.
pub(in crate::commands) fn report_json(report: &RetrievalReport) -> Value {
    json!({
        "cases": report.cases,
        "correct": report.correct,
        "accuracy": report.accuracy,
        "standard_error": report.standard_error,
        "prompt_tokens_mean": report.prompt_tokens_mean,
        "density": report.density,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_dense": report.kv_bytes_dense,
        "prefill_tokens_per_second": report.prefill_tokens_per_second,
        "decode_tokens_per_second": report.decode_tokens_per_second,
        "seconds": report.seconds,
    })
}

/// A report by size and depth.
pub(super) struct Summary<'a> {
    pub(super) plan: &'a str,
    /// What sizes are counted in.
    pub(super) unit: &'static str,
    pub(super) report: &'a RetrievalReport,
    pub(super) depth_bins: usize,
}

impl Summary<'_> {
    /// Prints tables for people, or the object for programs.
    pub(super) fn write(&self, context: &Context) -> Result<()> {
        let sizes = self.report.by_size();
        let mut head = HEAD;
        head[0] = self.unit;
        let size = |report: &RetrievalReport| report.items.first().and_then(|item| item.size);
        let label = |report: &RetrievalReport| size(report).map_or("all".into(), |s| s.to_string());
        let rows: Vec<_> = sizes.iter().map(|report| row(&label(report), report)).collect();
        context.print(format_args!("Cache: {}\n\n{}", self.plan, table(&head, &rows)))?;
        self.print_depths(&sizes, &label, context)?;
        let effective = effective_context(&sizes);
        if sizes.len() > 1 {
            context.print(format_args!("\nEffective context: {}", text(effective.as_ref())))?;
        }
        let mut value = report_json(self.report);
        value["plan"] = json!(self.plan);
        value["effective_context"] = json!(effective.as_ref().map(|e| e.context));
        value["average_span"] = json!(effective.as_ref().map(|e| e.average_span));
        value["ratio"] = json!(effective.as_ref().map(|e| e.ratio));
        value["missed"] = json!(effective.map(|e| e.missed));
        let sizes = sizes.iter().map(|report| {
            let mut value = report_json(report);
            value[self.unit] = json!(size(report));
            value["context_mean"] = json!(report.context_mean);
            value["average_span"] = json!(report.average_span);
            value["depths"] = json!(report.by_depth(self.depth_bins));
            value
        });
        value["sizes"] = sizes.collect();
        context.json(&value)
    }

    /// Accuracy by size and depth.
    fn print_depths(
        &self,
        sizes: &[RetrievalReport],
        label: &dyn Fn(&RetrievalReport) -> String,
        context: &Context,
    ) -> Result<()> {
        if self.report.by_depth(1).is_empty() || self.depth_bins == 1 {
            return Ok(());
        }
        let bins = self.depth_bins;
        let mut head = vec![self.unit.to_string()];
        let edge = |bin: usize| format!("{:.0}", 100.0 * bin as f64 / bins as f64);
        head.extend((0..bins).map(|bin| format!("{}-{} %", edge(bin), edge(bin + 1))));
        let rows: Vec<Vec<String>> = sizes
            .iter()
            .map(|report| {
                let mut row = vec![label(report)];
                row.resize(bins + 1, "-".to_string());
                for bin in report.by_depth(bins) {
                    // Edges are multiples of 1 / bins.
                    let index = (bin.from * bins as f64).round() as usize;
                    row[index + 1] = format!("{}/{}", bin.found, bin.asked);
                }
                row
            })
            .collect();
        let head: Vec<&str> = head.iter().map(String::as_str).collect();
        context.print(format_args!("\nFound, by depth in the context:\n{}", table(&head, &rows)))
    }
}

/// The effective context as a sentence.
fn text(effective: Option<&EffectiveContext>) -> String {
    let goal = percent(EFFECTIVE_ACCURACY);
    let Some(EffectiveContext { context, average_span, ratio, missed }) = effective else {
        return format!("none; no length reaches {goal}");
    };
    let mut text = format!(
        "{context:.0} tokens, {ratio:.2} times the average span of {average_span:.0} keys there"
    );
    if !missed.is_empty() {
        let missed: Vec<_> = missed.iter().map(|m| format!("{m:.0}")).collect();
        text.push_str(&format!("; but {} tokens are below {goal}", missed.join(", ")));
    }
    text
}
