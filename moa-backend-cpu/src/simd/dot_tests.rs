use half::f16;
use moa_core::RowType;

use super::*;
use crate::element::{Fp8, Int4, Int8};
use crate::simd::tests::on_every_arch;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    (0..n as u32).map(|i| (hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

const QUERIES: usize = 7;
const ROWS: usize = 11;

/// Rows of a type with their scales, and what they stand for.
struct Made<E> {
    codes: Vec<E>,
    scales: Vec<u16>,
    values: Vec<f64>,
}

fn made<E: RowElement>(dim: usize) -> Made<E> {
    let mut made = Made { codes: Vec::new(), scales: Vec::new(), values: Vec::new() };
    for row in noise(ROWS * dim, 1).chunks_exact_mut(dim) {
        let mut codes = vec![E::zeroed(); E::units(dim)];
        let scale = E::narrow(None, row, &mut codes);
        let mut values = vec![0.0; dim];
        match E::TYPE {
            RowType::Plain(_) => {
                values.iter_mut().enumerate().for_each(|(at, x)| *x = E::element(&codes, dim, at));
            }
            narrow => {
                made.scales.push(scale);
                narrow.widen(bytemuck::cast_slice(&codes), scale, &mut values);
            }
        }
        made.values.extend(values.into_iter().map(f64::from));
        made.codes.extend(codes);
    }
    made
}

/// Scores of all queries with some of the rows, `[query][row]`.
fn scores<E: RowElement>(dim: usize, made: &Made<E>, rows: std::ops::Range<usize>) -> Vec<f32> {
    let wide = dim.next_multiple_of(LANES);
    let (mut padded, mut codes) = (vec![0.0; QUERIES * wide], vec![0; QUERIES * dim]);
    let (mut steps, mut sums) = (vec![0.0; QUERIES], vec![0; QUERIES]);
    let of_queries = noise(QUERIES * dim, 2);
    for (i, query) in of_queries.chunks_exact(dim).enumerate() {
        padded[i * wide..][..dim].copy_from_slice(query);
        (steps[i], sums[i]) = whole::round(query, &mut codes[i * dim..][..dim]);
    }
    let whole = whole::is_used(E::TYPE, dim).then_some(whole::Queries {
        codes: &codes,
        steps: &steps,
        sums: &sums,
    });
    let mut scores = vec![f32::NAN; QUERIES * rows.len()];
    E::dots(Dots {
        dim,
        queries: Queries { wide: &padded, whole },
        keys: &made.codes[rows.start * E::units(dim)..rows.end * E::units(dim)],
        scales: made.scales.get(rows.clone()).unwrap_or(&[]),
        scores: &mut scores,
        score_stride: rows.len(),
    });
    scores
}

const DIMS: [usize; 7] = [1, 21, 48, 64, 96, 128, 256];

fn check_scores<E: RowElement>() {
    for dim in DIMS {
        let made = made::<E>(dim);
        let queries = noise(QUERIES * dim, 2);
        for found in on_every_arch(|| {
            let all = scores(dim, &made, 0..ROWS);
            // A key's score is the same bit for bit whichever keys it comes with.
            for row in 0..ROWS {
                let alone = scores(dim, &made, row..row + 1);
                (0..QUERIES).for_each(|q| assert_eq!(alone[q], all[q * ROWS + row]));
            }
            all
        }) {
            for (at, found) in found.into_iter().enumerate() {
                let (query, row) = (at / ROWS, at % ROWS);
                let values = &made.values[row * dim..][..dim];
                let query = queries[query * dim..][..dim].iter().map(|x| f64::from(*x));
                let exact: f64 = query.clone().zip(values).map(|(q, k)| q * k).sum();
                // Half of a step of the query for each element of the key.
                let most = query.fold(0.0, |most: f64, x| most.max(x.abs())) / 65_534.0;
                let sum: f64 = values.iter().map(|x| x.abs()).sum();
                let bound = (most + 1e-6) * sum;
                assert!((f64::from(found) - exact).abs() <= bound, "{dim}: {found} {exact}");
            }
        }
    }
}

#[test]
fn scores_are_products_whichever_keys_come_together() {
    check_scores::<f32>();
    check_scores::<f16>();
    check_scores::<Int8>();
    check_scores::<Fp8>();
    check_scores::<Int4>();
}

fn check_sums<E: RowElement>() {
    for dim in DIMS {
        let (made, wide) = (made::<E>(dim), dim.next_multiple_of(LANES));
        let weights = noise(QUERIES * ROWS, 3);
        for found in on_every_arch(|| {
            let mut out = vec![0.5; QUERIES * wide];
            crate::simd::dispatch(WeightedSums {
                dim,
                count: QUERIES,
                weights: &mut weights.clone(),
                weight_stride: ROWS,
                values: &made.codes,
                scales: &made.scales,
                out: &mut out,
                out_stride: wide,
            });
            out
        }) {
            for (q, found) in found.chunks_exact(wide).enumerate() {
                for (at, found) in found[..dim].iter().enumerate() {
                    let weight = |row: usize| f64::from(weights[q * ROWS + row]);
                    let exact: f64 =
                        (0..ROWS).map(|row| weight(row) * made.values[row * dim + at]).sum();
                    let error = (f64::from(*found) - 0.5 - exact).abs();
                    assert!(error < 1e-5 * (1.0 + exact.abs()), "{dim}: {found} {exact}");
                }
            }
        }
        for found in on_every_arch(|| {
            let mut to = vec![f32::NAN; ROWS * dim];
            let (rows, scales) = (&made.codes[..], &made.scales[..]);
            crate::simd::dispatch(Widen { dim, rows, scales, to: &mut to });
            to
        }) {
            assert!(found.iter().zip(&made.values).all(|(a, b)| f64::from(*a) == *b), "{dim}");
        }
    }
}

#[test]
fn weighted_sums_and_widened_rows_are_those_of_what_rows_stand_for() {
    check_sums::<f32>();
    check_sums::<f16>();
    check_sums::<Int8>();
    check_sums::<Fp8>();
    check_sums::<Int4>();
}
