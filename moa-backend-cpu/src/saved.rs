//! A cache as bytes and back, whatever the types of its heads.

use moa_core::{CacheState, CacheType};

use crate::cache::{Cache, Rows, Stretch, with_store};
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
        fn parts<E: RowElement>(rows: &Rows<E>, slots: usize, dim: usize) -> [&[u8]; 2] {
            let Stretch { codes, scales } = &rows.cached;
            let codes = bytemuck::cast_slice(&codes[..slots * E::units(dim)]);
            [codes, bytemuck::cast_slice(&scales[..slots.min(scales.len())])]
        }
        let dim = self.state.head_dim();
        let heads = self.heads.iter().enumerate().flat_map(|(kv_head, store)| {
            let slots = written(&self.state, kv_head);
            with_store!(store, pair => [parts(&pair.keys, slots, dim), parts(&pair.values, slots, dim)])
        });
        let parts: Vec<&[u8]> = heads.flatten().collect();
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let shortage = |_| Error::OutOfMemory { what: "a saved cache", bytes: len as u64 };
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(shortage)?;
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
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
