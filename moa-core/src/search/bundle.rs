use super::lagrangian::{Lagrangian, Point};
use super::quadratic::{combine, dot, minimise};
use super::subproblem::{FEASIBLE, feasible};

/// Maximum of the dual function, as far as it was found.
pub(super) struct Maximum {
    /// Multipliers, one per row.
    pub(super) multipliers: Vec<f64>,
    /// The dual function there.
    pub(super) point: Point,
    /// Choices whose weighted mean nearly solves the relaxation.
    pub(super) mixture: Vec<Vec<u16>>,
    /// Step size to begin with next time.
    pub(super) step: f64,
    /// Best choice met that breaks no constraint, and its objective.
    pub(super) incumbent: Option<(f64, Vec<u16>)>,
}

/// When to stop.
pub(super) struct Stop {
    /// Evaluations.
    pub(super) evaluations: usize,
    /// Distance to the maximum, own units.
    pub(super) tolerance: f64,
    /// A value that is high enough.
    pub(super) enough: f64,
}

struct Cut {
    multipliers: Vec<f64>,
    point: Point,
    idle: usize,
}

/// Maximises the concave, piecewise linear dual function with a proximal bundle method (Kiwiel
/// 1990): the next point maximises the cuts seen so far less the squared distance to the best one.
pub(super) fn maximise(
    dual: &mut Lagrangian<'_>,
    start: &[f64],
    step: f64,
    stop: &Stop,
) -> Maximum {
    let rows = start.len();
    let core = dual.sub.core;
    let mut incumbent: Option<(f64, Vec<u16>)> = None;
    let mut offer = |at: &[f64], point: &Point| {
        if feasible(&point.slope) {
            let value = point.value - dot(at, &point.slope);
            if incumbent.as_ref().is_none_or(|(best, _)| value < *best)
                && core.within_limit(&point.choice)
            {
                incumbent = Some((value, point.choice.clone()));
            }
        }
    };
    let mut centre = start.to_vec();
    let mut best = dual.evaluate(&centre);
    offer(&centre, &best);
    let mut cuts = vec![Cut { multipliers: centre.clone(), point: best.clone(), idle: 0 }];
    let mut weights = vec![1.0];
    let mut step = step;

    for _ in 1..stop.evaluations {
        if rows == 0 || best.value >= stop.enough {
            break;
        }
        // Dual of the proximal problem: weights of the cuts, then of the multipliers' signs.
        let mut columns: Vec<Vec<f64>> = cuts.iter().map(|cut| cut.point.slope.clone()).collect();
        let mut linear: Vec<f64> =
            cuts.iter().map(|cut| cut.error(&centre, best.value) / step).collect();
        for (row, &at) in centre.iter().enumerate() {
            columns.push((0..rows).map(|r| f64::from(u8::from(r == row))).collect());
            linear.push(at / step);
        }
        let x = minimise(&columns, &linear, cuts.len());
        let direction = combine(&columns, &x);
        let error = step * dot(&linear, &x);
        weights = x[..cuts.len()].to_vec();
        let length = dot(&direction, &direction).sqrt();
        let reach = 1.0 + dot(&centre, &centre).sqrt();
        if error + length * reach <= stop.tolerance {
            break;
        }
        let next: Vec<f64> =
            centre.iter().zip(&direction).map(|(at, d)| (at + step * d).max(0.0)).collect();
        let point = dual.evaluate(&next);
        offer(&next, &point);
        let expected = error + step * length * length;
        let gained = point.value - best.value;
        // Where the parabola through value, slope and gain has its top (Kiwiel's rule).
        let top = 0.5 / (1.0 - (gained / expected).min(1.0)).max(0.05);
        if gained >= 0.1 * expected {
            step *= top.clamp(1.0, 5.0);
            best = point.clone();
            centre.clone_from(&next);
        } else {
            let new_error = Cut { multipliers: next.clone(), point: point.clone(), idle: 0 }
                .error(&centre, best.value);
            if new_error > expected {
                step *= top.clamp(0.1, 0.9);
            }
        }
        for (cut, &weight) in cuts.iter_mut().zip(&weights) {
            cut.idle = if weight > 0.0 { 0 } else { cut.idle + 1 };
        }
        let keep = 20 + 3 * rows;
        if cuts.len() > keep
            && let Some(oldest) = (0..cuts.len()).max_by_key(|&i| cuts[i].idle)
        {
            cuts.swap_remove(oldest);
            weights.swap_remove(oldest);
        }
        cuts.push(Cut { multipliers: next, point, idle: 0 });
        weights.push(0.0);
    }
    let mixture = cuts
        .into_iter()
        .zip(weights)
        .filter(|(_, weight)| *weight > FEASIBLE)
        .map(|(cut, _)| cut.point.choice)
        .collect();
    Maximum { multipliers: centre, point: best, mixture, step, incumbent }
}

impl Cut {
    /// How far the cut lies above the value at the centre.
    fn error(&self, centre: &[f64], value: f64) -> f64 {
        let shift: f64 = self
            .point
            .slope
            .iter()
            .zip(centre.iter().zip(&self.multipliers))
            .map(|(g, (c, m))| g * (c - m))
            .sum();
        (self.point.value + shift - value).max(0.0)
    }
}
