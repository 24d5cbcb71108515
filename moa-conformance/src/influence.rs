//! Influence and gradients against the f64 reference.

use moa_core::reference::{self, Heads};
use moa_core::{InfluenceInputs, InfluenceOutput, InfluenceSign, Span, SparseAttentionBackend};
use proptest::prelude::*;

use crate::backward::backward;
use crate::cases::{check, poisons};
use crate::numbers::{close_where_finite, distance, f64s, normal};
use crate::{Error, Poison, Stop, Subject, Verdict, World};

fn world(group: usize, kv: usize, dim: usize, tokens: usize) -> World {
    World::new(group * kv, kv, dim, &vec![(0, tokens); kv], tokens)
}

#[derive(Debug)]
struct Case {
    world: World,
    d_out: Vec<f32>,
    /// Of the layer's own mask.
    window: usize,
    block: usize,
    sign: InfluenceSign,
}

impl Case {
    /// A signed case of full causal attention.
    fn full(world: World, d_out: Vec<f32>, block: usize) -> Self {
        Self { world, d_out, window: usize::MAX, block, sign: InfluenceSign::Signed }
    }

    fn poisoned(self, poison: Poison) -> Self {
        Self { world: self.world.poisoned(poison), ..self }
    }

    fn span(&self) -> Span {
        Span::full(self.world.tokens.min(self.window))
    }

    /// The case with numbers as the backend's tensors hold them: q, k, v, and `d_out` in place.
    fn rounded<S: Subject>(self, s: &S) -> (Self, [Vec<f32>; 3]) {
        let round = |x: Vec<f32>| x.into_iter().map(|x| s.round_tensor(x)).collect::<Vec<_>>();
        let inputs = [self.world.q(), self.world.k(), self.world.v()].map(round);
        (Self { d_out: round(self.d_out), ..self }, inputs)
    }

    fn run<S: Subject>(
        &self,
        s: &S,
        [q, k, v]: &[Vec<f32>; 3],
        gradients: bool,
    ) -> Result<InfluenceOutput<S::Tensor>, Error<S>> {
        let Heads { query, kv, dim } = self.world.heads;
        let n = self.world.tokens;
        let spans = vec![self.span(); kv];
        let scale = self.world.scale();
        let (out, lse) = reference::extend(
            self.world.heads,
            &f64s(q),
            &f64s(k),
            &f64s(v),
            &spans,
            f64::from(scale),
        );
        let f32s = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let inputs = InfluenceInputs {
            q: &s.tensor(q, &[n, query, dim]),
            k: &s.tensor(k, &[n, kv, dim]),
            v: &s.tensor(v, &[n, kv, dim]),
            out: &s.tensor(&f32s(&out), &[n, query, dim]),
            lse: &s.lse(&f32s(&lse), &[n, query]),
            d_out: &s.tensor(&self.d_out, &[n, query, dim]),
            window: self.window,
            block: self.block,
            sign: self.sign,
            gradients,
        };
        s.backend().influence(&inputs, scale)
    }

    /// Influence of every entry of a query head, `[tokens, tokens]`.
    fn entries(&self, [q, k, v]: &[Vec<f32>; 3], head: usize) -> Vec<f64> {
        let scale = self.world.scale().into();
        reference::influence(
            self.world.heads,
            [&f64s(q), &f64s(k), &f64s(v)],
            &f64s(&self.d_out),
            self.span(),
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

fn cases<S: Subject>(s: &S) -> impl Strategy<Value = Case> + use<S> {
    let dim = proptest::sample::select(s.dims());
    let tokens = prop_oneof![1usize..20, 60usize..140];
    let block = proptest::sample::select(s.influence_blocks());
    let window = prop_oneof![Just(usize::MAX), 1usize..20, 20usize..140];
    let absolute = any::<bool>();
    (1usize..=3, 1usize..=2, dim, tokens, window, block, absolute, any::<u64>()).prop_map(
        |(group, kv, dim, tokens, window, block, absolute, seed)| {
            let world = World { seed, ..world(group, kv, dim, tokens) };
            let d_out = normal(tokens * group * kv * dim, seed ^ 0xd0);
            let sign = if absolute { InfluenceSign::Absolute } else { InfluenceSign::Signed };
            Case { world, d_out, window, block, sign }
        },
    )
}

/// Ignores the trial of a backend that does not offer influence, or influence with gradients.
fn offered<S: Subject>(s: &S, gradients: bool) -> Verdict {
    let world = world(1, 1, s.dim(8), 3);
    let block = s.influence_blocks()[0];
    let d_out = normal(3 * world.heads.dim, 1);
    let (case, inputs) = Case::full(world, d_out, block).rounded(s);
    let Err(error) = case.run(s, &inputs, gradients) else { return Ok(()) };
    match s.core_error(&error) {
        Some(moa_core::Error::Unsupported { .. }) => Err(Stop::ignored(error)),
        _ => Err(error.into()),
    }
}

#[track_caller]
fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (at, (x, y)) in a.iter().zip(b).enumerate() {
        // An entry close to 1 - 1e-6 loses digits in f32: relative to the size of the sums.
        assert!((x - y).abs() <= tolerance * (1.0 + y.abs()), "{at}: {x} {y}");
    }
}

pub(crate) fn influence_equals_the_reference<S: Subject>(s: &S) -> Verdict {
    offered(s, false)?;
    let gradients = offered(s, true).is_ok();
    check(24, cases(s), |case| {
        let (case, inputs) = case.rounded(s);
        let expected = case.blocks(&inputs);
        for gradients in [false, gradients] {
            let found = case.run(s, &inputs, gradients).unwrap().blocks;
            close(&found, &expected, s.influence_tolerance());
        }
    });
    Ok(())
}

pub(crate) fn gradients_equal_the_reference<S: Subject>(s: &S) -> Verdict {
    offered(s, true)?;
    check(16, cases(s), |case| {
        let (case, inputs) = case.rounded(s);
        let [q, k, v] = [f64s(&inputs[0]), f64s(&inputs[1]), f64s(&inputs[2])];
        let scale = case.world.scale().into();
        let expected =
            backward(case.world.heads, [&q, &k, &v], &f64s(&case.d_out), case.span(), scale);
        let gradients = case.run(s, &inputs, true).unwrap().gradients.expect("asked for");
        for (gradient, expected) in
            [gradients.d_q, gradients.d_k, gradients.d_v].iter().zip(&expected)
        {
            let size = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            assert!(distance(&s.host(gradient), expected) <= s.influence_tolerance() / 3.0 * size);
        }
        assert!(case.run(s, &inputs, false).unwrap().gradients.is_none());
    });
    Ok(())
}

/// As [`influence_equals_the_reference`], where a query, key or value is no number: only sums that hold a pair with it are
/// none.
pub(crate) fn hidden_pairs_have_no_influence<S: Subject>(s: &S) -> Verdict {
    offered(s, false)?;
    check(24, (cases(s), poisons()), |(case, poison)| {
        let (case, inputs) = case.poisoned(poison).rounded(s);
        let found = case.run(s, &inputs, false).unwrap().blocks;
        for (at, (x, y)) in found.iter().zip(case.blocks(&inputs)).enumerate() {
            let is_close = match y.is_finite() {
                true => (x - y).abs() <= s.influence_tolerance() * (1.0 + y.abs()),
                false => !x.is_finite(),
            };
            assert!(is_close, "block {at}: {x} in place of {y}");
        }
    });
    Ok(())
}

/// As [`gradients_equal_the_reference`], where a query, key or value is no number.
pub(crate) fn hidden_pairs_have_no_gradients<S: Subject>(s: &S) -> Verdict {
    offered(s, true)?;
    check(24, (cases(s), poisons()), |(case, poison)| {
        let (case, inputs) = case.poisoned(poison).rounded(s);
        let [q, k, v] = [f64s(&inputs[0]), f64s(&inputs[1]), f64s(&inputs[2])];
        let (heads, scale) = (case.world.heads, case.world.scale().into());
        let expected = backward(heads, [&q, &k, &v], &f64s(&case.d_out), case.span(), scale);
        let found = case.run(s, &inputs, true).unwrap().gradients.expect("asked for");
        let found = [("d_q", found.d_q), ("d_k", found.d_k), ("d_v", found.d_v)];
        for ((name, found), expected) in found.iter().zip(&expected) {
            let finite = expected.iter().filter(|x| x.is_finite());
            let size = finite.fold(1.0, |max: f64, x| max.max(x.abs()));
            let row = expected.len() / case.world.tokens;
            let place = |at| format!("{name} of token {}", at / row);
            let tolerance = s.influence_tolerance() / 3.0 * size;
            close_where_finite(&s.host(found), expected, tolerance, place);
        }
    });
    Ok(())
}

/// With the objective `sum(d_out * out)`, which is linear in the output, `E_ij` is exactly what
/// masking `A_ij` changes.
pub(crate) fn influence_is_what_masking_one_entry_changes<S: Subject>(s: &S) -> Verdict {
    offered(s, false)?;
    if !s.influence_blocks().contains(&1) {
        let name = s.backend().name();
        return Err(Stop::ignored(format_args!("{name} has no influence blocks of one entry")));
    }
    let (n, dim) = (9, s.dim(4));
    let d_out = normal(n * dim, 5);
    let case = Case::full(world(1, 1, dim, n), d_out, 1);
    let (case, inputs) = case.rounded(s);
    let found = case.run(s, &inputs, false)?.blocks;
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
                error < s.influence_tolerance() / 3.0,
                "{i}, {j}: {} {change}",
                found[i * n + j]
            );
        }
        assert!((i..n).all(|j| found[i * n + j] == 0.0));
    }
    Ok(())
}

/// In the last layer only the answer's tokens have a gradient.
pub(crate) fn zero_gradient_rows_contribute_nothing<S: Subject>(s: &S) -> Verdict {
    offered(s, false)?;
    let block = s.influence_blocks()[s.influence_blocks().len() / 2];
    let world = world(2, 1, s.dim(16), 200);
    let row = 2 * world.heads.dim;
    let mut d_out = normal(200 * row, 3);
    d_out[..190 * row].fill(0.0);
    let case = Case { sign: InfluenceSign::Absolute, ..Case::full(world, d_out, block) };
    let (case, inputs) = case.rounded(s);
    let blocks = case.run(s, &inputs, offered(s, true).is_ok())?.blocks;
    close(&blocks, &case.blocks(&inputs), s.influence_tolerance());
    let silent = 190 / block * 200usize.div_ceil(block);
    assert!(silent > 0 && blocks[..silent].iter().all(|&e| e == 0.0));
    Ok(())
}
