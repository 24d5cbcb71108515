use std::str::FromStr;

use moa_core::InfluenceSign;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a plan must not harm, as a function of the logits `z` at the positions that predict the
/// response, and how its influence is summed.
///
/// Each is a loss: larger is worse. A response's loss is the mean over its tokens `y`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross entropy `logsumexp(z) - z_y`, signed influence (the MoA paper, section 4.2).
    CrossEntropy,
    /// Cross entropy, absolute influence per attention entry (the original code).
    CrossEntropyAbsolute,
    /// Logit margin `logsumexp(z_others) - z_y`, signed. It does not saturate where the model is
    /// certain, which is where the gradient of the cross entropy vanishes.
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

/// Cross entropy of one row of logits, in nats.
pub(crate) fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|z| f64::from(*z - max).exp()).sum();
    f64::from(max) + sum.ln() - f64::from(logits[target])
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
    fn names_parse_and_unknown_ones_are_listed() {
        for (objective, name) in Objective::ALL {
            assert_eq!(name.parse::<Objective>().unwrap(), objective);
            assert_eq!(objective.name(), name);
        }
        assert!("mse".parse::<Objective>().unwrap_err().to_string().contains("margin"));
    }
}
