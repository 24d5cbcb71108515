use std::sync::{Arc, Mutex, PoisonError};

use moa_core::{
    Append, AttentionShape, CacheState, CacheType, ExtendInputs, Extended, InfluenceInputs,
    InfluenceOutput, LayerLayout, Scores, SparseAttentionBackend, check_extend,
};

use crate::attention::schedule::SPLIT_ROWS;
use crate::attention::step::{Batch, Step, Tensors};
use crate::attention::timing;
use crate::kernels::compile::{Variant, check_half};
use crate::memory::Workspace;
use crate::tensor::Form;
use crate::{Cache, Device, Dtype, Error, Operations, Result, Tensor, influence};

/// Attention on one GPU.
///
/// Tensors are f16 or bf16, one of them for the whole backend, and so are caches unless a narrower type is asked for;
/// arithmetic is f32. Calls return when their kernels are launched, and [`Tensor::to_f32`] waits for them.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    dtype: Dtype,
    cache_type: CacheType,
    /// Whether influence is always computed from q, k and v alone.
    exact: bool,
    /// For gradients; made when they are first asked for.
    operations: Mutex<Option<Arc<Operations>>>,
    /// Reused from call to call: the stream keeps their uses in order.
    scratch: Mutex<(Step, Workspace)>,
}

const OP: &str = "extend";

impl CudaBackend {
    /// A backend for tensors and caches of this type.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is f16 or bf16.
    pub fn new(device: &Device, dtype: Dtype) -> Result<Self> {
        check_half("CudaBackend::new", dtype)?;
        let scratch = Mutex::new((Step::new(device), Workspace::new(device)));
        let operations = Mutex::default();
        let cache_type = dtype.into();
        Ok(Self { device: device.clone(), dtype, cache_type, exact: false, operations, scratch })
    }

    /// One whose [`influence`](SparseAttentionBackend::influence) does not read the attention's
    /// output, which was rounded, even where no gradients are asked for: for profiling. It needs
    /// cuBLASLt and more time.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `dtype` is f16 or bf16.
    pub fn exact(device: &Device, dtype: Dtype) -> Result<Self> {
        Ok(Self { exact: true, ..Self::new(device, dtype)? })
    }

    /// Most new tokens of a sequence that attention takes as fast as one, where so many query heads share a KV head:
    /// more of them are read by fewer blocks.
    #[must_use]
    pub const fn few_tokens(group: usize) -> usize {
        match SPLIT_ROWS.checked_div(group) {
            None | Some(0) => 1,
            Some(tokens) => tokens,
        }
    }

    /// The same with caches of this type where a layout does not say another one.
    ///
    /// # Errors
    /// [`moa_core::Error::CacheType`] if it is another wide type than that of the tensors.
    pub fn with_cache_type(self, cache_type: CacheType) -> Result<Self> {
        match self.has_cache_type(cache_type) {
            true => Ok(Self { cache_type, ..self }),
            false => {
                let (backend, head) = (self.name(), None);
                Err(moa_core::Error::CacheType { backend, cache_type, head }.into())
            }
        }
    }

    fn operations(&self) -> Result<Arc<Operations>> {
        let mut operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(operations) = &*operations {
            return Ok(Arc::clone(operations));
        }
        let made = Arc::new(Operations::new(&self.device, self.dtype)?);
        Ok(Arc::clone(operations.insert(made)))
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type of tensors.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// A cache in this state, of the [bytes](Cache::to_bytes) of one of this backend's type.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more or fewer bytes than the state says, [`Error::Core`] if a head has a type
    /// that this backend does not, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn restore(&self, state: CacheState, bytes: &[u8]) -> Result<Cache> {
        let mut cache = self.open(state.layout(), state.head_dim())?;
        cache.load(state, bytes)?;
        Ok(cache)
    }

    /// How heads hold keys and values where a layout does not say it.
    pub fn cache_type(&self) -> CacheType {
        self.cache_type
    }

    /// Compiles or loads the kernels now rather than in the first call.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`].
    pub fn warm_up(&self, head_dim: usize) -> Result<()> {
        let variant = Variant { head_dim, dtype: self.dtype };
        self.device.kernels(variant)?;
        match self.cache_type.dtype() {
            Some(_) => Ok(()),
            None => self.device.narrow_kernels(variant, false).map(drop),
        }
    }
}

/// Everything about a call that can be wrong, but for the device of its tensors.
pub(crate) fn check<T: Form>(
    device: &Device,
    batch: &[Append<'_, Cache>],
    inputs: &ExtendInputs<'_, T>,
) -> Result<AttentionShape> {
    let shape = check_extend(batch, inputs, T::shape)?;
    let first = &*batch[0].cache;
    let own = first.dtype();
    let sinks = inputs.scores.sinks.map(|sinks| ("sinks", sinks, Dtype::F32));
    let feedback = inputs.key_feedback.map(|feedback| ("key_feedback", feedback, Dtype::F32));
    let tensors = [("q", inputs.q, own), ("k", inputs.k, own), ("v", inputs.v, own)];
    for (what, tensor, dtype) in tensors.into_iter().chain(sinks).chain(feedback) {
        if tensor.dtype() != dtype {
            return Err(Error::argument(OP, what, dtype, tensor.dtype()));
        }
    }
    if !first.device().is_same(device) {
        return Err(Error::argument(OP, "cache", "on the backend's device", "on another"));
    }
    Ok(shape)
}

/// The parts of a batch as a [`Step`] takes them.
pub(crate) fn parts<'a>(batch: &'a [Append<'_, Cache>]) -> (Vec<&'a Cache>, Vec<usize>) {
    batch.iter().map(|append| (&*append.cache, append.tokens)).unzip()
}

impl SparseAttentionBackend for CudaBackend {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.cache_type.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        cache_type == self.dtype.into() || cache_type.dtype().is_none()
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
        let variant = Variant { head_dim, dtype: self.dtype };
        Cache::open(&self.device, layout.clone(), variant, self.cache_type)
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        let AttentionShape { query_heads, .. } = check(&self.device, batch, inputs)?;
        let ExtendInputs { q, k, v, scores, lse, key_feedback } = *inputs;
        let Scores { scale, softcap, sinks } = scores;
        let sinks_and_feedback = sinks
            .map(|sinks| ("sinks", sinks))
            .into_iter()
            .chain(key_feedback.map(|feedback| ("key_feedback", feedback)));
        for (what, tensor) in [("q", q), ("k", k), ("v", v)].into_iter().chain(sinks_and_feedback) {
            if !tensor.device().is_same(&self.device) {
                return Err(Error::argument(OP, what, "on the backend's device", "on another"));
            }
        }
        let (caches, tokens) = parts(batch);
        let grown = Batch { caches: &caches, tokens: &tokens, query_heads, grows: false, softcap };
        let out = Tensor::uninitialised(&self.device, OP, q.shape(), self.dtype)?;
        let lse = match lse {
            true => Some(Tensor::uninitialised(&self.device, OP, &q.shape()[..2], Dtype::F32)?),
            false => None,
        };
        let tensors = Tensors {
            q: q.packed(),
            k: k.packed(),
            v: v.packed(),
            out: out.packed(),
            lse: lse.as_ref().map_or(0, Tensor::pointer),
            scale,
            sinks: sinks.map_or(0, Tensor::pointer),
            key_feedback: key_feedback.map_or(0, Tensor::pointer),
            rope: None,
        };
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let (step, workspace) = &mut *scratch;
        let stream = self.device.stream();
        // SAFETY: it is the device's own stream, on which all of this is allocated, used and freed,
        // so in order. Shapes were checked; no cache appears twice, as each is borrowed mutably.
        unsafe {
            step.prepare(workspace, &grown, stream)?;
            step.run(workspace, &tensors, stream)?;
        }
        for Append { cache, tokens } in batch {
            cache.advance(*tokens)?;
        }
        Ok(Extended { out, lse })
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
        match self.exact || inputs.gradients {
            true => influence::with_gradients(&*self.operations()?, inputs, scale),
            false => influence::influence(&self.device, self.dtype, inputs, scale),
        }
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        let variant = Variant { head_dim, dtype: self.dtype };
        timing::decode_seconds(&self.device, variant, self.cache_type, span, group)
    }
}
