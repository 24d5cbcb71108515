//! The same attention on burn's CUDA tensors: no copies, launched on burn's own stream.
//!
//! [`BurnCuda`] implements [`moa_core::SparseAttentionBackend`] on [`CubeTensor`], the tensor under
//! burn's `cuda` backend. Outputs are allocated by burn, caches by this crate.
//!
//! ```no_run
//! use burn_cubecl::tensor::CubeTensor;
//! use moa_backend_cuda::burn::BurnCuda;
//! use moa_backend_cuda::{Dtype, Result};
//! use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};
//!
//! /// The attention of a prompt: `[tokens, 32, 128]`, `[tokens, 8, 128]` and the same, after RoPE.
//! fn prompt(q: &CubeTensor, k: &CubeTensor, v: &CubeTensor) -> Result<CubeTensor> {
//!     let backend = BurnCuda::new(&q.device, Dtype::Bf16)?;
//!     let layout = LayerLayout::new(&[Span::new(64, 960)?; 8], 8192, 0)?;
//!     let mut cache = backend.open(&layout, 128)?;
//!     let tokens = q.meta.shape()[0];
//!     let inputs = ExtendInputs { q, k, v, scale: 0.088, lse: false };
//!     Ok(backend.extend(&mut [Append { cache: &mut cache, tokens }], &inputs)?.out)
//! }
//! ```
//!
//! # Order
//! A call runs after everything that the calling thread has asked of burn before, and before
//! everything it asks afterwards: it is put on the stream that burn uses for this thread, between the
//! other work there, by the thread of burn that owns the stream. Tensors that another thread's stream
//! made are waited for, as in burn's own kernels. Calls return when their kernels are launched. Under
//! burn's fusion, call it from an extension of the backend (`burn-backend-extension`), where tensors
//! are resolved to [`CubeTensor`]s.
//!
//! A call inside a graph capture of burn is refused: it uploads tables that a replay would not renew.

mod server;
mod view;

use std::sync::{Mutex, PoisonError};

use burn_backend::{DType, Shape, StreamId};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeDevice, kernel};
use moa_core::{
    Append, AttentionShape, ExtendInputs, Extended, InfluenceInputs, InfluenceOutput, LayerLayout,
    SparseAttentionBackend,
};

use crate::attention::step::{Batch, Step, Tensors};
use crate::attention::timing;
use crate::backend::{check, parts};
use crate::influence::Call;
use crate::kernels::compile::{Variant, check_half};
use crate::kernels::tables::Packed;
use crate::memory::Workspace;
use crate::{Cache, Device, Dtype, Error, Result};
use server::Server;
use view::View;

/// Attention on the GPU of a burn device.
///
/// Tensors and caches are f16 or bf16, one of them for the whole backend. Tensors may have any strides
/// (burn pads rows) as long as rows are contiguous and begin at multiples of 16 bytes. Caches are
/// those of [`CudaBackend`](crate::CudaBackend), which may use them too.
#[derive(Debug)]
pub struct BurnCuda {
    device: Device,
    dtype: Dtype,
    server: Server,
    /// Locked by burn's thread alone, which waits for nobody.
    scratch: Mutex<(Step, Workspace)>,
}

impl BurnCuda {
    /// A backend for tensors of this device and type.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is a CUDA device and f16 or bf16; those of [`Device::open`].
    pub fn new(device: &CubeDevice, dtype: Dtype) -> Result<Self> {
        const OP: &str = "BurnCuda::new";
        check_half(OP, dtype)?;
        let CubeDevice::Cuda(cuda) = device else {
            let got = format!("{device:?}");
            return Err(Error::argument(OP, "device", "a CUDA device", got));
        };
        // First ours: it says what is missing, where burn's server panics.
        let device = Device::open(cuda.index)?;
        let scratch = Mutex::new((Step::new(&device), Workspace::new(&device)));
        Ok(Self { server: Server::new(&device, cuda)?, device, dtype, scratch })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type of tensors and caches.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Uninitialised memory of burn's, on the stream on which `like` would be worked with.
    fn empty(&self, like: &CubeTensor, shape: &[usize], dtype: DType) -> CubeTensor {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let (client, device) = (like.client.clone(), like.device.clone());
        let handle = client.empty(bytes);
        CubeTensor::new_contiguous(client, device, Shape::from(shape.to_vec()), handle, dtype)
    }
}

impl SparseAttentionBackend for BurnCuda {
    type Tensor = CubeTensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.dtype.slot_bytes(head_dim)
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        Cache::open(&self.device, layout.clone(), Variant { head_dim, dtype: self.dtype })
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, CubeTensor>,
    ) -> Result<Extended<CubeTensor>> {
        const OP: &str = "extend";
        let ExtendInputs { q, k, v, scale, lse } = *inputs;
        let view = |what, tensor| View::new(OP, what, tensor, &self.server);
        let (q_view, k_view, v_view) = (view("q", q)?, view("k", k)?, view("v", v)?);
        let views = ExtendInputs { q: &q_view, k: &k_view, v: &v_view, scale, lse };
        let AttentionShape { query_heads, .. } = check(&self.device, batch, &views)?;
        let (caches, tokens) = parts(batch);
        let grown = Batch { caches: &caches, tokens: &tokens, query_heads, grows: false };
        // Compiled on this thread: burn's has other work.
        self.device.kernels(caches[0].variant())?;
        let shape = q.meta.shape();
        let out = self.empty(q, shape, q.dtype);
        let lse = lse.then(|| self.empty(q, &shape[..2], DType::F32));

        let buffers = [q, k, v, &out].into_iter().chain(&lse);
        let buffers = buffers.map(|tensor| tensor.handle.clone().binding()).collect();
        self.server.run(OP, out.handle.stream, buffers, |stream, addresses| {
            let &[q, k, v, out, ref lse @ ..] = addresses else { return Ok(()) };
            let tensors = Tensors {
                q: q_view.packed(q)?,
                k: k_view.packed(k)?,
                v: v_view.packed(v)?,
                out: Packed::contiguous(out, query_heads, q_view.row()),
                lse: lse.first().copied().unwrap_or(0),
                scale,
                rope: None,
            };
            let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
            let (step, workspace) = &mut *scratch;
            // SAFETY: `run` orders the stream after all that this crate's own stream and earlier calls
            // on any stream have done to the caches and to the scratch memory, and orders burn's use of
            // the tensors; it lends the tensors' memory for as long. Shapes were checked; no cache
            // appears twice, as each is borrowed mutably.
            unsafe {
                step.prepare(workspace, &grown, stream)?;
                step.run(workspace, &tensors, stream)
            }
        })?;
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

    /// Copies the log-sum-exp, which is small, if burn has padded its rows.
    fn influence(
        &self,
        inputs: &InfluenceInputs<'_, CubeTensor>,
        scale: f32,
    ) -> Result<InfluenceOutput<CubeTensor>> {
        const OP: &str = "influence";
        let view = |what, tensor| View::new(OP, what, tensor, &self.server);
        let views = InfluenceInputs {
            q: &view("q", inputs.q)?,
            k: &view("k", inputs.k)?,
            v: &view("v", inputs.v)?,
            out: &view("out", inputs.out)?,
            lse: &view("lse", inputs.lse)?,
            d_out: &view("d_out", inputs.d_out)?,
            window: inputs.window,
            block: inputs.block,
            sign: inputs.sign,
            gradients: inputs.gradients,
        };
        let call = Call::new(&self.device, self.dtype, &views)?;
        let lse = kernel::into_contiguous(inputs.lse.clone());

        let packed = [views.q, views.k, views.v, views.out, views.d_out];
        let tensors = [inputs.q, inputs.k, inputs.v, inputs.out, inputs.d_out, &lse];
        let buffers = tensors.map(|tensor| tensor.handle.clone().binding()).to_vec();
        self.server.run(OP, StreamId::current(), buffers, |stream, addresses| {
            let &[q, k, v, out, d_out, lse] = addresses else { return Ok(()) };
            let mut all = [Packed::NONE; 5];
            for ((packed, view), address) in all.iter_mut().zip(packed).zip([q, k, v, out, d_out]) {
                *packed = view.packed(address)?;
            }
            // SAFETY: as in `extend`; the sums are memory of this crate's own stream.
            unsafe { call.launch(stream, all, lse, scale) }
        })?;
        call.finish()
    }

    fn decode_seconds(&self, span: usize, group: usize, head_dim: usize) -> Result<f64> {
        let variant = Variant { head_dim, dtype: self.dtype };
        timing::decode_seconds(&self.device, variant, span, group)
    }
}
