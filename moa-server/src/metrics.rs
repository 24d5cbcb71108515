//! What the server has done, as Prometheus reads it.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Duration;

/// Numbers that any thread may change.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) requests: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) queued: AtomicU64,
    pub(crate) running: AtomicU64,
    pub(crate) kv_bytes: AtomicU64,
    pub(crate) kv_bytes_dense: AtomicU64,
    pub(crate) prefix_bytes: AtomicU64,
    pub(crate) prefix_host_bytes: AtomicU64,
    pub(crate) prefix_hits: AtomicU64,
    pub(crate) prefix_misses: AtomicU64,
    pub(crate) prefix_tokens: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) first_token: Histogram,
    pub(crate) per_token: Histogram,
    pub(crate) step: Histogram,
}

/// Upper ends of the buckets, in microseconds.
const BUCKETS: [u64; 16] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    120_000_000,
];

/// Times by how long they were.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    counts: [AtomicU64; BUCKETS.len()],
    all: AtomicU64,
    sum_us: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = BUCKETS.iter().position(|end| us <= *end) {
            self.counts[bucket].fetch_add(1, Relaxed);
        }
        self.all.fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let mut line = |text: std::fmt::Arguments<'_>| writeln!(out, "{text}");
        let mut sum = 0;
        let mut write = || -> std::fmt::Result {
            line(format_args!("# HELP {name} {help}\n# TYPE {name} histogram"))?;
            for (end, count) in BUCKETS.iter().zip(&self.counts) {
                sum += count.load(Relaxed);
                line(format_args!("{name}_bucket{{le=\"{}\"}} {sum}", *end as f64 / 1e6))?;
            }
            // Read after the buckets, so that none of them is above it.
            let all = self.all.load(Relaxed).max(sum);
            line(format_args!("{name}_bucket{{le=\"+Inf\"}} {all}"))?;
            line(format_args!("{name}_sum {}", self.sum_us.load(Relaxed) as f64 / 1e6))?;
            line(format_args!("{name}_count {all}"))
        };
        // A text takes all that is written.
        let _ = write();
    }
}

impl Metrics {
    /// Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let mut number = |kind: &str, name: &str, help: &str, value: u64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        let dense = self.kv_bytes_dense.load(Relaxed);
        let saved = dense.saturating_sub(self.kv_bytes.load(Relaxed));
        for (name, help, value) in [
            ("moa_requests_queued", "Requests that wait.", self.queued.load(Relaxed)),
            ("moa_requests_running", "Sequences that run.", self.running.load(Acquire)),
            ("moa_connections", "Open connections.", self.connections.load(Relaxed)),
            ("moa_kv_bytes", "Keys and values of running sequences.", self.kv_bytes.load(Relaxed)),
            ("moa_kv_bytes_dense", "What dense attention would take for them.", dense),
            ("moa_kv_bytes_saved", "The difference.", saved),
            ("moa_prefix_cache_bytes", "Keys and values kept.", self.prefix_bytes.load(Relaxed)),
            (
                "moa_prefix_host_bytes",
                "Keys and values kept in host memory.",
                self.prefix_host_bytes.load(Relaxed),
            ),
        ] {
            number("gauge", name, help, value);
        }
        for (name, help, value) in [
            ("moa_requests_total", "Requests that asked for tokens.", &self.requests),
            (
                "moa_requests_completed_total",
                "Choices (n of each prompt) answered to their end.",
                &self.completed,
            ),
            (
                "moa_requests_cancelled_total",
                "Running choices and waiting prompts whose client left.",
                &self.cancelled,
            ),
            (
                "moa_requests_failed_total",
                "Running choices and waiting prompts that failed or timed out.",
                &self.failed,
            ),
            ("moa_requests_refused_total", "Refused, as the queue was full.", &self.refused),
            ("moa_prefix_hits_total", "Requests that a kept prefix served.", &self.prefix_hits),
            ("moa_prefix_misses_total", "Requests read from the start.", &self.prefix_misses),
            ("moa_prefix_tokens_total", "Prompt tokens not read again.", &self.prefix_tokens),
            ("moa_prompt_tokens_total", "Prompt tokens read.", &self.prompt_tokens),
            ("moa_generated_tokens_total", "Tokens generated.", &self.generated_tokens),
        ] {
            number("counter", name, help, value.load(Relaxed));
        }
        let help = "From a request's arrival to its first token.";
        self.first_token.write(&mut out, "moa_time_to_first_token_seconds", help);
        let help = "Between two tokens of a request.";
        self.per_token.write(&mut out, "moa_time_per_output_token_seconds", help);
        let help = "What the loop waits for steps of the model, which may begin before it waits.";
        self.step.write(&mut out, "moa_step_seconds", help);
        out
    }
}

/// A gauge that goes down again when this is dropped.
#[derive(Debug)]
pub(crate) struct Counted<'a>(pub(crate) &'a AtomicU64);

impl<'a> Counted<'a> {
    pub(crate) fn new(gauge: &'a AtomicU64) -> Self {
        gauge.fetch_add(1, Relaxed);
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_is_at_most_as_long() {
        let metrics = Metrics::default();
        for ms in [1, 3, 3, 200_000] {
            metrics.first_token.observe(Duration::from_millis(ms));
        }
        let text = metrics.text();
        for line in [
            "moa_time_to_first_token_seconds_bucket{le=\"0.001\"} 1",
            "moa_time_to_first_token_seconds_bucket{le=\"0.005\"} 3",
            "moa_time_to_first_token_seconds_bucket{le=\"120\"} 3",
            "moa_time_to_first_token_seconds_bucket{le=\"+Inf\"} 4",
            "moa_time_to_first_token_seconds_count 4",
            "moa_step_seconds_count 0",
            "moa_requests_running 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
