//! Attention of new tokens over cached and new keys, then the append.

mod keys;
mod row;
mod schedule;
mod stage;
mod tile;

use moa_core::{
    Append, AttentionShape, CacheState, ExtendInputs, Extended, HeadLayout, check_extend,
};

use self::keys::Source;
use self::schedule::{Kind, Schedule, Task};
use crate::cache::{Cache, Pair, with_store};
use crate::element::Element;
use crate::pool::{self, SharedMut};
use crate::{Result, Tensor, workspace};

/// See [`moa_core::SparseAttentionBackend::extend`].
pub(crate) fn extend(
    batch: &mut [Append<'_, Cache>],
    inputs: &ExtendInputs<'_, Tensor>,
) -> Result<Extended<Tensor>> {
    let shape = check_extend(batch, inputs, Tensor::shape)?;
    let mut out = Tensor::zeros(inputs.q.shape())?;
    let mut lse = match inputs.lse {
        true => Some(Tensor::zeros(&[shape.tokens, shape.query_heads])?),
        false => None,
    };
    stage::stage(batch, &shape, inputs.k.data(), inputs.v.data());
    let states = batch.iter().map(|append| (&append.cache.state, append.tokens));
    let schedule = schedule::schedule(states, shape.group(), shape.head_dim);
    let tokens = batch.iter().map(|append| append.tokens);
    let call = Call {
        first: tokens.scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect(),
        batch,
        shape: &shape,
        q: inputs.q.data(),
        scale: inputs.scale,
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
    scale: f32,
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
            pool::for_each(schedule.tasks.len(), schedule.work, |i| {
                let task = &schedule.tasks[i];
                let cache = &*self.batch[task.sequence].cache;
                with_store!(&cache.store, pair => self.task(task, &cache.state, pair, &row_heads, &partials));
            });
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

    fn task<E: Element>(
        &self,
        task: &Task,
        state: &CacheState,
        pair: &Pair<E>,
        row_heads: &[RowHead],
        partials: &SharedMut<'_, f32>,
    ) {
        let &Task { sequence, kv_head, ref kind } = task;
        let AttentionShape { query_heads, head_dim, .. } = *self.shape;
        let group = self.shape.group();
        let head: &HeadLayout = state.layout().head(kv_head);
        let (first, count) = (self.first[sequence], self.batch[sequence].tokens);
        let new = kv_head * count * head_dim;
        let keys = Source { cached: &pair.keys[..], new: &pair.staged_keys[new..], dim: head_dim };
        let values =
            Source { cached: &pair.values[..], new: &pair.staged_values[new..], dim: head_dim };
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
                scale: self.scale,
                out: &self.out,
                lse: self.lse.as_ref(),
            }),
            Kind::Row { keys: split } => {
                let same = |r: &&RowHead| r.sequence == sequence && r.kv_head == kv_head;
                let Some(row_head) = row_heads.iter().find(same) else { return };
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
                    scale: self.scale,
                    // SAFETY: each split has a place of its own.
                    partial: unsafe { partials.slice(start, len) },
                });
            }
        }
    }

    fn merge(&self, row_head: &RowHead, partials: &[f32]) {
        let AttentionShape { query_heads, head_dim, .. } = *self.shape;
        let group = self.shape.group();
        let stride = self.split_len(row_head.sequence);
        for row in 0..self.batch[row_head.sequence].tokens * group {
            let token = self.first[row_head.sequence] + row / group;
            let at = token * query_heads + row_head.kv_head * group + row % group;
            // SAFETY: the tasks are done and nothing else is borrowed.
            let out = unsafe { self.out.slice(at * head_dim, head_dim) };
            let partials = &partials[row_head.start + row * row::partial_len(head_dim)..];
            let lse = row::merge(partials, stride, row_head.splits, out);
            if let Some(all) = &self.lse {
                // SAFETY: as above.
                unsafe { all.slice(at, 1)[0] = lse };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use moa_core::{Dtype, LayerLayout, Span, SparseAttentionBackend};

    use super::*;
    use crate::CpuBackend;

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
        for dtype in Dtype::ALL {
            let backend = CpuBackend::new(dtype);
            let mut clean = backend.open(&layout, 8).unwrap();
            let mut poisoned = backend.open(&layout, 8).unwrap();
            with_store!(&mut poisoned.store, pair => poison(pair));
            for tokens in [1, 2, 90, 1, 3, 1, 130, 1] {
                let (q, kv) = (tensor(tokens, 6), tensor(tokens, 3));
                let inputs = ExtendInputs { q: &q, k: &kv, v: &kv, scale: 0.4, lse: true };
                let [a, b] = [&mut clean, &mut poisoned]
                    .map(|cache| backend.extend(&mut [Append { cache, tokens }], &inputs).unwrap());
                assert!(a.out.data().iter().all(|x| x.is_finite()));
                assert_eq!(a, b);
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
        for (dtype, dim) in [(Dtype::F32, 20), (Dtype::F16, 24), (Dtype::Bf16, 72)] {
            let backend = CpuBackend::new(dtype);
            let run = || {
                let mut cache = backend.open(&layout, dim).unwrap();
                let mut all = Vec::new();
                // Small enough to stay on this thread.
                for tokens in [1, 2, 40, 1, 3, 20, 1] {
                    let (q, kv) = (tensor(tokens, 6, dim), tensor(tokens, 2, dim));
                    let inputs = ExtendInputs { q: &q, k: &kv, v: &kv, scale: 0.4, lse: true };
                    let batch = &mut [Append { cache: &mut cache, tokens }];
                    let Extended { out, lse } = backend.extend(batch, &inputs).unwrap();
                    all.extend([out.into_data(), lse.unwrap().into_data()].concat());
                }
                all
            };
            let results = crate::simd::tests::on_every_arch(run);
            for result in &results[1..] {
                for (a, b) in result.iter().zip(&results[0]) {
                    assert!((a - b).abs() < 1e-5, "{dtype:?}: {a} {b}");
                }
            }
        }
    }

    fn poison<E: Element>(pair: &mut Pair<E>) {
        E::narrow_slice(&vec![f32::NAN; pair.keys.len()], &mut pair.keys);
        E::narrow_slice(&vec![f32::NAN; pair.values.len()], &mut pair.values);
    }
}
