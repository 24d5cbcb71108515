use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The growth of each calibration response's cross entropy when every head loses the far context,
/// which shows whether calibration data has long dependencies at all.
///
/// This is measured rather than read off the influence. A response that hangs on one far token has
/// attention values near 1, where first-order influence is wild in size and sign: over eight records
/// that a model answers only by looking far back, the sum of far influence was hardly further from
/// zero, in standard errors, than over prose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FarLosses(Vec<f64>);

impl FarLosses {
    /// Smallest mean growth, in nats per token, that counts as a long dependency. Prose gains a few
    /// hundredths from its far context, an answer with one far number in it several tenths.
    pub const LEAST: f64 = 0.15;
    /// Samples below which nothing is said: of those that need far context, a quarter or more may
    /// happen to find it near.
    pub const FEWEST: usize = 3;

    /// Checks that a file can hold all numbers.
    pub(crate) fn check_finite(&self) -> Result<()> {
        match self.0.iter().find(|growth| !growth.is_finite()) {
            Some(growth) => {
                Err(Error::invalid("loss without far context", "a finite number", growth))
            }
            None => Ok(()),
        }
    }

    /// Adds a sample's growth, in nats per token.
    pub fn push(&mut self, growth: f64) {
        self.0.push(growth);
    }

    /// Adds the samples of another shard.
    pub fn merge(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    /// Samples that were measured.
    pub fn samples(&self) -> usize {
        self.0.len()
    }

    /// Mean growth; 0 without samples.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }

    /// Standard error of the mean; `None` for fewer than two samples, which do not show it.
    pub fn standard_error(&self) -> Option<f64> {
        let (n, mean) = (self.0.len() as f64, self.mean());
        let squares: f64 = self.0.iter().map(|x| (x - mean).powi(2)).sum();
        (self.0.len() >= 2).then(|| (squares / (n - 1.0) / n).sqrt())
    }

    /// Whether the far context was measured on three samples or more and made no difference: the mean is below
    /// [`FarLosses::LEAST`], or growth and decrease are about as large.
    ///
    /// The latter is a mean below its standard error. Where no sample gets better without the far
    /// context that never holds, however few of them need it: an answer that happens to lie near
    /// does not count against the data.
    pub fn is_noise(&self) -> bool {
        let mean = self.mean();
        self.samples() >= Self::FEWEST
            && (mean < Self::LEAST || self.standard_error().is_some_and(|error| mean < error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(losses: &[f64]) -> FarLosses {
        FarLosses(losses.to_vec())
    }

    #[test]
    fn small_or_scattered_growth_is_noise() {
        let losses = of(&[1.0, 2.0, 3.0]);
        assert_eq!((losses.samples(), losses.mean()), (3, 2.0));
        assert!((losses.standard_error().unwrap() - 1.0 / 3.0f64.sqrt()).abs() < 1e-12);
        assert_eq!((of(&[]).standard_error(), of(&[0.5]).standard_error()), (None, None));
        assert!(!losses.is_noise() && !of(&[0.5]).is_noise());
        // Sure, but small.
        assert!(of(&[0.02, 0.021, 0.02]).is_noise());
        // Large, but of either sign.
        assert!(of(&[3.0, -2.0, 0.5, -0.5]).is_noise());
        // One of four answers is far.
        assert!(!of(&[0.001, 0.0, 2.0, 0.01]).is_noise());
        // Too little is known.
        assert!(!of(&[]).is_noise() && !of(&[0.0, 0.0]).is_noise());
        let mut all = of(&[1.0]);
        all.merge(&of(&[3.0]));
        assert_eq!(all, of(&[1.0, 3.0]));
    }
}
