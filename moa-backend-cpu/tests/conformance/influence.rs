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
    fn run<T: TestBackend>(&self, t: &T, gradients: bool) -> InfluenceOutput<T::Tensor> {
        let Heads { query, kv, dim } = self.world.heads;
        let n = self.world.tokens;
        let spans = vec![Span::full(n); kv];
        let (q, k, v) = (self.world.q(), self.world.k(), self.world.v());
        let scale = self.world.scale();
        let (out, lse) = reference::extend(
            self.world.heads,
            &f64s(&q),
            &f64s(&k),
            &f64s(&v),
            &spans,
            scale.into(),
        );
        let f32s = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let inputs = InfluenceInputs {
            q: &t.tensor(&q, &[n, query, dim]),
            k: &t.tensor(&k, &[n, kv, dim]),
            v: &t.tensor(&v, &[n, kv, dim]),
            out: &t.tensor(&f32s(&out), &[n, query, dim]),
            lse: &t.tensor(&f32s(&lse), &[n, query]),
            d_out: &t.tensor(&self.d_out, &[n, query, dim]),
            block: self.block,
            sign: self.sign,
            gradients,
        };
        t.backend().influence(&inputs, scale).unwrap()
    }

    /// Influence of every entry of a query head, `[tokens, tokens]`.
    fn entries(&self, head: usize) -> Vec<f64> {
        let (q, k, v) = (self.world.q(), self.world.k(), self.world.v());
        let scale = self.world.scale().into();
        reference::influence(
            self.world.heads,
            &f64s(&q),
            &f64s(&k),
            &f64s(&v),
            &f64s(&self.d_out),
            head,
            scale,
        )
    }

    fn blocks(&self) -> Vec<f64> {
        let Heads { query, kv, .. } = self.world.heads;
        let (n, blocks) = (self.world.tokens, self.world.tokens.div_ceil(self.block));
        let mut sums = vec![0.0; kv * blocks * blocks];
        for head in 0..query {
            let entries = self.entries(head);
            for (at, e) in entries.iter().enumerate() {
                let (i, j) = (at / n / self.block, at % n / self.block);
                let e = if self.sign == InfluenceSign::Absolute { e.abs() } else { *e };
                sums[(head / (query / kv) * blocks + i) * blocks + j] += e;
            }
        }
        sums
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let dim = prop_oneof![Just(3usize), Just(8), Just(20), Just(64), Just(72)];
    let tokens = prop_oneof![1usize..20, 60usize..140];
    let block = prop_oneof![Just(1usize), Just(7), Just(16), Just(64), Just(500)];
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

#[track_caller]
fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (at, (x, y)) in a.iter().zip(b).enumerate() {
        // An entry close to 1 - 1e-6 loses digits in f32: relative to the size of the sums.
        assert!((x - y).abs() <= 3e-4 * (1.0 + y.abs()), "{at}: {x} {y}");
    }
}

pub(crate) fn influence_equals_the_reference<T: TestBackend>(t: &T) {
    check(24, cases(), |case| {
        let expected = case.blocks();
        close(&case.run(t, false).blocks, &expected);
        close(&case.run(t, true).blocks, &expected);
    });
}

pub(crate) fn gradients_equal_the_reference<T: TestBackend>(t: &T) {
    check(16, cases(), |case| {
        let (q, k, v) = (f64s(&case.world.q()), f64s(&case.world.k()), f64s(&case.world.v()));
        let scale = case.world.scale().into();
        let expected = backward(case.world.heads, [&q, &k, &v], &f64s(&case.d_out), scale);
        let gradients = case.run(t, true).gradients.expect("gradients were asked for");
        for (gradient, expected) in
            [gradients.d_q, gradients.d_k, gradients.d_v].iter().zip(&expected)
        {
            let size = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            assert!(distance(&t.host(gradient), expected) <= 1e-4 * size);
        }
        assert!(case.run(t, false).gradients.is_none());
    });
}

/// With the objective `sum(d_out * out)`, which is linear in the output, `E_ij` is exactly what
/// masking `A_ij` changes.
pub(crate) fn influence_is_what_masking_one_entry_changes<T: TestBackend>(t: &T) {
    let n = 9;
    let d_out = normal(n * 4, 5);
    let case = Case { world: world(1, 1, 4, n), d_out, block: 1, sign: InfluenceSign::Signed };
    let found = case.run(t, false).blocks;
    let (q, k, v, scale) = (case.world.q(), case.world.k(), case.world.v(), case.world.scale());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    let row = |x: &[f32], i: usize| x[i * 4..i * 4 + 4].to_vec();
    let objective = |i: usize, masked: Option<usize>| -> f64 {
        let keys = (0..=i).filter(|&j| Some(j) != masked);
        let weighted = keys.map(|j| {
            let weight = (f64::from(scale) * dot(&row(&q, i), &row(&k, j))).exp();
            (weight, weight * dot(&row(&case.d_out, i), &row(&v, j)))
        });
        let (sum, product) = weighted.fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        product / sum
    };
    for i in 0..n {
        for j in 0..i {
            let change = objective(i, Some(j)) - objective(i, None);
            assert!(
                (found[i * n + j] - change).abs() < 1e-4,
                "{i}, {j}: {} {change}",
                found[i * n + j]
            );
        }
        assert!((i..n).all(|j| found[i * n + j] == 0.0));
    }
}

/// In the last layer only the answer's tokens have a gradient.
pub(crate) fn zero_gradient_rows_contribute_nothing<T: TestBackend>(t: &T) {
    let world = world(2, 1, 16, 200);
    let mut d_out = normal(200 * 2 * 16, 3);
    d_out[..190 * 2 * 16].fill(0.0);
    let case = Case { world, d_out, block: 10, sign: InfluenceSign::Absolute };
    let blocks = case.run(t, true).blocks;
    close(&blocks, &case.blocks());
    assert!(blocks[..19 * 20].iter().all(|&e| e == 0.0));
}
