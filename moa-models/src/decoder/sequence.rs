use moa_core::{CacheState, LayerLayout, Plan, SparseAttentionBackend};

use crate::Result;
use crate::decoder::block::Cache;
use crate::decoder::model::Decoder;
use crate::device::rope_table::RopeTable;
use crate::device::{Device, Math};

/// The state of one text that a [`Decoder`] is reading or writing: a cache for every layer, as
/// large as its plan allows and no larger.
pub struct Sequence<D: Device> {
    /// The caches of all layers; a model has at least one.
    pub(crate) caches: Vec<Cache<D>>,
    pub(crate) rope: RopeTable,
    /// A device failed half-way through a step: layers disagree on the length.
    pub(crate) broken: bool,
}

impl<D: Device> std::fmt::Debug for Sequence<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sequence({} of {} tokens)", self.len(), self.capacity())
    }
}

impl<D: Device> Sequence<D> {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.state().len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most tokens it may hold.
    pub fn capacity(&self) -> usize {
        self.state().capacity()
    }

    /// How far all layers are filled: the top one is the last that a step appends to.
    fn state(&self) -> &CacheState {
        self.caches[self.caches.len() - 1].as_ref()
    }

    /// Checks that so many more tokens fit.
    pub(crate) fn check_append(&self, tokens: usize) -> Result<()> {
        Ok(self.state().check_append(tokens)?)
    }
}

impl<D: Math> Decoder<D> {
    pub(crate) fn rope(&self, capacity: usize) -> Result<RopeTable> {
        RopeTable::new(&self.config, capacity)
    }

    /// Opens an empty sequence of at most `capacity` tokens with the spans of `plan` at that
    /// length. `slack` more tokens per head can be rolled back (speculative decoding).
    ///
    /// # Errors
    /// [`Error::Core`](crate::Error::Core) with [`ShapeMismatch`](moa_core::Error::ShapeMismatch)
    /// if the plan is for a model of other dimensions,
    /// [`Error::ContextExceeded`](crate::Error::ContextExceeded) if `capacity` is longer than the
    /// model's context, [`Error::Invalid`](crate::Error::Invalid) if it is 0,
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) or
    /// [`Error::Backend`](crate::Error::Backend) if the device has no room for the caches.
    pub fn open(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<Sequence<D>> {
        let plan = self.own_plan(plan)?;
        self.config.check_context(capacity)?;
        let layouts = (0..self.layers.len())
            .map(|layer| LayerLayout::new(&plan.layer_spans(layer, capacity), capacity, slack))
            .collect::<moa_core::Result<Vec<_>>>()?;
        let bytes = layouts.iter().map(|layout| layout.bytes(self.slot_bytes())).sum();
        self.device.check_room("keys and values", bytes)?;
        let open = |layout| self.open_cache(layout);
        let caches = layouts.iter().map(open).collect::<Result<_>>()?;
        Ok(Sequence { caches, rope: self.rope(capacity)?, broken: false })
    }

    /// Bytes of one slot of a cache, key and value together.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.device.attention().slot_bytes(self.config.head_dim)
    }

    /// An empty cache of one layer.
    pub(crate) fn open_cache(&self, layout: &LayerLayout) -> Result<Cache<D>> {
        self.device.attention().open(layout, self.config.head_dim).map_err(Into::into)
    }

    /// An independent copy of a sequence, for a shared prefix.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) or
    /// [`Error::Backend`](crate::Error::Backend) if the device has no room for a second set of
    /// caches.
    pub fn fork(&self, sequence: &Sequence<D>) -> Result<Sequence<D>> {
        let fork = |cache| self.device.attention().fork(cache).map_err(Into::into);
        Ok(Sequence {
            caches: sequence.caches.iter().map(fork).collect::<Result<_>>()?,
            rope: sequence.rope.clone(),
            broken: sequence.broken,
        })
    }

    /// Forgets all tokens after the first `len`.
    ///
    /// # Errors
    /// [`moa_core::Error::Evicted`] if keys that were overwritten would be needed; nothing changes.
    pub fn truncate(&self, sequence: &mut Sequence<D>, len: usize) -> Result<()> {
        // Layers differ in spans: ask all of them before changing one.
        for cache in &sequence.caches {
            cache.as_ref().clone().truncate(len)?;
        }
        for cache in &mut sequence.caches {
            self.device.attention().truncate(cache, len).map_err(Into::into)?;
        }
        Ok(())
    }

    /// Bytes of keys and values that a sequence really holds.
    pub fn kv_bytes(&self, sequence: &Sequence<D>) -> u64 {
        sequence.caches.iter().map(|c| self.device.attention().bytes(c)).sum()
    }
}
