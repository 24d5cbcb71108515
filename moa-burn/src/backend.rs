use burn::backend::DispatchTensor;
use moa_core::{
    Append, CacheState, CacheType, ExtendInputs, Extended, InfluenceInputs, InfluenceOutput,
    LayerLayout, Scores, SparseAttentionBackend,
};

use crate::bridge::{lift, lower};
use crate::{Error, LayerCache, Result, SparseAttention};

impl AsRef<CacheState> for LayerCache {
    fn as_ref(&self) -> &CacheState {
        self.0.as_ref()
    }
}

/// For code that is generic over backends. [`DispatchTensor`] is what a `burn::Tensor` of any rank is inside:
/// `Tensor::into_dispatch`, `Tensor::from_dispatch`. f32 alone.
impl SparseAttentionBackend for SparseAttention {
    type Tensor = DispatchTensor;
    type Cache = LayerCache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "burn"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.kernels.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        self.kernels.has_cache_type(cache_type)
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<LayerCache> {
        Ok(LayerCache(self.kernels.open(layout, head_dim)?))
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        inputs: &ExtendInputs<'_, DispatchTensor>,
    ) -> Result<Extended<DispatchTensor>> {
        let ExtendInputs { q, k, v, scores, lse, key_feedback } = *inputs;
        let Scores { scale, softcap, sinks } = scores;
        let (q, k, v) = (lower("q", q)?, lower("k", k)?, lower("v", v)?);
        let sinks = sinks.map(|sinks| lower("sinks", sinks)).transpose()?;
        let feedback = key_feedback.map(|own| lower("key_feedback", own)).transpose()?;
        let mut batch: Vec<_> = batch
            .iter_mut()
            .map(|append| Append { cache: &mut append.cache.0, tokens: append.tokens })
            .collect();
        let scores = Scores { scale, softcap, sinks: sinks.as_ref() };
        let key_feedback = feedback.as_ref();
        let inputs = ExtendInputs { lse, key_feedback, ..ExtendInputs::new(&q, &k, &v, scores) };
        let Extended { out, lse } = self.kernels.extend(&mut batch, &inputs)?;
        let lse = lse.map(|lse| lift(lse, &self.device));
        Ok(Extended { out: lift(out, &self.device), lse })
    }

    fn fork(&self, cache: &LayerCache) -> Result<LayerCache> {
        Ok(LayerCache(self.kernels.fork(&cache.0)?))
    }

    fn truncate(&self, cache: &mut LayerCache, len: usize) -> Result<()> {
        Ok(self.kernels.truncate(&mut cache.0, len)?)
    }

    fn bytes(&self, cache: &LayerCache) -> u64 {
        self.kernels.bytes(&cache.0)
    }

    fn influence(
        &self,
        _: &InfluenceInputs<'_, DispatchTensor>,
        _: f32,
    ) -> Result<InfluenceOutput<DispatchTensor>> {
        let operation = "influence";
        Err(moa_core::Error::Unsupported { backend: self.name(), operation }.into())
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        Ok(self.kernels.decode_seconds(span, group, head_dim)?)
    }
}
