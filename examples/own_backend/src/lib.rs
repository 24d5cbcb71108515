//! A backend of one's own: caches of 8-bit fixed-point numbers on the host.
//!
//! ```sh
//! cargo test -p own_backend
//! ```
//!
//! The core's geometry says where a head keeps which position and what a query sees, and
//! [`check_extend`] what is wrong with a call. What is left is storage and arithmetic.

use std::sync::Arc;

use moa_core::{
    Append, CacheState, ExtendInputs, Extended, HeadLayout, LayerLayout, Position, Result, Scores,
    SparseAttentionBackend, check_extend,
};

/// The value of one step of a cached number.
const STEP: f32 = 1.0 / 32.0;

/// A number between -4 and 4 as a cache holds it.
pub fn encode(x: f32) -> i8 {
    (x / STEP).round() as i8
}

/// The number that a cache holds.
pub fn decode(code: i8) -> f32 {
    f32::from(code) * STEP
}

/// Row-major numbers.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// As many as the product of the shape.
    pub data: Vec<f32>,
    /// Of the form `[tokens, heads, head_dim]`.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// One head's row of one token.
    fn row(&self, token: usize, head: usize) -> &[f32] {
        let (heads, dim) = (self.shape[1], self.shape[2]);
        &self.data[(token * heads + head) * dim..][..dim]
    }
}

/// Keys and values of one sequence in one layer, `[slots, head_dim]` each.
#[derive(Clone, Debug)]
pub struct Cache {
    state: CacheState,
    keys: Vec<i8>,
    values: Vec<i8>,
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// Appends the key and value of one token, rows `token` of `k` and `v`.
    fn append(&mut self, k: &Tensor, v: &Tensor, token: usize) -> Result<Position> {
        let (position, dim) = (Position(self.state.len()), self.state.head_dim());
        for (head, layout) in self.state.layout().heads().iter().enumerate() {
            let at = layout.slot(position).0 * dim;
            for (row, slots) in [(k, &mut self.keys), (v, &mut self.values)] {
                let codes = row.row(token, head).iter().map(|x| encode(*x));
                slots[at..at + dim].iter_mut().zip(codes).for_each(|(slot, code)| *slot = code);
            }
        }
        self.state.append(1)?;
        Ok(position)
    }

    /// Attention of one query at `position` over what its head sees: appends the output to `out`, and
    /// returns the log-sum-exp of the scores. A sink of minus infinity is none.
    fn attend(
        &self,
        head: &HeadLayout,
        position: Position,
        q: &[f32],
        scores: &Scores<'_, Tensor>,
        sink: f32,
        out: &mut Vec<f32>,
    ) -> f32 {
        let row = |codes: &[i8], slot: usize| -> Vec<f32> {
            codes[slot * q.len()..][..q.len()].iter().map(|code| decode(*code)).collect()
        };
        let seen = head.span().visible(position).into_iter().flatten();
        let slots: Vec<usize> = seen.map(|key| head.slot(Position(key)).0).collect();
        let score = |slot: &usize| -> f32 {
            let products = q.iter().zip(row(&self.keys, *slot)).map(|(q, k)| q * k);
            let score = scores.scale * products.sum::<f32>();
            scores.softcap.map_or(score, |cap| cap * (score / cap).tanh())
        };
        let scores: Vec<f32> = slots.iter().map(score).collect();
        let max = scores.iter().copied().fold(sink, f32::max);
        let sum: f32 = scores.iter().chain([&sink]).map(|score| (score - max).exp()).sum();
        let mut mean = vec![0.0; q.len()];
        for (slot, score) in slots.iter().zip(&scores) {
            let weight = (score - max).exp() / sum;
            mean.iter_mut().zip(row(&self.values, *slot)).for_each(|(x, v)| *x += weight * v);
        }
        out.extend(mean);
        max + sum.ln()
    }
}

/// The backend: token by token, so that chunks cannot matter.
#[derive(Clone, Copy, Debug, Default)]
pub struct FixedPoint;

impl SparseAttentionBackend for FixedPoint {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = moa_core::Error;

    fn name(&self) -> &'static str {
        "fixed point"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        2 * head_dim as u64
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
        let codes = vec![0; layout.slots() * head_dim];
        let state = CacheState::new(Arc::new(layout.clone()), head_dim);
        Ok(Cache { state, keys: codes.clone(), values: codes })
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        let shape = check_extend(batch, inputs, |tensor| &tensor.shape[..])?;
        let (mut out, mut lse, mut token) = (Vec::new(), Vec::new(), 0);
        for Append { cache, tokens } in batch {
            for _ in 0..*tokens {
                let position = cache.append(inputs.k, inputs.v, token)?;
                for query in 0..shape.query_heads {
                    let head = cache.state.layout().head(query / shape.group());
                    let q = inputs.q.row(token, query);
                    let sinks = inputs.scores.sinks;
                    let sink = sinks.map_or(f32::NEG_INFINITY, |sinks| sinks.data[query]);
                    lse.push(cache.attend(head, position, q, &inputs.scores, sink, &mut out));
                }
                token += 1;
            }
        }
        Ok(Extended {
            out: Tensor { data: out, shape: inputs.q.shape.clone() },
            lse: inputs.lse.then(|| Tensor { data: lse, shape: inputs.q.shape[..2].into() }),
        })
    }

    fn fork(&self, cache: &Cache) -> Result<Cache> {
        Ok(cache.clone())
    }

    fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.state.truncate(len)
    }

    fn bytes(&self, cache: &Cache) -> u64 {
        (cache.keys.len() + cache.values.len()) as u64
    }
}

/// The examples of the guide for engines compile.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/embedding.md")]
struct Guide;
