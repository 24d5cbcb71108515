//! A head's cache in the blocks of a paged engine: each KV head is a sequence of its own to the engine's
//! kernels, with one KV head, a table of blocks and a length.

use super::layout::HeadLayout;
use crate::{Error, Result};

impl HeadLayout {
    /// Slots that hold a key once the sequence has `len` tokens; they are the head's first ones.
    ///
    /// Without slack they are all that the query at position `len - 1` sees, so that a kernel which
    /// attends to the first `held(len)` slots of a sequence decodes right. Keys carry their positions in
    /// themselves (RoPE), so their order in a ring does not matter.
    pub fn held(&self, len: usize) -> usize {
        len.min(self.slots())
    }

    /// Blocks of `block_size` slots that hold the keys of `len` tokens: the length of the head's block table.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `block_size` is 0.
    pub fn blocks(&self, len: usize, block_size: usize) -> Result<usize> {
        match block_size {
            0 => Err(Error::invalid("block_size", "at least 1 slot", 0)),
            _ => Ok(self.held(len).div_ceil(block_size)),
        }
    }

    /// Where a paged engine writes `tokens` new keys of this head after `len` earlier ones: the slot mapping
    /// `table[block] * block_size + offset` of each, or -1 (which such engines pass over) for those that
    /// later ones of the same call would overwrite. `table` has the engine's block for each
    /// `block_size` slots of the head.
    ///
    /// Attention of a chunk comes first, since its first query may still see keys that the chunk pushes out.
    ///
    /// ```
    /// use moa_core::{LayerLayout, Span};
    /// // 2 sinks and 4 recent keys, in blocks of 4 slots: the engine gave this head its blocks 7 and 3.
    /// let layout = LayerLayout::new(&[Span::new(2, 4)?], 100, 0)?;
    /// let head = layout.head(0);
    /// assert_eq!(head.slot_mapping(0, 5, &[7, 3], 4)?, [28, 29, 30, 31, 12]);
    /// // Token 6 takes the slot of token 2.
    /// assert_eq!(head.slot_mapping(5, 2, &[7, 3], 4)?, [13, 30]);
    /// assert_eq!((head.held(7), head.blocks(7, 4)?), (6, 2));
    /// # Ok::<(), moa_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if `block_size` is 0, the table is too short, or a slot's number is above 2^63.
    pub fn slot_mapping(
        &self,
        len: usize,
        tokens: usize,
        table: &[u32],
        block_size: usize,
    ) -> Result<Vec<i64>> {
        let needed = self.blocks(len.saturating_add(tokens), block_size)?;
        if table.len() < needed {
            let expected = format!("{needed} blocks of {block_size} slots");
            return Err(Error::invalid("block table", expected, table.len()));
        }
        let mut mapping = vec![-1; tokens];
        for run in self.append(len, tokens) {
            for i in 0..run.len {
                let own = run.slot.0 - self.offset().0 + i;
                let block = table[own / block_size] as usize;
                let slot =
                    block.checked_mul(block_size).and_then(|n| n.checked_add(own % block_size));
                let slot = slot.and_then(|slot| i64::try_from(slot).ok());
                mapping[run.position.0 + i - len] =
                    slot.ok_or_else(|| Error::invalid("slot", "a number below 2^63", "more"))?;
            }
        }
        Ok(mapping)
    }
}
