//! A small convex quadratic programme.

/// Minimises `|P x|^2 / 2 + c . x` over `x >= 0` with the sum of the first `simplex` entries equal
/// to 1, by active sets (as Lawson and Hanson do for non-negative least squares).
///
/// `columns` are those of `P`; `simplex` is at least 1. Returns `x`. Stops at a feasible `x` that
/// may be slightly suboptimal when rounding stops progress.
pub(super) fn minimise(columns: &[Vec<f64>], linear: &[f64], simplex: usize) -> Vec<f64> {
    let n = columns.len();
    let gram = |i: usize, j: usize| dot(&columns[i], &columns[j]);
    let cost = |i: usize| 0.5 * gram(i, i) + linear[i];
    let start = (0..simplex).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(0);
    let mut x = vec![0.0; n];
    x[start] = 1.0;
    let mut active = vec![start];
    let scale = columns.iter().map(|p| dot(p, p)).fold(1e-300, f64::max);

    for _ in 0..20 * (n + 5) {
        let image = combine(columns, &x);
        let gradient: Vec<f64> = (0..n).map(|j| dot(&columns[j], &image) + linear[j]).collect();
        // The multiplier of the equality, from the members that are in it.
        let (mut sum, mut weight) = (0.0, 0.0);
        for &j in active.iter().filter(|&&j| j < simplex) {
            sum += x[j] * gradient[j];
            weight += x[j];
        }
        let level = sum / f64::max(weight, 1e-300);
        let violation = |j: usize| gradient[j] - if j < simplex { level } else { 0.0 };
        let entering = (0..n)
            .filter(|j| !active.contains(j))
            .min_by(|&a, &b| violation(a).total_cmp(&violation(b)));
        let tolerance = 1e-13 * (scale + level.abs());
        let Some(entering) = entering.filter(|&j| violation(j) < -tolerance) else { break };
        active.push(entering);

        loop {
            let Some(z) = stationary(columns, linear, simplex, &active, scale) else {
                active.retain(|&j| x[j] > 0.0);
                return x;
            };
            if z.iter().all(|&z| z > 0.0) {
                active.iter().zip(&z).for_each(|(&j, &z)| x[j] = z);
                break;
            }
            let mut step = 1.0;
            for (&j, &z) in active.iter().zip(&z) {
                if z <= 0.0 {
                    step = f64::min(step, x[j] / (x[j] - z).max(1e-300));
                }
            }
            for (&j, &z) in active.iter().zip(&z) {
                x[j] += step * (z - x[j]);
                if z <= 0.0 && x[j] <= 1e-15 {
                    x[j] = 0.0;
                }
            }
            let before = active.len();
            active.retain(|&j| x[j] > 0.0);
            if active.len() == before || !active.iter().any(|&j| j < simplex) {
                return x;
            }
        }
    }
    x
}

/// The minimum over the span of the active columns with the equality, signs ignored.
fn stationary(
    columns: &[Vec<f64>],
    linear: &[f64],
    simplex: usize,
    active: &[usize],
    scale: f64,
) -> Option<Vec<f64>> {
    let k = active.len();
    let width = k + 2;
    let mut a = vec![0.0; (k + 1) * width];
    for (r, &i) in active.iter().enumerate() {
        for (s, &j) in active.iter().enumerate() {
            a[r * width + s] = dot(&columns[i], &columns[j]);
        }
        // Nearly parallel cuts are the rule, not the exception.
        a[r * width + r] += 1e-12 * scale;
        let member = f64::from(u8::from(i < simplex)) * scale.sqrt();
        a[r * width + k] = member;
        a[k * width + r] = member;
        a[r * width + k + 1] = -linear[i];
    }
    a[k * width + k + 1] = scale.sqrt();
    solve(&mut a, k + 1).map(|mut z| {
        z.truncate(k);
        z
    })
}

/// Gaussian elimination with row pivoting on the augmented matrix `[n, n + 1]`.
fn solve(a: &mut [f64], n: usize) -> Option<Vec<f64>> {
    let width = n + 1;
    for col in 0..n {
        let pivot = (col..n)
            .max_by(|&r, &s| a[r * width + col].abs().total_cmp(&a[s * width + col].abs()))?;
        if a[pivot * width + col].abs() < 1e-280 {
            return None;
        }
        if pivot != col {
            for j in 0..width {
                a.swap(pivot * width + j, col * width + j);
            }
        }
        for r in col + 1..n {
            let factor = a[r * width + col] / a[col * width + col];
            if factor != 0.0 {
                for j in col..width {
                    a[r * width + j] -= factor * a[col * width + j];
                }
            }
        }
    }
    let mut z = vec![0.0; n];
    for r in (0..n).rev() {
        let known: f64 = (r + 1..n).map(|j| a[r * width + j] * z[j]).sum();
        z[r] = (a[r * width + n] - known) / a[r * width + r];
    }
    z.iter().all(|z| z.is_finite()).then_some(z)
}

/// `P x`.
pub(super) fn combine(columns: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    let mut image = vec![0.0; columns.first().map_or(0, Vec::len)];
    for (column, &x) in columns.iter().zip(x).filter(|(_, x)| **x != 0.0) {
        image.iter_mut().zip(column).for_each(|(sum, p)| *sum += x * p);
    }
    image
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minimum_beats_every_point_of_a_grid() {
        let columns =
            vec![vec![1.0, 0.2], vec![-0.5, 0.7], vec![0.3, -0.9], vec![1.0, 0.0], vec![0.0, 1.0]];
        let linear = [0.1, 0.3, 0.0, 0.05, 0.4];
        let value = |x: &[f64]| {
            let image = combine(&columns, x);
            0.5 * dot(&image, &image) + dot(&linear, x)
        };
        let x = minimise(&columns, &linear, 3);
        assert!((x[..3].iter().sum::<f64>() - 1.0).abs() < 1e-9);
        for a in 0..=20 {
            for b in 0..=20 - a {
                for (d, e) in (0..10).flat_map(|d| (0..10).map(move |e| (d, e))) {
                    let (a, b) = (f64::from(a) / 20.0, f64::from(b) / 20.0);
                    let y = [a, b, 1.0 - a - b, f64::from(d) / 10.0, f64::from(e) / 10.0];
                    assert!(value(&x) <= value(&y) + 1e-9, "{x:?} {y:?}");
                }
            }
        }
    }
}
