use std::ops::Range;

use crate::{Error, Position, Result, Span};

/// Index into one layer's flat cache buffer, in units of one token's `head_dim` elements.
/// Never the same as a [`Position`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

/// A stretch of consecutive positions that lie in consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    span: Span,
    offset: usize,
    sink: usize,
    ring: usize,
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
    /// its end, ring from its start.
    pub fn runs(&self, positions: Range<usize>) -> impl Iterator<Item = Run> + use<> {
        let layout = *self;
        let in_sink = positions.start.min(self.sink)..positions.end.min(self.sink);
        let after = positions.start.max(self.sink)..positions.end.max(self.sink);
        debug_assert!(after.len() <= self.ring);
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
        let end = len + tokens;
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
        let mut slots = 0usize;
        let mut heads = Vec::with_capacity(spans.len());
        for &span in spans {
            let sink = span.sink().min(capacity);
            let ring = span.window().saturating_add(slack).min(capacity - sink);
            heads.push(HeadLayout { span, offset: slots, sink, ring });
            slots = slots
                .checked_add(sink + ring)
                .ok_or_else(|| Error::invalid("slots", "fewer than 2^64 in a layer", "more"))?;
        }
        Ok(Self { heads, slots, capacity })
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

    /// Bytes of keys and values together, given those of one slot:
    /// [`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes).
    pub fn bytes(&self, slot_bytes: u64) -> u64 {
        self.slots as u64 * slot_bytes
    }
}
