/// A scale from values to a share of an axis, with round numbers to label it.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    from: f64,
    to: f64,
    is_log: bool,
    /// Values to label, with their labels.
    pub(crate) ticks: Vec<(f64, String)>,
}

/// A linear axis where values differ by at most this factor.
const LINEAR: f64 = 30.0;

impl Axis {
    /// An axis that holds all values, with room at both ends; logarithmic where that is asked for, all
    /// values are positive and they differ much. Values that are not finite are left out.
    pub(crate) fn around(values: &[f64], may_be_log: bool) -> Self {
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let low = finite().reduce(f64::min).unwrap_or(0.0);
        let high = finite().reduce(f64::max).unwrap_or(1.0);
        if may_be_log && low > 0.0 && high / low > LINEAR {
            Self::log(low, high)
        } else {
            Self::linear(low, high)
        }
    }

    fn linear(low: f64, high: f64) -> Self {
        // Values that are all alike get an axis around them.
        let spread = if high > low { high - low } else { low.abs().max(1e-3) };
        let (from, to) = (low - 0.08 * spread, high + 0.08 * spread);
        let rough = (to - from) / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough);
        let step = step.unwrap_or(rough);
        let decimals = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
        let label = |value: f64| match value.abs() {
            large if large >= 1e5 || step < 1e-4 => format!("{value:.1e}"),
            _ => format!("{:.decimals$}", if value.abs() < 1e-9 * step { 0.0 } else { value }),
        };
        let first = (from / step).ceil() as i64;
        let last = (to / step).floor() as i64;
        let ticks = (first..=last).take(12).map(|i| i as f64 * step);
        let ticks = ticks.map(|value| (value, label(value))).collect();
        Self { from, to, is_log: false, ticks }
    }

    fn log(low: f64, high: f64) -> Self {
        let (low, high) = (low.log10(), high.log10());
        let (from, to) = (low - 0.08 * (high - low), high + 0.08 * (high - low));
        let powers = from.ceil() as i32..=to.floor() as i32;
        let step = (powers.clone().count() / 6).max(1);
        let label = |power: i32| match power {
            0..=4 => format!("{}", 10f64.powi(power)),
            -4..0 => format!("{:.*}", power.unsigned_abs() as usize, 10f64.powi(power)),
            _ => format!("1e{power}"),
        };
        let ticks = powers.step_by(step).map(|power| (10f64.powi(power), label(power))).collect();
        Self { from, to, is_log: true, ticks }
    }

    /// Where a value lies, 0 at the beginning of the axis and 1 at its end.
    pub(crate) fn share(&self, value: f64) -> f64 {
        let value = if self.is_log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        (value - self.from) / (self.to - self.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(labels(&Axis::around(&[0.0, 10.0], false)), ["0", "5", "10"]);
        assert_eq!(labels(&Axis::around(&[-0.13, 0.21], false)), ["-0.1", "0.0", "0.1", "0.2"]);
        assert_eq!(labels(&Axis::around(&[0.002, 3.0], true)), ["0.01", "0.1", "1"]);
        for values in [vec![5.0], vec![0.0, 0.0], vec![], vec![-3e7, 9e8], vec![1e-9, 2e-9]] {
            let axis = Axis::around(&values, true);
            assert!((1..=12).contains(&axis.ticks.len()), "{values:?}: {axis:?}");
            for (value, _) in &axis.ticks {
                assert!((0.0..=1.0).contains(&axis.share(*value)), "{axis:?}");
            }
            for value in values {
                assert!((0.0..=1.0).contains(&axis.share(value)), "{value}: {axis:?}");
            }
        }
    }

    #[test]
    fn numbers_that_are_none_do_not_break_the_axis() {
        let axis = Axis::around(&[f64::NAN, 1.0, f64::INFINITY, 2.0], true);
        assert!((0.0..0.2).contains(&axis.share(1.0)) && (0.8..1.0).contains(&axis.share(2.0)));
    }
}
