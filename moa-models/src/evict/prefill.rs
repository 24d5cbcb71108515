//! Reading a prompt with dense attention, of which some keys are kept.

use std::ops::Range;

use moa_core::{Append, ExtendInputs, Extended, LayerLayout, Plan, Span, SparseAttentionBackend};

use super::budget::{adaptive, equal, global};
use super::scores::{Pool, Rows, Seen};
use crate::decoder::block::Cache;
use crate::decoder::model::Decoder;
use crate::decoder::rotations::Rotations;
use crate::decoder::sequence::{Evicted, Sequence};
use crate::device::{Device, Math};
use crate::{Error, Result, memory};

/// Queries that score keys in SnapKV and Ada-KV, and whose own keys are kept.
const WINDOW: usize = 32;

/// First keys that KVzip keeps.
const ZIP_SINK: usize = 4;

/// How keys are scored.
pub(crate) enum Method<'a> {
    SnapKv,
    AdaKv,
    /// With what is read to score stretches of the context.
    KvZip(&'a [Repeat]),
}

/// A text that repeats a stretch of the context, whose keys it scores.
#[derive(Debug)]
pub(crate) struct Repeat {
    pub(crate) keys: Range<usize>,
    pub(crate) input: Vec<u32>,
}

/// Rotated queries and keys of new tokens, their values, and what attention made of them.
struct Attended<D: Device> {
    q: D::Tensor,
    k: D::Tensor,
    v: D::Tensor,
    extended: Extended<D::Tensor>,
}

impl<D: Math> Decoder<D> {
    /// Reads `tokens` in a step of their own and keeps `kept` keys a KV head on average; `room` more tokens can
    /// follow. The logits are those of dense attention, of the last token.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no token or one is not in the vocabulary, the model is one rank's part, or a
    /// layer sees fewer recent keys than there are tokens; [`Error::ContextExceeded`], [`Error::OutOfMemory`],
    /// [`Error::Backend`].
    pub(crate) fn prefill_evicting(
        &self,
        tokens: &[u32],
        room: usize,
        kept: usize,
        method: &Method<'_>,
    ) -> Result<(Sequence<D>, Vec<f32>)> {
        self.check_evicting(tokens, room)?;
        let rope = self.rope(tokens.len() + room)?;
        let kept = kept.clamp(1, tokens.len());
        let (caches, x) = match method {
            Method::SnapKv | Method::AdaKv => {
                let is_even = matches!(method, Method::SnapKv);
                self.keep_by_window(tokens, &rope, (room, kept), is_even)?
            }
            Method::KvZip(repeats) => self.keep_by_repeats(tokens, &rope, (room, kept), repeats)?,
        };
        let last = self.device.rows(&x, &[tokens.len() - 1])?;
        let h = self.device.rms_norm(&last, &self.norm, self.eps())?;
        let logits = self.values(self.output(&h)?)?;
        let held = caches[caches.len() - 1].as_ref().len();
        let evicted = Evicted { read: tokens.len(), lag: tokens.len() - held };
        let (model, evicted) = (self.id, Some(evicted));
        Ok((Sequence { caches, rope, model, broken: false, evicted }, logits))
    }

    /// The errors of [`prefill_evicting`](Self::prefill_evicting) that are no device's.
    pub(crate) fn check_evicting(&self, tokens: &[u32], room: usize) -> Result<()> {
        self.check_whole("eviction")?;
        self.check_tokens(tokens)?;
        if tokens.is_empty() {
            return Err(Error::invalid("prompt", "at least 1 token", 0));
        }
        let length = tokens.len() + room;
        self.config.check_context(length)?;
        let windows = self.layers.iter().filter_map(|layer| layer.kind.sliding_window);
        match windows.min().filter(|window| *window < length) {
            Some(window) => {
                let expected = format!("layers that see all of {length} tokens");
                Err(Error::invalid("eviction", expected, format!("a sliding window of {window}")))
            }
            None => Ok(()),
        }
    }

    /// SnapKV and Ada-KV, layer by layer: no more than one layer's keys are held whole.
    fn keep_by_window(
        &self,
        tokens: &[u32],
        rope: &crate::RopeTable,
        (room, kept): (usize, usize),
        is_even: bool,
    ) -> Result<(Vec<Cache<D>>, D::Tensor)> {
        let device = &self.device;
        let (len, window) = (tokens.len(), WINDOW.min(kept / 2));
        let rotations = self.rotations(&[(rope, 0..len)])?;
        let layout = LayerLayout::new(&vec![Span::full(len); self.local.kv_heads], len, 0)?;
        // Defaults of each authors' code.
        let pool = if is_even { Pool::Mean(5) } else { Pool::Most(7) };
        let keep = if is_even { equal } else { adaptive };
        let mut caches = Vec::new();
        let x = self.blocks(self.embed(tokens)?, |index, qkv| {
            let mut dense = self.open_cache(&layout)?;
            let Attended { q, k, v, extended } = self.attend(index, &mut dense, qkv, &rotations)?;
            drop(dense);
            // Keys of the window are kept, and all others seen by each of its queries.
            let recent: Vec<usize> = (len - window.max(1)..len).collect();
            let q = self.host_rows(device.rows(&q, &recent)?)?;
            let lse = self.log_sums(extended.lse)?;
            let k_host = self.host_rows(k.clone())?;
            let lse = &lse[recent[0] * self.local.query_heads..];
            let seen = Seen { q: &q, lse, k: &k_host, scale: self.scale() };
            let scores = seen.window_scores(len - window, pool)?;
            caches.extend(self.compact(&k, &v, &keep(&scores, kept, window), room)?);
            Ok(extended.out)
        })?;
        Ok((caches, x))
    }

    /// KVzip: keys of the whole model compete, after the context was read again.
    fn keep_by_repeats(
        &self,
        tokens: &[u32],
        rope: &crate::RopeTable,
        (room, kept): (usize, usize),
        repeats: &[Repeat],
    ) -> Result<(Vec<Cache<D>>, D::Tensor)> {
        let len = tokens.len();
        let longest = repeats.iter().map(|repeat| repeat.input.len()).max().unwrap_or(0);
        let mut dense = self.open(&Plan::full(self.shape())?, len + longest, 0)?;
        dense.rope = rope.clone();
        let heads = self.local.kv_heads;
        let (mut whole, mut keys) = (Vec::new(), Vec::new());
        let x = self.read_seeing(&mut dense, tokens, |_, attended| {
            keys.push(self.host_rows(attended.k.clone())?);
            whole.push((attended.k, attended.v));
            Ok(())
        })?;
        let none = || memory::filled(len, f32::NEG_INFINITY, "scores of keys");
        let mut scores: Vec<Vec<f32>> =
            (0..self.layers.len() * heads).map(|_| none()).collect::<Result<_>>()?;
        for repeat in repeats {
            self.check_tokens(&repeat.input)?;
            self.read_seeing(&mut dense, &repeat.input, |layer, attended| {
                let q = self.host_rows(attended.q)?;
                let lse = self.log_sums(attended.extended.lse)?;
                let seen = Seen { q: &q, lse: &lse, k: &keys[layer], scale: self.scale() };
                seen.highest(repeat.keys.clone(), &mut scores[layer * heads..(layer + 1) * heads])
            })?;
            self.truncate(&mut dense, len)?;
        }
        for scores in &mut scores {
            scores.iter_mut().take(ZIP_SINK).for_each(|score| *score = f32::INFINITY);
        }
        drop(dense);
        let kept = global(&scores, kept * scores.len());
        let mut caches = Vec::new();
        for ((k, v), kept) in whole.iter().zip(kept.chunks(heads)) {
            caches.extend(self.compact(k, v, &kept.to_vec(), room)?);
        }
        Ok((caches, x))
    }

    /// Appends tokens to a sequence, and shows what each layer attended with.
    fn read_seeing(
        &self,
        sequence: &mut Sequence<D>,
        tokens: &[u32],
        mut see: impl FnMut(usize, Attended<D>) -> Result<()>,
    ) -> Result<D::Tensor> {
        sequence.check_append(tokens.len())?;
        let positions = sequence.len()..sequence.len() + tokens.len();
        let rotations = self.rotations(&[(&sequence.rope, positions)])?;
        self.blocks(self.embed(tokens)?, |index, qkv| {
            let attended = self.attend(index, &mut sequence.caches[index], qkv, &rotations)?;
            let out = attended.extended.out.clone();
            see(index, attended)?;
            Ok(out)
        })
    }

    fn attend(
        &self,
        index: usize,
        cache: &mut Cache<D>,
        [q, k, v]: [D::Tensor; 3],
        rotations: &Rotations<D>,
    ) -> Result<Attended<D>> {
        let [q, k] = self.rotated(&self.layers[index], q, k, rotations)?;
        let tokens = self.device.shape(&q)[0];
        let inputs = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &k, &v, self.scale()) };
        let mut batch = [Append { cache, tokens }];
        let extended = self.device.attention().extend(&mut batch, &inputs).map_err(Into::into)?;
        Ok(Attended { q, k, v, extended })
    }

    fn host_rows(&self, x: D::Tensor) -> Result<Rows> {
        let heads = self.device.shape(&x)[1];
        Ok(Rows { data: self.device.values(x)?, heads, dim: self.config.head_dim })
    }

    fn log_sums(&self, lse: Option<D::Tensor>) -> Result<Vec<f32>> {
        let lse = lse.ok_or_else(|| Error::invalid("log-sum-exps", "those asked for", "none"))?;
        self.device.values(lse)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Checkpoint, Cpu, LogitRows};

    fn tiny() -> Checkpoint<Cpu> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
        Checkpoint::open(Cpu::default(), folder).unwrap()
    }

    #[test]
    fn later_tokens_see_the_same_keys_however_they_are_cut() {
        let (checkpoint, tokens) =
            (tiny(), (0..150).map(|i| 5 + i * 37 % 4000).collect::<Vec<u32>>());
        let model = &checkpoint.model;
        let repeats = checkpoint.repeats(&tokens[..100]).unwrap();
        for method in [Method::SnapKv, Method::AdaKv, Method::KvZip(&repeats)] {
            let (mut whole, _) = model.prefill_evicting(&tokens[..100], 60, 40, &method).unwrap();
            let held: usize = whole.caches.iter().map(|cache| cache.as_ref().len()).sum();
            assert_eq!(held, 40 * whole.caches.len());
            assert_eq!((whole.len(), whole.capacity()), (100, 160));
            let (mut single, mut other) =
                (model.fork(&whole).unwrap(), model.fork(&whole).unwrap());
            let expected = model.prefill(&mut whole, &tokens[100..], 64).unwrap();
            let mut logits = Vec::new();
            for token in &tokens[100..149] {
                model.prefill(&mut single, &[*token], 1).unwrap();
            }
            // A batch of sequences of unequal caches, with unequal numbers of new tokens.
            let (a, b): (&[u32], &[u32]) = (&tokens[149..], &tokens[100..]);
            let both = model
                .forward(&mut [&mut single, &mut other], &[a, b], LogitRows::Last)
                .unwrap()
                .into_data();
            logits.extend(both);
            for got in logits.chunks(expected.len()) {
                let far = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 1e-3, "{far}");
            }
            assert_eq!(whole.len(), 150);
            assert!(
                model.truncate(&mut whole, 99).is_err() && model.truncate(&mut whole, 151).is_err()
            );
            model.truncate(&mut whole, 101).unwrap();
            let again = model.prefill(&mut whole, &tokens[101..], 64).unwrap();
            assert!(again.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3));
            let mut dense = model.open(&Plan::full(model.shape()).unwrap(), 20, 0).unwrap();
            let mixed =
                model.forward(&mut [&mut whole, &mut dense], &[&[5], &[5]], LogitRows::None);
            assert!(matches!(mixed, Err(Error::Invalid { what: "batch", .. })));
        }
    }

    #[test]
    fn what_cannot_be_evicted_is_refused() {
        let checkpoint = tiny();
        let refused = |tokens: &[u32], room| {
            checkpoint.model.prefill_evicting(tokens, room, 4, &Method::SnapKv).map(|_| ())
        };
        assert!(matches!(refused(&[], 4), Err(Error::Invalid { what: "prompt", .. })));
        assert!(matches!(refused(&[9000], 4), Err(Error::Invalid { what: "token id", .. })));
        assert!(matches!(refused(&[5], 8192), Err(Error::ContextExceeded { .. })));
        assert!(matches!(checkpoint.repeats(&[5; 8150]), Err(Error::ContextExceeded { .. })));
        let parts = checkpoint.repeats(&[5; 5000]).unwrap();
        assert_eq!(parts.iter().map(|part| part.keys.len()).collect::<Vec<_>>(), [2048, 2048, 904]);
    }
}
