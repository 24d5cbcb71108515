//! moa's attention on candle's tensors: queries, keys and values are candle's (here views of larger
//! ones), the output lies in memory that candle allocates, everything runs on candle's stream, nothing
//! is copied. Only the caches are moa's. Checked against candle's own attention with the same mask.
//!
//! ```sh
//! cd examples/candle_cuda && CUDA_COMPUTE_CAP=90 cargo run --release
//! ```
//!
//! Needs a GPU, and the CUDA toolkit to build candle's kernels (`nvcc` on `PATH`).

use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, D, DType, Device, Error, Layout, Result, Storage, Tensor};
use half::bf16;
use moa_backend_cuda::tables::Packed;
use moa_backend_cuda::{Batch, Cache, CudaBackend, Dtype, Step, Tensors, Workspace};
use moa_core::{LayerLayout, Position, Span, SparseAttentionBackend};

/// One layer's attention for one sequence.
struct Attention {
    cache: Cache,
    step: Step,
    workspace: Workspace,
}

impl Attention {
    /// Appends tokens; all tensors are `[tokens, heads, head_dim]`.
    fn extend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, query_heads, head_dim) = q.dims3()?;
        let device = q.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        // SAFETY: `run` writes every element.
        let mut out = unsafe { device.alloc::<bf16>(tokens * query_heads * head_dim) }?;
        {
            let [q, k, v] = [q, k, v].map(Tensor::storage_and_layout);
            // The guards tell cudarc, when dropped, that the stream has used this memory.
            let (q, _q) = packed(&q.0, q.1, &stream)?;
            let (k, _k) = packed(&k.0, k.1, &stream)?;
            let (v, _v) = packed(&v.0, v.1, &stream)?;
            let (out, _out) = out.device_ptr_mut(&stream);
            let out = Packed::contiguous(out, query_heads, head_dim);
            let scale = 1.0 / (head_dim as f32).sqrt();
            let tensors = Tensors { q, k, v, out, lse: 0, scale, rope: None };
            let (caches, tokens) = ([&self.cache], [tokens]);
            let batch = Batch { caches: &caches, tokens: &tokens, query_heads, grows: false };
            let raw = stream.cu_stream().cast();
            // SAFETY: all of this is on candle's stream, in order with candle's work; `main` opened the
            // cache before a synchronisation and keeps it until the last result has been read.
            unsafe {
                self.step.prepare(&mut self.workspace, &batch, raw).map_err(Error::wrap)?;
                self.step.run(&self.workspace, &tensors, raw).map_err(Error::wrap)?;
            }
        }
        self.cache.advance(tokens).map_err(Error::wrap)?;
        let out = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
        Ok(Tensor::from_storage(out, q.shape(), BackpropOp::none(), false))
    }
}

/// A tensor as moa's kernels read it, with any strides but the innermost.
fn packed<'a>(
    storage: &'a Storage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(Packed, SyncOnDrop<'a>)> {
    let (Storage::Cuda(storage), &[token, head, 1]) = (storage, layout.stride()) else {
        return Err(Error::msg(format!("expected strides [_, _, 1] on CUDA, got {layout:?}")));
    };
    let (address, guard) = storage.as_cuda_slice::<bf16>()?.device_ptr(stream);
    let data = address + (layout.start_offset() * size_of::<bf16>()) as u64;
    Ok((Packed { data, token: token as i64, head: head as i64 }, guard))
}

/// candle's attention in f32, `[tokens, query heads, head dim]`.
fn reference(q: &Tensor, k: &Tensor, v: &Tensor, layout: &LayerLayout) -> Result<Tensor> {
    let (tokens, query_heads, head_dim) = q.dims3()?;
    let group = query_heads / k.dim(1)?;
    let (mut of_kv, mut mask) = (Vec::new(), Vec::new());
    for kv in (0..query_heads).map(|head| head / group) {
        of_kv.push(kv as u32);
        let attends = |q, k| layout.head(kv).span().attends(Position(q), Position(k));
        let row = |q| (0..tokens).map(move |k| if attends(q, k) { 0. } else { f32::NEG_INFINITY });
        mask.extend((0..tokens).flat_map(row));
    }
    let of_kv = Tensor::new(of_kv, q.device())?;
    let mask = Tensor::from_vec(mask, (query_heads, tokens, tokens), q.device())?;
    let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous());
    let (k, v) = (k?.index_select(&of_kv, 0)?, v?.index_select(&of_kv, 0)?);
    let scores = ((q?.matmul(&k.t()?)? / (head_dim as f64).sqrt())? + mask)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(&v)?.transpose(0, 1)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (tokens, query_heads, kv_heads, head_dim) = (1024, 32, 8, 128);
    let spans: moa_core::Result<Vec<Span>> = (0..8).map(|i| Span::new(4, 60 + 120 * i)).collect();
    let layout = LayerLayout::new(&spans?, tokens, 0)?;
    let candle = Device::new_cuda_with_stream(0)?;
    let random = |heads| Tensor::randn(0f32, 1., (tokens, heads, head_dim), &candle);
    let [q, k, v] =
        [query_heads, kv_heads, kv_heads].map(|heads| random(heads)?.to_dtype(DType::BF16));
    let (q, k, v) = (q?, k?, v?);

    let device = moa_backend_cuda::Device::open(0)?;
    let cache = CudaBackend::new(&device, Dtype::Bf16)?.open(&layout, head_dim)?;
    device.synchronize()?;
    let (step, workspace) = (Step::new(&device), Workspace::new(&device));
    let mut attention = Attention { cache, step, workspace };

    // A prompt in two chunks, then token by token.
    let (mut outputs, mut at) = (Vec::new(), 0);
    for chunk in [700, 300].into_iter().chain([1; 24]) {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(0, at, chunk));
        outputs.push(attention.extend(&q?, &k?, &v?)?);
        at += chunk;
    }
    let out = Tensor::cat(&outputs, 0)?.to_dtype(DType::F32)?;
    let difference =
        (out - reference(&q, &k, &v, &layout)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("{}, largest difference from candle's attention: {difference:.5}", device.name());
    // bf16 keeps 8 bits.
    if difference.is_nan() || difference > 1e-2 {
        return Err(format!("expected at most 1e-2, got {difference}").into());
    }
    Ok(())
}
