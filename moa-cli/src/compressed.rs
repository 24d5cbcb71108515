use std::fmt;

use moa_models::{Compressed, HeldOut};
use serde::Serialize;

use crate::output::percent;

/// Losses that [`moa_models::compress`] measured, and how much it searched for them.
#[derive(Debug, Serialize)]
pub(crate) struct Losses {
    dense_loss: f64,
    start_loss: f64,
    loss: f64,
    start_divergence: f64,
    divergence: f64,
    held_out: Option<HeldOut>,
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
            held_out: found.refined.held_out,
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
            "Response loss: dense {:.4}, best searched plan {:.4}, chosen plan {:.4}; divergence from \
             dense on text: {:.4}, {:.4} nats per token ({} plans searched, gap to the proven bound at \
             most {}; {} plans measured)",
            self.dense_loss,
            self.start_loss,
            self.loss,
            self.start_divergence,
            self.divergence,
            self.searched_plans,
            percent(self.worst_gap),
            self.evaluations,
        )?;
        match &self.held_out {
            None => Ok(()),
            Some(of) => write!(f, "\n{}", held_out(of)),
        }
    }
}

/// What a plan does to held-out text, in a line.
pub(crate) fn held_out(of: &HeldOut) -> String {
    format!(
        "Held-out text: divergence {:.4}, perplexity {:+.1} % over dense; one window of the same size for all heads \
         {:.4}, {:+.1} %",
        of.divergence,
        100.0 * of.growth.exp_m1(),
        of.limit_divergence,
        100.0 * of.limit_growth.exp_m1(),
    )
}
