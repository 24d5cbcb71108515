//! Random sequences and how they are run.

use moa_core::reference::{self, Heads};
use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::TestBackend;

pub(crate) type Backend<T> = <T as TestBackend>::Backend;
pub(crate) type Cache<T> = <Backend<T> as SparseAttentionBackend>::Cache;

/// One layer and one sequence's inputs, packed `[tokens, heads, dim]`.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) heads: Heads,
    pub(crate) spans: Vec<Span>,
    pub(crate) tokens: usize,
    pub(crate) seed: u64,
}

/// Numbers of about unit normal distribution.
pub(crate) fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.732).collect()
}

pub(crate) fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Largest absolute difference; infinite if something is not a number.
pub(crate) fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs());
    differences.fold(0.0, |max, d| if d.is_nan() { f64::INFINITY } else { d.max(max) })
}

/// Largest difference, relative where numbers are larger than 1; infinite if something is not a
/// number.
pub(crate) fn error(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let errors = a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs() / y.abs().max(1.0));
    errors.fold(0.0, |max, d| if d.is_nan() { f64::INFINITY } else { d.max(max) })
}

#[track_caller]
pub(crate) fn close(a: &[f32], b: &[f32], tolerance: f64) {
    let error = error(a, &f64s(b));
    assert!(error <= tolerance, "differs by {error:e}, more than {tolerance:e}");
}

impl World {
    pub(crate) fn new(
        query: usize,
        kv: usize,
        dim: usize,
        spans: &[(usize, usize)],
        tokens: usize,
    ) -> Self {
        let spans = spans.iter().map(|&(sink, window)| Span::new(sink, window).unwrap()).collect();
        Self { heads: Heads { query, kv, dim }, spans, tokens, seed: 1 }
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    pub(crate) fn q(&self) -> Vec<f32> {
        normal(self.tokens * self.heads.query * self.heads.dim, self.seed)
    }

    pub(crate) fn k(&self) -> Vec<f32> {
        normal(self.tokens * self.heads.kv * self.heads.dim, self.seed ^ 0x0051_5ec5)
    }

    pub(crate) fn v(&self) -> Vec<f32> {
        normal(self.tokens * self.heads.kv * self.heads.dim, self.seed ^ 0x0cab_1e5e)
    }

    pub(crate) fn layout(&self, capacity: usize, slack: usize) -> LayerLayout {
        LayerLayout::new(&self.spans, capacity, slack).unwrap()
    }

    pub(crate) fn open<T: TestBackend>(&self, t: &T, capacity: usize, slack: usize) -> Cache<T> {
        t.backend().open(&self.layout(capacity, slack), self.heads.dim).unwrap()
    }

    /// Outputs and log-sum-exps of the f64 reference.
    pub(crate) fn reference<T: TestBackend>(&self, t: &T) -> (Vec<f64>, Vec<f64>) {
        let rounded = |x: Vec<f32>| x.iter().map(|&x| f64::from(t.round(x))).collect::<Vec<_>>();
        let (k, v) = (rounded(self.k()), rounded(self.v()));
        let q: Vec<f64> = self.q().iter().map(|&x| f64::from(t.round_tensor(x))).collect();
        reference::extend(self.heads, &q, &k, &v, &self.spans, f64::from(self.scale()))
    }

    /// Appends this world's tokens `range` to a cache.
    pub(crate) fn extend<T: TestBackend>(
        &self,
        t: &T,
        cache: &mut Cache<T>,
        range: std::ops::Range<usize>,
    ) -> Result<Output, <Backend<T> as SparseAttentionBackend>::Error> {
        batch(t, &mut [Entry { world: self, cache, range }]).map(|mut outputs| outputs.remove(0))
    }

    /// The whole sequence, cut into chunks, in a cache with just enough room.
    pub(crate) fn run<T: TestBackend>(&self, t: &T, chunks: &[usize]) -> Output {
        let mut cache = self.open(t, self.tokens, 0);
        self.run_in(t, &mut cache, 0, chunks)
    }

    /// Tokens from `start`, cut into chunks.
    pub(crate) fn run_in<T: TestBackend>(
        &self,
        t: &T,
        cache: &mut Cache<T>,
        start: usize,
        chunks: &[usize],
    ) -> Output {
        let (mut all, mut at) = (Output::default(), start);
        for chunk in chunks {
            let output = self.extend(t, cache, at..at + chunk).unwrap();
            all.out.extend(output.out);
            all.lse.extend(output.lse);
            at += chunk;
        }
        all
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Output {
    pub(crate) out: Vec<f32>,
    pub(crate) lse: Vec<f32>,
}

/// One sequence of a batch: which tokens of which world go to which cache.
pub(crate) struct Entry<'a, T: TestBackend> {
    pub(crate) world: &'a World,
    pub(crate) cache: &'a mut Cache<T>,
    pub(crate) range: std::ops::Range<usize>,
}

/// One call for several sequences of equal dimensions; outputs per sequence.
pub(crate) fn batch<T: TestBackend>(
    t: &T,
    entries: &mut [Entry<'_, T>],
) -> Result<Vec<Output>, <Backend<T> as SparseAttentionBackend>::Error> {
    let heads = entries[0].world.heads;
    let scale = entries[0].world.scale();
    let tokens: Vec<usize> = entries.iter().map(|e| e.range.len()).collect();
    let total: usize = tokens.iter().sum();
    let pack = |all: fn(&World) -> Vec<f32>, heads_of: usize| {
        let row = heads_of * heads.dim;
        let parts =
            entries.iter().map(|e| all(e.world)[e.range.start * row..e.range.end * row].to_vec());
        t.tensor(&parts.collect::<Vec<_>>().concat(), &[total, heads_of, heads.dim])
    };
    let (q, k, v) =
        (pack(World::q, heads.query), pack(World::k, heads.kv), pack(World::v, heads.kv));
    let mut appends: Vec<_> = entries
        .iter_mut()
        .map(|e| Append { cache: &mut *e.cache, tokens: e.range.len() })
        .collect();
    let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale, lse: true };
    let extended = t.backend().extend(&mut appends, &inputs)?;
    let (out, lse) = (t.host(&extended.out), t.host(&extended.lse.expect("lse was asked for")));
    let mut first = 0;
    Ok(tokens
        .iter()
        .map(|n| {
            let rows = first * heads.query..(first + n) * heads.query;
            first += n;
            let out = out[rows.start * heads.dim..rows.end * heads.dim].to_vec();
            Output { out, lse: lse[rows].to_vec() }
        })
        .collect())
}

/// Worlds around the edges of tiles and spans.
pub(crate) fn worlds<T: TestBackend>(t: &T) -> impl Strategy<Value = World> + use<T> {
    let span = (0usize..6, prop_oneof![1usize..12, 30usize..150, Just(1000)]);
    let dim = proptest::sample::select(t.dims());
    let group = prop_oneof![Just(1usize), Just(2), Just(3), Just(4), Just(7), Just(16)];
    let tokens = prop_oneof![4 => 1usize..40, 2 => 60usize..140, 1 => 250usize..300];
    (group, proptest::collection::vec(span, 1..=2), dim, tokens, any::<u64>()).prop_map(
        |(group, spans, dim, tokens, seed)| {
            let world = World::new(group * spans.len(), spans.len(), dim, &spans, tokens);
            World { seed, ..world }
        },
    )
}

/// A world and chunks that add up to its tokens.
pub(crate) fn chunked_worlds<T: TestBackend>(
    t: &T,
) -> impl Strategy<Value = (World, Vec<usize>)> + use<T> {
    let sizes = prop_oneof![3 => 1usize..5, 2 => 5usize..40, 1 => 60usize..200];
    (worlds(t), proptest::collection::vec(sizes, 1..30)).prop_map(|(world, sizes)| {
        let chunks = cut(world.tokens, &sizes);
        (world, chunks)
    })
}

/// Cuts `tokens` into chunks of the given sizes and one for the rest.
pub(crate) fn cut(tokens: usize, sizes: &[usize]) -> Vec<usize> {
    let mut left = tokens;
    let mut chunks: Vec<usize> = sizes
        .iter()
        .map(|&size| {
            let chunk = size.min(left);
            left -= chunk;
            chunk
        })
        .filter(|&chunk| chunk > 0)
        .collect();
    chunks.extend((left > 0).then_some(left));
    chunks
}

/// Runs a property on random cases, the same ones every time.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    runner
        .run(&strategy, |case| {
            property(case);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
