//! Codes of keys that make up for one another.

use super::rounding::rotate;

/// Share of the diagonal's mean that is added to each element of it, so that directions that no query was seen in count
/// for something.
const DAMPING: f64 = 0.03;

/// Scales whose rows have feedback: others' products might be numbers that devices take for 0, or overflow.
const LEAST_SCALE: f32 = 1.0 / (1u64 << 60) as f32;
const MOST_SCALE: f32 = (1u64 << 60) as f32;

/// The feedback of a KV head whose queries have these second moments `E[q q^T]`, `[head_dim, head_dim]`; as many
/// numbers, or all 0 where the moments are none or no numbers.
///
/// A rounded key is off by `e`, and a score by `q . e`, whose mean square is `e^T E[q q^T] e`: errors of two elements
/// may cancel each other. Keys of 4 bits therefore get their codes one after the other. The last element of the rotated
/// row `y` comes first; once element `j` has its code, what is left of it, `y[j]` less what the code stands for, cut to
/// 12 bits, times `feedback[j][i]` is added to each `y[i]` before it. The scale is that of the row as it came; rows
/// whose scale is not between 2^-60 and 2^60 are rounded as they are.
///
/// With the moments of the rotated queries `U^T U`, `U` an upper triangle whose rows are over their diagonal, the
/// feedback is `-U^-1`, which makes element `i`'s code the best there is for those after it (as GPTQ does with weights,
/// Frantar et al. 2022; as a lattice, Babai's nearest plane). Its numbers have 12 bits too and are at least 2^-30 or 0,
/// so that products are exact in f32: a device comes to the same sums, with a fused multiply-add or without. A feedback
/// of other numbers may round otherwise on another device.
///
/// ```
/// # use moa_core::{RowType, key_feedback};
/// // Queries that see the first element alone.
/// let feedback = key_feedback(&[1.0, 0.0, 0.0, 0.0], 2);
/// let key = [0.3, -0.1];
/// assert!((RowType::Int4.round(&key)[0] - 0.3).abs() > 0.02);
/// assert!((RowType::Int4.round_with(Some(&feedback), &key)[0] - 0.3).abs() < 0.001);
/// ```
///
/// # Panics
/// If there are not as many moments as the square of the head dimension.
pub fn key_feedback(moments: &[f64], head_dim: usize) -> Vec<f32> {
    assert_eq!(moments.len(), head_dim * head_dim);
    let mut rotated = moments.to_vec();
    for _ in 0..2 {
        rotated.chunks_exact_mut(head_dim).for_each(rotate);
        transpose(&mut rotated, head_dim);
    }
    factor(rotated, head_dim).unwrap_or_else(|| vec![0.0; head_dim * head_dim])
}

/// `None` where the damped moments have no factor.
fn factor(mut moments: Vec<f64>, n: usize) -> Option<Vec<f32>> {
    let damping = DAMPING * (0..n).map(|i| moments[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| moments[i * n + i] += damping);
    // Rows of the upper factor over their diagonal, from the moments' lower left corner on: `upper[i]` is what is left
    // of row `i` once those before it are taken out.
    for i in 0..n {
        let pivot = moments[i * n + i];
        if !(pivot > 0.0 && pivot.is_finite()) {
            return None;
        }
        let (above, below) = moments.split_at_mut((i + 1) * n);
        let row = &mut above[i * n..];
        for (at, rest) in below.chunks_exact_mut(n).enumerate() {
            let share = row[i + 1 + at] / pivot;
            rest.iter_mut().zip(&*row).skip(i + 1).for_each(|(x, own)| *x -= share * own);
        }
        row[i..].iter_mut().for_each(|x| *x /= pivot);
    }
    // The inverse, column by column from the diagonal up.
    let mut feedback = vec![0.0; n * n];
    let mut column = vec![0.0; n];
    for j in 0..n {
        column[j] = 1.0;
        for i in (0..j).rev() {
            let row = &moments[i * n..][..n];
            column[i] = -(i + 1..=j).map(|k| row[k] * column[k]).sum::<f64>();
            feedback[j * n + i] = few_bits(-column[i])?;
        }
    }
    Some(feedback)
}

/// The nearest number of 12 bits, 0 below 2^-30; `None` above 2^30.
fn few_bits(x: f64) -> Option<f32> {
    const MOST: f64 = (1u64 << 30) as f64;
    let rounded = f32::from_bits(((x as f32).to_bits().saturating_add(0x800)) & 0xffff_f000);
    match f64::from(rounded.abs()) {
        size if size < 1.0 / MOST => Some(0.0),
        size if size <= MOST => Some(rounded),
        _ => None,
    }
}

fn transpose(square: &mut [f64], n: usize) {
    for i in 0..n {
        (0..i).for_each(|j| square.swap(i * n + j, j * n + i));
    }
}

/// Changes a rotated row to one whose every element has the code that it gets by `feedback`.
///
/// # Panics
/// If there are not as many numbers of the feedback as the square of the row's.
pub(super) fn feed_back(row: &mut [f32], scale: f32, feedback: &[f32]) {
    assert_eq!(feedback.len(), row.len() * row.len());
    if !(LEAST_SCALE..=MOST_SCALE).contains(&scale) {
        return;
    }
    for (j, feedback) in feedback.chunks_exact(row.len()).enumerate().rev() {
        let cell = (f64::from(row[j]) / f64::from(scale)).floor().clamp(-8.0, 7.0) as f32;
        let left = row[j] - (cell + 0.5) * scale;
        let left = f32::from_bits(left.to_bits() & 0xffff_f000);
        row[..j].iter_mut().zip(feedback).for_each(|(x, share)| *x += share * left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RowType, SplitMix64};

    fn normal(random: &mut SplitMix64) -> f64 {
        (0..12).map(|_| random.unit()).sum::<f64>() - 6.0
    }

    /// Queries of a few directions and some noise, and their moments.
    fn queries(dim: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
        let mut random = SplitMix64::new(3);
        let directions: Vec<Vec<f64>> =
            (0..dim / 8 + 1).map(|_| (0..dim).map(|_| normal(&mut random)).collect()).collect();
        let queries: Vec<Vec<f64>> = (0..400)
            .map(|_| {
                let mut query: Vec<f64> = (0..dim).map(|_| 0.3 * normal(&mut random)).collect();
                for direction in &directions {
                    let share = normal(&mut random);
                    query.iter_mut().zip(direction).for_each(|(x, own)| *x += share * own);
                }
                query
            })
            .collect();
        let mut moments = vec![0.0; dim * dim];
        for query in &queries {
            for (row, x) in moments.chunks_mut(dim).zip(query) {
                row.iter_mut().zip(query).for_each(|(sum, y)| *sum += x * y / 400.0);
            }
        }
        (queries, moments)
    }

    #[test]
    fn scores_are_nearer_with_feedback() {
        for dim in [8, 20, 64, 96, 128] {
            let (queries, moments) = queries(dim);
            let feedback = key_feedback(&moments, dim);
            let mut random = SplitMix64::new(5);
            let [mut plain, mut fed] = [0.0; 2];
            for _ in 0..40 {
                let key: Vec<f32> = (0..dim).map(|_| normal(&mut random) as f32).collect();
                let error = |stored: Vec<f64>| -> f64 {
                    let off = |query: &Vec<f64>| -> f64 {
                        let each = stored.iter().zip(&key).zip(query);
                        each.map(|((x, y), q)| q * (x - f64::from(*y))).sum()
                    };
                    queries.iter().map(|query| off(query).powi(2)).sum()
                };
                plain += error(RowType::Int4.round(&key));
                fed += error(RowType::Int4.round_with(Some(&feedback), &key));
            }
            assert!(fed < 0.6 * plain, "{dim}: {fed} of {plain}");
        }
    }

    #[test]
    fn products_of_feedback_are_exact() {
        let (_, moments) = queries(64);
        let feedback = key_feedback(&moments, 64);
        assert!(feedback.iter().any(|x| *x != 0.0));
        for (at, x) in feedback.iter().enumerate() {
            assert_eq!(x.to_bits() & 0xfff, 0);
            assert!(*x == 0.0 || (x.abs() >= 2.0f32.powi(-30) && at % 64 < at / 64));
        }
    }

    #[test]
    fn moments_that_are_none_give_none() {
        for moments in [[0.0; 4], [f64::NAN; 4], [f64::INFINITY; 4], [-1.0, 0.0, 0.0, 1.0]] {
            assert_eq!(key_feedback(&moments, 2), [0.0; 4]);
        }
    }

    #[test]
    fn other_types_and_rows_at_the_ends_are_rounded_as_they_are() {
        let (_, moments) = queries(20);
        let feedback = key_feedback(&moments, 20);
        let row: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin()).collect();
        for kind in [RowType::Int8, RowType::Fp8] {
            assert_eq!(kind.round_with(Some(&feedback), &row), kind.round(&row));
        }
        assert_ne!(RowType::Int4.round_with(Some(&feedback), &row), RowType::Int4.round(&row));
        for factor in [1e-30, 1e30] {
            let row: Vec<f32> = row.iter().map(|x| x * factor).collect();
            assert_eq!(RowType::Int4.round_with(Some(&feedback), &row), RowType::Int4.round(&row));
        }
    }
}
