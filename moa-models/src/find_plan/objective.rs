use std::str::FromStr;

use moa_core::InfluenceSign;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a plan must not harm, as a function of the logits `z` at the positions that predict the
/// response, and how its influence is summed.
///
/// Each is a loss: larger is worse. A response's loss is the mean over its tokens `y`, or weighted
/// by [`TokenWeight`]. Its influence `E_ij = A_ij/(1-A_ij) * (D_i - dO_i . V_j)`, with `D_i = dO_i .
/// O_i` and `dO` the gradient of the loss by a query head's attention output, is the first-order
/// change when query `i` no longer sees key `j`. A KV head's influence is the sum over the query
/// heads of its group, as their keys go together: `E_ij = sum_h E_ij^h`, or `sum_h |E_ij^h|` where
/// influence is absolute; a KV head is then kept if any query head of its group needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross entropy `logsumexp(z) - z_y`, signed influence (the MoA paper, section 4.2). Its
    /// gradient `softmax(z) - onehot(y)` vanishes where the model is certain.
    CrossEntropy,
    /// Cross entropy `logsumexp(z) - z_y`, absolute influence per attention entry (the original
    /// code). What is noise adds up instead of cancelling, over all N^2 entries.
    CrossEntropyAbsolute,
    /// Logit margin `logsumexp(z_others) - z_y`, signed. Its gradient `softmax(z_others) - onehot(y)`
    /// is as large where the model is certain as anywhere.
    Margin,
}

impl Objective {
    /// Every objective with its name on the command line.
    pub const ALL: [(Self, &'static str); 3] = [
        (Self::CrossEntropy, "cross-entropy"),
        (Self::CrossEntropyAbsolute, "cross-entropy-absolute"),
        (Self::Margin, "margin"),
    ];

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross-entropy",
            Self::CrossEntropyAbsolute => "cross-entropy-absolute",
            Self::Margin => "margin",
        }
    }

    /// How influence is summed.
    pub fn sign(self) -> InfluenceSign {
        match self {
            Self::CrossEntropyAbsolute => InfluenceSign::Absolute,
            Self::CrossEntropy | Self::Margin => InfluenceSign::Signed,
        }
    }

    /// Loss of one row of logits for `target`, and its gradient in place of the logits.
    pub(crate) fn gradient(self, logits: &mut [f32], target: usize) -> f64 {
        let margin = self == Self::Margin;
        let z_y = f64::from(logits[target]);
        let counts = |i: usize| !(margin && i == target);
        let max = logits
            .iter()
            .enumerate()
            .filter(|(i, _)| counts(*i))
            .map(|(_, z)| *z)
            .fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0f64;
        for (i, z) in logits.iter_mut().enumerate() {
            let e = if counts(i) { f64::from(*z - max).exp() } else { 0.0 };
            sum += e;
            *z = e as f32;
        }
        let scale = sum.recip() as f32;
        logits.iter_mut().for_each(|z| *z *= scale);
        logits[target] -= 1.0;
        f64::from(max) + sum.ln() - z_y
    }
}

/// How much each token of a response counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenWeight {
    /// All alike: `w_t = 1 / T`.
    #[default]
    Uniform,
    /// By how hard the token is for the dense model: `w_t = (c_t + 0.01) / sum_s (c_s + 0.01)`, with
    /// `c` the cross entropy in nats. Tokens that follow from the text before them, whatever heads see,
    /// count for little; the constant keeps a response that is certain throughout from being decided by
    /// one token.
    Hard,
}

impl TokenWeight {
    /// Every weighting with its name on the command line.
    pub const ALL: [(Self, &'static str); 2] = [(Self::Uniform, "uniform"), (Self::Hard, "hard")];

    /// Weights of tokens of these cross entropies, whose own weights ([`Item`](crate::Item)'s) are `own`; their sum
    /// is 1.
    pub(crate) fn weights(self, cross_entropies: &[f64], own: &[f64]) -> Vec<f64> {
        const LEAST: f64 = 0.01;
        let weight = |(c, own): (&f64, &f64)| match self {
            Self::Uniform => *own,
            Self::Hard => own * (c.max(0.0) + LEAST),
        };
        let weights: Vec<f64> = cross_entropies.iter().zip(own).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }
}

impl FromStr for TokenWeight {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(w, _)| *w).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, n)| *n).collect();
            Error::invalid("token weight", names.join(", "), name)
        })
    }
}

/// An objective with the weight of each token: `sum_t w_t * loss(z_t, y_t)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightedObjective {
    /// Loss of a token.
    pub objective: Objective,
    /// How much it counts.
    pub weight: TokenWeight,
}

impl From<Objective> for WeightedObjective {
    fn from(objective: Objective) -> Self {
        Self { objective, weight: TokenWeight::Uniform }
    }
}

impl WeightedObjective {
    /// Name in files, such as `margin` or `margin, hard tokens`.
    pub fn name(self) -> String {
        match self.weight {
            TokenWeight::Uniform => self.objective.name().to_string(),
            TokenWeight::Hard => format!("{}, hard tokens", self.objective.name()),
        }
    }
}

/// `KL(dense || plan)` of two rows of logits with the logarithms of their sums of exponentials:
/// `sum_i p_i (z_i - z'_i) + lse' - lse`.
pub(crate) fn divergence(dense: &[f32], plan: &[f32], (lse_dense, lse_plan): (f64, f64)) -> f64 {
    let lse = lse_dense as f32;
    let term = |z: f32, other: f32| {
        // An impossible token costs nothing, whatever the plan makes of it.
        if z == f32::NEG_INFINITY { 0.0 } else { exp(z - lse) * (z - other) }
    };
    let mut sum = 0.0;
    for (dense, plan) in dense.chunks(BLOCK).zip(plan.chunks(BLOCK)) {
        let (dense, dense_rest) = dense.as_chunks::<LANES>();
        let (plan, plan_rest) = plan.as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for (dense, plan) in dense.iter().zip(plan) {
            for ((lane, z), other) in lanes.iter_mut().zip(dense).zip(plan) {
                *lane += term(*z, *other);
            }
        }
        let rest = dense_rest.iter().zip(plan_rest).map(|(z, other)| term(*z, *other));
        sum += lanes.into_iter().chain(rest).map(f64::from).sum::<f64>();
    }
    // Rounding may leave equal rows slightly below 0.
    (sum + lse_plan - lse_dense).max(0.0)
}

/// Cross entropy of one row of logits, in nats.
pub(crate) fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    log_sum_exp(logits) - f64::from(logits[target])
}

/// Logarithm of the sum of exponentials of one row of logits.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for block in logits.chunks(BLOCK) {
        let (block, rest) = block.as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for block in block {
            lanes.iter_mut().zip(block).for_each(|(lane, z)| *lane += exp(z - max));
        }
        let rest = rest.iter().map(|z| exp(z - max));
        sum += lanes.into_iter().chain(rest).map(f64::from).sum::<f64>();
    }
    f64::from(max) + sum.ln()
}

/// Sums that are independent of each other, so that the compiler takes vectors.
const LANES: usize = 16;

/// Entries that are summed in f32 before the sum goes on in f64.
const BLOCK: usize = 512;

/// `e^x` for `x` up to 80, to two units of the last place: 2 to the whole part of `x / ln 2`, by the exponent's
/// bits, times a polynomial of what is left. Vocabularies are large and rows many: a call of the library's for
/// each entry takes longer than the model on a GPU.
fn exp(x: f32) -> f32 {
    // Adding it leaves a sum's whole part in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first of which has so few bits that its products are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = x - whole * LN_2[0] - whole * LN_2[1];
    let mut y = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        y = y * rest + c;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    y * f32::from_bits(exponent << 23)
}

impl FromStr for Objective {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(o, _)| *o).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, n)| *n).collect();
            Error::invalid("objective", names.join(", "), name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let logits = [0.3f32, -1.2, 2.0, 0.7];
        for (objective, _) in Objective::ALL {
            for target in 0..4 {
                let mut gradient = logits;
                objective.gradient(&mut gradient, target);
                for i in 0..4 {
                    let at = |h: f32| {
                        let mut moved = logits;
                        moved[i] += h;
                        objective.gradient(&mut moved, target)
                    };
                    let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                    assert!(
                        (numeric - f64::from(gradient[i])).abs() < 1e-4,
                        "{objective:?} {target} {i}"
                    );
                }
            }
        }
    }

    #[test]
    fn divergence_is_that_of_the_softmaxes() {
        let (dense, other) = ([0.3f32, -1.2, 2.0, 0.7], [1.3f32, -1.2, 1.0, 0.7]);
        let log = |row: &[f32], i| -cross_entropy(row, i);
        let expected: f64 =
            (0..4).map(|i| log(&dense, i).exp() * (log(&dense, i) - log(&other, i))).sum();
        let of =
            |other: &[f32]| divergence(&dense, other, (log_sum_exp(&dense), log_sum_exp(other)));
        assert!((of(&other) - expected).abs() < 1e-6);
        assert_eq!(of(&dense), 0.0);
    }

    #[test]
    fn sums_of_exponentials_are_those_of_the_library() {
        for x in (-860..=800).map(|x| x as f32 / 10.0 + 0.013) {
            let (got, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / expected - 1.0).abs() < 3e-7, "{x}: {got} {expected}");
        }
        // Of lengths that blocks and lanes do not divide, with tokens that cannot be.
        let inf = f32::NEG_INFINITY;
        let rows: Vec<f32> = (0..1333).map(|i| ((i * 37) % 101) as f32 / 7.0 - 9.0).collect();
        for len in [1, 15, 16, 17, 511, 513, 1333] {
            let row = &rows[..len];
            let expected = row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(row) - expected).abs() < 1e-6, "{len}");
            let with = [row, &[inf]].concat();
            assert!((log_sum_exp(&with) - expected).abs() < 1e-6, "{len}");
            assert_eq!(divergence(&with, &with, (expected, expected)), 0.0);
        }
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
    }

    #[test]
    fn hard_tokens_weigh_more_and_certain_responses_evenly() {
        let weights = TokenWeight::Hard.weights(&[0.0, 0.99, 0.0], &[1.0; 3]);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((weights[1] / weights[0] - 100.0).abs() < 1e-9);
        // Rounding makes a cross entropy of 0 slightly negative.
        let weights = TokenWeight::Hard.weights(&[1e-9, 0.0, -1e-9], &[1.0; 3]);
        assert!(weights.iter().all(|w| (w - 1.0 / 3.0).abs() < 1e-6), "{weights:?}");
        assert_eq!(TokenWeight::Uniform.weights(&[3.0, 0.0], &[0.25; 2]), [0.5, 0.5]);
    }

    #[test]
    fn names_parse_and_unknown_ones_are_listed() {
        for (weight, name) in TokenWeight::ALL {
            assert_eq!(name.parse::<TokenWeight>().unwrap(), weight);
        }
        assert!("soft".parse::<TokenWeight>().unwrap_err().to_string().contains("hard"));
        for (objective, name) in Objective::ALL {
            assert_eq!(name.parse::<Objective>().unwrap(), objective);
            assert_eq!(objective.name(), name);
        }
        assert!("mse".parse::<Objective>().unwrap_err().to_string().contains("margin"));
    }
}
