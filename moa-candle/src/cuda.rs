use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda::CudaDType;
use candle_core::cuda::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, DeviceLocation, Error, Layout, Result, Storage, Tensor,
};
use moa_backend_cuda::tables::Packed;
use moa_backend_cuda::{Batch, CudaBackend, Step, Tensors, Workspace};
use moa_core::{CacheState, Dtype, LayerLayout, Scores, SparseAttentionBackend};

use crate::{Dims, LayerCache, Store, elsewhere};

/// moa's kernels on candle's stream.
#[derive(Debug)]
pub(crate) struct Road {
    candle: CudaDevice,
    device: moa_backend_cuda::Device,
    backend: CudaBackend,
    dtype: DType,
    /// One for all layers: candle's stream keeps their calls in order.
    launch: Mutex<(Step, Workspace)>,
}

/// A cache that is freed after candle's stream has passed its last use.
#[derive(Debug)]
pub(crate) struct Cache {
    cache: moa_backend_cuda::Cache,
    road: Arc<Road>,
}

impl Drop for Road {
    fn drop(&mut self) {
        // A stream that fails has nothing in flight any more.
        let _ = self.candle.synchronize();
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = self.road.candle.synchronize();
    }
}

impl Cache {
    pub(crate) fn state(&self) -> &CacheState {
        self.cache.as_ref()
    }
}

impl Road {
    pub(crate) fn open(candle: &CudaDevice, dtype: Dtype) -> Result<Self> {
        let DeviceLocation::Cuda { gpu_id } = candle.location() else {
            candle_core::bail!("device: expected CUDA, got {:?}", candle.location());
        };
        let device = moa_backend_cuda::Device::open(gpu_id).map_err(Error::wrap)?;
        let backend = CudaBackend::new(&device, dtype).map_err(Error::wrap)?;
        let launch = Mutex::new((Step::new(&device), Workspace::new(&device)));
        let dtype = if dtype == Dtype::F16 { DType::F16 } else { DType::BF16 };
        Ok(Self { candle: candle.clone(), device, backend, dtype, launch })
    }

    pub(crate) fn cache(self: Arc<Self>, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        let cache = self.backend.open(layout, head_dim).map_err(Error::wrap)?;
        // The cache is made on the device's own stream and used on candle's.
        self.device.synchronize().map_err(Error::wrap)?;
        Ok(Cache { cache, road: self })
    }

    pub(crate) fn fork(self: Arc<Self>, from: &Cache) -> Result<Cache> {
        self.candle.synchronize()?;
        let cache = self.backend.fork(&from.cache).map_err(Error::wrap)?;
        self.device.synchronize().map_err(Error::wrap)?;
        Ok(Cache { cache, road: self })
    }

    pub(crate) fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        self.backend.truncate(&mut cache.cache, len).map_err(Error::wrap)
    }

    /// See [`crate::SparseAttention::forward`].
    pub(crate) fn forward(
        &self,
        caches: &mut [&mut LayerCache],
        inputs: [&Tensor; 3],
        scores: Scores<'_, Tensor>,
        dims: Dims,
    ) -> Result<Tensor> {
        let mut own = Vec::with_capacity(caches.len());
        for cache in caches {
            match &mut cache.0 {
                Store::Cuda(cache) => own.push(&mut cache.cache),
                Store::Cpu(_) => return Err(elsewhere()),
            }
        }
        let dtype = self.dtype;
        if let Some(other) = inputs.iter().find(|x| x.dtype() != dtype) {
            candle_core::bail!(
                "q, k, v: expected {dtype:?} as the caches, got {:?}",
                other.dtype()
            );
        }
        match dtype {
            DType::F16 => self.extend::<half::f16>(&mut own, inputs, scores, dims),
            _ => self.extend::<half::bf16>(&mut own, inputs, scores, dims),
        }
    }

    fn extend<T: CudaDType + DeviceRepr>(
        &self,
        caches: &mut [&mut moa_backend_cuda::Cache],
        inputs: [&Tensor; 3],
        scores: Scores<'_, Tensor>,
        dims: Dims,
    ) -> Result<Tensor> {
        let Dims { batch, tokens, query_heads, head_dim } = dims;
        let stream = self.candle.cuda_stream();
        // SAFETY: the calls below write every element.
        let mut out = unsafe { self.candle.alloc::<T>(batch * tokens * query_heads * head_dim) }?;
        {
            let [q, k, v] = inputs.map(Tensor::storage_and_layout);
            // The guards tell cudarc, when dropped, that the stream has used this memory.
            let (q, _q) = Strided::new::<T>(&q.0, q.1, &stream)?;
            let (k, _k) = Strided::new::<T>(&k.0, k.1, &stream)?;
            let (v, _v) = Strided::new::<T>(&v.0, v.1, &stream)?;
            let Scores { scale, softcap, sinks } = scores;
            // Of candle's own type, and without gaps.
            let sinks = sinks.map(|x| x.to_dtype(DType::F32)?.contiguous()).transpose()?;
            let sinks = sinks.as_ref().map(Tensor::storage_and_layout);
            let sinks = match &sinks {
                Some((storage, layout)) => Some(address::<f32>(storage, layout, &stream)?),
                None => None,
            };
            let sinks = sinks.as_ref().map_or(0, |(address, _)| *address);
            let (out, _out) = out.device_ptr_mut(&stream);
            let mut launch = self.launch.lock().unwrap_or_else(PoisonError::into_inner);
            let (step, workspace) = &mut *launch;
            // Sequences of one token are rows one stride apart; longer ones are a call each.
            let together = if tokens == 1 { batch } else { 1 };
            for (call, caches) in caches.chunks_mut(together).enumerate() {
                let place = |x: &Strided| x.packed(call * together, tokens == 1);
                let row = query_heads * head_dim;
                let out = out + (call * together * tokens * row * size_of::<T>()) as u64;
                let out = Packed::contiguous(out, query_heads, head_dim);
                let [q, k, v] = [&q, &k, &v].map(place);
                let tensors = Tensors { q, k, v, out, lse: 0, scale, sinks, rope: None };
                let counts = vec![tokens; caches.len()];
                let shared: Vec<&moa_backend_cuda::Cache> = caches.iter().map(|c| &**c).collect();
                let batch =
                    Batch { caches: &shared, tokens: &counts, query_heads, grows: false, softcap };
                let raw = stream.cu_stream().cast();
                // SAFETY: all of this is on candle's stream, in order with candle's work. Caches were opened
                // before a synchronisation, and they, the step and the workspace are freed after one.
                unsafe {
                    step.prepare(workspace, &batch, raw).map_err(Error::wrap)?;
                    step.run(workspace, &tensors, raw).map_err(Error::wrap)?;
                }
                for cache in caches {
                    cache.advance(tokens).map_err(Error::wrap)?;
                }
            }
        }
        let out = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, self.candle.clone()));
        let shape = (batch, tokens, query_heads, head_dim);
        Tensor::from_storage(out, shape, BackpropOp::none(), false).transpose(1, 2)
    }
}

/// A tensor `[batch, heads, tokens, head_dim]` where candle keeps it.
struct Strided {
    data: u64,
    /// Elements from one to the next.
    sequence: usize,
    head: usize,
    token: usize,
    bytes: usize,
}

impl Strided {
    fn new<'a, T: CudaDType + DeviceRepr + 'a>(
        storage: &'a Storage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<(Self, SyncOnDrop<'a>)> {
        let &[sequence, head, token, 1] = layout.stride() else {
            candle_core::bail!("q, k, v: expected strides [_, _, _, 1] on CUDA, got {layout:?}");
        };
        let (data, guard) = address::<T>(storage, layout, stream)?;
        Ok((Self { data, sequence, head, token, bytes: size_of::<T>() }, guard))
    }

    /// The tokens of a sequence, or the one token of each from this sequence on.
    fn packed(&self, sequence: usize, one_each: bool) -> Packed {
        let token = if one_each { self.sequence } else { self.token };
        let data = self.data + (sequence * self.sequence * self.bytes) as u64;
        Packed { data, token: token as i64, head: self.head as i64 }
    }
}

/// Of a tensor's first element; the guard tells cudarc, when dropped, that the stream has used it.
fn address<'a, T: CudaDType + DeviceRepr + 'a>(
    storage: &'a Storage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let Storage::Cuda(storage) = storage else {
        candle_core::bail!("tensors: expected CUDA, got {:?}", storage.device().location());
    };
    let (address, guard) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
    Ok((address + (layout.start_offset() * size_of::<T>()) as u64, guard))
}
