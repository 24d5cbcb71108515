use serde::{Deserialize, Serialize};

use super::layout::LayerLayout;
use crate::{Error, Result};

/// One KV head's part of a cache and its mask, as kernels on a device read it: a row of the table
/// that [`LayerLayout::head_rows`] makes.
///
/// All numbers are slots or tokens, so 32 bits are enough and a kernel widens them where it needs an
/// element's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadRow {
    /// First slot of the head.
    pub offset: u32,
    /// The head's first slots hold positions `0..sink_slots`.
    pub sink_slots: u32,
    /// Then comes a ring of this many slots: [`HeadLayout::slot`](crate::HeadLayout::slot).
    pub ring: u32,
    /// The mask's sink: [`Span::attends`](crate::Span::attends).
    pub sink: u32,
    /// The mask's window.
    pub window: u32,
}

impl HeadRow {
    /// Capacities from here on have no rows: kernels add a position to a window in 31 bits.
    pub const CAPACITY_LIMIT: usize = 1 << 30;

    /// Numbers of a row.
    pub const WORDS: usize = 5;

    /// The row's numbers in the order of its fields, which is how a device's table holds them.
    pub const fn words(&self) -> [u32; Self::WORDS] {
        [self.offset, self.sink_slots, self.ring, self.sink, self.window]
    }
}

impl LayerLayout {
    /// The table of all heads for a device, one row after the other.
    ///
    /// Counts are clipped to the capacity; the mask hides as much as before, as no position is larger.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the capacity is not below [`HeadRow::CAPACITY_LIMIT`] or there are more
    /// than 2^32 slots.
    pub fn head_rows(&self) -> Result<Vec<HeadRow>> {
        let capacity = self.capacity();
        if capacity >= HeadRow::CAPACITY_LIMIT {
            return Err(Error::invalid("capacity", "fewer than 2^30 tokens", capacity));
        }
        if u32::try_from(self.slots() - 1).is_err() {
            return Err(Error::invalid("slots", "at most 2^32 in a layer", self.slots()));
        }
        let clip = |count: usize| count.min(capacity) as u32;
        let row = |head: &crate::HeadLayout| HeadRow {
            offset: head.offset().0 as u32,
            sink_slots: clip(head.sink_slots()),
            ring: clip(head.ring_slots()),
            sink: clip(head.span().sink()),
            window: clip(head.span().window()),
        };
        Ok(self.heads().iter().map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Position, Span};

    #[test]
    fn rows_say_what_the_layout_says() {
        let spans = [Span::full(usize::MAX), Span::new(3, 5).unwrap(), Span::new(500, 1).unwrap()];
        let layout = LayerLayout::new(&spans, 40, 2).unwrap();
        for (row, head) in layout.head_rows().unwrap().iter().zip(layout.heads()) {
            let [sink_slots, ring] = [row.sink_slots, row.ring].map(|n| n as usize);
            let clipped = Span::new(row.sink as usize, row.window as usize).unwrap();
            for query in 0..40 {
                let at = match query < sink_slots {
                    true => query,
                    false => sink_slots + (query - sink_slots) % ring,
                };
                assert_eq!(head.slot(Position(query)).0, row.offset as usize + at);
                for key in 0..40 {
                    let sees = |span: Span| span.attends(Position(query), Position(key));
                    assert_eq!(sees(clipped), sees(head.span()), "{query} {key}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_32_bits_is_refused() {
        let rows = |heads: usize, window: usize, capacity: usize| {
            let spans = vec![Span::new(0, window).unwrap(); heads];
            LayerLayout::new(&spans, capacity, 0).unwrap().head_rows()
        };
        assert!(matches!(
            rows(1, 5, 1 << 30),
            Err(Error::Invalid { what, .. }) if what == "capacity"
        ));
        assert_eq!(rows(7, 1 << 29, 1 << 29).unwrap()[6].offset, 6 << 29);
        // A layout of 2^32 slots and more exists with 64 bits alone.
        #[cfg(target_pointer_width = "64")]
        {
            assert_eq!(rows(8, 1 << 29, 1 << 29).unwrap()[7].offset, 7 << 29);
            assert!(matches!(
                rows(9, 1 << 29, 1 << 29),
                Err(Error::Invalid { what, .. }) if what == "slots"
            ));
        }
    }
}
