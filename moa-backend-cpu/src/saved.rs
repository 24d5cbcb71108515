//! A cache as bytes and back, whatever the types of its heads.

use moa_core::{CacheState, CacheType};

use crate::cache::{Cache, Rows, Store, with_store};
use crate::element::RowElement;
use crate::{Error, Result};

impl Cache {
    /// The bytes of all slots that were written since the cache was empty: for each KV head its keys, then its
    /// values, each of them as elements or codes, then their scales where the type has any, in this machine's order
    /// of bytes. [`from_bytes`](Self::from_bytes) makes the cache of them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        fn add<E: RowElement>(rows: &Rows<E>, slots: usize, dim: usize, bytes: &mut Vec<u8>) {
            let scales = slots.min(rows.cached.scales.len());
            bytes.extend_from_slice(bytemuck::cast_slice(
                &rows.cached.codes[..slots * E::units(dim)],
            ));
            bytes.extend_from_slice(bytemuck::cast_slice(&rows.cached.scales[..scales]));
        }
        let (mut bytes, dim) = (Vec::new(), self.state.head_dim());
        let written_bytes = |(kv_head, store): (usize, &Store)| {
            let row =
                with_store!(store, pair => pair.keys.row_bytes(dim) + pair.values.row_bytes(dim));
            written(&self.state, kv_head) * row
        };
        let len: usize = self.heads.iter().enumerate().map(written_bytes).sum();
        let shortage = |_| Error::OutOfMemory { what: "a saved cache", bytes: len as u64 };
        bytes.try_reserve_exact(len).map_err(shortage)?;
        for (kv_head, store) in self.heads.iter().enumerate() {
            let slots = written(&self.state, kv_head);
            with_store!(store, pair => {
                add(&pair.keys, slots, dim, &mut bytes);
                add(&pair.values, slots, dim, &mut bytes);
            });
        }
        Ok(bytes)
    }

    /// A cache in this state, of [these bytes](Self::to_bytes). Heads whose type the layout does not say have
    /// `cache_type`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more or fewer bytes than the state says, [`Error::OutOfMemory`].
    pub fn from_bytes(state: CacheState, cache_type: CacheType, bytes: &[u8]) -> Result<Self> {
        fn take<E: RowElement>(rows: &mut Rows<E>, slots: usize, dim: usize, rest: &mut &[u8]) {
            let scales = slots.min(rows.cached.scales.len());
            let parts: [&mut [u8]; 2] = [
                bytemuck::cast_slice_mut(&mut rows.cached.codes[..slots * E::units(dim)]),
                bytemuck::cast_slice_mut(&mut rows.cached.scales[..scales]),
            ];
            for part in parts {
                let (own, others) = rest.split_at(part.len());
                part.copy_from_slice(own);
                *rest = others;
            }
        }
        let dim = state.head_dim();
        let expected = state.written_bytes(cache_type.slot_bytes(dim));
        // Before any memory is asked for.
        if bytes.len() as u64 != expected {
            let expected = format!("{expected} bytes");
            return Err(Error::argument("from_bytes", "bytes", expected, bytes.len()));
        }
        let mut cache = Self::new(state.layout().clone(), dim, cache_type)?;
        let mut rest = bytes;
        for (kv_head, store) in cache.heads.iter_mut().enumerate() {
            let slots = written(&state, kv_head);
            with_store!(store, pair => {
                take(&mut pair.keys, slots, dim, &mut rest);
                take(&mut pair.values, slots, dim, &mut rest);
            });
        }
        cache.state = state;
        Ok(cache)
    }
}

/// A head's slots that were written since the cache was empty.
fn written(state: &CacheState, kv_head: usize) -> usize {
    state.layout().head(kv_head).slots().min(state.extent().high_water)
}
