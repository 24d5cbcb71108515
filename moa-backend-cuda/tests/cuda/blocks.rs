//! Weights in quantised blocks, against the numbers that they hold.

use moa_backend_cuda::{BlockType, BlockWeight, Dtype, Error, Tensor, Weight};
use moa_conformance::{BlockProducts, Stop, Trial, Verdict, block_products, random_blocks, trials};
use moa_core::ArgumentError;

use super::ops::{Ops, product};
use crate::gpu::round;

pub(crate) fn trials() -> Vec<Trial> {
    let suites = [("blocks_f16", 0), ("blocks_bf16", 1)].map(|(name, at)| {
        block_products(name, move || {
            let ops = Ops::all()?.into_iter().nth(at);
            ops.map(OfBlocks).ok_or_else(|| Stop::ignored("no operations of this type"))
        })
    });
    let own = trials![
        widened_weights_are_the_elements_rounded,
        a_row_does_not_depend_on_the_others_nor_on_how_many_there_are,
        norm_and_gate_around_a_row_give_the_bits_of_operations_apart,
        kinds_may_differ_among_layers_of_one_input,
        sums_and_biases_are_added,
        columns_of_others_are_taken,
        large_weights_are_uploaded_and_widened_in_parts,
        weights_that_cannot_be_held_are_refused,
    ];
    suites.into_iter().flatten().chain(own).collect()
}

struct OfBlocks(Ops);

fn upload(ops: &Ops, kind: BlockType, blocks: &[u8], shape: [usize; 2]) -> BlockWeight {
    let row_bytes = shape[1] / kind.block_len() * kind.block_bytes();
    let fill = |rows: std::ops::Range<usize>, to: &mut [u8]| {
        to.copy_from_slice(&blocks[rows.start * row_bytes..rows.end * row_bytes]);
    };
    ops.operations.upload_blocks(kind, shape, fill).unwrap()
}

/// A random weight with its elements.
fn weight(ops: &Ops, kind: BlockType, shape: [usize; 2], seed: u64) -> (BlockWeight, Vec<f64>) {
    let blocks = random_blocks(kind, shape[0] * shape[1], seed);
    let mut values = vec![0.0; shape[0] * shape[1]];
    kind.widen(&blocks, 0, &mut values);
    (upload(ops, kind, &blocks, shape), values.into_iter().map(f64::from).collect())
}

impl BlockProducts for OfBlocks {
    fn product(
        &self,
        kind: BlockType,
        blocks: &[u8],
        shape: [usize; 2],
        x: &[f32],
    ) -> Option<Vec<f32>> {
        let Ops { device, operations } = &self.0;
        let x_shape = [x.len() / shape[1], shape[1]];
        let x = Tensor::from_f32(device, x, &x_shape, self.0.dtype()).unwrap();
        let weight = upload(&self.0, kind, blocks, shape);
        Some(operations.linear(&x, &weight, None, Dtype::F32).unwrap().to_f32().unwrap())
    }

    fn rows(
        &self,
        kind: BlockType,
        blocks: &[u8],
        shape: [usize; 2],
        rows: &[u32],
    ) -> Option<Vec<f32>> {
        let weight = upload(&self.0, kind, blocks, shape);
        Some(self.0.operations.embed_blocks(&weight, rows, 1.0).unwrap().to_f32().unwrap())
    }

    fn round(&self, x: f32) -> f32 {
        round(self.0.dtype(), x)
    }

    /// Few rows: sums in f32. Many: elements are rounded to the 16-bit type.
    fn share(&self, rows: usize) -> f64 {
        match (rows, self.0.dtype()) {
            (0..65, _) => 1e-5,
            (_, Dtype::F16) => 6e-4,
            _ => 4.5e-3,
        }
    }
}

fn widened_weights_are_the_elements_rounded() -> Verdict {
    for ops in Ops::all()? {
        for kind in BlockType::ALL {
            let shape = [37, 2 * kind.block_len() + if kind.block_len() == 32 { 32 } else { 0 }];
            let (weight, values) = weight(&ops, kind, shape, 3);
            let wide = ops.operations.widen_blocks(&weight).unwrap();
            assert_eq!((wide.shape(), wide.dtype()), (&shape[..], ops.dtype()));
            let expected: Vec<f32> = values.iter().map(|x| round(ops.dtype(), *x as f32)).collect();
            assert!(wide.to_f32().unwrap() == expected, "{kind}");
        }
    }
    Ok(())
}

fn a_row_does_not_depend_on_the_others_nor_on_how_many_there_are() -> Verdict {
    for ops in Ops::all()? {
        for kind in BlockType::ALL {
            let (n, k) = (40, 2304);
            let (x, _) = ops.random(&[64, k], ops.dtype(), 1);
            let (w, _) = weight(&ops, kind, [n, k], 2);
            let product = |x: &Tensor| {
                ops.operations.linear(x, &w, None, Dtype::F32).unwrap().to_f32().unwrap()
            };
            let all = product(&x);
            for rows in [0..1, 1..3, 5..13, 2..12, 60..64, 0..31, 3..50] {
                let part = product(&x.rows(rows.clone()).unwrap());
                assert!(part == all[rows.start * n..rows.end * n], "{kind} {rows:?}");
            }
        }
    }
    Ok(())
}

/// One row takes kernels that norm and gate; two rows take one operation after the other.
fn norm_and_gate_around_a_row_give_the_bits_of_operations_apart() -> Verdict {
    for ops in Ops::all()? {
        let operations = &ops.operations;
        let values = |x: Tensor| x.to_f32().unwrap();
        for (kind, k) in BlockType::ALL.into_iter().flat_map(|kind| [(kind, 256), (kind, 2304)]) {
            let (x, _) = ops.random(&[2, k], Dtype::F32, 1);
            let (norm, _) = ops.random(&[k], Dtype::F32, 2);
            let (bias, _) = ops.random(&[352], Dtype::F32, 3);
            let norm = (&norm, 1e-5);
            let row = x.rows(0..1).unwrap();
            // Halves of whole tiles of 16 rows, and others; more tiles than a GPU has multiprocessors.
            for n in [352, 48, if k == 256 { 5408 } else { 32 }] {
                let (w, _) = weight(&ops, kind, [n, k], 4);
                let (weights, biases) = ([Weight::from(&w)], (n == 352).then_some(&bias));
                let normed = operations.rms_norm(&x, norm.0, norm.1).unwrap();
                for output in [ops.dtype(), Dtype::F32] {
                    let all =
                        values(operations.linears(&normed, &weights, biases, output).unwrap());
                    let one = operations.normed_linears(&row, norm, &weights, biases, output);
                    assert!(values(one.unwrap()) == all[..n], "{kind} {n} {k}");
                }
                let all = values(operations.normed_swiglu(&x, norm, &weights, None).unwrap());
                let one = values(operations.normed_swiglu(&row, norm, &weights, None).unwrap());
                assert!(one == all[..n / 2], "{kind} {n} {k}");
            }
        }
    }
    Ok(())
}

fn kinds_may_differ_among_layers_of_one_input() -> Verdict {
    for ops in Ops::all()? {
        let k = 512;
        let parts = [(BlockType::Q4K, 48), (BlockType::Q6K, 16), (BlockType::Q8_0, 8)];
        let weights = parts.map(|(kind, n)| weight(&ops, kind, [n, k], n as u64));
        let (wide, wide_values) = ops.random(&[24, k], ops.dtype(), 9);
        let (bias, biases) = ops.random(&[96], Dtype::F32, 4);
        for m in [1, 11, 70] {
            let (x, xs) = ops.random(&[m, k], ops.dtype(), 5);
            let all: Vec<Weight<'_>> =
                weights.iter().map(|(w, _)| w.into()).chain([(&wide).into()]).collect();
            let y = ops.operations.linears(&x, &all, Some(&bias), Dtype::F32).unwrap();
            let values = weights.iter().flat_map(|(_, values)| values.clone());
            let values: Vec<f64> = values.chain(wide_values.iter().copied()).collect();
            let mut expected = product(&xs, &values, k, 96);
            expected.iter_mut().enumerate().for_each(|(i, y)| *y += biases[i % 96]);
            // Elements are up to 256, and may be rounded.
            ops.close(&y, &expected, if m < 65 { 0.05 } else { 20.0 });
        }
    }
    Ok(())
}

fn sums_and_biases_are_added() -> Verdict {
    for ops in Ops::all()? {
        let [n, k] = [40, 320];
        let (w, ws) = weight(&ops, BlockType::Q4_0, [n, k], 1);
        let (bias, biases) = ops.random(&[n], Dtype::F32, 3);
        for m in [1, 9, 70] {
            let (x, xs) = ops.random(&[m, k], ops.dtype(), 2);
            let (sum, before) = ops.random(&[m, n], Dtype::F32, 4);
            let expected = product(&xs, &ws, k, n).into_iter().zip(&before).enumerate();
            let expected: Vec<f64> = expected.map(|(i, (y, x))| y + x + biases[i % n]).collect();
            let y = ops.operations.linear_add(sum, &x, &w, Some(&bias)).unwrap();
            ops.close(&y, &expected, if m < 65 { 1e-3 } else { 0.2 });
            let y = ops.operations.linear(&x, &w, Some(&bias), ops.dtype()).unwrap();
            assert_eq!(y.dtype(), ops.dtype());
            let added: Vec<f64> =
                expected.iter().zip(&before).map(|(y, before)| y - before).collect();
            // Rounded before the bias, and after it.
            let twice = if ops.dtype() == Dtype::F16 { 0.01 } else { 0.08 };
            ops.close(&y, &added, if m < 65 { twice } else { 0.2 });
        }
    }
    Ok(())
}

fn columns_of_others_are_taken() -> Verdict {
    for ops in Ops::all()? {
        let (both, values) = ops.random(&[90, 192], ops.dtype(), 1);
        let right = both.columns(96..192).unwrap();
        let rights: Vec<f64> = values.chunks(192).flat_map(|row| row[96..].to_vec()).collect();
        for kind in [BlockType::Q4_0, BlockType::Q5_1, BlockType::Q8_0] {
            let (w, ws) = weight(&ops, kind, [16, 96], 2);
            for m in [3, 20, 90] {
                let y = ops.operations.linear(&right.rows(0..m).unwrap(), &w, None, Dtype::F32);
                let allowed = if m < 65 { 1e-3 } else { 0.5 };
                ops.close(&y.unwrap(), &product(&rights[..m * 96], &ws, 96, 16), allowed);
            }
            let none = right.rows(0..0).unwrap();
            let y = ops.operations.linear(&none, &w, None, Dtype::F32).unwrap();
            assert_eq!(y.shape(), [0, 16]);
        }
    }
    Ok(())
}

/// 9 MB of blocks, 4 at a time; 150 MB of widened weights, 134 at a time.
fn large_weights_are_uploaded_and_widened_in_parts() -> Verdict {
    for ops in Ops::all()? {
        let [n, k] = [600, 131_072];
        let blocks = random_blocks(BlockType::Q4_0, 16 * k, 3);
        let all: Vec<u8> = (0..n / 8).flat_map(|_| blocks[..blocks.len() / 2].to_vec()).collect();
        let w = upload(&ops, BlockType::Q4_0, &all, [n, k]);
        let (x, _) = ops.random(&[66, k], ops.dtype(), 2);
        let few = ops.operations.linear(&x.rows(0..64).unwrap(), &w, None, Dtype::F32).unwrap();
        let few = few.to_f32().unwrap();
        // Every eighth row is the same.
        for row in few.chunks(n) {
            assert!(row.iter().zip(&row[8..]).all(|(a, b)| a == b));
        }
        let many = ops.operations.linear(&x, &w, None, Dtype::F32).unwrap();
        let expected: Vec<f64> = few.iter().map(|x| f64::from(*x)).collect();
        let size = (expected.iter().map(|x| x * x).sum::<f64>() / (64 * n) as f64).sqrt();
        ops.close(&many.rows(0..64).unwrap(), &expected, 0.05 * size);
        assert!(size > 10.0, "{size}");
    }
    Ok(())
}

fn weights_that_cannot_be_held_are_refused() -> Verdict {
    for ops in Ops::all()? {
        for (kind, k) in [(BlockType::Q4_0, 48), (BlockType::Q6K, 128)] {
            let refused = ops.operations.upload_blocks(kind, [16, k], |_, _| {});
            assert!(matches!(refused, Err(Error::Argument(ArgumentError { .. }))), "{kind}");
        }
        let (w, _) = weight(&ops, BlockType::Q8_0, [16, 64], 1);
        let (x, _) = ops.random(&[2, 96], ops.dtype(), 1);
        let refused = ops.operations.linear(&x, &w, None, Dtype::F32);
        assert!(matches!(refused, Err(Error::Argument(_))));
        let refused = ops.operations.embed_blocks(&w, &[16], 1.0);
        assert!(matches!(refused, Err(Error::Argument(_))));
    }
    Ok(())
}
