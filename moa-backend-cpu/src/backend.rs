use std::sync::Arc;
use std::time::Instant;

use moa_core::{
    Append, CacheType, ExtendInputs, Extended, InfluenceInputs, InfluenceOutput, LayerLayout, Span,
    SparseAttentionBackend,
};

use crate::{Cache, Error, Result, Tensor, attention, influence};

/// Attention on CPU threads and SIMD.
///
/// The type in which caches hold keys and values is a choice. The default, f32, rounds nothing; bf16 and f16 halve
/// the memory, narrower types take less still. A layout may choose another type for each head.
///
/// Sums are f32. So are products, but that keys in int8 and int4 meet the queries of one or a few tokens in whole
/// numbers, and where [`narrow_products`](Self::narrow_products) is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuBackend {
    cache_type: CacheType,
    narrow_products: bool,
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new(CacheType::F32)
    }
}

impl CpuBackend {
    /// A backend whose caches are of this type, a [`Dtype`](moa_core::Dtype) or a [`CacheType`].
    pub fn new(cache_type: impl Into<CacheType>) -> Self {
        Self { cache_type: cache_type.into(), narrow_products: false }
    }

    /// Whether queries and weights of chunks of several tokens are rounded to bf16 before they meet keys and values in bf16, on
    /// machines that multiply pairs of bf16 (AVX-512 BF16), as GPUs do: about twice as fast. It is off at first. Heads of other
    /// types, and one to a few tokens, are what they are without it.
    #[must_use]
    pub const fn narrow_products(self, narrow: bool) -> Self {
        Self { narrow_products: narrow, ..self }
    }

    /// Type of the caches that it opens where a layout does not say another.
    pub const fn cache_type(&self) -> CacheType {
        self.cache_type
    }
}

impl SparseAttentionBackend for CpuBackend {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.cache_type.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        CacheType::ALL.contains(&cache_type)
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
        if head_dim == 0 {
            return Err(Error::argument("open", "head_dim", "at least 1", 0));
        }
        Cache::new(Arc::new(layout.clone()), head_dim, self.cache_type)
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        attention::extend(batch, inputs, self.narrow_products)
    }

    fn fork(&self, cache: &Cache) -> Result<Cache> {
        cache.fork()
    }

    fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        Ok(cache.state.truncate(len)?)
    }

    fn bytes(&self, cache: &Cache) -> u64 {
        cache.bytes()
    }

    fn influence(
        &self,
        inputs: &InfluenceInputs<'_, Tensor>,
        scale: f32,
    ) -> Result<InfluenceOutput<Tensor>> {
        influence::influence(inputs, scale)
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        let window = Span::new(0, span)?;
        let layout = LayerLayout::new(&[window], span.saturating_add(DECODE_RUNS), 0)?;
        let mut cache = self.open(&layout, head_dim)?;
        // A full cache of zeros takes as long to read as any other, once its pages are resident.
        cache.fill_for_timing(span - 1)?;
        let q = Tensor::zeros(&[1, group, head_dim])?;
        let kv = Tensor::zeros(&[1, 1, head_dim])?;
        let inputs = ExtendInputs::new(&q, &kv, &kv, 1.0);
        let mut seconds = Vec::with_capacity(DECODE_RUNS);
        for _ in 0..DECODE_RUNS {
            let start = Instant::now();
            self.extend(&mut [Append { cache: &mut cache, tokens: 1 }], &inputs)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[DECODE_RUNS / 2])
    }
}

/// Decode steps timed for one measurement, of which the median counts.
const DECODE_RUNS: usize = 15;
