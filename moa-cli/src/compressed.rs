use std::fmt;

use moa_models::{Agreement, Compressed, HeldOut};
use serde::Serialize;

use crate::output::{percent, table};

/// Losses that [`moa_models::compress`] measured, and how much it searched for them.
#[derive(Debug, Serialize)]
pub(crate) struct Losses {
    dense_loss: f64,
    start_loss: f64,
    loss: f64,
    /// `None` where no text was measured, as the next.
    start_divergence: Option<f64>,
    divergence: Option<f64>,
    evaluations: usize,
    searched_plans: usize,
    worst_gap: f64,
}

impl From<&Compressed> for Losses {
    fn from(found: &Compressed) -> Self {
        Self {
            dense_loss: found.refined.dense_loss,
            start_loss: found.refined.start_loss,
            loss: found.refined.loss,
            start_divergence: found.refined.start_divergence,
            divergence: found.refined.divergence,
            evaluations: found.refined.evaluations,
            searched_plans: found.found.plans.len(),
            worst_gap: found.found.set.worst_gap,
        }
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Response loss: dense {:.4}, best searched plan {:.4}, chosen plan {:.4}",
            self.dense_loss, self.start_loss, self.loss,
        )?;
        if let Some((start, own)) = self.start_divergence.zip(self.divergence) {
            write!(f, "; divergence from dense on text: {start:.4}, {own:.4}")?;
        }
        write!(
            f,
            " nats per token ({} plans searched, gap to the proven bound at most {}; {} measurements, those of searched \
             plans and of dense attention included)",
            self.searched_plans,
            percent(self.worst_gap),
            self.evaluations,
        )
    }
}

/// Predictions of held-out text under dense attention, under the plan, and under one window of its size for all heads.
pub(crate) fn held_out(of_lengths: &[HeldOut]) -> String {
    const HEAD: [&str; 8] = [
        "held-out text of",
        "tokens",
        "dense ppl",
        "plan ppl",
        "ratio",
        "KL mean",
        "KL worst 1 %",
        "equal greedy",
    ];
    let row = |name: String, of: &Agreement| {
        vec![
            name,
            of.tokens.to_string(),
            format!("{:.4}", of.dense_perplexity),
            format!("{:.4}", of.plan_perplexity),
            format!("{:.4}", of.perplexity_ratio),
            format!("{:.5}", of.kl_mean),
            format!("{:.4}", of.kl_worst),
            percent(of.equal_greedy),
        ]
    };
    let rows = of_lengths.iter().flat_map(|HeldOut { length, plan, limit }| {
        let limit = limit.as_ref().map(|limit| row("one window".to_string(), limit));
        [row(length.to_string(), plan)].into_iter().chain(limit)
    });
    table(&HEAD, &rows.collect::<Vec<_>>())
}
