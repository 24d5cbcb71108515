//! Decode steps that a device records once.

use std::ops::Range;

use moa_core::SparseAttentionBackend;

use crate::Result;
use crate::device::rope_table::RopeTable;
use crate::device::{Device, Draw};

type Cache<D> = <<D as Device>::Attention as SparseAttentionBackend>::Cache;

/// The caches and dimensions of one batch, from which a device prepares a decode step that it can
/// launch again.
pub struct ReplayBatch<'a, D: Device> {
    /// The caches of every layer, one per sequence.
    pub caches: Vec<Vec<&'a Cache<D>>>,
    /// New tokens of each sequence in a step.
    pub tokens: usize,
    /// Whether other sequences are to [take the places](Replay::replace) of these, which may be more or fewer.
    pub changes: bool,
    /// Query heads of a layer that the device has.
    pub query_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor of attention scores.
    pub scale: f32,
    /// Rotary frequencies of all sequences.
    pub rope: &'a RopeTable,
    /// Whether queries and keys of a layer are rotated, for each layer.
    pub rotary: Vec<bool>,
    /// What is added to rotated keys of a layer, the second row of a table `[2, kv_heads, head_dim]`; for each layer, all
    /// of whose sequences then have it. Only layers that rotate have one.
    pub key_shifts: Vec<Option<&'a D::Tensor>>,
    /// Feedback of a layer's keys, as [`ExtendInputs::key_feedback`](moa_core::ExtendInputs::key_feedback), for each layer.
    pub key_feedback: Vec<Option<&'a D::Tensor>>,
    /// Most tokens that a sequence may hold.
    pub capacity: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

/// A decode step of one batch, as many tokens for each sequence, that a device records once and launches again
/// and again.
///
/// The decoder describes the step in terms of these operations and of [`Math`](crate::Math); the
/// device decides when it runs that description and when it launches what it recorded of it. Steps are
/// those of the sequences that it was prepared for, or that took their places since: whoever holds this keeps them, their
/// caches and the model where they are, and says with each step how long they are.
pub trait Replay<D: Device>: Send {
    /// Has other sequences take the places of those before, which may be gone. Where nothing recorded fits them, a step of
    /// theirs is prepared if `prepares` says so. Returns whether steps can be run; if not, or where this fails, none can.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and [`Error::Backend`](crate::Error::Backend) if a step cannot be
    /// prepared.
    ///
    /// # Safety
    /// As [`Device::replay`].
    unsafe fn replace(
        &mut self,
        device: &D,
        batch: &ReplayBatch<'_, D>,
        prepares: bool,
    ) -> Result<bool> {
        let _ = (device, batch, prepares);
        Ok(false)
    }

    /// Whether it is worth keeping for sequences that may [take the places](Self::replace) of its own once those are gone. One that
    /// is not is dropped with them, and the memory that it holds of theirs.
    fn serves_others(&self) -> bool {
        true
    }

    /// Whether a step has run, so that the next ones are launched as a whole.
    fn is_rehearsed(&self) -> bool {
        false
    }

    /// Whether the next step takes what all such steps take: what is to be recorded has been.
    fn is_recorded(&self) -> bool {
        true
    }

    /// Steps that were recorded so far, each to be launched again for all batches that it fits.
    fn recordings(&self) -> usize {
        0
    }

    /// Puts `tokens` in place, those of a sequence one after the other, and has `step` happen for them;
    /// the sequences hold `lens` tokens before it.
    ///
    /// `step` only calls operations that the device records, on this and on tensors that it makes
    /// itself or that live as long as this does.
    ///
    /// # Errors
    /// The error of `step`; [`Error::OutOfMemory`](crate::Error::OutOfMemory), after which the step can be run in
    /// another way; [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn run(
        &mut self,
        device: &D,
        tokens: &[u32],
        lens: &[usize],
        step: &dyn Fn(&dyn Replay<D>) -> Result<()>,
    ) -> Result<()>;

    /// Rows of the embedding for the tokens in place times `factor`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn embed(&self, device: &D, table: &D::Matrix, factor: f32) -> Result<D::Tensor>;

    /// Rotates queries and keys where `layer` does, appends keys and values to its caches, and attends:
    /// `[tokens, heads, head_dim]` each.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn attend(&self, device: &D, layer: usize, qkv: [D::Tensor; 3]) -> Result<D::Tensor>;

    /// Writes logits of normed rows into these columns of [`logits`](Self::logits), and zeros into the
    /// others.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn write_logits(
        &self,
        device: &D,
        h: &D::Tensor,
        matrix: &D::Matrix,
        columns: Range<usize>,
    ) -> Result<()>;

    /// Chooses the likeliest tokens.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn finish(&self, device: &D) -> Result<()>;

    /// Has other tokens chosen by the logits of the step that was run last, as [`Device::sample`] does.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::Invalid`](crate::Error::Invalid) or
    /// [`Error::Backend`](crate::Error::Backend) as [`Device::sample`].
    fn sample(&self, device: &D, draws: &[Draw], units: &[f64]) -> Result<()>;

    /// Logits of the last step, `[tokens, vocab]`, which the next one overwrites.
    fn logits(&self) -> &D::Tensor;

    /// Waits for the last step: the token that was chosen after each of its tokens, the likeliest one and the lowest of
    /// equals unless others were [asked for](Self::sample); `None` for one with a logit that is infinite or not a number.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    fn chosen(&self) -> Result<Vec<Option<u32>>>;

    /// Records in a cache the tokens that a step has appended.
    ///
    /// # Errors
    /// [`Error::Core`](crate::Error::Core) if the cache is full.
    fn advance(&self, cache: &mut Cache<D>) -> Result<()>;
}
