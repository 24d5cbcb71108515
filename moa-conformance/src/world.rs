use std::ops::Range;

use moa_core::reference::{self, Heads};
use moa_core::{
    Append, CacheType, ExtendInputs, Extended, LayerLayout, Scores, Span, SparseAttentionBackend,
    key_feedback,
};

use crate::numbers::{f64s, normal};
use crate::{Cache, Error, Subject};

/// One layer of an attention model and the inputs of one sequence to it: what the suite runs backends
/// on. Inputs are random by [`seed`](Self::seed), packed `[tokens, heads, head_dim]`.
#[derive(Clone, Debug)]
pub struct World {
    /// Heads and their dimension.
    pub heads: Heads,
    /// The span of each KV head.
    pub spans: Vec<Span>,
    /// The cache type of each KV head, where it is not the backend's own; empty where all are.
    pub types: Vec<Option<CacheType>>,
    /// The layer's softcap.
    pub softcap: Option<f32>,
    /// Whether the layer has learned [`sinks`](Self::sinks).
    pub has_sinks: bool,
    /// Whether keys of 4 bits have [`feedback`](Self::feedback).
    pub has_feedback: bool,
    /// Length of the sequence.
    pub tokens: usize,
    /// Other seeds give other inputs.
    pub seed: u64,
    /// A row of all heads that holds no numbers.
    pub poison: Option<Poison>,
}

/// A token whose query, key or value holds one thing in all its elements, which may be infinite or no number.
#[derive(Clone, Copy, Debug)]
pub struct Poison {
    /// The token.
    pub token: usize,
    /// The tensor.
    pub of: Poisoned,
    /// The thing.
    pub with: f32,
}

/// A tensor of a [`World`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poisoned {
    /// Queries.
    Queries,
    /// Keys.
    Keys,
    /// Values.
    Values,
}

impl World {
    /// A world with `query` query heads and `kv` KV heads, and spans of these `(sink, window)`, one
    /// for each KV head.
    ///
    /// # Panics
    /// Panics if a span is not valid.
    pub fn new(
        query: usize,
        kv: usize,
        dim: usize,
        spans: &[(usize, usize)],
        tokens: usize,
    ) -> Self {
        let spans = spans.iter().map(|&(sink, window)| Span::new(sink, window).unwrap()).collect();
        let heads = Heads { query, kv, dim };
        Self {
            heads,
            spans,
            types: Vec::new(),
            softcap: None,
            has_sinks: false,
            has_feedback: false,
            tokens,
            seed: 1,
            poison: None,
        }
    }

    /// The world with a poisoned row, of the token modulo the world's.
    pub(crate) fn poisoned(self, poison: Poison) -> Self {
        let token = poison.token % self.tokens;
        Self { poison: Some(Poison { token, ..poison }), ..self }
    }

    /// The usual factor of scores, `1 / sqrt(head_dim)`.
    pub fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// Queries, `[tokens, query_heads, head_dim]`.
    pub fn q(&self) -> Vec<f32> {
        self.rows(self.heads.query, 0, Poisoned::Queries)
    }

    /// Keys, `[tokens, kv_heads, head_dim]`.
    pub fn k(&self) -> Vec<f32> {
        self.rows(self.heads.kv, 0x0051_5ec5, Poisoned::Keys)
    }

    /// Values, `[tokens, kv_heads, head_dim]`.
    pub fn v(&self) -> Vec<f32> {
        self.rows(self.heads.kv, 0x0cab_1e5e, Poisoned::Values)
    }

    fn rows(&self, heads: usize, salt: u64, of: Poisoned) -> Vec<f32> {
        let row = heads * self.heads.dim;
        let mut rows = normal(self.tokens * row, self.seed ^ salt);
        if let Some(poison) = self.poison.filter(|poison| poison.of == of) {
            rows[poison.token * row..][..row].fill(poison.with);
        }
        rows
    }

    /// The layer's sinks, `[query_heads]`, whatever the seed: about as large as scores, and minus infinity
    /// for some head.
    pub fn sinks(&self) -> Vec<f32> {
        let mut sinks = normal(self.heads.query, 0x51);
        sinks.iter_mut().skip(2).step_by(5).for_each(|sink| *sink = f32::NEG_INFINITY);
        sinks
    }

    /// Feedback of each KV head, `[kv_heads, head_dim, head_dim]`, whatever the seed: that of queries which a few
    /// directions make up for the most part.
    pub fn feedback(&self) -> Vec<f32> {
        let dim = self.heads.dim;
        let of_head = |head: usize| {
            let mut moments = vec![0.0; dim * dim];
            for direction in f64s(&normal((dim / 4 + 1) * dim, 0xfeed + head as u64)).chunks(dim) {
                for (row, x) in moments.chunks_mut(dim).zip(direction) {
                    row.iter_mut().zip(direction).for_each(|(sum, y)| *sum += x * y);
                }
            }
            key_feedback(&moments, dim)
        };
        (0..self.heads.kv).flat_map(of_head).collect()
    }

    /// The same world, whose heads go through the subject's types in turn, from one that the seed says.
    pub(crate) fn of_types<S: Subject>(self, s: &S) -> Self {
        let types: Vec<_> = s.cache_types().iter().copied().map(Some).chain([None]).collect();
        let own = |head: usize| types[(self.seed as usize).wrapping_add(head) % types.len()];
        Self { types: (0..self.heads.kv).map(own).collect(), ..self }
    }

    /// The geometry of a cache for `capacity` tokens that can go back by `slack` more than one.
    ///
    /// # Panics
    /// Panics if there is no such geometry.
    pub fn layout(&self, capacity: usize, slack: usize) -> LayerLayout {
        let layout = LayerLayout::new(&self.spans, capacity, slack).unwrap();
        match &self.types[..] {
            [] => layout,
            types => layout.with_cache_types(types).unwrap(),
        }
    }

    /// An empty cache of this [`layout`](Self::layout).
    ///
    /// # Panics
    /// Panics if the backend refuses.
    pub fn open<S: Subject>(&self, s: &S, capacity: usize, slack: usize) -> Cache<S> {
        s.backend().open(&self.layout(capacity, slack), self.heads.dim).unwrap()
    }

    /// Outputs and log-sum-exps of the f64 reference, on inputs as the backend rounds them.
    pub fn reference<S: Subject>(&self, s: &S) -> (Vec<f64>, Vec<f64>) {
        let (k, v) = (self.stored_keys(s), self.stored_values(s));
        let q: Vec<f64> = self.q().iter().map(|&x| f64::from(s.round_tensor(x))).collect();
        let sinks = self.has_sinks.then(|| f64s(&self.sinks()));
        let scores = reference::Scores {
            scale: self.scale().into(),
            softcap: self.softcap.map(f64::from),
            sinks: sinks.as_deref(),
        };
        reference::extend(self.heads, &q, &k, &v, &self.spans, scores)
    }

    /// Keys as heads of their types hold them.
    pub fn stored_keys<S: Subject>(&self, s: &S) -> Vec<f64> {
        let feedback = self.has_feedback.then(|| self.feedback());
        let square = self.heads.dim * self.heads.dim;
        self.stored(s, &self.k(), |own, head, row| match own {
            Some(own) => {
                let feedback = feedback.as_ref().map(|all| &all[head * square..][..square]);
                own.keys().round_with(feedback, row)
            }
            None => s.round_key(row),
        })
    }

    /// Values as heads of their types hold them.
    pub fn stored_values<S: Subject>(&self, s: &S) -> Vec<f64> {
        self.stored(s, &self.v(), |own, _, row| match own {
            Some(own) => own.values().round(row),
            None => s.round_value(row),
        })
    }

    fn stored<S: Subject>(
        &self,
        s: &S,
        x: &[f32],
        round: impl Fn(Option<CacheType>, usize, &[f32]) -> Vec<f64>,
    ) -> Vec<f64> {
        // What a cache rounds comes in the type of tensors.
        let x: Vec<f32> = x.iter().map(|&x| s.round_tensor(x)).collect();
        let rows = x.chunks(self.heads.dim).enumerate();
        rows.flat_map(|(i, row)| {
            let head = i % self.heads.kv;
            round(self.types.get(head).copied().flatten(), head, row)
        })
        .collect()
    }

    /// Appends this world's tokens `range` to a cache.
    ///
    /// # Errors
    /// The error of the backend's `extend`.
    pub fn extend<S: Subject>(
        &self,
        s: &S,
        cache: &mut Cache<S>,
        range: Range<usize>,
    ) -> Result<Output, Error<S>> {
        batch(s, &mut [Entry { world: self, cache, range }]).map(|mut outputs| outputs.remove(0))
    }

    /// The whole sequence, cut into chunks, in a cache with just enough room.
    ///
    /// # Panics
    /// Panics if the backend refuses.
    pub fn run<S: Subject>(&self, s: &S, chunks: &[usize]) -> Output {
        let mut cache = self.open(s, self.tokens, 0);
        self.run_in(s, &mut cache, 0, chunks)
    }

    /// Tokens from `start`, cut into chunks.
    ///
    /// # Panics
    /// Panics if the backend refuses.
    pub fn run_in<S: Subject>(
        &self,
        s: &S,
        cache: &mut Cache<S>,
        start: usize,
        chunks: &[usize],
    ) -> Output {
        let (mut all, mut at) = (Output::default(), start);
        for chunk in chunks {
            let output = self.extend(s, cache, at..at + chunk).unwrap();
            all.out.extend(output.out);
            all.lse.extend(output.lse);
            at += chunk;
        }
        all
    }
}

/// The attention output of some tokens of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// `[tokens, query_heads, head_dim]`.
    pub out: Vec<f32>,
    /// Log-sum-exps of the scores, `[tokens, query_heads]`.
    pub lse: Vec<f32>,
}

/// One sequence of a batch: which tokens of which world go to which cache.
pub struct Entry<'a, S: Subject> {
    /// The world that the sequence is of.
    pub world: &'a World,
    /// The sequence's cache.
    pub cache: &'a mut Cache<S>,
    /// Tokens of the world: those after the ones that the cache holds.
    pub range: Range<usize>,
}

/// One call for several sequences of one layer; outputs per sequence.
///
/// # Errors
/// The error of the backend's `extend`.
///
/// # Panics
/// Panics if there is no entry, or if there are no log-sum-exps, which are asked for.
pub fn batch<S: Subject>(s: &S, entries: &mut [Entry<'_, S>]) -> Result<Vec<Output>, Error<S>> {
    let World { heads, softcap, has_sinks, has_feedback, .. } = *entries[0].world;
    let first = entries[0].world;
    let sinks = has_sinks.then(|| s.lse(&first.sinks(), &[heads.query]));
    let feedback =
        has_feedback.then(|| s.lse(&first.feedback(), &[heads.kv, heads.dim, heads.dim]));
    let scores = Scores { scale: first.scale(), softcap, sinks: sinks.as_ref() };
    let tokens: Vec<usize> = entries.iter().map(|e| e.range.len()).collect();
    let total: usize = tokens.iter().sum();
    let pack = |all: fn(&World) -> Vec<f32>, heads_of: usize| {
        let row = heads_of * heads.dim;
        let parts =
            entries.iter().map(|e| all(e.world)[e.range.start * row..e.range.end * row].to_vec());
        s.tensor(&parts.collect::<Vec<_>>().concat(), &[total, heads_of, heads.dim])
    };
    let qkv = [pack(World::q, heads.query), pack(World::k, heads.kv), pack(World::v, heads.kv)];
    let caches = entries.iter_mut().map(|e| Append { cache: &mut *e.cache, tokens: e.range.len() });
    let [q, k, v] = &qkv;
    let key_feedback = feedback.as_ref();
    let inputs = ExtendInputs { lse: true, key_feedback, ..ExtendInputs::new(q, k, v, scores) };
    let Extended { out, lse } = s.backend().extend(&mut caches.collect::<Vec<_>>(), &inputs)?;
    let (out, lse) = (s.host(&out), s.host(&lse.expect("lse was asked for")));
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

/// The backend's `extend` by caches and how many tokens each gets.
///
/// # Errors
/// The error of the backend's `extend`.
pub fn extend<'a, 'b, S: Subject>(
    s: &S,
    batch: impl IntoIterator<Item = (&'a mut Cache<S>, usize)>,
    [q, k, v]: [&'b S::Tensor; 3],
    scores: impl Into<Scores<'b, S::Tensor>>,
    lse: bool,
) -> Result<Extended<S::Tensor>, Error<S>>
where
    Cache<S>: 'a,
{
    let batch = batch.into_iter().map(|(cache, tokens)| Append { cache, tokens });
    let mut batch: Vec<Append<'a, Cache<S>>> = batch.collect();
    s.backend().extend(&mut batch, &ExtendInputs { lse, ..ExtendInputs::new(q, k, v, scores) })
}
