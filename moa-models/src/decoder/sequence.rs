use moa_core::{CacheState, LayerLayout, Plan, SparseAttentionBackend};

use crate::decoder::block::Cache;
use crate::decoder::model::Decoder;
use crate::device::rope_table::RopeTable;
use crate::device::{Device, Math};
use crate::{Error, Result};

/// The state of one text that a [`Decoder`] is reading or writing: a cache for every layer, as
/// large as its plan allows and no larger.
pub struct Sequence<D: Device> {
    /// The caches of all layers, or those of all their KV heads one by one where keys were evicted; a model has
    /// at least one.
    pub(crate) caches: Vec<Cache<D>>,
    pub(crate) rope: RopeTable,
    /// [`Decoder::id`] of the model that opened it.
    pub(crate) model: u64,
    /// A device failed half-way through a step: layers disagree on the length.
    pub(crate) broken: bool,
    /// Set where keys were evicted after they were read.
    pub(crate) evicted: Option<Evicted>,
}

/// A sequence whose slots are no longer its positions: each KV head has a cache with the keys that it kept and all
/// later ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evicted {
    /// Tokens of which keys were evicted.
    pub(crate) read: usize,
    /// Those that the last KV head of the top layer does not have.
    pub(crate) lag: usize,
}

impl<D: Device> std::fmt::Debug for Sequence<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sequence({} of {} tokens)", self.len(), self.capacity())
    }
}

impl<D: Device> Sequence<D> {
    /// Tokens held: those read, where keys of some were evicted.
    pub fn len(&self) -> usize {
        self.state().len() + self.lag()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most tokens it may hold.
    pub fn capacity(&self) -> usize {
        self.state().capacity() + self.lag()
    }

    fn lag(&self) -> usize {
        self.evicted.map_or(0, |evicted| evicted.lag)
    }

    /// Whether [`Decoder::truncate`] can forget all tokens after the first `len`.
    pub fn can_truncate(&self, len: usize) -> bool {
        let Some(back) = self.len().checked_sub(len) else { return false };
        // Layers differ in spans.
        !self.broken
            && self.evicted.is_none_or(|evicted| evicted.read <= len)
            && self.caches.iter().all(|cache| can_forget(cache.as_ref(), back))
    }

    /// Whether so many tokens after the next one can be appended with it and be forgotten again.
    pub(crate) fn can_check(&self, tokens: usize) -> bool {
        self.can_forget_after(1, tokens)
    }

    /// Whether so many tokens can be appended once more, where a step that appended them failed.
    pub(crate) fn can_append_again(&self, tokens: usize) -> bool {
        self.can_forget_after(0, tokens)
    }

    /// Whether `forgotten` tokens that follow `kept` new ones can be forgotten.
    fn can_forget_after(&self, kept: usize, forgotten: usize) -> bool {
        let can = |cache: &Cache<D>| {
            let mut state = cache.as_ref().clone();
            let len = state.len() + kept;
            state.append(kept + forgotten).and_then(|()| state.truncate(len)).is_ok()
        };
        self.caches.iter().all(can)
    }

    /// How far all layers are filled: the last cache is the last that a step appends to.
    fn state(&self) -> &CacheState {
        self.caches[self.caches.len() - 1].as_ref()
    }

    /// Checks that so many more tokens fit.
    pub(crate) fn check_append(&self, tokens: usize) -> Result<()> {
        Ok(self.state().check_append(tokens)?)
    }
}

/// Whether the last so many tokens can be forgotten.
pub(crate) fn can_forget(state: &CacheState, tokens: usize) -> bool {
    state.clone().truncate(state.len() - tokens).is_ok()
}

impl<D: Math> Decoder<D> {
    pub(crate) fn rope(&self, capacity: usize) -> Result<RopeTable> {
        RopeTable::new(&self.config, capacity)
    }

    /// Opens an empty sequence of at most `capacity` tokens with the spans of `plan` at that
    /// length. `slack` more tokens per head can be rolled back (speculative decoding).
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch)
    /// if the plan is for a model of other dimensions,
    /// [`Error::ContextExceeded`] if `capacity` is longer than the
    /// model's context, [`Error::Invalid`] if it is 0,
    /// [`Error::OutOfMemory`] or
    /// [`Error::Backend`] if the device has no room for the caches.
    pub fn open(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<Sequence<D>> {
        let layouts = self.layouts(plan, capacity, slack)?;
        let bytes = layouts
            .iter()
            .map(|layout| layout.bytes(self.config.head_dim, self.slot_bytes()))
            .sum();
        self.device.check_room("keys and values", bytes)?;
        self.prepare_narrow_keys(&layouts)?;
        let open = |layout| self.open_cache(layout);
        let caches = layouts.iter().map(open).collect::<Result<_>>()?;
        let (rope, model) = (self.rope(capacity)?, self.id);
        Ok(Sequence { caches, rope, model, broken: false, evicted: None })
    }

    pub(crate) fn layouts(
        &self,
        plan: &Plan,
        capacity: usize,
        slack: usize,
    ) -> Result<Vec<LayerLayout>> {
        let own = self.own_plan(plan)?;
        self.layouts_of(&own, capacity, slack)
    }

    /// Layouts of the heads that `plan` is about, which are those of one rank.
    fn layouts_of(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<Vec<LayerLayout>> {
        self.config.check_context(capacity)?;
        let (attention, mut layouts) = (self.device.attention(), Vec::new());
        for layer in 0..self.layers.len() {
            let layout = plan.layout(layer, capacity, slack)?;
            layout.check_cache_types(attention.name(), |own| attention.has_cache_type(own))?;
            layouts.push(layout);
        }
        Ok(layouts)
    }

    /// Bytes of keys and values that a sequence takes which is [opened](Self::open) with these arguments,
    /// without opening it. Where several devices share the model, those of the device that has most of them: the same
    /// number on all ranks.
    ///
    /// # Errors
    /// [`Error::Core`], [`Error::ContextExceeded`] and [`Error::Invalid`] as [`open`](Self::open).
    pub fn cache_bytes(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<u64> {
        self.most_bytes(plan, capacity, slack, self.slot_bytes())
    }

    /// The same of dense attention, in 16 bits where the device's caches are narrower.
    ///
    /// # Errors
    /// As [`cache_bytes`](Self::cache_bytes).
    pub fn dense_cache_bytes(&self, capacity: usize) -> Result<u64> {
        let dense = Plan::full(self.shape())?;
        let slot_bytes = dense.shape().dense_slot_bytes(self.slot_bytes());
        self.most_bytes(&dense, capacity, 0, slot_bytes)
    }

    fn most_bytes(
        &self,
        plan: &Plan,
        capacity: usize,
        slack: usize,
        slot_bytes: u64,
    ) -> Result<u64> {
        let (mut most, head_dim) = (0, self.config.head_dim);
        for rank in 0..self.ranks() {
            let own = self.plan_of(plan, rank)?;
            let layouts = self.layouts_of(&own, capacity, slack)?;
            most = most.max(layouts.iter().map(|own| own.bytes(head_dim, slot_bytes)).sum());
        }
        Ok(most)
    }

    /// Whether a sequence that is opened with these arguments forgets keys, so that it can be cut only where its rings
    /// still hold what the tokens before see: the same on all ranks.
    ///
    /// # Errors
    /// As [`cache_bytes`](Self::cache_bytes).
    pub fn has_rings(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<bool> {
        for rank in 0..self.ranks() {
            let own = self.plan_of(plan, rank)?;
            let layouts = self.layouts_of(&own, capacity, slack)?;
            if layouts.iter().any(LayerLayout::has_rings) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Bytes of one slot of a cache, key and value together.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.device.attention().slot_bytes(self.config.head_dim)
    }

    /// An empty cache of one layer.
    pub(crate) fn open_cache(&self, layout: &LayerLayout) -> Result<Cache<D>> {
        self.device.attention().open(layout, self.config.head_dim).map_err(Into::into)
    }

    /// Checks that this model opened a sequence: another one's caches have other dimensions or lie on another
    /// device, and what they hold means something else.
    pub(crate) fn check_owner(&self, sequence: &Sequence<D>) -> Result<()> {
        match sequence.model == self.id {
            true => Ok(()),
            false => {
                Err(Error::invalid("sequence", "one that this model opened", "another model's"))
            }
        }
    }

    /// An independent copy of a sequence, for a shared prefix.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another model opened the sequence;
    /// [`Error::OutOfMemory`] or
    /// [`Error::Backend`] if the device has no room for a second set of
    /// caches.
    pub fn fork(&self, sequence: &Sequence<D>) -> Result<Sequence<D>> {
        self.check_owner(sequence)?;
        let fork = |cache| self.device.attention().fork(cache).map_err(Into::into);
        Ok(Sequence {
            caches: sequence.caches.iter().map(fork).collect::<Result<_>>()?,
            rope: sequence.rope.clone(),
            model: self.id,
            broken: sequence.broken,
            evicted: sequence.evicted,
        })
    }

    /// Forgets all tokens after the first `len`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another model opened the sequence, [`moa_core::Error::Evicted`] if keys that were
    /// overwritten would be needed; nothing changes.
    pub fn truncate(&self, sequence: &mut Sequence<D>, len: usize) -> Result<()> {
        self.check_owner(sequence)?;
        if let Some(Evicted { read, .. }) = sequence.evicted
            && len < read
        {
            let needed = len.saturating_sub(1);
            return Err(moa_core::Error::Evicted { to: len, needed, oldest_held: read }.into());
        }
        if len > sequence.len() {
            let expected = format!("at most {}", sequence.len());
            return Err(moa_core::Error::invalid("length", expected, len).into());
        }
        // Caches of heads differ in length where keys were evicted, and have all later ones.
        let back = sequence.len() - len;
        // Layers differ in spans: ask all of them before changing one.
        for cache in &sequence.caches {
            let mut state = cache.as_ref().clone();
            state.truncate(state.len() - back)?;
        }
        // A sequence that was broken stays so; an unwind or an error half-way leaves it broken.
        let broken = std::mem::replace(&mut sequence.broken, true);
        for cache in &mut sequence.caches {
            let len = cache.as_ref().len() - back;
            self.device.attention().truncate(cache, len).map_err(Into::into)?;
        }
        sequence.broken = broken;
        Ok(())
    }

    /// Bytes of keys and values that a sequence really holds.
    pub fn kv_bytes(&self, sequence: &Sequence<D>) -> u64 {
        sequence.caches.iter().map(|c| self.device.attention().bytes(c)).sum()
    }
}
