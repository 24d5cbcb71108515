//! Which keys a query sees and where they lie: [`moa_core::Span`] and [`moa_core::HeadLayout`]
//! for the device.

use cubecl::prelude::*;
use moa_core::HeadRow;

/// Fewest keys of a split, and most splits of a head: longer heads have larger splits.
pub(crate) const MIN_SPLIT_KEYS: u32 = 256;
pub(crate) const MAX_SPLITS: u32 = 256;

/// [`HeadRow`] as kernels hold it, with what a store of heads of one type adds.
#[derive(CubeType, CubeTypeMut, Clone, Copy, Debug)]
pub(crate) struct Head {
    /// First slot in the store.
    pub(crate) offset: u32,
    pub(crate) sink_slots: u32,
    pub(crate) ring: u32,
    pub(crate) sink: u32,
    pub(crate) window: u32,
    /// Which KV head of the tensors it is.
    pub(crate) number: u32,
    /// Word of the store's keys that holds the scales of the first slot, where the type has any.
    pub(crate) scales: u32,
}

/// Numbers of a row of the store's table.
const WORDS: usize = HeadRow::WORDS + 2;

impl Head {
    pub(crate) fn new(row: &HeadRow, number: u32, scales: u32) -> Self {
        let [offset, sink_slots, ring, sink, window] = row.words();
        Self { offset, sink_slots, ring, sink, window, number, scales }
    }

    /// The row of the store's table.
    pub(crate) fn words(&self) -> [u32; WORDS] {
        let Self { offset, sink_slots, ring, sink, window, number, scales } = *self;
        [offset, sink_slots, ring, sink, window, number, scales]
    }
}

/// Reads a store's head from its table.
#[cube]
pub(crate) fn head(table: &[u32], own: u32) -> Head {
    let at = own as usize * WORDS;
    Head {
        offset: table[at],
        sink_slots: table[at + 1],
        ring: table[at + 2],
        sink: table[at + 3],
        window: table[at + 4],
        number: table[at + 5],
        scales: table[at + 6],
    }
}

/// [`moa_core::Span::attends`].
#[cube]
pub(crate) fn attends(head: &Head, query: u32, key: u32) -> bool {
    // Without branches, and without differences that would be negative.
    (key <= query) & ((key < head.sink) | (query < key + head.window))
}

/// [`moa_core::HeadLayout::slot`].
#[cube]
pub(crate) fn slot(head: &Head, position: u32) -> u32 {
    let mut slot = head.offset + position;
    if position >= head.sink_slots {
        slot = head.offset + head.sink_slots + (position - head.sink_slots) % head.ring;
    }
    slot
}

/// All keys that some query of a range sees, numbered from 0: sinks, then the rest.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Keys {
    /// Positions `0..sink_end` come first.
    pub(crate) sink_end: u32,
    /// Then those from here on.
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// Keys that queries at positions `first..end` see.
#[cube]
pub(crate) fn keys(head: &Head, first: u32, end: u32) -> Keys {
    let sink_end = head.sink.min(end);
    // The first query is the one whose window reaches back furthest.
    let mut start = sink_end;
    if first + 1 > head.window + sink_end {
        start = first + 1 - head.window;
    }
    Keys { sink_end, start, count: sink_end + end - start }
}

/// Position of a numbered key.
#[cube]
pub(crate) fn position(keys: &Keys, number: u32) -> u32 {
    // The second is no sink's position, but it is one.
    select(number < keys.sink_end, number, keys.start + number - keys.sink_end)
}

/// Keys per split of a head that sees `count` keys. Depends on nothing else, so that the rounding
/// of a sequence's result never depends on the batch.
#[cube]
pub(crate) fn split_keys(count: u32) -> u32 {
    let needed = count.div_ceil(MAX_SPLITS).div_ceil(64) * 64;
    needed.max(MIN_SPLIT_KEYS)
}
