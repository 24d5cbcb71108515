use moa_core::{
    Append, CacheState, CacheType, ExtendInputs, Extended, InfluenceInputs, InfluenceOutput,
    LayerLayout, SparseAttentionBackend,
};

use crate::attention::{self, timing};
use crate::{Cache, Device, Error, MatrixUnits, Result, Tensor, influence};

/// Attention on one GPU.
///
/// Tensors and arithmetic are f32, caches what was asked for, or what a layout says for each head. Calls return when their kernels are queued, and
/// [`Tensor::to_vec`] waits for them; what goes wrong on the device is reported there too. A device that is lost is
/// [`Error::Lost`] of the first call that waits for it, and of every call after that.
#[derive(Clone, Debug)]
pub struct WgpuBackend {
    device: Device,
    cache_type: CacheType,
    matrix_units: MatrixUnits,
}

impl WgpuBackend {
    /// A backend whose caches are of this type, a [`Dtype`](crate::Dtype) or a [`CacheType`].
    pub fn new(device: &Device, cache_type: impl Into<CacheType>) -> Self {
        let (device, cache_type) = (device.clone(), cache_type.into());
        Self { device, cache_type, matrix_units: MatrixUnits::default() }
    }

    /// The same with another use of matrix units.
    pub fn with_matrix_units(self, matrix_units: MatrixUnits) -> Self {
        Self { matrix_units, ..self }
    }

    /// Whether long chunks with heads of this size take the matrix-unit kernel, emulated or not.
    pub fn has_matrix_units(&self, head_dim: usize) -> bool {
        let limits = attention::Limits::of(&self.device);
        self.matrix_units.blocks(&self.device, &limits, self.cache_type, head_dim).is_some()
    }

    /// Type of the caches that it opens where a layout does not say another.
    pub fn cache_type(&self) -> CacheType {
        self.cache_type
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A cache in this state, of the [bytes](Cache::to_bytes) of one of this backend's type.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more or fewer bytes than the state says, [`Error::TooLarge`],
    /// [`Error::OutOfMemory`], [`Error::Device`], [`Error::Lost`].
    pub fn restore(&self, state: CacheState, bytes: &[u8]) -> Result<Cache> {
        let mut cache = self.open(state.layout(), state.head_dim())?;
        cache.load(state, bytes)?;
        Ok(cache)
    }
}

impl SparseAttentionBackend for WgpuBackend {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.cache_type.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        CacheType::ALL.contains(&cache_type)
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
        Cache::open(&self.device, layout, head_dim, self.cache_type)
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        attention::extend(&self.device, self.matrix_units, batch, inputs)
    }

    fn fork(&self, cache: &Cache) -> Result<Cache> {
        cache.fork()
    }

    fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        Ok(cache.state_mut().truncate(len)?)
    }

    fn bytes(&self, cache: &Cache) -> u64 {
        cache.bytes()
    }

    fn influence(
        &self,
        inputs: &InfluenceInputs<'_, Tensor>,
        scale: f32,
    ) -> Result<InfluenceOutput<Tensor>> {
        influence::influence(&self.device, inputs, scale)
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        timing::decode_seconds(self, span, group, head_dim)
    }
}
