//! Weights of 8-bit floats, against arithmetic in f64 on the numbers that they hold.

use moa_backend_cuda::{Dtype, E4m3Weight, Error, Tensor, e4m3};
use moa_conformance::{Stop, Trial, Verdict, f64s, normal, trials};
use moa_core::ArgumentError;

use super::ops::{Ops, product};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        products_are_those_of_the_numbers_held,
        large_weights_are_widened_in_parts,
        outputs_need_not_be_a_multiple_of_anything,
        a_row_does_not_depend_on_the_others_nor_on_how_many_there_are,
        every_number_arrives_and_so_does_its_scale,
        wide_inputs_and_columns_of_others_are_taken,
        random_weights_are_uniform,
        weights_that_cannot_be_held_are_refused,
    ]
}

/// Of each element type, products by the kernels that the device chooses and by those that every GPU has.
fn both() -> Result<impl Iterator<Item = [Ops; 2]>, Stop> {
    let portable =
        |ops: Ops| Ops { device: ops.device, operations: ops.operations.without_wgmma() };
    Ok(Ops::all()?.into_iter().zip(Ops::all()?.map(portable)).map(|(own, every)| [own, every]))
}

fn kinds() -> Result<impl Iterator<Item = Ops>, Stop> {
    Ok(both()?.flatten())
}

/// A weight of the device, and its numbers.
pub(crate) fn weight(ops: &Ops, [n, k]: [usize; 2], values: &[f32]) -> (E4m3Weight, Vec<f64>) {
    let mut bytes = vec![0; n * k];
    let rows = values.chunks(k).zip(bytes.chunks_mut(k));
    let rounded = rows.flat_map(|(values, bytes)| {
        let scale = f64::from(e4m3::encode_row(values, bytes).unwrap());
        bytes.iter().map(move |byte| scale * f64::from(e4m3::decode(*byte))).collect::<Vec<_>>()
    });
    let rounded = rounded.collect();
    let fill = |range: std::ops::Range<usize>, to: &mut Vec<f32>| to.extend(&values[range]);
    (ops.operations.upload_e4m3([n, k], fill).unwrap(), rounded)
}

/// What a weight holds, by products with the rows of an identity matrix, `rows` at a time.
fn numbers(ops: &Ops, weight: &E4m3Weight, rows: usize) -> Vec<f32> {
    let [n, k] = weight.shape();
    let mut identity = vec![0.0; k * k];
    (0..k).for_each(|i| identity[i * k + i] = 1.0);
    let identity = Tensor::from_f32(ops.device, &identity, &[k, k], ops.dtype()).unwrap();
    let mut numbers = vec![0.0; n * k];
    for start in (0..k).step_by(rows) {
        let x = identity.rows(start..k.min(start + rows)).unwrap();
        let y = ops.operations.linear(&x, weight, None, Dtype::F32).unwrap().to_f32().unwrap();
        for (column, row) in y.chunks(n).enumerate() {
            (0..n).for_each(|i| numbers[i * k + start + column] = row[i]);
        }
    }
    numbers
}

/// Sums are f32, of the same numbers as the reference: what is allowed is what products of 16-bit
/// weights are allowed.
fn products_are_those_of_the_numbers_held() -> Verdict {
    for kinds in both()? {
        // Tiles of more than 8 tokens want thousands of outputs.
        for ([n, k], most) in [
            ([40, 16], 300),
            ([72, 336], 300),
            ([136, 2048], 300),
            ([24, 4112], 300),
            ([8200, 336], 66),
            // So many that k is not divided.
            ([17_000, 144], 20),
        ] {
            let ops = &kinds[0];
            let (x, xs) = ops.random(&[most, k], ops.dtype(), 1);
            let values = normal(n * k, 2);
            let [(own, ws), (every, _)] = kinds.each_ref().map(|ops| weight(ops, [n, k], &values));
            let (bias, biases) = ops.random(&[n], Dtype::F32, 3);
            let expected = product(&xs, &ws, k, n);
            let sums = 1e-6 * k as f64;
            let counts =
                [1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 41, 64, 65, 66, 81, 97, 113, 128, 129, 300];
            for m in counts.into_iter().filter(|m| *m <= most) {
                let x = x.rows(0..m).unwrap();
                let (before, befores) = ops.random(&[m, n], Dtype::F32, 4);
                let added = expected.iter().zip(&befores).enumerate();
                let added: Vec<f64> = added.map(|(i, (y, x))| y + x + biases[i % n]).collect();
                for (ops, w) in kinds.iter().zip([&own, &every]) {
                    for output in [ops.dtype(), Dtype::F32] {
                        let y = ops.operations.linear(&x, w, None, output).unwrap();
                        assert_eq!(y.dtype(), output);
                        ops.close(&y, &expected[..m * n], sums);
                    }
                    let sum = before.clone();
                    let y = ops.operations.linear_add(sum, &x, w, Some(&bias)).unwrap();
                    ops.close(&y, &added, sums);
                }
            }
        }
    }
    Ok(())
}

/// 273 MB of widened weights, 134 at a time.
fn large_weights_are_widened_in_parts() -> Verdict {
    for ops in kinds()? {
        let (o, [n, k]) = (&ops.operations, [520, 262_160]);
        let w = o.random_e4m3([n, k], 1.0, 1).unwrap();
        let x = o.random(&[130, k], ops.dtype(), 1.0, 2).unwrap();
        let few = o.linear(&x.rows(0..64).unwrap(), &w, None, Dtype::F32).unwrap();
        let many = o.linear(&x, &w, None, Dtype::F32).unwrap();
        // Sums of a third of their terms' number; what is missing would be of the order of 100.
        ops.close(&many.rows(0..64).unwrap(), &f64s(&few.to_f32().unwrap()), 0.1);
        let size = f64s(&few.to_f32().unwrap()).iter().map(|x| x * x).sum::<f64>();
        assert!((size / (64 * n) as f64).sqrt() > 100.0, "{size}");
    }
    Ok(())
}

/// Widths that cuBLASLt would not take.
fn outputs_need_not_be_a_multiple_of_anything() -> Verdict {
    for ops in kinds()? {
        let (x, xs) = ops.random(&[70, 176], ops.dtype(), 1);
        for n in [1, 71, 8201] {
            let (w, ws) = weight(&ops, [n, 176], &normal(n * 176, 2));
            for m in [1, 7, 14, 20, 70] {
                let x = x.rows(0..m).unwrap();
                let y = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap();
                ops.close(&y, &product(&xs[..m * 176], &ws, 176, n), 2e-4);
            }
        }
    }
    Ok(())
}

fn a_row_does_not_depend_on_the_others_nor_on_how_many_there_are() -> Verdict {
    for ops in kinds()? {
        // The first has so many outputs that every kernel is chosen for some number of rows.
        // The last has so many that an H200's multiprocessors take as many blocks as they can.
        for [n, k] in [[8200, 720], [264, 4112], [34_000, 336], [51_000, 336]] {
            let (x, _) = ops.random(&[128, k], ops.dtype(), 1);
            let w = ops.operations.random_e4m3([n, k], 1.0, 2).unwrap();
            let product = |x: &Tensor| {
                ops.operations.linear(x, &w, None, Dtype::F32).unwrap().to_f32().unwrap()
            };
            let all = product(&x);
            for rows in [
                0..1,
                1..3,
                5..13,
                2..12,
                60..77,
                0..31,
                96..128,
                50..87,
                80..128,
                3..67,
                40..119,
                10..100,
                0..100,
            ] {
                let part = product(&x.rows(rows.clone()).unwrap());
                assert!(part == all[rows.start * n..rows.end * n], "{rows:?} of [{n}, {k}]");
            }
        }
    }
    Ok(())
}

fn every_number_arrives_and_so_does_its_scale() -> Verdict {
    for ops in kinds()? {
        let codes = (0..=0xffu8).map(|code| if code & 0x7f == 0x7f { 0 } else { code });
        let row: Vec<f32> = codes.map(e4m3::decode).collect();
        // Powers of two that f16 still has room for.
        let values: Vec<f32> =
            (0..8).flat_map(|i| row.iter().map(move |x| x * 2f32.powi(2 * i - 13))).collect();
        let (w, _) = weight(&ops, [8, 256], &values);
        // A few rows, more, and so many that the weight is widened.
        for rows in [1, 8, 64, 256] {
            assert!(numbers(&ops, &w, rows) == values, "by {rows} rows");
        }
    }
    Ok(())
}

fn wide_inputs_and_columns_of_others_are_taken() -> Verdict {
    for ops in kinds()? {
        let (both, values) = ops.random(&[150, 96], ops.dtype(), 1);
        let (w, ws) = weight(&ops, [16, 48], &normal(16 * 48, 2));
        let right = both.columns(48..96).unwrap();
        let rights: Vec<f64> = values.chunks(96).flat_map(|row| row[48..].to_vec()).collect();
        for m in [3, 20, 150] {
            let y = ops.operations.linear(&right.rows(0..m).unwrap(), &w, None, Dtype::F32);
            ops.close(&y.unwrap(), &product(&rights[..m * 48], &ws, 48, 16), 1e-4);
        }
        let wide = Tensor::from_f32(ops.device, &right.to_f32().unwrap(), &[150, 48], Dtype::F32);
        let wide = wide.unwrap();
        let y = ops.operations.linear(&wide.rows(0..5).unwrap(), &w, None, Dtype::F32).unwrap();
        ops.close(&y, &product(&rights[..5 * 48], &ws, 48, 16), 1e-4);
        let none = wide.rows(0..0).unwrap();
        assert_eq!(ops.operations.linear(&none, &w, None, Dtype::F32).unwrap().shape(), [0, 16]);
    }
    Ok(())
}

fn random_weights_are_uniform() -> Verdict {
    for ops in Ops::all()? {
        let amplitude = 0.03;
        let w = ops.operations.random_e4m3([64, 512], amplitude, 7).unwrap();
        let values = f64s(&numbers(&ops, &w, 512));
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / n;
        let amplitude = f64::from(amplitude);
        assert!(mean.abs() < 0.02 * amplitude, "{mean}");
        assert!((variance / (amplitude * amplitude / 3.0) - 1.0).abs() < 0.03, "{variance}");
        // Rounding moves by a sixteenth at most.
        assert!(values.iter().all(|x| x.abs() <= 1.07 * amplitude));
        let rows = values.chunks(512).collect::<Vec<_>>();
        assert!(rows[0] != rows[1], "rows are alike");
        let again = ops.operations.random_e4m3([64, 512], 0.03, 7).unwrap();
        assert!(f64s(&numbers(&ops, &again, 512)) == values);
        let other = ops.operations.random_e4m3([64, 512], 0.03, 8).unwrap();
        assert!(f64s(&numbers(&ops, &other, 512)) != values);
    }
    Ok(())
}

fn weights_that_cannot_be_held_are_refused() -> Verdict {
    for ops in Ops::all()? {
        let o = &ops.operations;
        let ones = |range: std::ops::Range<usize>, to: &mut Vec<f32>| {
            to.extend(range.map(|_| 1.0));
        };
        let error = o.upload_e4m3([4, 24], ones).unwrap_err();
        assert!(
            matches!(error, Error::Argument(ArgumentError { argument: "weight", .. })),
            "{error}"
        );
        let error = o.random_e4m3([4, 24], 1.0, 0).unwrap_err();
        assert!(
            matches!(error, Error::Argument(ArgumentError { argument: "weight", .. })),
            "{error}"
        );
        let error = o.upload_e4m3([4, 32], |_, to| to.push(1.0)).unwrap_err();
        assert!(
            matches!(error, Error::Argument(ArgumentError { argument: "fill", .. })),
            "{error}"
        );
        for bad in [f32::NAN, f32::INFINITY] {
            let bad = |range: std::ops::Range<usize>, to: &mut Vec<f32>| {
                to.extend(range.map(|i| if i == 2 * 32 + 5 { bad } else { 1.0 }));
            };
            let error = o.upload_e4m3([4, 32], bad).unwrap_err();
            let named = matches!(error, Error::NotFinite { row: 2, column: 5, .. });
            assert!(named, "{error}");
        }
        let w = o.upload_e4m3([4, 32], ones).unwrap();
        let x = Tensor::zeros(ops.device, &[3, 16], ops.dtype()).unwrap();
        let error = o.linear(&x, &w, None, Dtype::F32).unwrap_err();
        assert!(matches!(error, Error::Argument(ArgumentError { argument: "x", .. })), "{error}");
        let y = Tensor::zeros(ops.device, &[3, 8], Dtype::F32).unwrap();
        let x = Tensor::zeros(ops.device, &[3, 32], ops.dtype()).unwrap();
        let error = o.linear_into(&x, &w, &y).unwrap_err();
        assert!(matches!(error, Error::Argument(ArgumentError { argument: "out", .. })), "{error}");
        // Nothing at all is nothing.
        let empty = o.upload_e4m3([0, 32], ones).unwrap();
        assert_eq!(o.linear(&x, &empty, None, Dtype::F32).unwrap().shape(), [3, 0]);
        let none = o.upload_e4m3([4, 0], ones).unwrap();
        let x = Tensor::zeros(ops.device, &[3, 0], ops.dtype()).unwrap();
        let y = o.linear(&x, &none, None, Dtype::F32).unwrap();
        assert_eq!(y.to_f32().unwrap(), [0.0; 12]);
    }
    Ok(())
}
