use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::serial::LayoutFile;
use crate::{CacheType, Error, Position, Result, Span};

/// Index into one layer's flat cache buffer, in units of one token's `head_dim` elements.
/// Never the same as a [`Position`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Slot(pub usize);

/// A stretch of consecutive positions that lie in consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// First position.
    pub position: Position,
    /// Its slot.
    pub slot: Slot,
    /// Number of tokens.
    pub len: usize,
}

/// One head's part of the buffer: `sink` slots for the first positions, then a ring.
///
/// Position `p` lies in slot `p` while it is in the sink, and in ring slot
/// `(p - sink) % ring` after that. The ring has at least `window` slots unless the context is too
/// short to fill it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadLayout {
    span: Span,
    offset: usize,
    sink: usize,
    ring: usize,
    cache_type: Option<CacheType>,
}

impl HeadLayout {
    /// The span whose keys the layout keeps.
    pub fn span(&self) -> Span {
        self.span
    }

    /// First slot of the head.
    pub fn offset(&self) -> Slot {
        Slot(self.offset)
    }

    /// How the head's keys and values are held, where that is not the backend's choice:
    /// [`LayerLayout::with_cache_types`].
    pub fn cache_type(&self) -> Option<CacheType> {
        self.cache_type
    }

    /// Slots for sink positions.
    pub fn sink_slots(&self) -> usize {
        self.sink
    }

    /// Slots of the ring.
    pub fn ring_slots(&self) -> usize {
        self.ring
    }

    /// All slots of the head.
    pub fn slots(&self) -> usize {
        self.sink + self.ring
    }

    /// Where a position is, or was, or will be kept.
    ///
    /// # Panics
    /// If the position lies beyond the context length of a layout without ring.
    pub fn slot(&self, position: Position) -> Slot {
        let p = position.0;
        Slot(self.offset + if p < self.sink { p } else { self.sink + (p - self.sink) % self.ring })
    }

    /// The oldest position outside the sink that is still held once `high_water` tokens have been
    /// appended.
    pub fn oldest_held(&self, high_water: usize) -> usize {
        high_water.saturating_sub(self.ring).max(self.sink.min(high_water))
    }

    /// Slots of a range of positions that the head holds, as at most three runs: sink, ring up to
    /// its end, ring from its start. Of more positions than the ring has slots the last ones count, as
    /// no others can be held with them.
    pub fn runs(&self, positions: Range<usize>) -> impl Iterator<Item = Run> + use<> {
        let layout = *self;
        let in_sink = positions.start.min(self.sink)..positions.end.min(self.sink);
        let end = positions.end.max(self.sink);
        let after = positions.start.max(self.sink).max(end.saturating_sub(self.ring))..end;
        let first = if after.is_empty() {
            0
        } else {
            (self.ring - (after.start - self.sink) % self.ring).min(after.len())
        };
        let split = after.start + first;
        [in_sink, after.start..split, split..after.end].into_iter().filter(|r| !r.is_empty()).map(
            move |r| Run {
                position: Position(r.start),
                slot: layout.slot(Position(r.start)),
                len: r.len(),
            },
        )
    }

    /// What appending `tokens` tokens to `len` writes: runs whose positions start at `len`.
    /// Tokens that the same append would overwrite again are left out.
    pub fn append(&self, len: usize, tokens: usize) -> impl Iterator<Item = Run> + use<> {
        let end = len.saturating_add(tokens);
        let sink = len.min(self.sink)..end.min(self.sink);
        let kept = end.saturating_sub(self.ring).max(len).max(self.sink)..end.max(self.sink);
        // An append that skips tokens covers two separate ranges; each is at most sink or ring long.
        self.runs(sink).chain(self.runs(kept))
    }

    /// Cached positions (before `len`) that some query of `queries` sees, `queries.start >= len`:
    /// a range in the sink and a range after it.
    pub fn cached_keys(&self, len: usize, queries: Range<usize>) -> [Range<usize>; 2] {
        let [sink, _] = self.span.visible(Position(queries.start));
        // Later queries see no older keys outside the sink.
        let window = self.span.window_start(Position(queries.start)).min(len)..len;
        let sink = 0..sink.end.min(len).min(window.start);
        [sink, window]
    }
}

/// Cache of one layer: the heads' slots one after the other in one flat buffer of keys, and the
/// same again for values.
///
/// ```
/// use moa_core::{LayerLayout, Position, Slot, Span};
/// // Two KV heads, opened for 100 tokens: one sees everything, one 2 sinks + 6 recent keys.
/// let layout = LayerLayout::new(&[Span::full(100), Span::new(2, 6)?], 100, 0)?;
/// assert_eq!(layout.slots(), 100 + 8);
/// assert_eq!(layout.head(1).slot(Position(50)), Slot(100 + 2 + (50 - 2) % 6));
/// # Ok::<(), moa_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "LayoutFile", try_from = "LayoutFile")]
pub struct LayerLayout {
    heads: Vec<HeadLayout>,
    slots: usize,
    capacity: usize,
}

impl LayerLayout {
    /// Layout for sequences of at most `capacity` tokens. `slack` extra ring slots per head let a
    /// sequence roll back that many tokens more (see [`CacheState::truncate`](crate::CacheState::truncate)); they never change what
    /// a query sees.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no head or the number of slots overflows.
    pub fn new(spans: &[Span], capacity: usize, slack: usize) -> Result<Self> {
        if spans.is_empty() {
            return Err(Error::invalid("spans", "at least one head", 0));
        }
        if capacity == 0 {
            return Err(Error::invalid("capacity", "at least 1 token", 0));
        }
        let ring = |span: &Span| (*span, span.window().saturating_add(slack));
        Self::with_rings(spans.iter().map(ring), capacity)
    }

    /// Layout of heads whose rings have so many slots, as far as the capacity needs them.
    pub(super) fn with_rings(
        heads: impl IntoIterator<Item = (Span, usize)>,
        capacity: usize,
    ) -> Result<Self> {
        let mut slots = 0usize;
        let mut layouts = Vec::new();
        for (span, ring) in heads {
            let sink = span.sink().min(capacity);
            let ring = ring.min(capacity - sink);
            layouts.push(HeadLayout { span, offset: slots, sink, ring, cache_type: None });
            slots = slots.checked_add(sink + ring).ok_or_else(|| {
                let most = format!("fewer than 2^{} in a layer", usize::BITS);
                Error::invalid("slots", most, "more")
            })?;
        }
        Ok(Self { heads: layouts, slots, capacity })
    }

    /// The same slots, with the types in which heads hold keys and values, one entry for each head. Where
    /// there is none, the backend's own type holds.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one entry for each head.
    pub fn with_cache_types(mut self, types: &[Option<CacheType>]) -> Result<Self> {
        if types.len() != self.heads.len() {
            return Err(Error::invalid(
                "cache types",
                format!("{} heads", self.heads.len()),
                types.len(),
            ));
        }
        self.heads.iter_mut().zip(types).for_each(|(head, own)| head.cache_type = *own);
        Ok(self)
    }

    /// Checks that a backend of this name has every type that the layout asks for, before anything is
    /// allocated.
    ///
    /// # Errors
    /// [`Error::CacheType`] of the first head whose type it lacks.
    pub fn check_cache_types(
        &self,
        backend: &'static str,
        has: impl Fn(CacheType) -> bool,
    ) -> Result<()> {
        let types = self.heads.iter().map(HeadLayout::cache_type).enumerate();
        for (head, cache_type) in types {
            if let Some(cache_type) = cache_type.filter(|own| !has(*own)) {
                return Err(Error::CacheType { backend, cache_type, head: Some(head) });
            }
        }
        Ok(())
    }

    /// Layout of one KV head.
    ///
    /// # Panics
    /// If the head does not exist.
    pub fn head(&self, kv_head: usize) -> &HeadLayout {
        &self.heads[kv_head]
    }

    /// All KV heads.
    pub fn heads(&self) -> &[HeadLayout] {
        &self.heads
    }

    /// Slots of all heads together.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Most tokens a sequence may hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether a head forgets keys in a sequence of all tokens, and so can be rolled back only as far as its ring reaches.
    pub fn has_rings(&self) -> bool {
        self.heads.iter().any(|head| head.slots() < self.capacity)
    }

    /// Bytes of keys and values together, of heads of `head_dim` elements. A head whose
    /// [type](Self::with_cache_types) is not said takes `slot_bytes` for each slot:
    /// [`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes).
    pub fn bytes(&self, head_dim: usize, slot_bytes: u64) -> u64 {
        self.first_bytes(usize::MAX, head_dim, slot_bytes)
    }

    /// [`bytes`](Self::bytes) of at most `most` slots of each head.
    pub(crate) fn first_bytes(&self, most: usize, head_dim: usize, slot_bytes: u64) -> u64 {
        let slot = |own: Option<CacheType>| own.map_or(slot_bytes, |own| own.slot_bytes(head_dim));
        let bytes = |head: &HeadLayout| head.slots().min(most) as u64 * slot(head.cache_type);
        self.heads.iter().map(bytes).sum()
    }
}
