use std::time::Instant;

use moa_core::Plan;
use serde::Serialize;

use crate::decoder::logits::LogitRows;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::find_plan::objective::cross_entropy;
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// Most logits of a step, 64 MiB of them.
const MOST_LOGITS: usize = 1 << 24;

impl Item {
    /// Fewest tokens of a window ([`Item::windows`]): `first`, and two of the text, one of which is predicted from text.
    pub fn shortest_window(first: Option<u32>) -> usize {
        2 + usize::from(first.is_some())
    }

    /// A text cut into windows of `length` tokens that each begin with `first`, at most `windows` of
    /// them: the first token of a window is the prompt, all others are the response.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text does not fill one window, `first` counted, or a window is too short.
    pub fn windows(
        tokens: &[u32],
        first: Option<u32>,
        length: usize,
        windows: usize,
    ) -> Result<Vec<Self>> {
        let head: Vec<u32> = first.into_iter().collect();
        if windows == 0 {
            return Err(Error::invalid("windows", "at least 1", 0));
        }
        let least = Self::shortest_window(first);
        if length < least {
            return Err(Error::invalid(
                "length of a window",
                format!("at least {least} tokens"),
                length,
            ));
        }
        let room = length - head.len();
        if tokens.len() < room {
            let (expected, got) = (format!("at least {length} tokens"), tokens.len() + head.len());
            return Err(Error::invalid("text", expected, got));
        }
        let item = |part: &[u32]| {
            let ids = [&head, part].concat();
            Self::new(&ids[..1], &ids[1..])
        };
        tokens.chunks_exact(room).take(windows).map(item).collect()
    }
}

/// Perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PerplexityReport {
    /// `exp` of the mean cross entropy.
    pub perplexity: f64,
    /// Mean cross entropy in nats per token.
    pub cross_entropy: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows of the text.
    pub windows: usize,
    /// Tokens per window.
    pub length: usize,
    /// Keys kept / context length.
    pub density: f64,
    /// Bytes of keys and values that a sequence held.
    pub kv_bytes: u64,
    /// The same for dense attention.
    pub kv_bytes_dense: u64,
    /// Time for all windows.
    pub seconds: f64,
}

/// Perplexity of several texts together, each measured as a [`PerplexityReport`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PooledPerplexity {
    /// `exp` of the mean cross entropy.
    pub perplexity: f64,
    /// Mean cross entropy over all tokens, in nats per token.
    pub cross_entropy: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows of all texts.
    pub windows: usize,
    /// Mean over windows of keys kept / context length.
    pub density: f64,
    /// Mean over windows of the bytes of keys and values that a sequence held.
    pub kv_bytes: u64,
    /// The same for dense attention.
    pub kv_bytes_dense: u64,
    /// Time for all windows.
    pub seconds: f64,
}

impl PooledPerplexity {
    /// The reports together; `None` of no report.
    pub fn new(reports: &[PerplexityReport]) -> Option<Self> {
        let windows: usize = reports.iter().map(|r| r.windows).sum();
        let tokens: usize = reports.iter().map(|r| r.tokens).sum();
        let over_windows = |field: &dyn Fn(&PerplexityReport) -> f64| {
            reports.iter().map(|r| field(r) * r.windows as f64).sum::<f64>() / windows as f64
        };
        let sum: f64 = reports.iter().map(|r| r.cross_entropy * r.tokens as f64).sum();
        let cross_entropy = sum / tokens as f64;
        (windows > 0).then(|| Self {
            perplexity: cross_entropy.exp(),
            cross_entropy,
            tokens,
            windows,
            density: over_windows(&|r| r.density),
            kv_bytes: over_windows(&|r| r.kv_bytes as f64) as u64,
            kv_bytes_dense: over_windows(&|r| r.kv_bytes_dense as f64) as u64,
            seconds: reports.iter().map(|r| r.seconds).sum(),
        })
    }
}

impl<D: Math> Decoder<D> {
    /// Perplexity of `tokens`, cut into windows of `length` that each begin with `first`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text does not fill one window or a token is not in the vocabulary,
    /// [`Error::NotFinite`] with the token and the window whose cross entropy is no number,
    /// [`Error::ContextExceeded`] if `length` is
    /// beyond the model's context, [`Error::Cancelled`].
    pub fn perplexity(
        &self,
        tokens: &[u32],
        first: Option<u32>,
        length: usize,
        windows: usize,
        plan: &Plan,
        progress: &mut dyn Progress,
    ) -> Result<PerplexityReport> {
        let begin = Instant::now();
        self.check_tokens(tokens)?;
        let parts = Item::windows(tokens, first, length, windows)?;
        let (mut sum, mut count, mut kv_bytes) = (0.0, 0, 0);
        for (done, part) in (1..).zip(&parts) {
            let mut sequence = self.open(plan, length, 0)?;
            let (chunk, mut targets) = (self.logit_chunk(), part.response().iter());
            for chunk in part.inputs().chunks(chunk) {
                let logits = self.all_logits(&mut sequence, chunk)?;
                let rows = logits.chunks(self.config().vocab_size);
                for (row, target) in rows.zip(targets.by_ref()) {
                    let own = cross_entropy(row, *target as usize);
                    if !own.is_finite() {
                        let at = count % length;
                        let what = format!("cross entropy of token {at} of window {done}");
                        return Err(Error::NotFinite { what, got: own.to_string() });
                    }
                    sum += own;
                    count += 1;
                }
            }
            kv_bytes = self.kv_bytes(&sequence);
            progress.advance(Stage::Evaluate, done, parts.len())?;
        }
        let cross_entropy = sum / count as f64;
        Ok(PerplexityReport {
            perplexity: cross_entropy.exp(),
            cross_entropy,
            tokens: count,
            windows: parts.len(),
            length,
            density: self.config.windowed(plan)?.density(length),
            kv_bytes,
            kv_bytes_dense: self.dense_bytes(length)?,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    /// Tokens of a step whose logits are all wanted: few enough to bound `[rows, vocab]`.
    pub(crate) fn logit_chunk(&self) -> usize {
        (MOST_LOGITS / self.config().vocab_size).clamp(16, 512)
    }

    /// Appends tokens and returns the logits of each of them, `[tokens, vocab]`.
    pub(crate) fn all_logits(
        &self,
        sequence: &mut Sequence<D>,
        tokens: &[u32],
    ) -> Result<Vec<f32>> {
        let rows: Vec<usize> = (0..tokens.len()).collect();
        self.values(self.forward(&mut [sequence], &[tokens], LogitRows::Rows(&rows))?)
    }

    /// Bytes that a dense cache of `capacity` tokens would hold, of the heads that are here, in 16 bits where the device's
    /// caches are narrower. Layers with a sliding window hold no more than that.
    ///
    /// # Errors
    /// No variant of [`Error`]: the dimensions of a loaded model alone decide, and the result is
    /// always `Ok`.
    pub fn dense_bytes(&self, capacity: usize) -> Result<u64> {
        self.full_bytes(capacity, self.shape().dense_slot_bytes(self.slot_bytes()))
    }

    /// The same in the type of the device's caches, of which evicted caches keep a share.
    pub(crate) fn unevicted_bytes(&self, capacity: usize) -> Result<u64> {
        self.full_bytes(capacity, self.slot_bytes())
    }

    fn full_bytes(&self, capacity: usize, slot_bytes: u64) -> Result<u64> {
        Ok(self.own_plan(&Plan::full(self.shape())?)?.kv_bytes(capacity, slot_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_count_by_their_tokens_and_caches_by_their_windows() {
        let report = |cross_entropy: f64, tokens, windows, kv_bytes| PerplexityReport {
            perplexity: cross_entropy.exp(),
            cross_entropy,
            tokens,
            windows,
            length: 64,
            density: 0.25,
            kv_bytes,
            kv_bytes_dense: 4 * kv_bytes,
            seconds: 1.5,
        };
        let pooled = PooledPerplexity::new(&[report(1.0, 300, 1, 100), report(2.0, 100, 3, 200)]);
        let pooled = pooled.unwrap();
        assert_eq!((pooled.cross_entropy, pooled.perplexity), (1.25, 1.25f64.exp()));
        assert_eq!((pooled.tokens, pooled.windows, pooled.seconds), (400, 4, 3.0));
        assert_eq!((pooled.kv_bytes, pooled.kv_bytes_dense, pooled.density), (175, 700, 0.25));
        assert_eq!(PooledPerplexity::new(&[]), None);
    }
}
