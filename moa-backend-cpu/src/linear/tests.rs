//! Products of rows of every number with weights of every type, against f64.

use super::*;

/// Numbers between -1 and 1 that bf16 has not.
fn values(len: usize, mut seed: u32) -> Vec<f32> {
    let next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / 8_388_608.0 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[track_caller]
fn check(y: &[f32], x: &[f32], w: impl Fn(usize, usize) -> f32, (m, n, k): (usize, usize, usize)) {
    for i in 0..m {
        for j in 0..n {
            let product = |l: usize| f64::from(x[i * k + l]) * f64::from(w(j, l));
            let exact: f64 = (0..k).map(product).sum();
            let sizes: f64 = (0..k).map(|l| product(l).abs()).sum();
            let error = (f64::from(y[i * n + j]) - exact).abs();
            assert!(
                error <= 2e-6 * sizes + 1e-6,
                "{m} {n} {k} at {i}, {j}: {} {exact}",
                y[i * n + j]
            );
        }
    }
}

const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (2, 70, 33),
    (7, 33, 160),
    (15, 5, 31),
    (16, 64, 64),
    (17, 80, 1),
    (23, 113, 515),
    (270, 97, 40),
    (3, 40, 0),
];

#[test]
fn products_of_every_type_are_those_of_the_widened_weights() -> Result<()> {
    for (m, n, k) in SHAPES {
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let halves: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
        let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let x = Tensor::new(x, &[m, k])?;
        for (data, wide) in [
            (WeightData::F32(&w), w.clone()),
            (WeightData::F16(&halves), halves.iter().map(|w| w.to_f32()).collect()),
            (WeightData::Bf16(&narrow), narrow.iter().map(|w| w.to_f32()).collect()),
        ] {
            let y = linear(&x, WeightRef::new(data, n, k)?, None)?;
            check(y.data(), x.data(), |j, l| wide[j * k + l], (m, n, k));
            // The same weights, of `k` outputs and `n` inputs.
            let d_y = Tensor::new(values(m * n, 3), &[m, n])?;
            let d_x = linear_backward_input(&d_y, WeightRef::new(data, n, k)?)?;
            check(d_x.data(), d_y.data(), |l, j| wide[j * k + l], (m, k, n));
        }
    }
    Ok(())
}

#[test]
fn narrow_activations_are_rounded_and_nothing_else_is() -> Result<()> {
    let rounds = |x: &f32| bf16::from_f32(*x).to_f32();
    for (m, n, k) in SHAPES {
        let w: Vec<bf16> = values(n * k, 2).iter().map(|w| bf16::from_f32(*w)).collect();
        let x = Tensor::new(values(m * k, 1), &[m, k])?;
        let weight = WeightRef::new(WeightData::Bf16(&w), n, k)?.narrow_activations(true);
        let bias = values(n, 4);
        let y = linear(&x, weight, Some(&bias))?;
        #[cfg(target_arch = "x86_64")]
        let rounded = panels::pairs::Machine::here().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        let rounded = false;
        let as_taken = |x: &Tensor| -> Vec<f32> {
            x.data().iter().map(|x| if rounded { rounds(x) } else { *x }).collect()
        };
        let taken = as_taken(&x);
        let y: Vec<f32> = y.data().iter().zip(bias.iter().cycle()).map(|(y, b)| y - b).collect();
        check(&y, &taken, |j, l| w[j * k + l].to_f32(), (m, n, k));
        let joined = linears(&x, &[(weight, Some(&bias[..])), (weight, None)])?;
        assert_eq!(joined[0], linear(&x, weight, Some(&bias))?);
        assert_eq!(joined[1], linear(&x, weight, None)?);
        let d_y = Tensor::new(values(m * n, 3), &[m, n])?;
        let d_x = linear_backward_input(&d_y, weight)?;
        check(d_x.data(), &as_taken(&d_y), |l, j| w[j * k + l].to_f32(), (m, k, n));
    }
    Ok(())
}

/// Where the machine multiplies tiles. Elsewhere, and for few rows, the option changes no bit.
#[test]
fn many_rows_round_blocks_and_their_activations() -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    let tiles = tiles::Amx::here().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    let tiles = false;
    let rounds = |x: &f32| bf16::from_f32(*x).to_f32();
    for (m, n, k) in [(1, 70, 256), (15, 33, 512), (16, 33, 512), (50, 70, 256)] {
        let x = Tensor::new(values(m * k, 1), &[m, k])?;
        for kind in BlockType::ALL {
            let (mut bytes, mut w) = (Vec::new(), vec![0.0; n * k]);
            kind.narrow(&values(n * k, 2), &mut bytes);
            kind.widen(&bytes, 0, &mut w);
            let weight = WeightRef::new(WeightData::Blocks(kind, &bytes), n, k)?;
            let y = linear(&x, weight.narrow_activations(true), None)?;
            if tiles && m >= crate::MANY_ROWS {
                let x: Vec<f32> = x.data().iter().map(rounds).collect();
                check(y.data(), &x, |j, l| rounds(&w[j * k + l]), (m, n, k));
            } else {
                assert_eq!(y, linear(&x, weight, None)?, "{kind} {m}");
            }
        }
    }
    Ok(())
}

#[test]
fn threads_and_rows_beside_it_change_no_bit_of_a_row() -> Result<()> {
    let (n, k) = (200, 65);
    let w: Vec<bf16> = values(n * k, 2).iter().map(|w| bf16::from_f32(*w)).collect();
    let x = values(600 * k, 1);
    for narrow in [false, true] {
        let weight = WeightRef::new(WeightData::Bf16(&w), n, k)?.narrow_activations(narrow);
        let run = |threads: usize, m: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let x = Tensor::new(x[..m * k].to_vec(), &[m, k])?;
            pool.map_or_else(
                |_| linear(&x, weight, None),
                |pool| pool.install(|| linear(&x, weight, None)),
            )
        };
        let one = run(1, 600)?;
        for (threads, m) in [(2, 600), (3, 600), (2, 37), (1, 16)] {
            assert_eq!(run(threads, m)?.data(), &one.data()[..m * n]);
        }
    }
    Ok(())
}

#[test]
fn joined_layers_of_several_types_are_the_layers() -> Result<()> {
    let k = 96;
    let w = values(70 * k, 2);
    let halves: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
    let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    let mut blocks = Vec::new();
    BlockType::Q8_0.narrow(&w[..33 * k], &mut blocks);
    let bias = values(70, 3);
    let pairs = WeightRef::new(WeightData::Bf16(&narrow), 70, k)?.narrow_activations(true);
    let coded = WeightRef::new(WeightData::Blocks(BlockType::Q8_0, &blocks), 33, k)?;
    let layers = [
        (pairs, Some(&bias[..])),
        (coded, None),
        (coded.narrow_activations(true), None),
        (WeightRef::new(WeightData::F16(&halves), 70, k)?.narrow_activations(true), None),
        (WeightRef::new(WeightData::F32(&w), 70, k)?, None),
        (WeightRef::new(WeightData::F16(&halves[..k]), 1, k)?, Some(&bias[..1])),
        (WeightRef::new(WeightData::Bf16(&narrow[..0]), 0, k)?, None),
        (WeightRef::new(WeightData::Bf16(&narrow), 70, k)?, None),
    ];
    for m in [0, 1, 5, 9, 15, 16, 40] {
        let x = Tensor::new(values(m * k, 1), &[m, k])?;
        let alone = layers.iter().map(|(weight, bias)| linear(&x, *weight, *bias));
        assert_eq!(linears(&x, &layers)?, alone.collect::<Result<Vec<_>>>()?, "{m}");
    }
    let x = Tensor::zeros(&[1, k - 1])?;
    assert!(matches!(linears(&x, &layers), Err(Error::Argument(_))));
    Ok(())
}
