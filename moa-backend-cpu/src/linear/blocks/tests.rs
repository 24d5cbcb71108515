use super::*;
use crate::ops::{WeightData, WeightRef, linear, linear_backward_input, linears};
use crate::{Error, Tensor};

/// Elements of each type in the file.
const ELEMENTS: usize = 512;

/// Random blocks of a type, with the values that the reference implementation gives them
/// (`tests/data/blocks.py`).
fn reference(kind: BlockType) -> (&'static [u8], Vec<f32>) {
    let mut rest: &[u8] = include_bytes!("../../../tests/data/blocks.bin");
    for other in BlockType::ALL {
        let (blocks, after) = rest.split_at(ELEMENTS / other.block_len() * other.block_bytes());
        let (values, after) = after.split_at(4 * ELEMENTS);
        if other == kind {
            let values = values.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
            return (blocks, values);
        }
        rest = after;
    }
    panic!("{kind:?} is not in the file");
}

fn levels() -> Vec<Level> {
    let mut levels = vec![Level::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(Level::has_avx2().then_some(Level::Avx2));
        levels.extend(Level::has_vnni().then_some(Level::Vnni));
    }
    levels
}

fn random(seed: &mut u32) -> u32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    *seed >> 8
}

/// A matrix of blocks of the file, with its values.
fn matrix(kind: BlockType, rows: usize, cols: usize, seed: &mut u32) -> (Vec<u8>, Vec<f32>) {
    let (blocks, values) = reference(kind);
    let (len, size) = (kind.block_len(), kind.block_bytes());
    let (mut bytes, mut wide) = (Vec::new(), Vec::new());
    for _ in 0..rows * cols / len {
        let block = random(seed) as usize % (ELEMENTS / len);
        bytes.extend_from_slice(&blocks[block * size..(block + 1) * size]);
        wide.extend_from_slice(&values[block * len..(block + 1) * len]);
    }
    (bytes, wide)
}

fn activations(len: usize, seed: &mut u32) -> Vec<f32> {
    (0..len).map(|_| (random(seed) % 2001) as f32 / 700.0 - 1.3).collect()
}

/// What the activations are rounded to.
fn rounded(x: &[f32]) -> Vec<f32> {
    let groups = x.as_chunks::<GROUP>().0.iter().map(activations::quantise);
    groups.flat_map(|(step, codes)| codes.map(|code| step * f32::from(code))).collect()
}

#[test]
fn values_are_those_of_the_reference() {
    for kind in BlockType::ALL {
        let (blocks, values) = reference(kind);
        let mut found = vec![0.0; ELEMENTS];
        kind.widen(blocks, 0, &mut found);
        assert!(found.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind:?}");
        for level in levels() {
            for range in [0..ELEMENTS, 5..6, 31..97, 250..300, 511..512, 512..512] {
                let mut found = vec![0.0; range.len()];
                widen_with(level, kind, blocks, range.start, &mut found);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&values[range]), "{kind:?} {level:?}");
            }
        }
    }
}

/// `tests/data/rounded.py` made them of the reference implementation.
#[test]
fn blocks_are_rounded_as_the_reference_rounds() {
    const COUNT: usize = 768;
    let (values, mut rest) = include_bytes!("../../../tests/data/rounded.bin").split_at(4 * COUNT);
    let values: Vec<f32> = values.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    for kind in BlockType::ALL {
        let expected;
        (expected, rest) = rest.split_at(COUNT / kind.block_len() * kind.block_bytes());
        let mut found = Vec::new();
        kind.narrow(&values, &mut found);
        let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        assert_eq!((found.len(), wrong), (expected.len(), 0), "{kind:?}");
    }
}

#[test]
fn rounding_costs_what_the_bits_say() {
    let mut seed = 17;
    let x: Vec<f32> = (0..2048)
        .map(|_| (0..12).map(|_| random(&mut seed) as f32 / 16_777_216.0 - 0.5).sum::<f32>())
        .collect();
    // Root of the mean square of the error, over that of numbers of a normal distribution.
    for (kind, most) in [
        (BlockType::Q8_0, 0.007),
        (BlockType::Q6K, 0.021),
        (BlockType::Q5K, 0.036),
        (BlockType::Q5_1, 0.041),
        (BlockType::Q5_0, 0.044),
        (BlockType::Q4K, 0.073),
        (BlockType::Q4_1, 0.084),
        (BlockType::Q4_0, 0.090),
    ] {
        let mut blocks = Vec::new();
        kind.narrow(&x, &mut blocks);
        let mut near = vec![0.0; x.len()];
        kind.widen(&blocks, 0, &mut near);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = x.iter().zip(&near).map(|(x, y)| square(x - y)).sum();
        let share = (error / x.iter().copied().map(square).sum::<f64>()).sqrt();
        assert!(share < most && share > 0.7 * most, "{kind:?} {share}");
    }
}

#[test]
fn products_are_exact_but_for_the_rounding_of_activations() {
    let mut seed = 1;
    for kind in BlockType::ALL {
        for blocks in [1, 3] {
            let k = blocks * kind.block_len();
            for (m, n) in [(1, 1), (2, 70), (7, 33), (8, 16), (13, 19), (33, 48)] {
                let (bytes, w) = matrix(kind, n, k, &mut seed);
                let x = activations(m * k, &mut seed);
                let near = rounded(&x);
                for level in levels() {
                    let mut y = vec![0.0; m * n];
                    let weight = Blocks { kind, bytes: &bytes };
                    let out = SharedMut::new(&mut y);
                    forward_all(level, &x, (m, k), &[(weight, n, &out)]).unwrap();
                    // Many rows without VNNI are not rounded at all.
                    let taken = if m < MANY || level.unpacks() { &near } else { &x };
                    check(&y, taken, &w, (m, n, k), 1e-5, &format!("{kind:?} {level:?} {m}"));
                    // A code is half a step from its activation, which is 1/16256 of the largest.
                    check(&y, &x, &w, (m, n, k), 1e-4, "rounding");
                }
            }
        }
    }
}

/// Compares with f64: at most `share` of the sum of products without their signs.
fn check(y: &[f32], x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), share: f64, at: &str) {
    for i in 0..m {
        for j in 0..n {
            let product = |l: usize| f64::from(x[i * k + l]) * f64::from(w[j * k + l]);
            let exact: f64 = (0..k).map(product).sum();
            let sizes: f64 = (0..k).map(|l| product(l).abs()).sum();
            let error = (f64::from(y[i * n + j]) - exact).abs();
            assert!(error <= share * sizes + 1e-6, "{at} at {i}, {j}: {} {exact}", y[i * n + j]);
        }
    }
}

#[test]
fn gradients_are_those_of_the_values() -> Result<(), Error> {
    let mut seed = 3;
    for kind in BlockType::ALL {
        let (m, n, k) = (5, 40, 2 * kind.block_len());
        let (bytes, w) = matrix(kind, n, k, &mut seed);
        let d_y = activations(m * n, &mut seed);
        let weight = WeightRef::new(WeightData::Blocks(kind, &bytes), n, k)?;
        let d_x = linear_backward_input(&Tensor::new(d_y.clone(), &[m, n])?, weight)?;
        let transposed: Vec<f32> = (0..k * n).map(|at| w[at % n * k + at / n]).collect();
        check(d_x.data(), &d_y, &transposed, (m, k, n), 1e-5, "backward");
    }
    Ok(())
}

#[test]
fn joined_layers_are_the_layers() -> Result<(), Error> {
    let mut seed = 9;
    let (k, bias) = (256, [0.5; 33]);
    let kinds = [BlockType::Q4K, BlockType::Q4K, BlockType::Q6K, BlockType::Q8_0];
    let matrices = kinds.map(|kind| matrix(kind, 33, k, &mut seed).0);
    let weights = kinds.iter().zip(&matrices);
    let weights = weights.map(|(kind, m)| WeightRef::new(WeightData::Blocks(*kind, m), 33, k));
    let mut layers = Vec::new();
    for (weight, bias) in weights.zip([None, Some(&bias[..]), None, Some(&bias[..])]) {
        layers.push((weight?, bias));
    }
    for m in [0, 1, 5, 9] {
        let x = Tensor::new(activations(m * k, &mut seed), &[m, k])?;
        let alone = layers.iter().map(|(weight, bias)| linear(&x, *weight, *bias));
        assert_eq!(linears(&x, &layers)?, alone.collect::<Result<Vec<_>, _>>()?);
    }
    let x = Tensor::zeros(&[1, k - 1])?;
    assert!(matches!(linears(&x, &layers), Err(Error::Argument(_))));
    Ok(())
}

#[test]
fn what_is_no_number_stays_none_in_its_row() -> Result<(), Error> {
    let mut seed = 5;
    for kind in BlockType::ALL {
        let (n, k) = (17, kind.block_len());
        let (bytes, _) = matrix(kind, n, k, &mut seed);
        for m in [2, 9] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = activations(m * k, &mut seed);
                x[k + 3] = bad;
                let weight = WeightRef::new(WeightData::Blocks(kind, &bytes), n, k)?;
                let y = linear(&Tensor::new(x, &[m, k])?, weight, None)?;
                for (row, y) in y.data().chunks(n).enumerate() {
                    // An infinity stays one where weights are widened, and no activations rounded.
                    let widens = m >= MANY && !Level::best().unpacks();
                    let is_none = |y: &f32| y.is_nan() || (widens && y.is_infinite());
                    assert!(y.iter().all(|y| is_none(y) == (row == 1)), "{kind:?} {m} {row}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn parts_of_blocks_are_refused() {
    for kind in BlockType::ALL {
        let (blocks, _) = reference(kind);
        let new = |bytes, rows, cols| WeightRef::new(WeightData::Blocks(kind, bytes), rows, cols);
        let cols = 256;
        assert!(new(blocks, ELEMENTS / cols, cols).is_ok());
        for (bytes, rows, cols) in [
            (&blocks[1..], ELEMENTS / cols, cols),
            (blocks, ELEMENTS, 1),
            (blocks, ELEMENTS / cols + 1, cols),
            (&blocks[..0], 1, cols),
        ] {
            assert!(matches!(new(bytes, rows, cols), Err(Error::Argument(_))), "{kind:?}");
        }
    }
}
