//! Influence and gradients against the f64 reference.

use moa_core::reference::{self, Heads};
use moa_core::{InfluenceInputs, InfluenceOutput, InfluenceSign, Span, SparseAttentionBackend};
use proptest::prelude::*;

use super::TestBackend;
use super::backward::backward;
use super::world::{World, check, distance, f64s, normal};

fn world(group: usize, kv: usize, dim: usize, tokens: usize) -> World {
    World::new(group * kv, kv, dim, &vec![(0, tokens); kv], tokens)
}

#[derive(Debug)]
struct Case {
    world: World,
    d_out: Vec<f32>,
    block: usize,
    sign: InfluenceSign,
}

impl Case {
    /// The case with numbers as the backend's tensors hold them: q, k, v, and `d_out` in place.
    fn rounded<T: TestBackend>(self, t: &T) -> (Self, [Vec<f32>; 3]) {
        let round = |x: Vec<f32>| x.into_iter().map(|x| t.round_tensor(x)).collect::<Vec<_>>();
        let inputs = [self.world.q(), self.world.k(), self.world.v()].map(round);
        (Self { d_out: round(self.d_out), ..self }, inputs)
    }

    fn run<T: TestBackend>(
        &self,
        t: &T,
        [q, k, v]: &[Vec<f32>; 3],
        gradients: bool,
    ) -> InfluenceOutput<T::Tensor> {
        let Heads { query, kv, dim } = self.world.heads;
        let n = self.world.tokens;
        let spans = vec![Span::full(n); kv];
        let scale = self.world.scale();
        let (out, lse) =
            reference::extend(self.world.heads, &f64s(q), &f64s(k), &f64s(v), &spans, scale.into());
        let f32s = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let inputs = InfluenceInputs {
            q: &t.tensor(q, &[n, query, dim]),
            k: &t.tensor(k, &[n, kv, dim]),
            v: &t.tensor(v, &[n, kv, dim]),
            out: &t.tensor(&f32s(&out), &[n, query, dim]),
            lse: &t.lse(&f32s(&lse), &[n, query]),
            d_out: &t.tensor(&self.d_out, &[n, query, dim]),
            block: self.block,
            sign: self.sign,
            gradients,
        };
        t.backend().influence(&inputs, scale).unwrap()
    }

    /// Influence of every entry of a query head, `[tokens, tokens]`.
    fn entries(&self, [q, k, v]: &[Vec<f32>; 3], head: usize) -> Vec<f64> {
        let scale = self.world.scale().into();
        reference::influence(
            self.world.heads,
            &f64s(q),
            &f64s(k),
            &f64s(v),
            &f64s(&self.d_out),
            head,
            scale,
        )
    }

    fn blocks(&self, inputs: &[Vec<f32>; 3]) -> Vec<f64> {
        let Heads { query, kv, .. } = self.world.heads;
        let (n, blocks) = (self.world.tokens, self.world.tokens.div_ceil(self.block));
        let mut sums = vec![0.0; kv * blocks * blocks];
        for head in 0..query {
            let entries = self.entries(inputs, head);
            for (at, e) in entries.iter().enumerate() {
                let (i, j) = (at / n / self.block, at % n / self.block);
                let e = if self.sign == InfluenceSign::Absolute { e.abs() } else { *e };
                sums[(head / (query / kv) * blocks + i) * blocks + j] += e;
            }
        }
        sums
    }
}

fn cases<T: TestBackend>(t: &T) -> impl Strategy<Value = Case> + use<T> {
    let dim = proptest::sample::select(t.dims());
    let tokens = prop_oneof![1usize..20, 60usize..140];
    let block = proptest::sample::select(t.influence_blocks());
    let absolute = any::<bool>();
    (1usize..=3, 1usize..=2, dim, tokens, block, absolute, any::<u64>()).prop_map(
        |(group, kv, dim, tokens, block, absolute, seed)| {
            let world = World { seed, ..world(group, kv, dim, tokens) };
            let d_out = normal(tokens * group * kv * dim, seed ^ 0xd0);
            let sign = if absolute { InfluenceSign::Absolute } else { InfluenceSign::Signed };
            Case { world, d_out, block, sign }
        },
    )
}

/// A loud word where a backend lacks what a test needs.
fn has<T: TestBackend>(t: &T, what: &str, has: bool) -> bool {
    if !has {
        eprintln!("skipped: {} has no {what}", t.backend().name());
    }
    has
}

#[track_caller]
fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (at, (x, y)) in a.iter().zip(b).enumerate() {
        // An entry close to 1 - 1e-6 loses digits in f32: relative to the size of the sums.
        assert!((x - y).abs() <= tolerance * (1.0 + y.abs()), "{at}: {x} {y}");
    }
}

pub(crate) fn influence_equals_the_reference<T: TestBackend>(t: &T) {
    check(24, cases(t), |case| {
        let (case, inputs) = case.rounded(t);
        let expected = case.blocks(&inputs);
        close(&case.run(t, &inputs, false).blocks, &expected, t.influence_tolerance());
        if t.has_gradients() {
            close(&case.run(t, &inputs, true).blocks, &expected, t.influence_tolerance());
        }
    });
}

pub(crate) fn gradients_equal_the_reference<T: TestBackend>(t: &T) {
    if !has(t, "gradients of influence", t.has_gradients()) {
        return;
    }
    check(16, cases(t), |case| {
        let (case, inputs) = case.rounded(t);
        let [q, k, v] = [f64s(&inputs[0]), f64s(&inputs[1]), f64s(&inputs[2])];
        let scale = case.world.scale().into();
        let expected = backward(case.world.heads, [&q, &k, &v], &f64s(&case.d_out), scale);
        let gradients = case.run(t, &inputs, true).gradients.expect("gradients were asked for");
        for (gradient, expected) in
            [gradients.d_q, gradients.d_k, gradients.d_v].iter().zip(&expected)
        {
            let size = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            assert!(distance(&t.host(gradient), expected) <= t.influence_tolerance() / 3.0 * size);
        }
        assert!(case.run(t, &inputs, false).gradients.is_none());
    });
}

/// With the objective `sum(d_out * out)`, which is linear in the output, `E_ij` is exactly what
/// masking `A_ij` changes.
pub(crate) fn influence_is_what_masking_one_entry_changes<T: TestBackend>(t: &T) {
    if !has(t, "influence blocks of one entry", t.influence_blocks().contains(&1)) {
        return;
    }
    let (n, dim) = (9, t.dim(4));
    let d_out = normal(n * dim, 5);
    let case = Case { world: world(1, 1, dim, n), d_out, block: 1, sign: InfluenceSign::Signed };
    let (case, inputs) = case.rounded(t);
    let found = case.run(t, &inputs, false).blocks;
    let ([q, k, v], scale) = (&inputs, case.world.scale());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    let row = |x: &[f32], i: usize| x[i * dim..(i + 1) * dim].to_vec();
    let objective = |i: usize, masked: Option<usize>| -> f64 {
        let keys = (0..=i).filter(|&j| Some(j) != masked);
        let weighted = keys.map(|j| {
            let weight = (f64::from(scale) * dot(&row(q, i), &row(k, j))).exp();
            (weight, weight * dot(&row(&case.d_out, i), &row(v, j)))
        });
        let (sum, product) = weighted.fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        product / sum
    };
    for i in 0..n {
        for j in 0..i {
            let change = objective(i, Some(j)) - objective(i, None);
            let error = (found[i * n + j] - change).abs() / change.abs().max(1.0);
            assert!(
                error < t.influence_tolerance() / 3.0,
                "{i}, {j}: {} {change}",
                found[i * n + j]
            );
        }
        assert!((i..n).all(|j| found[i * n + j] == 0.0));
    }
}

/// In the last layer only the answer's tokens have a gradient.
pub(crate) fn zero_gradient_rows_contribute_nothing<T: TestBackend>(t: &T) {
    let block = t.influence_blocks()[t.influence_blocks().len() / 2];
    let world = world(2, 1, t.dim(16), 200);
    let row = 2 * world.heads.dim;
    let mut d_out = normal(200 * row, 3);
    d_out[..190 * row].fill(0.0);
    let case = Case { world, d_out, block, sign: InfluenceSign::Absolute };
    let (case, inputs) = case.rounded(t);
    let blocks = case.run(t, &inputs, t.has_gradients()).blocks;
    close(&blocks, &case.blocks(&inputs), t.influence_tolerance());
    let silent = 190 / block * 200usize.div_ceil(block);
    assert!(silent > 0 && blocks[..silent].iter().all(|&e| e == 0.0));
}
