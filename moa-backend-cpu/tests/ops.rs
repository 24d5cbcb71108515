//! The operations around attention against f64, and their gradients against differences.

use half::{bf16, f16};
use moa_backend_cpu::ops::{self, WeightData, WeightRef};
use moa_backend_cpu::{Error, Tensor};
use moa_core::ArgumentError;

/// Numbers of about unit normal distribution.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.732).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(normal(shape.iter().product(), seed), shape).unwrap()
}

/// Gradient of `sum(dy * f(x))` by `x` through central differences of an f64 function.
fn numeric(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let objective = |x: &[f64]| f(x).iter().zip(dy).map(|(y, d)| y * d).sum::<f64>();
    let shifted = |at: usize, by: f64| {
        let mut x = x.to_vec();
        x[at] += by;
        objective(&x)
    };
    (0..x.len()).map(|at| (shifted(at, 1e-5) - shifted(at, -1e-5)) / 2e-5).collect()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[track_caller]
fn close(a: &[f32], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((f64::from(*a) - b).abs() <= tolerance * (1.0 + b.abs()), "{at}: {a} {b}");
    }
}

#[test]
fn linear_and_its_gradient_equal_the_naive_product() {
    for (m, n, k) in [
        (1, 5, 7),
        (2, 70, 64),
        (3, 33, 40),
        (7, 40, 100),
        (8, 300, 33),
        (10, 50, 7),
        (70, 100, 300),
        (127, 49, 64),
        (530, 9, 20),
        (20, 10, 600),
    ] {
        let x = tensor(&[m, k], 1);
        let dy = tensor(&[m, n], 2);
        let bias = normal(n, 3);
        let w = normal(n * k, 4);
        let (h, b): (Vec<f16>, Vec<bf16>) =
            w.iter().map(|&w| (f16::from_f32(w), bf16::from_f32(w))).unzip();
        let h_wide: Vec<f32> = h.iter().map(|w| w.to_f32()).collect();
        let b_wide: Vec<f32> = b.iter().map(|w| w.to_f32()).collect();
        let weights = [
            (WeightData::F32(&w), &w),
            (WeightData::F16(&h), &h_wide),
            (WeightData::Bf16(&b), &b_wide),
        ];
        for (data, wide) in weights {
            let weight = WeightRef::new(data, n, k).unwrap();
            let mut y = vec![0.0; m * n];
            let mut dx = vec![0.0; m * k];
            for i in 0..m {
                for j in 0..n {
                    for c in 0..k {
                        let w = f64::from(wide[j * k + c]);
                        y[i * n + j] += f64::from(x.data()[i * k + c]) * w;
                        dx[i * k + c] += f64::from(dy.data()[i * n + j]) * w;
                    }
                }
            }
            close(ops::linear(&x, weight, None).unwrap().data(), &y, 3e-5);
            close(ops::linear_backward_input(&dy, weight).unwrap().data(), &dx, 3e-5);
            for row in y.chunks_exact_mut(n) {
                row.iter_mut().zip(&bias).for_each(|(y, b)| *y += f64::from(*b));
            }
            close(ops::linear(&x, weight, Some(&bias)).unwrap().data(), &y, 3e-5);
        }
    }
}

#[test]
fn linear_does_not_depend_on_other_rows() {
    let w = normal(64 * 96, 1);
    let weight = WeightRef::new(WeightData::F32(&w), 64, 96).unwrap();
    for m in [2, 40, 200] {
        let x = tensor(&[m, 96], 2);
        let mut other = tensor(&[m, 96], 3);
        other.data_mut()[96..192].copy_from_slice(&x.data()[96..192]);
        let (a, b) =
            (ops::linear(&x, weight, None).unwrap(), ops::linear(&other, weight, None).unwrap());
        assert_eq!(a.data()[64..128], b.data()[64..128]);
    }
}

#[test]
fn rms_norm_and_its_gradient() {
    for k in [1, 5, 64, 100] {
        let (x, dy, weight) = (tensor(&[3, k], 1), tensor(&[3, k], 2), normal(k, 3));
        let norm = |x: &[f64]| -> Vec<f64> {
            x.chunks(k)
                .flat_map(|row| {
                    let r = (row.iter().map(|x| x * x).sum::<f64>() / k as f64 + 1e-5).sqrt();
                    row.iter()
                        .zip(&weight)
                        .map(move |(x, w)| x / r * f64::from(*w))
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        let wide = f64s(x.data());
        close(ops::rms_norm(&x, &weight, 1e-5).unwrap().data(), &norm(&wide), 1e-5);
        let dx = numeric(&wide, &f64s(dy.data()), norm);
        close(ops::rms_norm_backward(&x, &weight, 1e-5, &dy).unwrap().data(), &dx, 1e-4);
    }
}

#[test]
fn swiglu_and_its_gradients() {
    let (mut gate, up, dy) = (tensor(&[5, 37], 1), tensor(&[5, 37], 2), tensor(&[5, 37], 3));
    gate.data_mut()[..4].copy_from_slice(&[-120.0, 120.0, -20.0, 20.0]);
    let (g, u, d) = (f64s(gate.data()), f64s(up.data()), f64s(dy.data()));
    let swiglu = |gate: &[f64], up: &[f64]| -> Vec<f64> {
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    };
    close(ops::swiglu(&gate, &up).unwrap().data(), &swiglu(&g, &u), 1e-5);
    let (d_gate, d_up) = ops::swiglu_backward(&gate, &up, &dy).unwrap();
    close(d_gate.data(), &numeric(&g, &d, |g| swiglu(g, &u)), 1e-4);
    close(d_up.data(), &numeric(&u, &d, |u| swiglu(&g, u)), 1e-4);
}

#[test]
fn rope_rotates_pairs_and_back() {
    let (positions, half) = (50, 4);
    let angle = |p: usize, i: usize| p as f64 * 10f64.powf(-(i as f64));
    let table = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..positions * half).map(|at| f(angle(at / half, at % half)) as f32).collect()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let before = tensor(&[3, 2, 8], 1);
    let at = [7, 49, 0];
    let mut x = before.clone();
    ops::rope(&mut x, &cos, &sin, &at, false).unwrap();
    let mut expected = f64s(before.data());
    for (row, head) in expected.chunks_exact_mut(8).enumerate() {
        for i in 0..half {
            let (s, c) = angle(at[row / 2], i).sin_cos();
            let (a, b) = (head[i], head[i + half]);
            (head[i], head[i + half]) = (a * c - b * s, b * c + a * s);
        }
    }
    close(x.data(), &expected, 1e-6);
    ops::rope(&mut x, &cos, &sin, &at, true).unwrap();
    close(x.data(), &f64s(before.data()), 1e-6);
}

#[test]
fn add_assign_adds() {
    let mut x = tensor(&[100, 3], 1);
    let y = tensor(&[100, 3], 2);
    let sum: Vec<f64> = x.data().iter().zip(y.data()).map(|(a, b)| f64::from(a + b)).collect();
    ops::add_assign(&mut x, &y).unwrap();
    close(x.data(), &sum, 0.0);
}

#[test]
fn wrong_shapes_are_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape).unwrap();
    let w = [0.0; 12];
    let weight = WeightRef::new(WeightData::F32(&w), 3, 4).unwrap();
    let is_shape = |error: Error, named: &str| {
        assert!(
            matches!(&error, Error::Argument(ArgumentError { argument, .. }) if *argument == named),
            "{error}"
        );
    };
    is_shape(WeightRef::new(WeightData::F32(&w), 3, 5).unwrap_err(), "data");
    is_shape(ops::linear(&zeros(&[2, 5]), weight, None).unwrap_err(), "x");
    is_shape(ops::linear(&zeros(&[2, 4]), weight, Some(&[0.0])).unwrap_err(), "bias");
    is_shape(ops::linear_backward_input(&zeros(&[2, 4]), weight).unwrap_err(), "dy");
    is_shape(ops::rms_norm(&zeros(&[2, 4]), &[1.0; 3], 0.0).unwrap_err(), "weight");
    is_shape(
        ops::rms_norm_backward(&zeros(&[2, 4]), &[1.0; 4], 0.0, &zeros(&[2, 3])).unwrap_err(),
        "dy",
    );
    is_shape(ops::swiglu(&zeros(&[2, 4]), &zeros(&[4, 2])).unwrap_err(), "up");
    is_shape(
        ops::swiglu_backward(&zeros(&[2, 4]), &zeros(&[2, 4]), &zeros(&[2])).unwrap_err(),
        "dy",
    );
    is_shape(ops::add_assign(&mut zeros(&[2]), &zeros(&[3])).unwrap_err(), "y");
    let mut x = zeros(&[2, 1, 4]);
    is_shape(
        ops::rope(&mut zeros(&[2, 4]), &[1.0; 4], &[0.0; 4], &[0, 1], false).unwrap_err(),
        "x",
    );
    is_shape(
        ops::rope(&mut zeros(&[2, 1, 3]), &[1.0; 4], &[0.0; 4], &[0, 1], false).unwrap_err(),
        "x",
    );
    is_shape(ops::rope(&mut x, &[1.0; 4], &[0.0; 4], &[0], false).unwrap_err(), "positions");
    is_shape(ops::rope(&mut x, &[1.0; 4], &[0.0; 2], &[0, 1], false).unwrap_err(), "cos, sin");
    let error = ops::rope(&mut x, &[1.0; 4], &[0.0; 4], &[0, 2], false).unwrap_err();
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "positions", .. })));
}

#[test]
fn empty_batches_are_allowed() {
    let w: [f32; 12] = [0.0; 12];
    let weight = WeightRef::new(WeightData::F32(&w), 3, 4).unwrap();
    let none = Tensor::zeros(&[0, 4]).unwrap();
    assert_eq!(ops::linear(&none, weight, None).unwrap().shape(), [0, 3]);
    assert_eq!(ops::rms_norm(&none, &[1.0; 4], 1e-5).unwrap().shape(), [0, 4]);
    assert_eq!(ops::swiglu(&none, &none).unwrap().shape(), [0, 4]);
}
