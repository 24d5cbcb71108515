use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A value at a context length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AtLength {
    /// Context length, in tokens.
    pub length: usize,
    /// The value there.
    pub value: f64,
}

/// Where a plan came from; every field is optional and none changes what the plan does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// What made the plan, such as `"moa compress"` or `"import"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Objective whose influence was profiled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// Name of the [`Space`](crate::Space) that was searched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub space: Option<String>,
    /// Lengths that were profiled.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profile_lengths: Vec<usize>,
    /// Bounds on density the search obeyed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub density_bounds: Vec<AtLength>,
    /// Lower bounds on density the search obeyed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub density_floors: Vec<AtLength>,
    /// Smallest share of the context that any head was to keep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_share: Option<f64>,
    /// Most distinct rules in one layer, where the search limited them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rules_per_layer: Option<usize>,
    /// Bound on decode time the search obeyed, as a share of dense attention's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_time: Option<f64>,
    /// Loss that the influence predicts at each profile length.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predicted_losses: Vec<AtLength>,
    /// Loss measured at validation lengths.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub measured_losses: Vec<AtLength>,
    /// Divergence of running text from the dense model's predictions measured at validation lengths.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub measured_divergences: Vec<AtLength>,
    /// Plans that were measured before this one was chosen.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<Trial>,
    /// Calibration data and seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// One measured plan: the loss that was predicted for it, and the loss that was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// 0 for plans of the influence alone, then the rounds of refinement, whose predictions rest on
    /// measured changes of single heads.
    pub round: usize,
    /// Length of the prediction.
    pub predicted_at: usize,
    /// Loss beyond dense attention's that was predicted, in the unit of the objective.
    pub predicted: f64,
    /// Length of the items that were measured.
    pub measured_at: usize,
    /// Response loss, in nats per token.
    pub measured: f64,
}

impl Provenance {
    /// Checks that a file can hold all numbers.
    pub(crate) fn check_finite(&self) -> Result<()> {
        let of = |what: &'static str, values: &[AtLength]| -> Vec<(String, f64)> {
            values.iter().map(|at| (format!("{what} at {} tokens", at.length), at.value)).collect()
        };
        let trials = self.trials.iter().enumerate().flat_map(|(index, trial)| {
            [("predicted", trial.predicted), ("measured", trial.measured)]
                .map(|(what, value)| (format!("{what} loss of trial {index}"), value))
        });
        let single = |what: &str, value: Option<f64>| value.map(|value| (what.to_string(), value));
        let bad = of("density bound", &self.density_bounds)
            .into_iter()
            .chain(of("density floor", &self.density_floors))
            .chain(of("predicted loss", &self.predicted_losses))
            .chain(of("measured loss", &self.measured_losses))
            .chain(of("measured divergence", &self.measured_divergences))
            .chain(single("smallest share", self.min_share))
            .chain(single("decode time", self.decode_time))
            .chain(trials)
            .find(|(_, value)| !value.is_finite());
        match bad {
            Some((what, value)) => Err(Error::invalid(what, "a finite number", value)),
            None => Ok(()),
        }
    }

    /// What was measured at a length, beside the prediction for the length nearest to it; `None`
    /// without predictions.
    pub fn trial(&self, round: usize, measured: AtLength) -> Option<Trial> {
        let nearest = |p: &&AtLength| p.length.abs_diff(measured.length);
        let predicted = self.predicted_losses.iter().min_by_key(nearest)?;
        Some(Trial {
            round,
            predicted_at: predicted.length,
            predicted: predicted.value,
            measured_at: measured.length,
            measured: measured.value,
        })
    }
}
