//! Attention of new tokens over cached and new keys, then the append.

mod keys;
mod products;
mod row;
mod schedule;
mod scores;
mod stage;
mod tile;

use moa_core::{
    Append, AttentionShape, CacheState, ExtendInputs, Extended, HeadLayout, check_extend, rotate,
    rotation,
};

use self::keys::{HeadRows, Source};
use self::schedule::{Kind, Schedule, Task};
use self::scores::Rule;
use crate::cache::{Cache, with_store};
use crate::pool::{self, SharedMut};
use crate::{Result, Tensor, workspace};

/// See [`moa_core::SparseAttentionBackend::extend`].
pub(crate) fn extend(
    batch: &mut [Append<'_, Cache>],
    inputs: &ExtendInputs<'_, Tensor>,
    narrow: bool,
) -> Result<Extended<Tensor>> {
    let shape = check_extend(batch, inputs, Tensor::shape)?;
    let mut out = Tensor::scratch(inputs.q.shape())?;
    let mut lse = match inputs.lse {
        true => Some(Tensor::zeros(&[shape.tokens, shape.query_heads])?),
        false => None,
    };
    stage::stage(batch, &shape, inputs)?;
    let states = batch.iter().map(|append| (&append.cache.state, append.tokens));
    let schedule = schedule::schedule(states, shape.group(), shape.head_dim)?;
    let tokens = batch.iter().map(|append| append.tokens);
    let call = Call {
        first: tokens.scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect(),
        batch,
        shape: &shape,
        q: inputs.q.data(),
        rule: Rule::new(&inputs.scores),
        narrow,
        out: SharedMut::new(out.data_mut()),
        lse: lse.as_mut().map(|lse| SharedMut::new(lse.data_mut())),
    };
    call.run(&schedule)?;
    stage::commit(batch)?;
    Ok(Extended { out, lse })
}

struct Call<'a> {
    batch: &'a [Append<'a, Cache>],
    /// Row of each sequence's first token.
    first: Vec<usize>,
    shape: &'a AttentionShape,
    q: &'a [f32],
    rule: Rule<'a>,
    /// Whether products may be of bf16.
    narrow: bool,
    out: SharedMut<'a, f32>,
    lse: Option<SharedMut<'a, f32>>,
}

/// Partial results of the row kernel for one sequence and KV head.
struct RowHead {
    sequence: usize,
    kv_head: usize,
    splits: usize,
    /// Of the first split, in the buffer of partial results.
    start: usize,
}

impl Call<'_> {
    fn run(&self, schedule: &Schedule) -> Result<()> {
        let row_heads = self.row_heads();
        let partial_len =
            row_heads.last().map_or(0, |r| r.start + r.splits * self.split_len(r.sequence));
        let mut partials: Vec<f32> =
            crate::zeroed::zeroed(partial_len, "partial attention results")?;
        {
            let partials = SharedMut::new(&mut partials);
            pool::try_for_each(schedule.tasks.len(), schedule.work, |i| {
                let task = &schedule.tasks[i];
                let cache = &*self.batch[task.sequence].cache;
                let store = &cache.heads[task.kv_head];
                let sources: [&dyn HeadRows; 2] =
                    with_store!(store, pair => [&pair.keys, &pair.values]);
                self.task(task, &cache.state, sources, &row_heads, &partials)
            })?;
        }
        for row_head in &row_heads {
            self.merge(row_head, &partials);
        }
        Ok(())
    }

    fn row_heads(&self) -> Vec<RowHead> {
        let mut row_heads = Vec::new();
        let mut start = 0;
        for (sequence, Append { cache, tokens }) in self.batch.iter().enumerate() {
            let state = &cache.state;
            if schedule::uses_rows(*tokens, self.shape.group()) {
                for (kv_head, head) in state.layout().heads().iter().enumerate() {
                    let splits = schedule::splits(head, state.len(), *tokens);
                    row_heads.push(RowHead { sequence, kv_head, splits, start });
                    start += splits * self.split_len(sequence);
                }
            }
        }
        row_heads
    }

    /// Elements of the partial results of one split.
    fn split_len(&self, sequence: usize) -> usize {
        self.batch[sequence].tokens * self.shape.group() * row::partial_len(self.shape.head_dim)
    }

    fn task(
        &self,
        task: &Task,
        state: &CacheState,
        sources: [&dyn HeadRows; 2],
        row_heads: &[RowHead],
        partials: &SharedMut<'_, f32>,
    ) -> Result<()> {
        let &Task { sequence, kv_head, ref kind, .. } = task;
        let AttentionShape { query_heads, head_dim, .. } = *self.shape;
        let group = self.shape.group();
        let head: &HeadLayout = state.layout().head(kv_head);
        let (first, count) = (self.first[sequence], self.batch[sequence].tokens);
        let (slot, dim) = (head.offset().0, head_dim);
        let [keys, values] = sources.map(|rows| Source { rows, first: slot, dim });
        match kind {
            Kind::Tile { tokens } => workspace::run(tile::TileTask {
                head,
                len: state.len(),
                tokens: tokens.clone(),
                first,
                query_heads,
                query_head: kv_head * group,
                group,
                q: self.q,
                keys,
                values,
                rule: self.rule,
                narrow: self.narrow,
                out: &self.out,
                lse: self.lse.as_ref(),
            }),
            Kind::Row { keys: split } => {
                let same = |r: &&RowHead| r.sequence == sequence && r.kv_head == kv_head;
                let Some(row_head) = row_heads.iter().find(same) else { return Ok(()) };
                let len = self.split_len(sequence);
                let start = row_head.start + split.start / schedule::SPLIT_KEYS * len;
                workspace::run(row::RowTask {
                    head,
                    len: state.len(),
                    tokens: count,
                    split: split.clone(),
                    group,
                    q: &self.q[(first * query_heads + kv_head * group) * head_dim..],
                    q_stride: query_heads * head_dim,
                    keys,
                    values,
                    rule: self.rule,
                    // SAFETY: each split has a place of its own.
                    partial: unsafe { partials.slice(start, len) },
                })
            }
        }
    }

    fn merge(&self, row_head: &RowHead, partials: &[f32]) {
        let AttentionShape { query_heads, head_dim, .. } = *self.shape;
        let group = self.shape.group();
        let stride = self.split_len(row_head.sequence);
        let store = &self.batch[row_head.sequence].cache.heads[row_head.kv_head];
        let rotates = with_store!(store, pair => pair.values.row_type().rotates());
        for row in 0..self.batch[row_head.sequence].tokens * group {
            let token = self.first[row_head.sequence] + row / group;
            let at = token * query_heads + row_head.kv_head * group + row % group;
            // SAFETY: the tasks are done and nothing else is borrowed.
            let out = unsafe { self.out.slice(at * head_dim, head_dim) };
            let partials = &partials[row_head.start + row * row::partial_len(head_dim)..];
            let total = |max, sum| self.rule.total(at % query_heads, max, sum);
            let lse = row::merge(partials, stride, row_head.splits, total, out);
            if rotates {
                rotate(out);
                out.iter_mut().for_each(|x| *x /= rotation(head_dim) as f32);
            }
            if let Some(all) = &self.lse {
                // SAFETY: as above.
                unsafe { all.slice(at, 1)[0] = lse };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use moa_core::{CacheType, LayerLayout, Position, Span, SparseAttentionBackend};

    use super::*;
    use crate::CpuBackend;
    use crate::cache::Pair;
    use crate::element::RowElement;

    // 10. Reading slots nobody wrote (vLLM's tests fill them with NaN).
    #[test]
    fn trap_10_slots_that_nobody_wrote_are_never_read() {
        let spans = [Span::full(300), Span::new(3, 20).unwrap(), Span::new(0, 150).unwrap()];
        let layout = LayerLayout::new(&spans, 300, 7).unwrap();
        let tensor = |tokens: usize, heads: usize| {
            let data =
                (0..tokens * heads * 8).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            Tensor::new(data, &[tokens, heads, 8]).unwrap()
        };
        for dtype in CacheType::ALL {
            let backend = CpuBackend::new(dtype);
            let mut clean = backend.open(&layout, 8).unwrap();
            let mut poisoned = backend.open(&layout, 8).unwrap();
            for head in &mut poisoned.heads {
                with_store!(head, pair => poison(pair));
            }
            for tokens in [1, 2, 90, 1, 3, 1, 130, 1] {
                let (q, kv) = (tensor(tokens, 6), tensor(tokens, 3));
                let inputs = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &kv, &kv, 0.4) };
                let [a, b] = [&mut clean, &mut poisoned]
                    .map(|cache| backend.extend(&mut [Append { cache, tokens }], &inputs).unwrap());
                assert!(a.out.data().iter().all(|x| x.is_finite()));
                assert_eq!(a, b);
            }
        }
    }

    /// A slot that is used and holds no number: only queries that see it say so.
    #[test]
    fn a_value_that_is_no_number_reaches_only_the_queries_that_see_it() {
        const TOKENS: usize = 300;
        let spans = [Span::full(TOKENS), Span::new(3, 20).unwrap(), Span::new(0, 150).unwrap()];
        let layout = LayerLayout::new(&spans, TOKENS, 7).unwrap();
        let data = |heads: usize| -> Vec<f32> {
            (0..TOKENS * heads * 8).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
        };
        let rows = |all: &[f32], heads: usize, range: std::ops::Range<usize>| {
            let rows = all[range.start * heads * 8..range.end * heads * 8].to_vec();
            Tensor::new(rows, &[range.len(), heads, 8]).unwrap()
        };
        for (dtype, chunk) in
            CacheType::ALL.into_iter().flat_map(|d| [(d, 1), (d, 3), (d, 40), (d, 300)])
        {
            let backend = CpuBackend::new(dtype);
            let run = |k: &[f32], v: &[f32]| {
                let mut cache = backend.open(&layout, 8).unwrap();
                let (q, mut out) = (data(6), Vec::new());
                for start in (0..TOKENS).step_by(chunk) {
                    let range = start..(start + chunk).min(TOKENS);
                    let (q, k, v) = (
                        rows(&q, 6, range.clone()),
                        rows(k, 3, range.clone()),
                        rows(v, 3, range.clone()),
                    );
                    let inputs = ExtendInputs::new(&q, &k, &v, 0.4);
                    let batch = &mut [Append { cache: &mut cache, tokens: range.len() }];
                    out.extend(backend.extend(batch, &inputs).unwrap().out.into_data());
                }
                out
            };
            let clean = run(&data(3), &data(3));
            for (at, bad) in
                [(0, f32::NAN), (130, f32::INFINITY), (141, f32::NEG_INFINITY), (299, f32::NAN)]
            {
                let mut poisoned = data(3);
                poisoned[at * 24..(at + 1) * 24].fill(bad);
                // As a value, and as a key, whose score no longer is a number.
                for out in [run(&data(3), &poisoned), run(&poisoned, &data(3))] {
                    for (index, (out, clean)) in out.iter().zip(&clean).enumerate() {
                        let (query, head) = (index / 48, index / 8 % 6 / 2);
                        if !spans[head].attends(Position(query), Position(at)) {
                            let place =
                                format!("{dtype:?}, chunks of {chunk}, {bad} at {at}: {query}");
                            assert!((out - clean).abs() < 1e-4, "{place}: {out} {clean}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_output() {
        let layout =
            LayerLayout::new(&[Span::full(300), Span::new(3, 20).unwrap()], 300, 0).unwrap();
        let tensor = |tokens: usize, heads: usize, dim: usize| {
            let data = (0..tokens * heads * dim).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0);
            Tensor::new(data.collect(), &[tokens, heads, dim]).unwrap()
        };
        let of_types = CacheType::ALL.into_iter().zip([20, 24, 72, 64, 40, 48, 21]);
        for (dtype, dim) in of_types.chain([(CacheType::K8V4, 96), (CacheType::Int4, 64)]) {
            // AVX-512 rounds queries to 16 bits where keys are whole numbers: 2^-16 of scores of up to 12.
            let bound = if dtype.keys().rotates() { 2e-4 } else { 1e-5 };
            let backend = CpuBackend::new(dtype);
            let run = || {
                let mut cache = backend.open(&layout, dim).unwrap();
                let mut all = Vec::new();
                // Small enough to stay on this thread.
                for tokens in [1, 2, 40, 1, 3, 20, 1] {
                    let (q, kv) = (tensor(tokens, 6, dim), tensor(tokens, 2, dim));
                    let inputs = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &kv, &kv, 0.4) };
                    let batch = &mut [Append { cache: &mut cache, tokens }];
                    let Extended { out, lse } = backend.extend(batch, &inputs).unwrap();
                    all.extend([out.into_data(), lse.unwrap().into_data()].concat());
                }
                all
            };
            let results = crate::simd::tests::on_every_arch(run);
            for result in &results[1..] {
                for (a, b) in result.iter().zip(&results[0]) {
                    assert!((a - b).abs() < bound, "{dtype:?}: {a} {b}");
                }
            }
        }
    }

    fn poison<K: RowElement, V: RowElement>(pair: &mut Pair<K, V>) {
        fn rows<E: RowElement>(rows: &mut crate::cache::Rows<E>) {
            bytemuck::cast_slice_mut::<E, u8>(&mut rows.cached.codes).fill(0xff);
            rows.cached.scales.fill(0x7fc0);
        }
        rows(&mut pair.keys);
        rows(&mut pair.values);
    }
}
