use moa_core::{BlockType, SplitMix64};

use crate::{Stop, Trial, Verdict, normal};

/// Linear layers of a backend whose weights lie in quantised blocks, with what [`block_products`] cannot know of them.
pub trait BlockProducts: Sized + 'static {
    /// `x . weight^T` of `x` `[rows, in]` and a weight `[out, in]` in these blocks, row by row as files have them;
    /// `None` if the backend does not keep such blocks.
    fn product(
        &self,
        kind: BlockType,
        blocks: &[u8],
        shape: [usize; 2],
        x: &[f32],
    ) -> Option<Vec<f32>>;

    /// Rows of such a weight, as an embedding gives them.
    fn rows(
        &self,
        kind: BlockType,
        blocks: &[u8],
        shape: [usize; 2],
        rows: &[u32],
    ) -> Option<Vec<f32>>;

    /// An element of `x` as the backend holds it.
    fn round(&self, x: f32) -> f32 {
        x
    }

    /// Largest difference from the product in f64 of so many rows, as a share of the sum of all terms without their
    /// signs.
    fn share(&self, rows: usize) -> f64;
}

type Check<S> = fn(&S, BlockType) -> Verdict;

/// What linear layers of quantised weights must do: four trials for each kind of blocks, named
/// `{name}::{check}_{kind}`. The specification is [`BlockType::widen`], multiplied in f64.
pub fn block_products<S: BlockProducts>(
    name: &str,
    open: impl Fn() -> Result<S, Stop> + Clone + Send + 'static,
) -> Vec<Trial> {
    let checks: [(&str, Check<S>); 4] = [
        ("products_are_those_of_the_elements", products_are_those_of_the_elements),
        ("every_element_arrives", every_element_arrives),
        ("rows_are_the_elements", rows_are_the_elements),
        ("what_is_no_number_stays_in_its_row", what_is_no_number_stays_in_its_row),
    ];
    let trials = BlockType::ALL.into_iter().flat_map(|kind| {
        let open = open.clone();
        checks.map(move |(check, run)| {
            let open = open.clone();
            Trial::new(format!("{name}::{check}_{kind}"), move || run(&open()?, kind))
        })
    });
    trials.collect()
}

/// Random blocks with factors around 1/16 of either sign, so that no element is as large as 256.
pub fn random_blocks(kind: BlockType, elements: usize, seed: u64) -> Vec<u8> {
    let mut random = SplitMix64::new(seed);
    let count = elements / kind.block_len() * kind.block_bytes();
    let mut bytes: Vec<u8> = (0..count).map(|_| (random.next_u64() >> 56) as u8).collect();
    let factors: &[usize] = match kind {
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q6K => &[208],
    };
    // Codes of 6 bits and steps of 7 make larger elements.
    let exponent = if kind.block_len() == 256 { 0x14 } else { 0x28 };
    for block in bytes.chunks_mut(kind.block_bytes()) {
        for &at in factors {
            let next = (block[at + 1] >> 2 & 1) * 4;
            block[at + 1] = block[at + 1] & 0x83 | (exponent + next);
        }
    }
    bytes
}

fn kept<T>(result: Option<T>, kind: BlockType) -> Result<T, Stop> {
    result.ok_or_else(|| Stop::ignored(format!("{kind} blocks are not kept")))
}

/// A weight with its elements.
fn weight(kind: BlockType, shape: [usize; 2], seed: u64) -> (Vec<u8>, Vec<f32>) {
    let elements = shape[0] * shape[1];
    let blocks = random_blocks(kind, elements, seed);
    let mut values = vec![0.0; elements];
    kind.widen(&blocks, 0, &mut values);
    (blocks, values)
}

/// Compares with f64.
fn check(y: &[f32], x: &[f32], w: &[f32], [n, k]: [usize; 2], share: f64, at: &str) {
    assert_eq!(y.len(), x.len() / k * n, "{at}");
    let mut worst = 0.0f64;
    for (i, (x, y)) in x.chunks(k).zip(y.chunks(n)).enumerate() {
        for (j, (w, &y)) in w.chunks(k).zip(y).enumerate() {
            let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (exact, sizes) =
                terms.fold((0.0, 0.0f64), |(sum, sizes), term| (sum + term, sizes + term.abs()));
            let error = (f64::from(y) - exact).abs() / sizes.max(1e-9);
            assert!(error <= share, "{at} at {i}, {j}: {y} for {exact}, {error:.1e} of all terms");
            worst = worst.max(error);
        }
    }
    println!("{at}: {worst:.1e} of all terms, {share:.1e} allowed");
}

fn products_are_those_of_the_elements<S: BlockProducts>(s: &S, kind: BlockType) -> Verdict {
    let len = kind.block_len();
    for ([n, blocks], counts) in [
        ([1, 1], &[1, 3][..]),
        ([16, 2], &[1, 2, 8, 9, 16]),
        ([33, 3], &[1, 5, 17, 33, 64]),
        ([72, 9], &[1, 4, 16, 65, 130]),
        ([24, 4096 / len], &[1, 7, 16]),
    ] {
        let shape = [n, blocks * len];
        let (bytes, w) = weight(kind, shape, 1);
        for &m in counts {
            let x = normal(m * shape[1], m as u64 + 2);
            let x: Vec<f32> = x.into_iter().map(|x| s.round(x)).collect();
            let y = kept(s.product(kind, &bytes, shape, &x), kind)?;
            check(&y, &x, &w, shape, s.share(m), &format!("{kind} {m} x {shape:?}"));
        }
    }
    Ok(())
}

/// Products with rows of an identity matrix.
fn every_element_arrives<S: BlockProducts>(s: &S, kind: BlockType) -> Verdict {
    let shape = [19, 512];
    let (bytes, w) = weight(kind, shape, 5);
    for m in [1, 4, 16, 128] {
        let mut x = vec![0.0; m * shape[1]];
        for first in (0..shape[1]).step_by(m).take(if m == 1 { 20 } else { usize::MAX }) {
            x.fill(0.0);
            (0..m).for_each(|i| x[i * shape[1] + first + i] = 1.0);
            let y = kept(s.product(kind, &bytes, shape, &x), kind)?;
            for (i, row) in y.chunks(shape[0]).enumerate() {
                for (j, y) in row.iter().enumerate() {
                    let exact = f64::from(w[j * shape[1] + first + i]);
                    let error = (f64::from(*y) - exact).abs();
                    // A term may be the difference of two: of the step's and of the least element.
                    let allowed = s.share(m) * (exact.abs() + 16.0);
                    assert!(error <= allowed, "{kind} {m}: {j}, {}: {y} for {exact}", first + i);
                }
            }
        }
    }
    Ok(())
}

fn rows_are_the_elements<S: BlockProducts>(s: &S, kind: BlockType) -> Verdict {
    let shape = [37, 768];
    let (bytes, w) = weight(kind, shape, 7);
    let rows = [0u32, 36, 15, 16, 8, 7, 7, 31];
    let got = kept(s.rows(kind, &bytes, shape, &rows), kind)?;
    for (row, got) in rows.iter().zip(got.chunks(shape[1])) {
        let expected = &w[*row as usize * shape[1]..][..shape[1]];
        for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
            // A device may multiply and add with one rounding.
            let allowed = 2e-7 * (expected.abs() + 16.0);
            assert!((got - expected).abs() <= allowed, "{kind} {row}, {at}: {got} {expected}");
        }
    }
    Ok(())
}

fn what_is_no_number_stays_in_its_row<S: BlockProducts>(s: &S, kind: BlockType) -> Verdict {
    let shape = [17, kind.block_len()];
    let (bytes, _) = weight(kind, shape, 9);
    for m in [2, 9, 20, 80] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = normal(m * shape[1], 3);
            x[shape[1] + 3] = bad;
            let y = kept(s.product(kind, &bytes, shape, &x), kind)?;
            for (row, y) in y.chunks(shape[0]).enumerate() {
                // A code may be 0.
                let numbers = y.iter().filter(|y| y.is_finite()).count();
                assert!(
                    if row == 1 { numbers < y.len() } else { numbers == y.len() },
                    "{kind} {m} {row}"
                );
            }
        }
    }
    Ok(())
}
