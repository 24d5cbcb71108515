//! The other operations of a Llama against plain loops in f64.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_WGPU=1` they fail then.

mod gpu;
#[path = "gpu/recorded.rs"]
mod recorded;

use std::process::ExitCode;

use gpu::{Alone, device};
use half::{bf16, f16};
use moa_backend_wgpu::cubecl::launched::LaunchedKernels;
use moa_backend_wgpu::ops::Layer;
use moa_backend_wgpu::{BlockType, Device, Dtype, Error, Matrix, Result, Tensor, ops};
use moa_conformance::{BlockProducts, Verdict, block_products, random_blocks, run, trials};
use moa_core::ArgumentError;
use recorded::{a_recorded_step_is_the_same_step, steps_that_are_not_recorded};

fn main() -> ExitCode {
    let own = trials![
        linear_is_the_matrix_product,
        layers_of_one_input_and_ends_of_branches,
        many_rows_may_be_rounded,
        rows_are_gathered_and_normed,
        rotations_and_pairwise_operations,
        wrong_shapes_are_refused,
        gradients_of_the_operations,
        layers_in_different_blocks,
        one_row_is_normed_where_it_is_multiplied,
        a_recorded_step_is_the_same_step,
        steps_that_are_not_recorded,
    ];
    let blocks = block_products("blocks", || {
        let (device, _alone) = device()?;
        Ok(OfBlocks { device, _alone })
    });
    run(own.into_iter().chain(blocks))
}

struct OfBlocks {
    device: Device,
    _alone: Alone,
}

impl BlockProducts for OfBlocks {
    fn product(
        &self,
        kind: BlockType,
        blocks: &[u8],
        [n, k]: [usize; 2],
        x: &[f32],
    ) -> Option<Vec<f32>> {
        let weight = self.matrix(kind, blocks, [n, k])?;
        let x = Tensor::new(&self.device, x, &[x.len() / k, k]).unwrap();
        Some(ops::linear(&x, &weight, None).unwrap().to_vec().unwrap())
    }

    fn rows(
        &self,
        kind: BlockType,
        blocks: &[u8],
        shape: [usize; 2],
        rows: &[u32],
    ) -> Option<Vec<f32>> {
        let table = self.matrix(kind, blocks, shape)?;
        Some(ops::embed(&table, rows, 1.0).unwrap().to_vec().unwrap())
    }

    /// All of it is f32.
    fn share(&self, _rows: usize) -> f64 {
        1e-5
    }
}

impl OfBlocks {
    fn matrix(&self, kind: BlockType, blocks: &[u8], [n, k]: [usize; 2]) -> Option<Matrix> {
        Matrix::keeps(kind).then(|| Matrix::in_blocks(&self.device, blocks, n, k, kind).unwrap())
    }
}

fn layers_in_different_blocks() -> Verdict {
    let (device, _alone) = device()?;
    let k = 512;
    let kinds = [BlockType::Q4K, BlockType::Q4K, BlockType::Q8_0];
    let weights = kinds.map(|kind| {
        let blocks = random_blocks(kind, 24 * k, kind.block_bytes() as u64);
        let mut values = vec![0.0; 24 * k];
        kind.widen(&blocks, 0, &mut values);
        (Matrix::in_blocks(&device, &blocks, 24, k, kind).unwrap(), values)
    });
    let bias = Tensor::new(&device, &numbers(24, 91), &[24]).unwrap();
    for m in [1, 5, 40] {
        let x = Tensor::new(&device, &numbers(m * k, 577), &[m, k]).unwrap();
        let layers = [0, 1, 2].map(|i| Layer { weight: &weights[i].0, bias: Some(&bias) });
        let together = ops::linears(&x, &layers, Dtype::F32)?;
        for (layer, together) in layers.into_iter().zip(together) {
            let alone = ops::linears(&x, &[layer], Dtype::F32)?.remove(0);
            assert_eq!(alone.to_vec()?, together.to_vec()?);
            let plus = ops::linear_add(&alone, &x, layer, Dtype::F32)?.to_vec()?;
            let twice: Vec<f64> = alone.to_vec()?.iter().map(|y| 2.0 * f64::from(*y)).collect();
            for (got, expected) in plus.into_iter().zip(twice) {
                assert!((f64::from(got) - expected).abs() < 1e-5 * expected.abs().max(10.0));
            }
        }
        let d_y = Tensor::new(&device, &numbers(m * 24, 77), &[m, 24]).unwrap();
        let d_x = ops::linear_backward(&d_y, &weights[0].0)?.to_vec()?;
        for (i, got) in d_x.iter().enumerate() {
            let (row, column) = (i / k, i % k);
            let terms = (0..24).map(|j| {
                f64::from(numbers(m * 24, 77)[row * 24 + j])
                    * f64::from(weights[0].1[j * k + column])
            });
            let expected: f64 = terms.sum();
            assert!((f64::from(*got) - expected).abs() < 1e-4 * expected.abs().max(10.0));
            if i > 2000 {
                break;
            }
        }
    }
    let blocks = random_blocks(BlockType::Q5K, 256, 1);
    let refused = Matrix::in_blocks(&device, &blocks, 1, 256, BlockType::Q5K);
    assert!(matches!(refused, Err(Error::Argument(ArgumentError { argument: "kind", .. }))));
    let blocks = random_blocks(BlockType::Q4_0, 64, 1);
    let refused = Matrix::in_blocks(&device, &blocks, 1, 48, BlockType::Q4_0);
    assert!(matches!(refused, Err(Error::Argument(ArgumentError { argument: "blocks", .. }))));
    Ok(())
}

/// A matrix in blocks, and its elements.
fn blocks(device: &Device, rows: usize, cols: usize, kind: BlockType) -> (Matrix, Vec<f64>) {
    let bytes = random_blocks(kind, rows * cols, rows as u64);
    let mut values = vec![0.0; rows * cols];
    kind.widen(&bytes, 0, &mut values);
    let wide = values.into_iter().map(f64::from).collect();
    (Matrix::in_blocks(device, &bytes, rows, cols, kind).unwrap(), wide)
}

/// By one kernel for all layers, or for a SwiGLU, where there is one row of whole loads.
fn one_row_is_normed_where_it_is_multiplied() -> Verdict {
    let (device, _alone) = device()?;
    let plain = [(1, 576), (1, 40), (3, 64), (1, 12), (20, 64)].map(|size| (size, None));
    let kinds = [BlockType::Q4_0, BlockType::Q8_0, BlockType::Q4K].map(Some);
    let in_blocks = kinds.map(|kind| ((1, 512), kind));
    for ((rows, cols), kind) in plain.into_iter().chain(in_blocks) {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let made = |features: usize| match kind {
                Some(kind) => blocks(&device, features, cols, kind),
                None => matrix(&device, features, cols, dtype),
            };
            let (x, g) = (numbers(rows * cols, 577), numbers(cols, 37));
            let b = numbers(33, 91);
            let input = Tensor::new(&device, &x, &[rows, cols]).unwrap();
            let norm = Tensor::new(&device, &g, &[cols]).unwrap();
            let bias = Tensor::new(&device, &b, &[33]).unwrap();
            let weights = [70, 33, 33].map(made);
            let layer = |i: usize| Layer { weight: &weights[i].0, bias: (i == 1).then_some(&bias) };
            let normed = |at: usize| {
                let row = &x[at / cols * cols..][..cols];
                let mean = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / cols as f64;
                f64::from(x[at]) / (mean + 0.1).sqrt() * f64::from(g[at % cols])
            };
            let normed: Vec<f64> = (0..x.len()).map(normed).collect();
            let product = |i: usize| -> Vec<f64> {
                let (weight, w) = &weights[i];
                let features = weight.rows();
                let of = |at: usize| {
                    let (row, feature) = (at / features * cols, at % features);
                    let terms = (0..cols).map(|c| normed[row + c] * w[feature * cols + c]);
                    terms.sum::<f64>() + if i == 1 { f64::from(b[feature]) } else { 0.0 }
                };
                (0..rows * features).map(of).collect()
            };
            let launched = LaunchedKernels::new();
            let outs =
                ops::normed_linears(&input, &norm, 0.1, &[0, 1, 2].map(layer), Dtype::F32).unwrap();
            let kernels = launched.finish().len();
            for (i, out) in outs.iter().enumerate() {
                close(out, product(i));
            }
            let launched = LaunchedKernels::new();
            let out = ops::normed_swiglu(&input, &norm, 0.1, [layer(2), layer(1)], Dtype::F32);
            let of_pair = launched.finish().len();
            let pairs = product(2).into_iter().zip(product(1));
            close(&out.unwrap(), pairs.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up));
            let whole = cols.is_multiple_of(16 / dtype.bytes()) || kind.is_some();
            assert_eq!((kernels == 1, of_pair == 1), (rows == 1 && whole, rows == 1 && whole));
        }
    }
    let (weight, _) = matrix(&device, 4, 8, Dtype::F32);
    let layer = Layer { weight: &weight, bias: None };
    let zeros = |len: usize| Tensor::new(&device, &vec![0.0; len], &[1, len]).unwrap();
    let norm = |len: usize| zeros(len).reshape(&[len]).unwrap();
    let refused = ops::normed_swiglu(&zeros(8), &norm(4), 0.1, [layer, layer], Dtype::F32);
    assert!(is_shape(refused, "norm"));
    let refused = ops::normed_swiglu(&zeros(4), &norm(4), 0.1, [layer, layer], Dtype::F32);
    assert!(is_shape(refused, "x"));
    Ok(())
}

fn numbers(n: usize, by: usize) -> Vec<f32> {
    (0..n).map(|i| (i * by % 1009) as f32 / 504.0 - 1.0).collect()
}

#[track_caller]
fn close(got: &Tensor, expected: impl IntoIterator<Item = f64>) {
    let got = got.to_vec().unwrap();
    let expected: Vec<f64> = expected.into_iter().collect();
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs() / expected.abs().max(1.0);
        assert!(error < 1e-5, "{at}: {got} {expected}");
    }
}

/// A matrix, and its elements as they were rounded.
fn matrix(device: &Device, rows: usize, cols: usize, dtype: Dtype) -> (Matrix, Vec<f64>) {
    let values = numbers(rows * cols, 331);
    let (bytes, rounded): (Vec<u8>, Vec<f64>) = match dtype {
        Dtype::F32 => (
            values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            values.iter().map(|&x| x.into()).collect(),
        ),
        Dtype::F16 => {
            let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            (
                halves.iter().flat_map(|x| x.to_le_bytes()).collect(),
                halves.iter().map(|x| x.to_f64()).collect(),
            )
        }
        _ => {
            let halves: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            (
                halves.iter().flat_map(|x| x.to_le_bytes()).collect(),
                halves.iter().map(|x| x.to_f64()).collect(),
            )
        }
    };
    (Matrix::new(device, &bytes, rows, cols, dtype).unwrap(), rounded)
}

fn linear_is_the_matrix_product() -> Verdict {
    let (device, _alone) = device()?;
    // One row, few and many; features and columns beside the tiles' sizes.
    let sizes = [(1, 70, 96), (3, 5, 6), (17, 33, 20), (70, 131, 72)];
    for (rows, features, cols) in sizes {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let (weight, w) = matrix(&device, features, cols, dtype);
            let (x, b) = (numbers(rows * cols, 577), numbers(features, 91));
            let bias = Tensor::new(&device, &b, &[features]).unwrap();
            let input = Tensor::new(&device, &x, &[rows, cols]).unwrap();
            let product = |with_bias: f64| {
                let at = move |i: usize| (i / features * cols, i % features * cols, i % features);
                let (x, w, b) = (&x, &w, &b);
                (0..rows * features).map(move |i| {
                    let (row, feature, bias) = at(i);
                    let terms = (0..cols).map(|c| f64::from(x[row + c]) * w[feature + c]);
                    terms.sum::<f64>() + with_bias * f64::from(b[bias])
                })
            };
            close(&ops::linear(&input, &weight, None).unwrap(), product(0.0));
            close(&ops::linear(&input, &weight, Some(&bias)).unwrap(), product(1.0));
        }
    }
    Ok(())
}

fn layers_of_one_input_and_ends_of_branches() -> Verdict {
    let (device, _alone) = device()?;
    // One row, few and many; rows of whole loads, and not.
    for (rows, cols) in [(1, 576), (3, 64), (9, 40), (16, 64), (17, 64), (2, 12)] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let x = numbers(rows * cols, 577);
            let input = Tensor::new(&device, &x, &[rows, cols]).unwrap();
            let b = numbers(33, 91);
            let bias = Tensor::new(&device, &b, &[33]).unwrap();
            let weights = [70, 33, 8, 9].map(|features| matrix(&device, features, cols, dtype));
            let product = |(weight, w): &(Matrix, Vec<f64>), more: &dyn Fn(usize) -> f64| {
                let features = weight.rows();
                let at = |i: usize| (i / features * cols, i % features * cols);
                let dot = |(row, feature): (usize, usize)| -> f64 {
                    (0..cols).map(|c| f64::from(x[row + c]) * w[feature + c]).sum()
                };
                (0..rows * features).map(|i| dot(at(i)) + more(i)).collect::<Vec<f64>>()
            };
            let layer = |i: usize| Layer { weight: &weights[i].0, bias: (i == 1).then_some(&bias) };
            let outs = ops::linears(&input, &[0, 1, 2, 3].map(layer), Dtype::F32).unwrap();
            for (i, (out, weight)) in outs.iter().zip(&weights).enumerate() {
                let bias = |at: usize| if i == 1 { f64::from(b[at % 33]) } else { 0.0 };
                close(out, product(weight, &bias));
            }
            let plus = numbers(rows * 33, 7);
            let residual = Tensor::new(&device, &plus, &[rows, 33]).unwrap();
            let out = ops::linear_add(&residual, &input, layer(1), Dtype::F32).unwrap();
            close(&out, product(&weights[1], &|at| f64::from(plus[at]) + f64::from(b[at % 33])));
            let refused = ops::linear_add(&bias, &input, layer(1), Dtype::F32);
            assert!(is_shape(refused, "plus"));
        }
    }
    Ok(())
}

fn many_rows_may_be_rounded() -> Verdict {
    let (device, _alone) = device()?;
    // Sizes that a product takes, and those for which there may be none.
    let sizes = [
        (40, 64, 96),
        (130, 200, 72),
        (1030, 256, 128),
        (40, 33, 12),
        (9, 5, 10),
        (2, 7, 12),
        (0, 8, 12),
    ];
    for (rows, features, cols) in sizes {
        let (weight, w) = matrix(&device, features, cols, Dtype::F16);
        let (x, plus) = (numbers(rows * cols, 577), numbers(rows * features, 13));
        let b = numbers(features, 91);
        let bias = Tensor::new(&device, &b, &[features]).unwrap();
        let input = Tensor::new(&device, &x, &[rows, cols]).unwrap();
        let residual = Tensor::new(&device, &plus, &[rows, features]).unwrap();
        let layer = Layer { weight: &weight, bias: Some(&bias) };
        let out = ops::linear_add(&residual, &input, layer, Dtype::F16).unwrap();
        let rounds = device.multiplies(Dtype::F16);
        for (i, got) in out.to_vec().unwrap().into_iter().enumerate() {
            let (row, feature) = (i / features * cols, i % features * cols);
            // What each term may be off, where a number of up to 1 is rounded to 11 bits.
            let (mut sum, mut size) = (0.0, 1.0);
            for c in 0..cols {
                let term = f64::from(x[row + c]) * w[feature + c];
                (sum, size) = (sum + term, size + term.abs());
            }
            let expected = sum + f64::from(plus[i]) + f64::from(b[i % features]);
            let most = size * if rounds { 4.9e-4 } else { 2e-6 };
            assert!((f64::from(got) - expected).abs() <= most, "{i}: {got} {expected}");
        }
    }
    // Weights of another type are multiplied in it.
    let x = Tensor::new(&device, &numbers(20 * 64, 577), &[20, 64]).unwrap();
    let weights = [Dtype::F16, Dtype::F32].map(|dtype| matrix(&device, 24, 64, dtype).0);
    let layers = [0, 1].map(|i| Layer { weight: &weights[i], bias: None });
    let outs = ops::linears(&x, &layers, Dtype::F16).unwrap();
    let exact = ops::linear(&x, &weights[1], None).unwrap().to_vec().unwrap();
    assert!(outs[1].to_vec().unwrap() == exact);
    for (got, exact) in outs[0].to_vec().unwrap().into_iter().zip(exact) {
        assert!((got - exact).abs() < 0.1, "{got} {exact}");
    }
    assert!(ops::linears(&x, &[], Dtype::F16).unwrap().is_empty());
    Ok(())
}

fn rows_are_gathered_and_normed() -> Verdict {
    let (device, _alone) = device()?;
    let (table, values) = matrix(&device, 11, 10, Dtype::Bf16);
    let row = |r: usize| values[r * 10..(r + 1) * 10].to_vec();
    let embedded = ops::embed(&table, &[7, 0, 7, 10], 1.0).unwrap();
    close(&embedded, [7, 0, 7, 10].into_iter().flat_map(row));
    let scaled = ops::embed(&table, &[7, 10], 3.0).unwrap();
    close(&scaled, [7, 10].into_iter().flat_map(row).map(|x| 3.0 * x));
    close(&ops::rows(&embedded, &[3, 1]).unwrap(), [10, 0].into_iter().flat_map(row));
    let none = ops::rows(&embedded, &[]).unwrap();
    assert_eq!((none.shape(), none.to_vec().unwrap()), (&[0, 10][..], vec![]));

    let weight = numbers(10, 7);
    let norm = ops::rms_norm(&embedded, &Tensor::new(&device, &weight, &[10]).unwrap(), 0.1);
    let expected = [7, 0, 7, 10].into_iter().flat_map(|r| {
        let x = row(r);
        let mean = x.iter().map(|x| x * x).sum::<f64>() / 10.0;
        let scaled = x.into_iter().zip(&weight);
        scaled.map(move |(x, &w)| x / (mean + 0.1).sqrt() * f64::from(w)).collect::<Vec<_>>()
    });
    close(&norm.unwrap(), expected);
    Ok(())
}

fn rotations_and_pairwise_operations() -> Verdict {
    let (device, _alone) = device()?;
    let (x, y) = (numbers(5 * 3 * 8, 13), numbers(5 * 3 * 8, 29));
    let angles: Vec<f32> = (0..5 * 4).map(|i| i as f32 * 0.3).collect();
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
        Tensor::new(&device, &values, &[5, 4]).unwrap()
    };
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let input = Tensor::new(&device, &x, &[5, 3, 8]).unwrap();
    let rotated = ops::rope(&input, &cos, &sin, false).unwrap();
    let expected = (0..x.len()).map(|at| {
        let (i, half) = (at % 8, 4);
        let angle = f64::from(angles[at / 24 * 4 + i % half]);
        let (own, other) = (f64::from(x[at]), f64::from(x[at - i + (i + half) % 8]));
        let sign = if i < half { -1.0 } else { 1.0 };
        own * angle.cos() + sign * other * angle.sin()
    });
    close(&rotated, expected);
    let back = ops::rope(&rotated, &cos, &sin, true).unwrap();
    close(&back, x.iter().map(|&x| x.into()));

    let other = Tensor::new(&device, &y, &[5, 3, 8]).unwrap();
    let pairs = || x.iter().zip(&y).map(|(&x, &y)| (f64::from(x), f64::from(y)));
    close(&ops::add(&input, &other).unwrap(), pairs().map(|(x, y)| x + y));
    let silu = pairs().map(|(x, y)| x / (1.0 + (-x).exp()) * y);
    close(&ops::swiglu(&input, &other).unwrap(), silu);
    Ok(())
}

fn is_shape(result: Result<Tensor>, named: &str) -> bool {
    matches!(result, Err(Error::Argument(ArgumentError { argument, .. })) if argument == named)
}

fn wrong_shapes_are_refused() -> Verdict {
    let (device, _alone) = device()?;
    let zeros =
        |shape: &[usize]| Tensor::new(&device, &vec![0.0; shape.iter().product()], shape).unwrap();
    let (weight, _) = matrix(&device, 4, 6, Dtype::F16);
    assert!(is_shape(ops::linear(&zeros(&[2, 5]), &weight, None), "x"));
    assert!(is_shape(ops::linear(&zeros(&[2, 6]), &weight, Some(&zeros(&[5]))), "bias"));
    assert!(is_shape(ops::rms_norm(&zeros(&[2, 6]), &zeros(&[5]), 0.1), "weight"));
    assert!(is_shape(ops::add(&zeros(&[2, 6]), &zeros(&[6, 2])), "right side"));
    assert!(is_shape(
        ops::rope(&zeros(&[2, 1, 6]), &zeros(&[2, 3]), &zeros(&[1, 3]), false),
        "sin"
    ));
    assert!(is_shape(zeros(&[2, 6]).reshape(&[5]), "shape"));
    assert!(is_shape(Tensor::new(&device, &[1.0], &[2]), "data"));
    assert!(is_shape(Tensor::new(&device, &[1.0], &[1, 1, 1, 1]), "shape"));
    assert!(matches!(
        ops::embed(&weight, &[4], 1.0),
        Err(Error::Argument(ArgumentError { argument: "id", .. }))
    ));
    assert!(matches!(
        ops::rows(&zeros(&[2, 6]), &[2]),
        Err(Error::Argument(ArgumentError { argument: "row", .. }))
    ));
    assert!(matches!(
        Matrix::new(&device, &[0; 6], 1, 3, Dtype::Bf16),
        Err(Error::Argument(ArgumentError { argument: "cols", .. }))
    ));
    assert!(matches!(
        Matrix::new(&device, &[0; 5], 1, 3, Dtype::F32),
        Err(Error::Argument(ArgumentError { argument: "bytes", .. }))
    ));
    Ok(())
}

fn gradients_of_the_operations() -> Verdict {
    let (device, _alone) = device()?;
    for (rows, features, cols) in [(1, 70, 96), (70, 131, 72)] {
        for dtype in [Dtype::F32, Dtype::F16] {
            let (weight, w) = matrix(&device, features, cols, dtype);
            let d_y = numbers(rows * features, 577);
            let input = Tensor::new(&device, &d_y, &[rows, features]).unwrap();
            let expected = (0..rows * cols).map(|at| {
                let (row, col) = (at / cols * features, at % cols);
                (0..features).map(|f| f64::from(d_y[row + f]) * w[f * cols + col]).sum()
            });
            close(&ops::linear_backward(&input, &weight).unwrap(), expected);
        }
    }

    // The others by central differences of the operations themselves, in f64.
    let (x, up, d_y) = (numbers(3 * 20, 13), numbers(3 * 20, 29), numbers(3 * 20, 7));
    let weight = numbers(20, 11);
    let tensor = |x: &[f32]| Tensor::new(&device, x, &[3, 20]).unwrap();
    let f64s = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let differences = |x: &[f32], objective: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
        let shifted = |at: usize, by: f64| {
            let mut x = f64s(x);
            x[at] += by;
            objective(&x)
        };
        (0..x.len()).map(|at| (shifted(at, 1e-5) - shifted(at, -1e-5)) / 2e-5).collect()
    };
    let norm = |x: &[f64]| -> f64 {
        let rows = x.chunks(20).zip(d_y.chunks(20)).map(|(x, d)| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / 20.0;
            let terms = x.iter().zip(&weight).zip(d);
            terms.map(|((x, &w), &d)| x * f64::from(w) * f64::from(d)).sum::<f64>()
                / (mean + 0.1).sqrt()
        });
        rows.sum()
    };
    let weights = Tensor::new(&device, &weight, &[20]).unwrap();
    let found = ops::rms_norm_backward(&tensor(&x), &weights, 0.1, &tensor(&d_y)).unwrap();
    close(&found, differences(&x, &norm));

    let swiglu = |gate: &[f64], up: &[f64]| -> f64 {
        let terms = gate.iter().zip(up).zip(&d_y);
        terms.map(|((x, up), &d)| x / (1.0 + (-x).exp()) * up * f64::from(d)).sum()
    };
    let (d_gate, d_up) = ops::swiglu_backward(&tensor(&x), &tensor(&up), &tensor(&d_y)).unwrap();
    close(&d_gate, differences(&x, &|x| swiglu(x, &f64s(&up))));
    close(&d_up, differences(&up, &|up| swiglu(&f64s(&x), up)));

    let placed = ops::place_rows(&tensor(&x), 1..4, 5).unwrap();
    let zeros = || std::iter::repeat_n(0.0, 20);
    close(&placed, zeros().chain(f64s(&x)).chain(zeros()));
    assert!(matches!(
        ops::place_rows(&tensor(&x), 3..6, 5),
        Err(Error::Argument(ArgumentError { argument: "rows", .. }))
    ));
    Ok(())
}
