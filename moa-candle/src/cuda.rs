use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda::CudaDType;
use candle_core::cuda::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, DeviceLocation, Error, Layout, Result, Shape, Storage, Tensor,
};
use moa_backend_cuda::tables::Packed;
use moa_backend_cuda::{Batch, CudaBackend, Step, Tensors, Workspace};
use moa_core::{Append, CacheState, Dtype, Extended, LayerLayout, Scores, SparseAttentionBackend};

use crate::{LayerCache, Store, elsewhere};

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

    /// See [`crate::SparseAttention::extend`]; `q`, `k` and `v` are `[batch, heads, tokens, head_dim]`, and hold the
    /// tokens of all sequences in this order.
    pub(crate) fn extend(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        inputs: [&Tensor; 3],
        scores: Scores<'_, Tensor>,
        lse: bool,
        key_feedback: Option<&Tensor>,
    ) -> Result<Extended<Tensor>> {
        let mut own = Vec::with_capacity(batch.len());
        for Append { cache, tokens } in batch {
            match &mut cache.0 {
                Store::Cuda(cache) => own.push(Append { cache: &mut cache.cache, tokens: *tokens }),
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
            DType::F16 => self.launch::<half::f16>(&mut own, inputs, scores, lse, key_feedback),
            _ => self.launch::<half::bf16>(&mut own, inputs, scores, lse, key_feedback),
        }
    }

    fn launch<T: CudaDType + DeviceRepr>(
        &self,
        own: &mut [Append<'_, moa_backend_cuda::Cache>],
        inputs: [&Tensor; 3],
        scores: Scores<'_, Tensor>,
        lse: bool,
        key_feedback: Option<&Tensor>,
    ) -> Result<Extended<Tensor>> {
        let (of_tensor, query_heads, tokens, head_dim) = inputs[0].dims4()?;
        let (rows, row) = (of_tensor * tokens, query_heads * head_dim);
        let stream = self.candle.cuda_stream();
        // SAFETY: the calls below write every element.
        let mut out = unsafe { self.candle.alloc::<T>(rows * row) }?;
        // SAFETY: likewise, where it is asked for.
        let mut sums =
            unsafe { self.candle.alloc::<f32>(if lse { rows * query_heads } else { 1 }) }?;
        {
            let [q, k, v] = inputs.map(Tensor::storage_and_layout);
            // The guards tell cudarc, when dropped, that the stream has used this memory.
            let (q, _q) = Strided::new::<T>(&q.0, q.1, &stream)?;
            let (k, _k) = Strided::new::<T>(&k.0, k.1, &stream)?;
            let (v, _v) = Strided::new::<T>(&v.0, v.1, &stream)?;
            let Scores { scale, softcap, sinks } = scores;
            // Of candle's own type, and without gaps.
            let whole = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
            let [sinks, feedback] = [sinks, key_feedback].map(|x| x.map(whole).transpose());
            let (sinks, feedback) = (sinks?, feedback?);
            let [sinks, feedback] =
                [&sinks, &feedback].map(|x| x.as_ref().map(Tensor::storage_and_layout));
            let (sinks, _sinks) = address_if_some(&sinks, &stream)?;
            let (key_feedback, _feedback) = address_if_some(&feedback, &stream)?;
            let (out, _out) = out.device_ptr_mut(&stream);
            let (sums, _sums) = sums.device_ptr_mut(&stream);
            let mut launch = self.launch.lock().unwrap_or_else(PoisonError::into_inner);
            let (step, workspace) = &mut *launch;
            // Rows that lie one stride apart are one call; other sequences are a call each.
            let strides: Option<Vec<usize>> =
                [&q, &k, &v].iter().map(|x| x.row(of_tensor, tokens)).collect();
            let together = if strides.is_some() { own.len() } else { 1 };
            let strides = strides.unwrap_or_else(|| vec![q.token, k.token, v.token]);
            for (call, own) in own.chunks_mut(together).enumerate() {
                let first = call * together * tokens;
                let place = |i: usize, x: &Strided| Packed {
                    data: x.data + (call * together * x.sequence * x.bytes) as u64,
                    token: strides[i] as i64,
                    head: x.head as i64,
                };
                let (q, k, v) = (place(0, &q), place(1, &k), place(2, &v));
                let out = out + (first * row * size_of::<T>()) as u64;
                let out = Packed::contiguous(out, query_heads, head_dim);
                let sums = sums + (first * query_heads * size_of::<f32>()) as u64;
                let lse = if lse { sums } else { 0 };
                let tensors = Tensors { q, k, v, out, lse, scale, sinks, key_feedback, rope: None };
                let counts: Vec<usize> = own.iter().map(|append| append.tokens).collect();
                let caches: Vec<&moa_backend_cuda::Cache> =
                    own.iter().map(|append| &*append.cache).collect();
                let batch =
                    Batch { caches: &caches, tokens: &counts, query_heads, grows: false, softcap };
                let raw = stream.cu_stream().cast();
                // SAFETY: all of this is on candle's stream, in order with candle's work. Caches were opened
                // before a synchronisation, and they, the step and the workspace are freed after one.
                unsafe {
                    step.prepare(workspace, &batch, raw).map_err(Error::wrap)?;
                    step.run(workspace, &tensors, raw).map_err(Error::wrap)?;
                }
                for Append { cache, tokens } in own {
                    cache.advance(*tokens).map_err(Error::wrap)?;
                }
            }
        }
        let lifted = |storage, shape| {
            let storage = Storage::Cuda(storage);
            Tensor::from_storage(storage, shape, BackpropOp::none(), false)
        };
        let out = CudaStorage::wrap_cuda_slice(out, self.candle.clone());
        let out = lifted(out, Shape::from((rows, query_heads, head_dim)));
        let sums = CudaStorage::wrap_cuda_slice(sums, self.candle.clone());
        Ok(Extended { out, lse: lse.then(|| lifted(sums, Shape::from((rows, query_heads)))) })
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

    /// Elements from one row to the next, if that is the same within and between sequences.
    fn row(&self, sequences: usize, tokens: usize) -> Option<usize> {
        match (sequences, tokens) {
            (1, _) => Some(self.token),
            (_, 1) => Some(self.sequence),
            _ => (self.sequence == tokens * self.token).then_some(self.token),
        }
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

/// Of a tensor of f32, or 0.
fn address_if_some<'a>(
    tensor: &'a Option<(impl Deref<Target = Storage>, &Layout)>,
    stream: &'a CudaStream,
) -> Result<(u64, Option<SyncOnDrop<'a>>)> {
    let Some((storage, layout)) = tensor else { return Ok((0, None)) };
    let (address, guard) = address::<f32>(storage, layout, stream)?;
    Ok((address, Some(guard)))
}
