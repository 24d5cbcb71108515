use std::sync::Arc;
use std::time::Instant;

use moa_core::{InfluenceInputs, InfluenceOutput, LayerLayout, Span, SparseAttentionBackend};

use crate::attention::{self, Inputs};
use crate::{Cache, CacheDtype, Error, Result, Tensor, influence};

/// Attention on CPU threads and SIMD.
///
/// Arithmetic is f32 always; the cache's element type is a choice. The default, f32, rounds
/// nothing; bf16 and f16 halve the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuBackend {
    cache_dtype: CacheDtype,
}

impl CpuBackend {
    /// A backend whose caches hold elements of this type.
    pub const fn new(cache_dtype: CacheDtype) -> Self {
        Self { cache_dtype }
    }

    /// Element type of the caches that it opens.
    pub const fn cache_dtype(&self) -> CacheDtype {
        self.cache_dtype
    }
}

impl SparseAttentionBackend for CpuBackend {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        if head_dim == 0 {
            return Err(Error::argument("open", "head_dim", "at least 1", 0));
        }
        Cache::new(Arc::new(layout.clone()), head_dim, self.cache_dtype)
    }

    fn extend(
        &self,
        caches: &mut [&mut Cache],
        tokens: &[usize],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f32,
        lse: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        attention::extend(caches, tokens, &Inputs { q, k, v, scale, lse })
    }

    fn len(&self, cache: &Cache) -> usize {
        cache.len()
    }

    fn fork(&self, cache: &Cache) -> Result<Cache> {
        cache.fork()
    }

    fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.truncate(len)
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
        cache.fill_for_timing(span - 1);
        let q = Tensor::zeros(&[1, group, head_dim])?;
        let kv = Tensor::zeros(&[1, 1, head_dim])?;
        let mut seconds = Vec::with_capacity(DECODE_RUNS);
        for _ in 0..DECODE_RUNS {
            let start = Instant::now();
            self.extend(&mut [&mut cache], &[1], &q, &kv, &kv, 1.0, false)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[DECODE_RUNS / 2])
    }
}

/// Decode steps timed for one measurement, of which the median counts.
const DECODE_RUNS: usize = 15;
