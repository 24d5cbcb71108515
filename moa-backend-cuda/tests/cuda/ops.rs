//! The operations beside attention, against arithmetic in f64 on the numbers that the device holds.

use moa_backend_cuda::{Device, Dtype, Error, Operations, Tensor, Turns, padded_rows};
use moa_conformance::{Stop, Trial, Verdict, f64s, normal, trials};
use moa_core::ArgumentError;

use super::gpu::{device, round};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        linear_is_a_product_with_the_transpose,
        a_row_of_a_product_does_not_depend_on_the_other,
        rows_up_to_a_padded_size_change_no_bit_of_the_others,
        wide_inputs_of_products_are_rounded,
        embedding_and_rows_copy,
        norm_swiglu_and_add,
        rope_rotates_and_rotates_back,
        turns_are_the_angles_of_positions,
        columns_are_views_that_every_operation_takes,
        argmax_is_the_lowest_of_the_largest_and_refuses_what_is_no_number,
        operations_refuse_what_does_not_fit,
    ]
}

/// What tests of one element type need.
pub(crate) struct Ops {
    pub(crate) device: &'static Device,
    pub(crate) operations: Operations,
}

impl Ops {
    pub(crate) fn all() -> Result<[Self; 2], Stop> {
        let device = device()?;
        let new = |dtype| Self { device, operations: Operations::new(device, dtype).unwrap() };
        Ok([Dtype::F16, Dtype::Bf16].map(new))
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.operations.dtype()
    }

    /// Random numbers of a shape, rounded to `dtype`, there and here.
    pub(crate) fn random(&self, shape: &[usize], dtype: Dtype, seed: u64) -> (Tensor, Vec<f64>) {
        let mut values = normal(shape.iter().product(), seed);
        values.iter_mut().for_each(|x| *x = round(dtype, *x));
        (Tensor::from_f32(self.device, &values, shape, dtype).unwrap(), f64s(&values))
    }

    /// Relative error that rounding the result to `dtype` explains.
    #[track_caller]
    pub(crate) fn close(&self, got: &Tensor, expected: &[f64], sums: f64) {
        let rounding = match got.dtype() {
            Dtype::F16 => 2f64.powi(-11),
            Dtype::Bf16 => 2f64.powi(-8),
            _ => 2f64.powi(-24),
        };
        let got = got.to_f32().unwrap();
        assert_eq!(got.len(), expected.len());
        for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (f64::from(*got) - expected).abs();
            assert!(
                error <= 1.01 * rounding * expected.abs() + sums,
                "element {at}: {got}, expected {expected}"
            );
        }
    }
}

pub(crate) fn product(a: &[f64], w: &[f64], k: usize, n: usize) -> Vec<f64> {
    let dot = |a: &[f64], w: &[f64]| a.iter().zip(w).map(|(a, w)| a * w).sum::<f64>();
    a.chunks(k).flat_map(|a| w.chunks(k).take(n).map(move |w| dot(a, w))).collect()
}

fn linear_is_a_product_with_the_transpose() -> Verdict {
    for ops in Ops::all()? {
        for (m, n, k) in [
            (1, 8, 8),
            (1, 40, 4096),
            (2, 72, 1096),
            (3, 40, 264),
            (4, 136, 2048),
            (5, 64, 1024),
            (65, 512, 256),
            (130, 2048, 704),
        ] {
            let (x, xs) = ops.random(&[m, k], ops.dtype(), 1);
            let (w, ws) = ops.random(&[n, k], ops.dtype(), 2);
            let (bias, biases) = ops.random(&[n], Dtype::F32, 3);
            let mut expected = product(&xs, &ws, k, n);
            let sums = 1e-6 * k as f64;
            for output in [ops.dtype(), Dtype::F32] {
                let y = ops.operations.linear(&x, &w, None, output).unwrap();
                assert_eq!((y.shape(), y.dtype()), (&[m, n][..], output));
                ops.close(&y, &expected, sums);
            }
            let (sum, sums_before) = ops.random(&[m, n], Dtype::F32, 4);
            let kept = sum.clone();
            for (row, before) in expected.chunks_mut(n).zip(sums_before.chunks(n)) {
                row.iter_mut().zip(before).zip(&biases).for_each(|((y, x), b)| *y += x + b);
            }
            let y = ops.operations.linear_add(sum, &x, &w, Some(&bias)).unwrap();
            ops.close(&y, &expected, sums);
            ops.close(&kept, &sums_before, 0.0);
        }
    }
    Ok(())
}

fn a_row_of_a_product_does_not_depend_on_the_other() -> Verdict {
    for ops in Ops::all()? {
        let (x, _) = ops.random(&[2, 704], ops.dtype(), 1);
        let (w, _) = ops.random(&[71, 704], ops.dtype(), 2);
        let all = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap().to_f32().unwrap();
        for rows in [0..1, 1..2] {
            let part = x.rows(rows.clone()).unwrap();
            let part = ops.operations.linear(&part, &w, None, Dtype::F32).unwrap();
            assert_eq!(part.to_f32().unwrap(), all[rows.start * 71..rows.end * 71]);
        }
    }
    Ok(())
}

/// Of moa-tiny's products, and of those of a model of 8B.
fn rows_up_to_a_padded_size_change_no_bit_of_the_others() -> Verdict {
    for ops in Ops::all()? {
        for (n, k) in [
            (256, 256),
            (1408, 256),
            (256, 704),
            (8192, 256),
            (6144, 4096),
            (4096, 4096),
            (28_672, 4096),
            (4096, 14_336),
            (32_000, 4096),
        ] {
            let x = ops.operations.random(&[256, k], ops.dtype(), 1.0, 1).unwrap();
            let w = ops.operations.random(&[n, k], ops.dtype(), 1.0, 2).unwrap();
            let mut differing = Vec::new();
            for output in [ops.dtype(), Dtype::F32] {
                let product = |rows| {
                    let x = x.rows(0..rows).unwrap();
                    ops.operations.linear(&x, &w, None, output).unwrap().to_f32().unwrap()
                };
                for rows in
                    [3, 5, 6, 7, 9, 11, 13, 15, 17, 20, 23, 25, 31, 33, 40, 50, 65, 100, 200]
                {
                    let (exact, padded) = (product(rows), product(padded_rows(rows)));
                    if exact != padded[..exact.len()] {
                        differing.push((output, rows));
                    }
                }
            }
            println!("{} {n} x {k}: {differing:?}", ops.dtype());
            assert!(differing.is_empty(), "{} {n} x {k}: {differing:?}", ops.dtype());
        }
    }
    Ok(())
}

fn wide_inputs_of_products_are_rounded() -> Verdict {
    for ops in Ops::all()? {
        let (x, xs) = ops.random(&[5, 64], Dtype::F32, 1);
        let (w, ws) = ops.random(&[16, 64], ops.dtype(), 2);
        let rounded: Vec<f64> = xs.iter().map(|x| round(ops.dtype(), *x as f32).into()).collect();
        let y = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap();
        ops.close(&y, &product(&rounded, &ws, 64, 16), 1e-4);
    }
    Ok(())
}

fn embedding_and_rows_copy() -> Verdict {
    for ops in Ops::all()? {
        let (table, values) = ops.random(&[100, 40], ops.dtype(), 1);
        let ids = [99, 0, 7, 7];
        let expected: Vec<f64> =
            ids.iter().flat_map(|id| values[id * 40..][..40].to_vec()).collect();
        let embedded = ops.operations.embed(&table, &ids.map(|id| id as u32), 1.0).unwrap();
        assert_eq!((embedded.shape(), embedded.dtype()), (&[4, 40][..], Dtype::F32));
        ops.close(&embedded, &expected, 0.0);
        let scaled = ops.operations.embed(&table, &ids.map(|id| id as u32), 0.25).unwrap();
        ops.close(&scaled, &expected.iter().map(|x| x / 4.0).collect::<Vec<_>>(), 0.0);
        let picked = ops.operations.rows(&table, &ids).unwrap();
        assert_eq!(picked.dtype(), ops.dtype());
        assert_eq!(f64s(&picked.to_f32().unwrap()), expected);
        let heads = table.reshape(&[100, 5, 8]).unwrap();
        let picked = ops.operations.rows(&heads, &ids).unwrap();
        assert_eq!(picked.shape(), [4, 5, 8]);
        assert_eq!(f64s(&picked.to_f32().unwrap()), expected);
        assert_eq!(ops.operations.rows(&heads, &[]).unwrap().shape(), [0, 5, 8]);
        // Logits of a vocabulary of any size.
        let (logits, values) = ops.random(&[100, 41], Dtype::F32, 2);
        let expected: Vec<f64> =
            ids.iter().flat_map(|id| values[id * 41..][..41].to_vec()).collect();
        let picked = ops.operations.rows(&logits, &ids).unwrap();
        assert_eq!((picked.shape(), picked.dtype()), (&[4, 41][..], Dtype::F32));
        assert_eq!(f64s(&picked.to_f32().unwrap()), expected);
        assert_eq!(ops.operations.rows(&logits, &[]).unwrap().shape(), [0, 41]);
        assert!(matches!(ops.operations.rows(&logits, &[3, 100]), Err(Error::Argument(_))));
    }
    Ok(())
}

fn norm_swiglu_and_add() -> Verdict {
    for ops in Ops::all()? {
        for (rows, cols) in [(1, 8), (3, 256), (70, 4096), (2, 8200)] {
            let (x, xs) = ops.random(&[rows, cols], Dtype::F32, 1);
            let (w, ws) = ops.random(&[cols], Dtype::F32, 2);
            let normed = xs.chunks(cols).flat_map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                row.iter().zip(&ws).map(move |(x, w)| x / (mean + 1e-5).sqrt() * w)
            });
            let y = ops.operations.rms_norm(&x, &w, 1e-5).unwrap();
            ops.close(&y, &normed.collect::<Vec<_>>(), 1e-5);

            let (up, ups) = ops.random(&[rows, cols], ops.dtype(), 3);
            let (gate, gates) = ops.random(&[rows, cols], ops.dtype(), 4);
            let silu = gates.iter().zip(&ups).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
            let y = ops.operations.swiglu(&gate, &up).unwrap();
            ops.close(&y, &silu.collect::<Vec<_>>(), 1e-5);

            for (y, ys) in [(up, ups), (x.clone(), xs.clone())] {
                let sum = xs.iter().zip(&ys).map(|(x, y)| x + y).collect::<Vec<_>>();
                ops.close(&ops.operations.add(x.clone(), &y).unwrap(), &sum, 0.0);
                ops.close(&x, &xs, 0.0);
            }
        }
    }
    Ok(())
}

fn rope_rotates_and_rotates_back() -> Verdict {
    for ops in Ops::all()? {
        for dtype in [ops.dtype(), Dtype::F32] {
            let (tokens, heads, dim) = (37, 3, 64);
            let (x, xs) = ops.random(&[tokens, heads, dim], dtype, 1);
            let angle = |token: usize, i: usize| token as f64 * 0.3 / (1 + i) as f64;
            let turns: Vec<f32> = (0..tokens)
                .flat_map(|t| (0..dim / 2).map(move |i| angle(t, i).sin_cos()))
                .flat_map(|(sin, cos)| [cos as f32, sin as f32])
                .collect();
            let turns = Tensor::from_f32(ops.device, &turns, &[tokens, dim], Dtype::F32).unwrap();
            let mut expected = xs.clone();
            for (row, head) in expected.chunks_exact_mut(dim).enumerate() {
                for i in 0..dim / 2 {
                    let (sin, cos) = angle(row / heads, i).sin_cos();
                    let (a, b) = (head[i], head[i + dim / 2]);
                    (head[i], head[i + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            let rotated = ops.operations.rope(&x, &turns, false).unwrap();
            ops.close(&rotated, &expected, 1e-6);
            ops.close(&x, &xs, 0.0);
            let back = ops.operations.rope(&rotated, &turns, true).unwrap();
            let slack = if dtype == Dtype::F32 { 1e-5 } else { 0.05 };
            ops.close(&back, &xs, slack);
        }
    }
    Ok(())
}

fn turns_are_the_angles_of_positions() -> Verdict {
    for ops in Ops::all()? {
        let plain: Vec<f64> = (0..32).map(|i| 5e5f64.powf(-f64::from(i) / 32.0)).collect();
        // The last half of the pairs is left as it is, without the factor.
        let slow = |(i, f): (usize, &f64)| if i < 16 { f / 8.0 } else { 0.0 };
        let slow: Vec<f64> = plain.iter().enumerate().map(slow).collect();
        let sequences = [(&plain, 1.0, 0..3), (&slow, 1.25, 131_070..131_072)];
        let turns = sequences.clone().map(|(inv_freq, scale, positions)| Turns {
            inv_freq,
            scale,
            positions,
        });
        let got = ops.operations.turns(&turns).unwrap();
        assert_eq!(got.shape(), [5, 64]);
        let expected = sequences.iter().flat_map(|(inv_freq, scale, positions)| {
            positions.clone().flat_map(move |position| {
                inv_freq.iter().flat_map(move |f| {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    let scale = if *f == 0.0 { 1.0 } else { *scale };
                    [cos * scale, sin * scale]
                })
            })
        });
        ops.close(&got, &expected.collect::<Vec<_>>(), 1e-9);
    }
    Ok(())
}

fn columns_are_views_that_every_operation_takes() -> Verdict {
    for ops in Ops::all()? {
        let (both, values) = ops.random(&[6, 48], ops.dtype(), 1);
        let part = |from: usize| -> Vec<f64> {
            values.chunks(48).flat_map(|row| row[from..from + 24].to_vec()).collect()
        };
        let [left, right] = [0..24, 24..48].map(|range| both.columns(range).unwrap());
        assert_eq!(f64s(&right.to_f32().unwrap()), part(24));
        let heads = right.clone().reshape(&[6, 3, 8]).unwrap();
        assert_eq!(f64s(&heads.to_f32().unwrap()), part(24));
        assert_eq!(f64s(&heads.reshape(&[3, 48]).unwrap().to_f32().unwrap()), part(24));
        let silu = part(0).into_iter().zip(part(24)).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
        let y = ops.operations.swiglu(&left, &right).unwrap();
        ops.close(&y, &silu.collect::<Vec<_>>(), 1e-5);
        let (w, ws) = ops.random(&[16, 24], ops.dtype(), 2);
        let y = ops.operations.linear(&right, &w, None, Dtype::F32).unwrap();
        ops.close(&y, &product(&part(24), &ws, 24, 16), 1e-4);
        let error = both.columns(40..49).unwrap_err();
        assert!(matches!(error, Error::Argument(_)), "{error}");
    }
    Ok(())
}

fn argmax_is_the_lowest_of_the_largest_and_refuses_what_is_no_number() -> Verdict {
    for ops in Ops::all()? {
        let cols = 5003;
        let mut values = normal(5 * cols, 1);
        for at in [17, 4000, 5002] {
            values[at] = 50.0;
            values[cols + at] = if at == 17 { f32::NEG_INFINITY } else { 50.0 };
        }
        values[2 * cols + 9] = f32::NAN;
        values[3 * cols + 9] = f32::INFINITY;
        values[4 * cols..].fill(f32::NEG_INFINITY);
        let x = Tensor::from_f32(ops.device, &values, &[5, cols], Dtype::F32).unwrap();
        let into = ops.operations.indices([0; 5].into_iter(), 1).unwrap();
        ops.operations.argmax(&x, &into).unwrap();
        assert_eq!(into.to_host().unwrap(), [17, 4000, -1, -1, -1]);
    }
    Ok(())
}

fn operations_refuse_what_does_not_fit() -> Verdict {
    for ops in Ops::all()? {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(ops.device, shape, dtype).unwrap();
        let (narrow, f32s) = (ops.dtype(), Dtype::F32);
        let weight = zeros(&[16, 64], narrow);
        let o = &ops.operations;
        for (name, result) in [
            ("x", o.linear(&zeros(&[3, 48], narrow), &weight, None, narrow)),
            ("weight", o.linear(&zeros(&[3, 64], narrow), &zeros(&[64], narrow), None, narrow)),
            ("sum", o.linear_add(zeros(&[2, 16], f32s), &zeros(&[3, 64], narrow), &weight, None)),
            (
                "bias",
                o.linear_add(
                    zeros(&[3, 16], f32s),
                    &zeros(&[3, 64], narrow),
                    &weight,
                    Some(&zeros(&[8], f32s)),
                ),
            ),
            ("x", o.rms_norm(&zeros(&[3, 12], f32s), &zeros(&[12], f32s), 1e-5)),
            ("up", o.swiglu(&zeros(&[3, 16], narrow), &zeros(&[3, 8], narrow))),
            ("turns", o.rope(&zeros(&[3, 1, 8], narrow), &zeros(&[2, 8], f32s), false)),
        ] {
            let error = result.unwrap_err();
            assert!(
                matches!(&error, Error::Argument(ArgumentError { argument, .. }) if *argument == name),
                "{error}"
            );
        }
        let other = if narrow == Dtype::F16 { Dtype::Bf16 } else { Dtype::F16 };
        for (name, result) in [
            ("weight", o.linear(&zeros(&[3, 64], narrow), &zeros(&[16, 64], f32s), None, narrow)),
            ("out", o.linear(&zeros(&[1, 64], narrow), &weight, None, other)),
            ("sum", o.linear_add(zeros(&[3, 16], narrow), &zeros(&[3, 64], narrow), &weight, None)),
            ("index", o.embed(&weight, &[16], 1.0)),
            ("index", o.rows(&weight, &[3, 16])),
            ("x", o.add(zeros(&[3, 16], narrow), &zeros(&[3, 16], narrow))),
        ] {
            let error = result.unwrap_err();
            assert!(
                matches!(&error, Error::Argument(ArgumentError { argument, .. }) if *argument == name),
                "{error}"
            );
        }
        let error = Operations::new(ops.device, f32s).unwrap_err();
        assert!(
            matches!(error, Error::Argument(ArgumentError { argument: "dtype", .. })),
            "{error}"
        );
    }
    Ok(())
}
