//! Attention of new tokens over cached and new keys, then the append.

mod check;
mod keys;
mod row;
mod schedule;
mod stage;
mod tile;

use moa_core::HeadLayout;

use self::check::Shape;
use self::keys::Source;
use self::schedule::{Kind, Plan, Sequence, Task};
use crate::cache::{Cache, Pair, with_store};
use crate::element::Element;
use crate::pool::{self, SharedMut};
use crate::{Result, Tensor, workspace};

/// Arguments of one call, packed as the trait says.
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) scale: f32,
    pub(crate) lse: bool,
}

/// See [`moa_core::SparseAttentionBackend::extend`].
pub(crate) fn extend(
    caches: &mut [&mut Cache],
    tokens: &[usize],
    inputs: &Inputs<'_>,
) -> Result<(Tensor, Option<Tensor>)> {
    let shape = check::check(caches, tokens, inputs)?;
    let mut out = Tensor::zeros(inputs.q.shape())?;
    let mut lse = match inputs.lse {
        true => Some(Tensor::zeros(&[shape.tokens, shape.query_heads])?),
        false => None,
    };
    stage::stage(caches, tokens, &shape, inputs.k.data(), inputs.v.data());
    {
        let sequences: Vec<_> = caches
            .iter()
            .zip(tokens)
            .map(|(cache, &tokens)| Sequence { layout: &cache.layout, len: cache.len(), tokens })
            .collect();
        let plan = schedule::plan(&sequences, shape.group, shape.head_dim);
        let call = Call {
            caches,
            tokens,
            first: shape.first_rows(tokens),
            shape: &shape,
            q: inputs.q.data(),
            scale: inputs.scale,
            out: SharedMut::new(out.data_mut()),
            lse: lse.as_mut().map(|lse| SharedMut::new(lse.data_mut())),
        };
        call.run(&plan)?;
    }
    stage::commit(caches, tokens, &shape);
    Ok((out, lse))
}

struct Call<'a> {
    caches: &'a [&'a mut Cache],
    tokens: &'a [usize],
    /// Row of each sequence's first token.
    first: Vec<usize>,
    shape: &'a Shape,
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
    fn run(&self, plan: &Plan) -> Result<()> {
        let row_heads = self.row_heads();
        let partial_len =
            row_heads.last().map_or(0, |r| r.start + r.splits * self.split_len(r.sequence));
        let mut partials: Vec<f32> =
            crate::zeroed::zeroed(partial_len, "partial attention results")?;
        {
            let partials = SharedMut::new(&mut partials);
            pool::for_each(plan.tasks.len(), plan.work, |i| {
                let task = &plan.tasks[i];
                let cache = &self.caches[task.sequence];
                with_store!(&cache.store, pair => self.task(task, cache, pair, &row_heads, &partials));
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
        for (sequence, (cache, &tokens)) in self.caches.iter().zip(self.tokens).enumerate() {
            if schedule::uses_rows(tokens, self.shape.group) {
                for (kv_head, head) in cache.layout.heads().iter().enumerate() {
                    let splits = schedule::splits(head, cache.len(), tokens);
                    row_heads.push(RowHead { sequence, kv_head, splits, start });
                    start += splits * self.split_len(sequence);
                }
            }
        }
        row_heads
    }

    /// Elements of the partial results of one split.
    fn split_len(&self, sequence: usize) -> usize {
        self.tokens[sequence] * self.shape.group * row::partial_len(self.shape.head_dim)
    }

    fn task<E: Element>(
        &self,
        task: &Task,
        cache: &Cache,
        pair: &Pair<E>,
        row_heads: &[RowHead],
        partials: &SharedMut<'_, f32>,
    ) {
        let &Task { sequence, kv_head, ref kind } = task;
        let Shape { group, query_heads, head_dim, .. } = *self.shape;
        let head: &HeadLayout = cache.layout.head(kv_head);
        let first = self.first[sequence];
        let new = kv_head * self.tokens[sequence] * head_dim;
        let keys = Source { cached: &pair.keys[..], new: &pair.staged_keys[new..], dim: head_dim };
        let values =
            Source { cached: &pair.values[..], new: &pair.staged_values[new..], dim: head_dim };
        match kind {
            Kind::Tile { tokens } => workspace::run(tile::TileTask {
                head,
                len: cache.len(),
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
                    len: cache.len(),
                    tokens: self.tokens[sequence],
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
        let Shape { group, query_heads, head_dim, .. } = *self.shape;
        let stride = self.split_len(row_head.sequence);
        for row in 0..self.tokens[row_head.sequence] * group {
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
    use moa_core::{LayerLayout, Span, SparseAttentionBackend};

    use super::*;
    use crate::{CacheDtype, CpuBackend};

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
        for dtype in [CacheDtype::F32, CacheDtype::F16, CacheDtype::Bf16] {
            let backend = CpuBackend::new(dtype);
            let mut clean = backend.open(&layout, 8).unwrap();
            let mut poisoned = backend.open(&layout, 8).unwrap();
            with_store!(&mut poisoned.store, pair => poison(pair));
            for tokens in [1, 2, 90, 1, 3, 1, 130, 1] {
                let (q, kv) = (tensor(tokens, 6), tensor(tokens, 3));
                let [a, b] = [&mut clean, &mut poisoned].map(|cache| {
                    backend.extend(&mut [cache], &[tokens], &q, &kv, &kv, 0.4, true).unwrap()
                });
                assert!(a.0.data().iter().all(|x| x.is_finite()));
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
        for (dtype, dim) in [(CacheDtype::F32, 20), (CacheDtype::F16, 24), (CacheDtype::Bf16, 72)] {
            let backend = CpuBackend::new(dtype);
            let run = || {
                let mut cache = backend.open(&layout, dim).unwrap();
                let mut all = Vec::new();
                // Small enough to stay on this thread.
                for tokens in [1, 2, 40, 1, 3, 20, 1] {
                    let (q, kv) = (tensor(tokens, 6, dim), tensor(tokens, 2, dim));
                    let cache = &mut [&mut cache][..];
                    let (out, lse) =
                        backend.extend(cache, &[tokens], &q, &kv, &kv, 0.4, true).unwrap();
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
