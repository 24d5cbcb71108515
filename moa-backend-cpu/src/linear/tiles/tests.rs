//! Layouts and cuts, on any machine with AVX-512 BF16: what tiles do is done in plain code.

use super::*;
use crate::linear::panels::pairs;
use moa_core::BlockType;

/// A machine whose tiles are arrays.
#[derive(Clone, Copy)]
struct Plain(V4);

impl Plain {
    fn here() -> Option<Self> {
        pairs::Machine::here().map(|machine| Self(machine.0))
    }
}

/// `TDPBF16PS` as Intel's manual has it: sums of even and of odd summands, each from zero on, then both.
fn multiply(sums: &mut [[f32; SIDE]; SIDE], w: &Tile, x: &Tile) {
    for (sums, w) in sums.iter_mut().zip(&w.0) {
        for (row, sum) in sums.iter_mut().enumerate() {
            let mut own = [0.0f32; 2];
            for pair in 0..SIDE {
                for (i, own) in own.iter_mut().enumerate() {
                    let x = x.0[pair][2 * row + i].to_f32();
                    *own = w[2 * pair + i].to_f32().mul_add(x, *own);
                }
            }
            *sum += own[0] + own[1];
        }
    }
}

impl Multiply for Plain {
    type Ready = ();

    fn simd(self) -> V4 {
        self.0
    }

    fn ready(self) {}

    unsafe fn products<S: Source>(
        (): &(),
        w: [*const Tile; TOGETHER],
        x: [*const Tile; TOGETHER],
        steps: usize,
        sums: &mut Sums,
    ) {
        sums.0.as_flattened_mut().fill([[0.0; SIDE]; SIDE]);
        for (sums, x) in sums.0.iter_mut().zip(x) {
            for (sums, w) in sums.iter_mut().zip(w) {
                // SAFETY: promised by the caller.
                let (w, x) = unsafe {
                    (
                        std::slice::from_raw_parts(w, steps * S::PARTS),
                        std::slice::from_raw_parts(x, steps * S::PARTS),
                    )
                };
                for (w, x) in w.chunks(S::PARTS).zip(x.chunks(S::PARTS)) {
                    for (i, w) in w.iter().enumerate() {
                        for (j, x) in x.iter().enumerate() {
                            if i + j < 2 {
                                multiply(sums, w, x);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Numbers between -1 and 1 that no 16 bits have.
fn values(len: usize, mut seed: u32) -> Vec<f32> {
    let next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / 8_388_608.0 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// Products of `x` `[m, k]` with each weight.
fn products<M: Multiply>(
    machine: M,
    x: &[f32],
    (m, k): (usize, usize),
    layers: &[(Weights<'_>, usize)],
) -> Vec<Vec<f32>> {
    let x = Tensor::new(x.to_vec(), &[m, k]).unwrap();
    // Anything but what is computed.
    let mut all: Vec<_> = layers.iter().map(|(_, n)| vec![7.5; m * n]).collect();
    {
        let outs: Vec<_> = all.iter_mut().map(|y| SharedMut::new(y)).collect();
        let layers = layers.iter().zip(&outs).map(|((w, n), out)| (*w, *n, out));
        forward_all(machine, &x, &layers.collect::<Vec<_>>()).unwrap();
    }
    all
}

#[track_caller]
fn check(y: &[f32], x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), share: f64) {
    assert_eq!(y.len(), m * n);
    for i in 0..m {
        for j in 0..n {
            let product = |l: usize| f64::from(x[i * k + l]) * f64::from(w[j * k + l]);
            let exact: f64 = (0..k).map(product).sum();
            let sizes: f64 = (0..k).map(|l| product(l).abs()).sum();
            let (found, error) = (y[i * n + j], (f64::from(y[i * n + j]) - exact).abs());
            assert!(error <= share * sizes + 1e-9, "{m} {n} {k} at {i}, {j}: {found} {exact}");
        }
    }
}

/// Rows, outputs and inputs.
const SHAPES: [(usize, usize, usize); 7] = [
    (1, 1, 32),
    (16, 16, 64),
    (17, 33, 32),
    (31, 70, 96),
    (50, 32, 256),
    (64, 5, 512),
    (33, 97, 32),
];

fn every_type<M: Multiply>(machine: M) {
    for (m, n, k) in SHAPES {
        // Rows of numbers need not be whole tiles.
        for k in [k, k - 7] {
            let (x, w) = (values(m * k, 1), values(n * k, 2));
            let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            let halves: Vec<half::f16> = w.iter().map(|w| half::f16::from_f32(*w)).collect();
            let wide: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
            let layers = [
                (Weights::Narrow(Narrow { w: &narrow, k }), n),
                (Weights::Halves(Halves { w: &halves, k }), n),
            ];
            let [a, b] = &products(machine, &x, (m, k), &layers)[..] else { panic!("two layers") };
            check(a, &rounded(&x), &rounded(&w), (m, n, k), 2e-6);
            // Two parts are off by 2^-17 of an activation, and the product of second parts by 2^-18.
            check(b, &x, &wide, (m, n, k), 2.5e-5);
        }
        let x = values(m * k, 1);
        for kind in BlockType::ALL.into_iter().filter(|kind| k % kind.block_len() == 0) {
            let mut bytes = Vec::new();
            kind.narrow(&values(n * k, 2), &mut bytes);
            let mut wide = vec![0.0; n * k];
            kind.widen(&bytes, 0, &mut wide);
            let layer = (Weights::Blocks(Blocks { kind, bytes: &bytes }), n);
            let y = &products(machine, &x, (m, k), &[layer])[0];
            check(y, &rounded(&x), &rounded(&wide), (m, n, k), 2e-6);
        }
    }
}

#[test]
fn products_of_every_type_are_those_of_rounded_numbers() {
    if let Some(machine) = Plain::here() {
        every_type(machine);
    }
    if let Some(machine) = Amx::here() {
        every_type(machine);
    }
}

/// Tiles have the bits that plain code gives, as the manual says in which order they sum.
#[test]
fn tiles_have_the_bits_of_plain_code() {
    let (Some(amx), Some(plain)) = (Amx::here(), Plain::here()) else { return };
    let (m, n, k) = (40, 70, 256);
    let (x, w) = (values(m * k, 1), values(n * k, 2));
    let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    let mut bytes = Vec::new();
    BlockType::Q8_0.narrow(&w, &mut bytes);
    let layers = [
        (Weights::Narrow(Narrow { w: &narrow, k }), n),
        (Weights::Blocks(Blocks { kind: BlockType::Q8_0, bytes: &bytes }), n),
    ];
    assert_eq!(products(amx, &x, (m, k), &layers), products(plain, &x, (m, k), &layers));
}

fn cuts<M: Multiply>(machine: M) {
    let (n, k) = (200, 96);
    let w = values(n * k, 2);
    let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    let mut bytes = Vec::new();
    BlockType::Q4_1.narrow(&w, &mut bytes);
    let layers = [
        (Weights::Narrow(Narrow { w: &narrow, k }), n),
        (Weights::Blocks(Blocks { kind: BlockType::Q4_1, bytes: &bytes }), n),
    ];
    let x = values(600 * k, 1);
    let run = |threads: usize, m: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| products(machine, &x[..m * k], (m, k), &layers))
    };
    let whole = run(1, 600);
    for (threads, m) in [(2, 600), (3, 600), (16, 600), (2, 37), (1, 16), (1, 1)] {
        for (y, whole) in run(threads, m).iter().zip(&whole) {
            assert_eq!(y, &whole[..m * n], "{threads} {m}");
        }
    }
}

#[test]
fn threads_and_rows_beside_it_change_no_bit_of_a_row() {
    if let Some(machine) = Plain::here() {
        cuts(machine);
    }
    if let Some(machine) = Amx::here() {
        cuts(machine);
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let Some(machine) = Plain::here() else { return };
    let (m, n, k) = (20, 33, 64);
    let mut bytes = Vec::new();
    BlockType::Q8_0.narrow(&values(n * k, 2), &mut bytes);
    let layer = (Weights::Blocks(Blocks { kind: BlockType::Q8_0, bytes: &bytes }), n);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = values(m * k, 1);
        x[17 * k + 40] = bad;
        let y = &products(machine, &x, (m, k), &[layer])[0];
        for (row, y) in y.chunks(n).enumerate() {
            assert!(y.iter().all(|y| y.is_finite() == (row != 17)), "{row}");
        }
    }
}
