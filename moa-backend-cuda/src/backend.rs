use std::sync::{Arc, Mutex, PoisonError};

use moa_core::{InfluenceInputs, InfluenceOutput, LayerLayout, SparseAttentionBackend};

use crate::attention::step::{Batch, Step, Tensors};
use crate::attention::timing;
use crate::kernels::compile::Variant;
use crate::memory::Workspace;
use crate::tensor::Form;
use crate::{Cache, Device, Dtype, Error, Operations, Result, Tensor, influence};

/// Attention on one GPU.
///
/// Tensors and caches are f16 or bf16, one of them for the whole backend; arithmetic is f32. Calls
/// return when their kernels are launched, and [`Tensor::to_f32`] waits for them.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    dtype: Dtype,
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
        if dtype == Dtype::F32 {
            return Err(Error::argument("CudaBackend::new", "dtype", "f16 or bf16", dtype));
        }
        let scratch = Mutex::new((Step::new(device), Workspace::new(device)));
        let operations = Mutex::default();
        Ok(Self { device: device.clone(), dtype, exact: false, operations, scratch })
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

    /// Element type of tensors and caches.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Compiles or loads the kernels now rather than in the first call.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`].
    pub fn warm_up(&self, head_dim: usize) -> Result<()> {
        self.device.kernels(Variant { head_dim, dtype: self.dtype }).map(drop)
    }

    fn check(&self, caches: &[&Cache], tokens: &[usize], tensors: [&Tensor; 3]) -> Result<usize> {
        let query_heads = check(&self.device, caches, tokens, tensors)?;
        for (what, tensor) in ["q", "k", "v"].into_iter().zip(tensors) {
            if tensor.device().context() != self.device.context() {
                return Err(Error::argument(OP, what, "on the backend's device", "on another"));
            }
        }
        Ok(query_heads)
    }
}

/// Everything about the tensors that can be wrong, but for their device; the batch is checked by the
/// step. Returns the number of query heads.
pub(crate) fn check<T: Form>(
    device: &Device,
    caches: &[&Cache],
    tokens: &[usize],
    [q, k, v]: [&T; 3],
) -> Result<usize> {
    let total = tokens.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
    let total = total.ok_or_else(|| Error::argument(OP, "tokens", "a sum below 2^64", "more"))?;
    let Some(cache) = caches.first() else {
        return Err(Error::argument(OP, "caches", "at least 1", 0));
    };
    let (kv_heads, head_dim) = (cache.layout().heads().len(), cache.head_dim());
    let &[q_tokens, query_heads, q_dim] = q.shape() else {
        return Err(Error::shape(OP, "q", "[tokens, query heads, head dim]", q.shape()));
    };
    if [q_tokens, q_dim] != [total, head_dim]
        || query_heads == 0
        || !query_heads.is_multiple_of(kv_heads)
    {
        let expected = format!("[{total}, a multiple of {kv_heads}, {head_dim}]");
        return Err(Error::shape(OP, "q", expected, q.shape()));
    }
    let kv_shape = [total, kv_heads, head_dim];
    for (what, tensor) in [("k", k), ("v", v)] {
        if tensor.shape() != kv_shape {
            return Err(Error::shape(OP, what, format_args!("{kv_shape:?}"), tensor.shape()));
        }
    }
    for (what, tensor) in [("q", q), ("k", k), ("v", v)] {
        if tensor.dtype() != cache.dtype() {
            return Err(Error::argument(OP, what, cache.dtype(), tensor.dtype()));
        }
    }
    if cache.device().context() != device.context() {
        return Err(Error::argument(OP, "cache", "on the backend's device", "on another"));
    }
    Ok(query_heads)
}

impl SparseAttentionBackend for CudaBackend {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        Cache::open(&self.device, layout, Variant { head_dim, dtype: self.dtype })
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
        let shared: Vec<&Cache> = caches.iter().map(|cache| &**cache).collect();
        let query_heads = self.check(&shared, tokens, [q, k, v])?;
        let batch = Batch { caches: &shared, tokens, query_heads, grows: false };
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
            rope: None,
        };
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let (step, workspace) = &mut *scratch;
        let stream = self.device.stream();
        // SAFETY: it is the device's own stream, on which all of this is allocated, used and freed,
        // so in order. Shapes were checked; no cache appears twice, as each is borrowed mutably.
        unsafe {
            step.prepare(workspace, &batch, stream)?;
            step.run(workspace, &tensors, stream)?;
        }
        for (cache, &tokens) in caches.iter_mut().zip(tokens) {
            cache.advance(tokens)?;
        }
        Ok((out, lse))
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
        match self.exact || inputs.gradients {
            true => influence::with_gradients(&*self.operations()?, inputs, scale),
            false => influence::influence(&self.device, self.dtype, inputs, scale),
        }
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        let variant = Variant { head_dim, dtype: self.dtype };
        timing::decode_seconds(&self.device, variant, span, group)
    }
}
