//! Rivals of plans that choose keys by what they say: dense attention reads a prompt, every KV head keeps the keys
//! that a score names, and decoding goes on from those alone.
//!
//! Kept keys move into a cache of their own for each KV head, so that heads may keep unequal numbers and what is
//! held is what a budget says. They were rotated when they were read; later tokens are rotated by their true
//! positions, which a sequence counts apart from the slots of its caches.

mod budget;
mod compact;
mod prefill;
mod repeat;
mod scores;

use crate::{Error, Result};

pub(crate) use prefill::Method;

/// How keys are scored after a prompt was read, and how a budget is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictionKind {
    /// SnapKV (arXiv 2404.14469): the attention that the last 32 queries pay to a key, summed, averaged over the
    /// query heads of its KV head and over 5 neighbouring keys. Every KV head keeps as many keys, those of the 32
    /// queries among them. 32, 5 and the average are the defaults of the authors' code (`init_snapkv`), and of kvpress
    /// but for its window of 64; the paper's LongBench runs take the most of 7.
    SnapKv,
    /// Ada-KV (arXiv 2407.11550): scores as SnapKV's, but for the most of 7 neighbouring keys in place of the average;
    /// the best of all heads of a layer get the layer's budget, but a fifth of it is shared out evenly. 7, the most and
    /// the fifth are what the authors' code runs with (`AdaptiveSnapKVCluster`, and `floor_alpha` of `pred.py`).
    AdaKv,
    /// KVzip (arXiv 2505.23416): the most attention that any query of the key's group pays to it while the model
    /// reads the context again after "Repeat the previous context exactly.", in parts of at most 2048 tokens, each
    /// of which scores its own keys. The best keys of the whole model are kept, and of every head the first 4. The
    /// attention is that over all keys of the cache; the authors' code, for speed, leaves out those of other parts.
    KvZip,
}

impl EvictionKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::SnapKv, Self::AdaKv, Self::KvZip];

    /// The name in flags and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SnapKv => "snapkv",
            Self::AdaKv => "adakv",
            Self::KvZip => "kvzip",
        }
    }
}

/// Eviction after prefill, at the bytes of a plan of some density.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eviction {
    /// Scores and budgets.
    pub kind: EvictionKind,
    /// Slots of a KV head on average, as a share of the context: those of kept keys and of tokens that follow.
    /// 1 keeps everything.
    pub density: f64,
    /// Evict before the question is read, the last line of the first message: what is kept then has to serve any
    /// question. Otherwise the scores know the question.
    pub before_question: bool,
}

impl Eviction {
    /// Keys that a KV head keeps on average of `read` tokens, where `context` tokens are held at most in the end:
    /// with room for those that follow it has `density * context` slots.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the density leaves room for no key, or is not in (0, 1].
    pub fn budget(&self, read: usize, context: usize) -> Result<usize> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(Error::invalid("density", "above 0 and at most 1", self.density));
        }
        // As a plan's span: 1e-6 absorbs the rounding of a product such as 0.1 * 10.
        let slots = (self.density * context as f64 + 1e-6) as usize;
        let later = context.saturating_sub(read);
        match slots.saturating_sub(later).min(read) {
            0 => {
                let least = (later + 1) as f64 / context.max(1) as f64;
                let expected = format!(
                    "at least {least:.3}, as {later} of {context} tokens follow those whose keys are evicted"
                );
                Err(Error::invalid("density", expected, self.density))
            }
            kept => Ok(kept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_kept_keys_and_of_later_tokens_are_the_share_of_the_context() {
        let budget = |density, read, context| {
            Eviction { kind: EvictionKind::SnapKv, density, before_question: false }
                .budget(read, context)
        };
        assert_eq!(budget(0.25, 900, 1000).unwrap(), 150);
        assert_eq!(budget(1.0, 900, 1000).unwrap(), 900);
        let error = budget(0.1, 900, 1000).unwrap_err().to_string();
        assert!(error.contains("0.101") && error.contains("100 of 1000"), "{error}");
        assert!(budget(0.0, 900, 1000).is_err() && budget(1.5, 900, 1000).is_err());
    }
}
