use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::layout::LayerLayout;
use super::serial::StateFile;
use crate::{Error, Result};

/// How far one sequence's cache in one layer is filled, with the geometry that it is filled by.
///
/// Every backend's cache holds one and keeps it in step with its buffers; forks share the layout.
///
/// ```
/// use std::sync::Arc;
/// use moa_core::{CacheState, LayerLayout, Span};
/// let layout = LayerLayout::new(&[Span::new(2, 6)?], 100, 0)?;
/// let mut state = CacheState::new(Arc::new(layout), 64);
/// state.append(40)?;
/// assert_eq!((state.len(), state.room()), (40, 60));
/// assert!(state.truncate(39).is_ok(), "a ring can go back by one token");
/// assert!(state.truncate(30).is_err(), "keys 25.. would be needed again, and are overwritten");
/// # Ok::<(), moa_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "StateFile", try_from = "StateFile")]
pub struct CacheState {
    layout: Arc<LayerLayout>,
    head_dim: usize,
    extent: Extent,
}

/// How many tokens a cache holds and has held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Tokens held.
    pub len: usize,
    /// Most tokens held since the cache was last empty: what its rings may have overwritten, and all
    /// that a copy has to copy.
    pub high_water: usize,
}

impl CacheState {
    /// The state of an empty cache whose keys have `head_dim` elements.
    pub fn new(layout: Arc<LayerLayout>, head_dim: usize) -> Self {
        Self { layout, head_dim, extent: Extent::default() }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.extent.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.extent.len == 0
    }

    /// Most tokens that the cache may hold.
    pub fn capacity(&self) -> usize {
        self.layout.capacity()
    }

    /// Tokens that may still be appended.
    pub fn room(&self) -> usize {
        self.capacity() - self.len()
    }

    /// Where each head keeps which position.
    pub fn layout(&self) -> &Arc<LayerLayout> {
        &self.layout
    }

    /// Elements of one key, and of one value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// How many tokens the cache holds and has held.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Bytes of keys and values in slots that were written since the cache was last empty: what a copy has to copy.
    /// A head whose [type](LayerLayout::with_cache_types) is not said takes `slot_bytes` for each slot, as in
    /// [`LayerLayout::bytes`].
    pub fn written_bytes(&self, slot_bytes: u64) -> u64 {
        self.layout.first_bytes(self.extent.high_water, self.head_dim, slot_bytes)
    }

    /// Checks that `tokens` more fit.
    ///
    /// # Errors
    /// [`Error::CapacityExceeded`].
    pub fn check_append(&self, tokens: usize) -> Result<()> {
        match tokens <= self.room() {
            true => Ok(()),
            false => Err(Error::CapacityExceeded {
                len: self.len(),
                more: tokens,
                capacity: self.capacity(),
            }),
        }
    }

    /// Records `tokens` tokens whose keys and values were written.
    ///
    /// # Errors
    /// [`Error::CapacityExceeded`]; the state is then as it was.
    pub fn append(&mut self, tokens: usize) -> Result<()> {
        self.check_append(tokens)?;
        self.extent.len += tokens;
        self.extent.high_water = self.extent.high_water.max(self.extent.len);
        Ok(())
    }

    /// Forgets all tokens after the first `len`.
    ///
    /// A ring that has wrapped can go back by one token plus its slack; a head that keeps
    /// everything can go back to any length.
    ///
    /// # Errors
    /// [`Error::Evicted`] if a head would need keys it no longer holds, [`Error::Invalid`] if `len`
    /// is longer than the sequence. The state is then as it was.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len() {
            return Err(Error::invalid("length", format!("at most {}", self.len()), len));
        }
        for head in self.layout.heads() {
            let oldest_held = head.oldest_held(self.extent.high_water);
            // What the next query, at position `len`, sees of the cache.
            let [_, window] = head.cached_keys(len, len..len + 1);
            let needed = window.start.max(head.sink_slots());
            if needed < oldest_held && window.end > needed {
                return Err(Error::Evicted { to: len, needed, oldest_held });
            }
        }
        match len {
            0 => self.reset(),
            _ => self.extent.len = len,
        }
        Ok(())
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.extent = Extent::default();
    }
}
