//! Caches with some keys of a layer, one for each KV head.

use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

use super::budget::Kept;
use crate::Result;
use crate::decoder::block::Cache;
use crate::decoder::model::Decoder;
use crate::device::Math;

impl<D: Math> Decoder<D> {
    /// A cache for each KV head with the keys and values that it keeps, and room for `room` more tokens.
    pub(super) fn compact(
        &self,
        k: &D::Tensor,
        v: &D::Tensor,
        kept: &Kept,
        room: usize,
    ) -> Result<Vec<Cache<D>>> {
        let (heads, dim) = (self.local.kv_heads, self.config.head_dim);
        let mut caches = Vec::with_capacity(heads);
        for keys in kept {
            let slots = keys.len() + room.max(1);
            caches.push(self.open_cache(&LayerLayout::new(&[Span::full(slots)], slots, 0)?)?);
        }
        let places = kept.iter().enumerate();
        let rows: Vec<usize> = places
            .flat_map(|(head, keys)| keys.iter().map(move |key| key * heads + head))
            .collect();
        if rows.is_empty() {
            return Ok(caches);
        }
        let device = &self.device;
        let chosen = |x: &D::Tensor| {
            let tokens = device.shape(x)[0];
            let flat = device.reshape(x.clone(), &[tokens * heads, dim])?;
            device.reshape(device.rows(&flat, &rows)?, &[rows.len(), 1, dim])
        };
        let (k, v) = (chosen(k)?, chosen(v)?);
        let mut batch: Vec<_> = caches
            .iter_mut()
            .zip(kept)
            .filter(|(_, keys)| !keys.is_empty())
            .map(|(cache, keys)| Append { cache, tokens: keys.len() })
            .collect();
        // Appending is what a cache can do on every device; what the keys attend to meanwhile is of no use.
        let inputs = ExtendInputs::new(&k, &k, &v, 1.0);
        device.attention().extend(&mut batch, &inputs).map_err(Into::into)?;
        drop(batch);
        Ok(caches)
    }
}
