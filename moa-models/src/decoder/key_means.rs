//! Keys of 4 bits are stored less their mean.
//!
//! A query's scores change by one number, `q . m`, if a vector `m` is subtracted from every key of its KV head, and
//! softmax does not see it: attention's output stays what it was. But the step of a rounded row is a share of its
//! largest element, and keys of a head have much in common: less their mean they are shorter, and so is the error.
//!
//! The mean is that of the rotated keys of [`TOKENS`] tokens that are drawn at random, of which the first is left
//! out, as it is unlike the others. Text has no other one that matters, so that no text is needed; it is found when a
//! sequence first needs it, by one step of the model. Log-sum-exps of rows would be off by `q . m`, so that who asks
//! for them gets keys as they are.

use moa_core::{
    Append, CacheState, CacheType, ExtendInputs, LayerLayout, Plan, RowType, SparseAttentionBackend,
};

use crate::Result;
use crate::checkpoint::fingerprint::fingerprint;
use crate::decoder::block::Cache;
use crate::decoder::layer::Layer;
use crate::decoder::model::Decoder;
use crate::device::{Device, Math};

/// Tokens of which the mean is taken.
const TOKENS: usize = 256;

/// What is added to rotated keys before they go into caches.
pub(crate) struct KeyMeans<D: Device> {
    /// Of each layer, `[2, kv_heads, head_dim]`: zeros, and the mean keys' negatives.
    pub(crate) layers: Vec<D::Tensor>,
    fingerprint: String,
}

impl<D: Math> Decoder<D> {
    /// Whether keys of a layer with this layout are stored less their mean. Ranks of a model would have to find the
    /// mean together, and do not.
    fn is_centred(&self, layout: &LayerLayout) -> bool {
        let Some(default) = self.device.centring_cache_type() else { return false };
        let mut types = layout.heads().iter().map(|head| head.cache_type().unwrap_or(default));
        self.shard.is_none() && types.any(|own| own.keys() == RowType::Int4)
    }

    /// Finds the means, if one of these layouts needs them.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory) or [`Backend`](crate::Error::Backend) if the device fails.
    pub(crate) fn prepare_key_means(&self, layouts: &[LayerLayout]) -> Result<()> {
        match layouts.iter().any(|layout| self.is_centred(layout)) {
            true => self.key_means().map(|_| ()),
            false => Ok(()),
        }
    }

    /// Fingerprint of the means, if one of these caches needs them.
    pub(crate) fn key_means_of<'a>(
        &self,
        mut caches: impl Iterator<Item = &'a CacheState>,
    ) -> Result<Option<String>> {
        match caches.any(|cache| self.is_centred(cache.layout())) {
            true => Ok(Some(self.key_means()?.fingerprint.clone())),
            false => Ok(None),
        }
    }

    /// What is added to the rotated keys of a layer in which these caches take part: the table, and for each cache
    /// its row; `None` if none has keys of 4 bits.
    pub(crate) fn key_shifts<'a>(
        &self,
        index: usize,
        caches: impl Iterator<Item = &'a Cache<D>>,
    ) -> Result<Option<(&D::Tensor, Vec<usize>)>>
    where
        D: 'a,
    {
        let of = |cache: &Cache<D>| usize::from(self.is_centred(cache.as_ref().layout()));
        let places: Vec<usize> = caches.map(of).collect();
        match places.contains(&1) {
            true => Ok(Some((&self.key_means()?.layers[index], places))),
            false => Ok(None),
        }
    }

    /// Rotated keys, less their mean where the cache has keys of 4 bits.
    pub(crate) fn centred(
        &self,
        layer: &Layer<D>,
        batch: &[Append<'_, Cache<D>>],
        k: D::Tensor,
    ) -> Result<D::Tensor> {
        match self.key_shifts(layer.index, batch.iter().map(|append| &*append.cache))? {
            None => Ok(k),
            Some((table, places)) => {
                let own = batch.iter().zip(places);
                let rows =
                    own.flat_map(|(append, place)| std::iter::repeat_n(place, append.tokens));
                self.device.add_rows(k, table, &rows.collect::<Vec<_>>())
            }
        }
    }

    fn key_means(&self) -> Result<&KeyMeans<D>> {
        if let Some(means) = self.key_means.get() {
            return Ok(means);
        }
        // Of two that find them at once one is kept; they are equal.
        let found = self.find_key_means()?;
        Ok(self.key_means.get_or_init(|| found))
    }

    /// One step of the model over random tokens, whose caches hold keys as they are.
    fn find_key_means(&self) -> Result<KeyMeans<D>> {
        let c = &self.config;
        let tokens = TOKENS.min(c.context_length());
        let ids = random_tokens(tokens, c.vocab_size);
        let device = &self.device;
        let plan = Plan::full(self.shape())?;
        let has = |own: &CacheType| device.attention().has_cache_type(*own);
        let wide = CacheType::ALL.into_iter().find(has);
        let (heads, dim) = (self.local.kv_heads, c.head_dim);
        let width = heads * dim;
        let table = self.rope(tokens)?;
        let rotations = device.rotations(&[(&table, 0..tokens)])?;
        let mut all = Vec::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        self.blocks(self.embed(&ids)?, |index, [q, k, v]| {
            let [q, k] = self.rotated(&self.layers[index], q, k, &rotations)?;
            let keys = device.values(k.clone())?;
            // The first key is left out, if it is not the only one.
            let rows = keys.chunks_exact(width).skip(usize::from(tokens > 1));
            let mut mean = vec![0.0; width];
            for row in rows {
                mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            let count = tokens.saturating_sub(1).max(1) as f64;
            let mut shifts = vec![0.0; 2 * width];
            for (to, sum) in shifts[width..].iter_mut().zip(&mean) {
                let shift = (-sum / count) as f32;
                // What overflows for random tokens need not do so for text.
                *to = if shift.is_finite() { shift } else { 0.0 };
            }
            all.extend(shifts[width..].iter().flat_map(|x| x.to_le_bytes()));
            layers.push(device.tensor(shifts, &[2, heads, dim])?);
            let layout = plan.layout(index, tokens, 0)?.with_cache_types(&vec![wide; heads])?;
            let mut cache = self.open_cache(&layout)?;
            let mut batch = [Append { cache: &mut cache, tokens }];
            let inputs = ExtendInputs::new(&q, &k, &v, self.scale());
            Ok(device.attention().extend(&mut batch, &inputs).map_err(Into::into)?.out)
        })?;
        Ok(KeyMeans { layers, fingerprint: fingerprint(&all) })
    }
}

/// Tokens of the whole vocabulary, the same ones always.
fn random_tokens(count: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 33) % vocab_size as u64) as u32
    };
    (0..count).map(|_| next()).collect()
}
