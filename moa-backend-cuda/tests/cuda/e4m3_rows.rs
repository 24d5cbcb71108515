//! Activations of 8-bit floats, against arithmetic in f64 on the numbers that rounding leaves.

use moa_backend_cuda::{Dtype, Error, Operations, Tensor, e4m3};
use moa_conformance::{Stop, Trial, Verdict, f64s, normal, trials};

use super::e4m3::weight;
use super::gpu::{device, round};
use super::ops::{Ops, product};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        a_device_without_them_is_refused,
        rows_are_rounded_as_those_of_weights,
        products_are_those_of_rounded_rows,
        rows_that_are_not_finite_give_nan_alone,
        a_row_depends_neither_on_the_others_nor_on_rows_up_to_the_padded_size,
        few_rows_and_odd_outputs_take_activations_of_16_bits,
    ]
}

/// Operations that round activations.
fn all() -> Result<[Ops; 2], Stop> {
    Ok(Ops::all()?.map(|Ops { device, operations }| Ops {
        device,
        operations: operations.with_e4m3_activations().unwrap(),
    }))
}

/// Those, where the device has such products.
fn able() -> Result<[Ops; 2], Stop> {
    match device()?.architecture().has_e4m3() {
        true => all(),
        false => Err(Stop::ignored("a device without products of e4m3")),
    }
}

fn a_device_without_them_is_refused() -> Verdict {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let made = Operations::new(device()?, dtype).unwrap().with_e4m3_activations();
        match (device()?.architecture().has_e4m3(), made) {
            (true, Ok(_)) | (false, Err(Error::NoE4m3Products { .. })) => {}
            (able, made) => panic!("able: {able}, {made:?}"),
        }
    }
    Ok(())
}

/// The numbers that rows of `k` are rounded to.
fn rounded(rows: &[f32], k: usize) -> Vec<f32> {
    let mut bytes = vec![0; k];
    let row = |row: &[f32]| {
        let scale = e4m3::encode_row(row, &mut bytes).unwrap();
        bytes.iter().map(|byte| scale * e4m3::decode(*byte)).collect::<Vec<_>>()
    };
    rows.chunks(k).flat_map(row).collect()
}

/// Every finite number of 16 bits, in rows that reach from the smallest to the largest and in rows of similar numbers.
fn rows_are_rounded_as_those_of_weights() -> Verdict {
    const K: usize = 256;
    for ops in able()? {
        let dtype = ops.dtype();
        let number = |bits: u32| match dtype {
            Dtype::Bf16 => f32::from_bits(bits << 16),
            _ => half::f16::from_bits(bits as u16).to_f32(),
        };
        // Factors and products of them with codes are normal numbers of f32.
        let kept = |x: &f32| x.is_finite() && (*x == 0.0 || (1e-30..1e30).contains(&x.abs()));
        let near: Vec<f32> = (0..1 << 16).map(number).filter(kept).collect();
        let count = near.len() / K;
        let far = (0..count * K).map(|at| near[at % K * count + at / K]);
        let mut values: Vec<f32> = near[..count * K].to_vec();
        values.extend(far);
        values.extend([0.0; K]);
        let mut identity = vec![0.0; K * K];
        (0..K).for_each(|i| identity[i * K + i] = 1.0);
        let (w, _) = weight(&ops, [K, K], &identity);
        let x = Tensor::from_f32(ops.device, &values, &[2 * count + 1, K], dtype).unwrap();
        assert!(x.shape()[0] >= 129);
        let y = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap().to_f32().unwrap();
        let expected = rounded(&values, K);
        for (at, (y, expected)) in y.iter().zip(&expected).enumerate() {
            assert!(y == expected, "{} became {y}, expected {expected}", values[at]);
        }
    }
    Ok(())
}

/// Sums are those of the tensor cores, which align what they add.
fn products_are_those_of_rounded_rows() -> Verdict {
    for ops in able()? {
        for [n, k] in [[16, 16], [48, 144], [576, 576], [136, 1536], [24, 4112], [2048, 336]] {
            let mut values = normal(300 * k, 1);
            // Rows of different sizes, up to 2.
            values.iter_mut().enumerate().for_each(|(i, x)| {
                *x = round(ops.dtype(), *x * ((i / k % 20) as f32 / 10.0 - 0.9).exp2());
            });
            let x = Tensor::from_f32(ops.device, &values, &[300, k], ops.dtype()).unwrap();
            let xs = f64s(&rounded(&values, k));
            let (w, ws) = weight(&ops, [n, k], &normal(n * k, 2));
            let (bias, biases) = ops.random(&[n], Dtype::F32, 3);
            let expected = product(&xs, &ws, k, n);
            let sums = TOLERANCE * 2.0 * (k as f64).sqrt();
            for m in [129, 130, 200, 256, 257, 300] {
                let x = x.rows(0..m).unwrap();
                for output in [ops.dtype(), Dtype::F32] {
                    let y = ops.operations.linear(&x, &w, None, output).unwrap();
                    assert_eq!(y.dtype(), output);
                    ops.close(&y, &expected[..m * n], sums);
                }
                let (sum, before) = ops.random(&[m, n], Dtype::F32, 4);
                let added = expected.iter().zip(&before).enumerate();
                let added: Vec<f64> = added.map(|(i, (y, x))| y + x + biases[i % n]).collect();
                let y = ops.operations.linear_add(sum, &x, &w, Some(&bias)).unwrap();
                ops.close(&y, &added, sums);
            }
        }
    }
    Ok(())
}

/// Of the spread of the largest rows' sums, which rounding of activations moves by 2.6e-2 of it and tensor cores by 1.2e-4.
const TOLERANCE: f64 = 4e-3;

fn rows_that_are_not_finite_give_nan_alone() -> Verdict {
    for ops in able()? {
        let mut values = normal(140 * 64, 1);
        for (row, bad) in [(3, f32::NAN), (70, f32::INFINITY), (139, f32::NEG_INFINITY)] {
            values[row * 64 + 17] = bad;
        }
        let x = Tensor::from_f32(ops.device, &values, &[140, 64], ops.dtype()).unwrap();
        let (w, _) = weight(&ops, [32, 64], &normal(32 * 64, 2));
        let y = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap().to_f32().unwrap();
        for (row, y) in y.chunks(32).enumerate() {
            let bad = [3, 70, 139].contains(&row);
            assert!(y.iter().all(|y| y.is_nan() == bad), "row {row}: {y:?}");
        }
    }
    Ok(())
}

fn a_row_depends_neither_on_the_others_nor_on_rows_up_to_the_padded_size() -> Verdict {
    for ops in able()? {
        let o = &ops.operations;
        let (x, _) = ops.random(&[256, 704], ops.dtype(), 1);
        let w = o.random_e4m3([4096, 704], 1.0, 2).unwrap();
        let product = |x: &Tensor| o.linear(x, &w, None, Dtype::F32).unwrap().to_f32().unwrap();
        for (padded, counts) in [(192, [129, 130, 150]), (256, [193, 200, 255])] {
            let all = product(&x.rows(0..padded).unwrap());
            for rows in counts {
                let part = product(&x.rows(0..rows).unwrap());
                assert!(part == all[..rows * 4096], "{rows} of {padded} rows");
                // The same rows beside others.
                let part = product(&x.rows(padded - rows..padded).unwrap());
                assert!(part == all[(padded - rows) * 4096..], "the last {rows} of {padded} rows");
            }
        }
    }
    Ok(())
}

fn few_rows_and_odd_outputs_take_activations_of_16_bits() -> Verdict {
    for (rounding, exact) in able()?.into_iter().zip(Ops::all()?) {
        for (n, rows, same) in
            [(64, 128, true), (64, 129, false), (24, 300, false), (20, 300, true)]
        {
            let (x, _) = rounding.random(&[rows, 96], rounding.dtype(), 1);
            let w = rounding.operations.random_e4m3([n, 96], 1.0, 2).unwrap();
            let [rounded, plain] = [&rounding, &exact].map(|ops| {
                ops.operations.linear(&x, &w, None, Dtype::F32).unwrap().to_f32().unwrap()
            });
            assert_eq!(rounded == plain, same, "{rows} rows, {n} outputs");
        }
        // A weight that lies in tiles, as on Hopper without rounding, is no weight that cuBLASLt could read.
        if rounding.device.architecture().has_wgmma() {
            let (x, _) = rounding.random(&[300, 96], rounding.dtype(), 1);
            let w = exact.operations.random_e4m3([64, 96], 1.0, 2).unwrap();
            let [rounded, plain] = [&rounding, &exact].map(|ops| {
                ops.operations.linear(&x, &w, None, Dtype::F32).unwrap().to_f32().unwrap()
            });
            assert!(rounded == plain, "a weight in tiles");
        }
    }
    Ok(())
}
