//! What plans are judged by, and what their measurements come to.

use std::collections::BTreeMap;

use moa_core::{AtLength, Plan};
use serde::Serialize;

use crate::eval::agreement::Agreement;
use crate::find_plan::profile::Item;

/// What plans are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Items whose responses should stay as likely as under dense attention, by the length that their
    /// sequences are opened for.
    pub items: &'a BTreeMap<usize, Vec<Item>>,
    /// Running text whose predictions should stay what they are under dense attention; may be empty.
    pub texts: &'a BTreeMap<usize, Vec<Item>>,
    /// How much divergence on text counts.
    pub text_goal: TextGoal<'a>,
    /// Other running text, split into what is read and what is predicted, by length. Where divergence has a limit,
    /// the plan that is accepted is held to it here too, in divergence and in perplexity; may be empty.
    pub held_out: &'a BTreeMap<usize, Vec<Item>>,
}

/// What a plan does to the predictions of held-out text of a length, and what the plan does that is its limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// Tokens of a text.
    pub length: usize,
    /// Under the plan.
    pub plan: Agreement,
    /// Under the plan that is the limit; `None` where text has none.
    pub limit: Option<Agreement>,
}

impl HeldOut {
    /// How many times as much the plan does to text as it may, in divergence or in growth of the cross entropy; 1 where
    /// it is within the limit, or beyond by no more than the noise of so few tokens, a standard error.
    pub(super) fn excess(&self) -> f64 {
        let Some(limit) = &self.limit else { return 1.0 };
        let (growth, limit_growth) = (self.plan.perplexity_ratio.ln(), limit.perplexity_ratio.ln());
        let times = |own: f64, limit: f64, noise: f64| {
            if own <= limit + noise { 1.0 } else { own / limit.max(noise) }
        };
        let tokens = self.plan.tokens.max(1) as f64;
        // The squares of divergences are mostly those of the worst 1 % of tokens.
        let worst = self.plan.kl_worst.powi(2) + limit.kl_worst.powi(2);
        let noise = (0.01 * worst / tokens).sqrt().max(0.05 * limit.kl_mean);
        let divergence = times(self.plan.kl_mean, limit.kl_mean, noise);
        // Near each other, two predictions' log probabilities of a token differ by the root of twice their divergence.
        let noise = (2.0 * (self.plan.kl_mean + limit.kl_mean) / tokens).sqrt();
        divergence.max(times(growth, limit_growth, noise.max(1e-4)))
    }
}

/// How much divergence on running text counts beside the loss of responses.
#[derive(Clone, Copy, Debug)]
pub enum TextGoal<'a> {
    /// A nat of divergence as much as this many nats of response loss.
    Weight(f64),
    /// The divergence should not exceed that of this plan, usually the uniform one of the same size; below
    /// that it decides between plans nearly alike in responses.
    NoWorseThan(&'a Plan),
}

/// What was measured of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Mean response loss at each length of the items, in nats per token: each context counts alike, however
    /// many questions it has, so that no task outweighs the others.
    pub response: Vec<AtLength>,
    /// Mean Kullback-Leibler divergence from the dense model's predictions at each length of the texts,
    /// in nats per token.
    pub divergence: Vec<AtLength>,
}

impl Measured {
    /// Mean response loss over the lengths.
    pub fn response_loss(&self) -> f64 {
        mean(&self.response)
    }

    /// Mean divergence over the lengths; 0 without texts.
    pub fn text_divergence(&self) -> f64 {
        mean(&self.divergence)
    }

    /// The same, `None` without texts.
    pub(super) fn measured_divergence(&self) -> Option<f64> {
        (!self.divergence.is_empty()).then(|| self.text_divergence())
    }
}

/// 0 for none, of which a `sum` is -0.
fn mean(losses: &[AtLength]) -> f64 {
    losses.iter().fold(0.0, |sum, loss| sum + loss.value) / losses.len().max(1) as f64
}

/// What a plan's measurements come to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Merit {
    Weight(f64),
    /// Divergence at most this much; what is beyond costs [`EXCESS`] nats for each time the limit, what is within
    /// [`WITHIN`].
    Limit(f64),
}

/// Nats of response loss that a divergence of twice its limit costs.
const EXCESS: f64 = 0.25;

/// Nats of response loss that a divergence as large as its limit costs: of plans nearly alike in responses, the one
/// that leaves text as it is.
const WITHIN: f64 = EXCESS / 10.0;

impl Merit {
    /// Smaller is better.
    pub(super) fn of(self, measured: &Measured) -> f64 {
        let within = match self {
            Self::Weight(_) => 0.0,
            Self::Limit(limit) => WITHIN * measured.text_divergence() / limit.max(1e-9),
        };
        self.needed(measured) + within
    }

    /// The same without what text may cost within its limit.
    pub(super) fn needed(self, measured: &Measured) -> f64 {
        let divergence = measured.text_divergence();
        let text = match self {
            Self::Weight(weight) => weight * divergence,
            Self::Limit(limit) => EXCESS * (divergence / limit.max(1e-9) - 1.0).max(0.0),
        };
        measured.response_loss() + text
    }

    /// What a nat of divergence costs near a plan that has as much of it as it may.
    pub(super) fn weight(self) -> f64 {
        match self {
            Self::Weight(weight) => weight,
            Self::Limit(limit) => EXCESS / limit.max(1e-9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_of_nothing_is_no_negative_zero() {
        assert!(mean(&[]).is_sign_positive());
    }

    #[test]
    fn text_within_its_limit_decides_between_plans_alike_in_responses() {
        let of = |response, divergence| {
            let [response, divergence] =
                [response, divergence].map(|value| vec![AtLength { length: 1024, value }]);
            Merit::Limit(0.01).of(&Measured { response, divergence })
        };
        assert!(of(0.3, 0.004) < of(0.3, 0.008));
        assert!(of(0.28, 0.01) < of(0.31, 0.0), "responses count more");
        assert!(of(0.3, 0.02) > of(0.5, 0.01), "the limit counts most");
    }

    #[test]
    fn more_harm_to_text_than_noise_is_an_excess() {
        let agreement = |kl_mean, growth: f64, tokens| Agreement {
            kl_mean,
            kl_worst: 30.0 * kl_mean,
            perplexity_ratio: growth.exp(),
            tokens,
            ..Agreement::default()
        };
        let of = |divergence, growth, tokens| {
            let limit = Some(agreement(0.01, 0.02, tokens));
            let plan = agreement(divergence, growth, tokens);
            HeldOut { length: 1024, plan, limit }.excess()
        };
        // The noise of the growth is .001, that of the divergence .0005.
        assert_eq!(of(0.0104, 0.0209, 40_000), 1.0);
        let [divergence, growth] = [of(0.02, 0.0, 40_000), of(0.0, 0.03, 40_000)];
        assert!((divergence - 2.0).abs() < 1e-9 && (growth - 1.5).abs() < 1e-9);
        // Of few tokens single ones say nearly all: .002 and .009.
        assert_eq!(of(0.0115, 0.0, 512), 1.0);
        assert_eq!(of(0.01, 0.0285, 512), 1.0);
        assert!(of(0.02, 0.0, 512) > 1.9);
    }
}
