//! Mixture-of-spans attention on NVIDIA GPUs.
//!
//! [`CudaBackend`] implements [`moa_core::SparseAttentionBackend`]: `extend` for ragged batches with
//! grouped-query heads, each KV head with its own sink and window, on f16 or bf16 caches that are
//! only as large as the spans.
//!
//! ```no_run
//! use moa_backend_cuda::{CudaBackend, Device, Dtype, Tensor};
//! use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};
//!
//! let device = Device::open(0)?;
//! let backend = CudaBackend::new(&device, Dtype::Bf16)?;
//! // One KV head that sees 64 sinks and 960 recent keys, for sequences of at most 8192 tokens.
//! let layout = LayerLayout::new(&[Span::new(64, 960)?], 8192, 0)?;
//! let mut cache = backend.open(&layout, 128)?;
//!
//! // A prompt of 1000 tokens, 4 query heads.
//! let q = Tensor::zeros(&device, &[1000, 4, 128], Dtype::Bf16)?;
//! let kv = Tensor::zeros(&device, &[1000, 1, 128], Dtype::Bf16)?;
//! let inputs = ExtendInputs::new(&q, &kv, &kv, 0.088);
//! let extended = backend.extend(&mut [Append { cache: &mut cache, tokens: 1000 }], &inputs)?;
//! assert_eq!(extended.out.shape(), [1000, 4, 128]);
//! # Ok::<(), moa_backend_cuda::Error>(())
//! ```
//!
//! # What is needed
//! Nothing to build. To run: a driver, a GPU of compute capability 8.0 or later, and NVRTC 12 or 13
//! (the CUDA toolkit, or the package `nvidia-cuda-nvrtc` on `LD_LIBRARY_PATH`); for [`Operations`] and
//! gradients cuBLASLt too. Each of them missing is an [`Error`] of its own. Kernels are compiled at first use and kept on disk; [`compile()`]
//! fills that cache on a machine without a GPU.
//!
//! # Which kernel runs
//! Few rows (new tokens x query heads per KV head, at most 16) take the split kernel, which cuts the
//! keys that a head sees every 512 keys; more take a tensor-core tile kernel, on Hopper with
//! warp-group instructions where the chunk is long enough. Which one, and how a sequence is cut,
//! depends on that sequence alone, so its result is bitwise the same whatever else is in the batch.
//!
//! # Whole models
//! [`Operations`] is the rest of a Llama, forward and backward; the crate `moa-models` runs models on
//! it. What is launched on the device's own stream alone can be captured and launched as one
//! [`Graph`], with its intermediate tensors in an [`Arena`].
//!
//! # Several GPUs
//! [`Nccl`] adds up tensors over the GPUs that share a model. It needs NCCL 2 (`libnccl2`, or the package
//! `nvidia-nccl`), and nothing else does.
//! [`PeerSums`] adds up small ones faster, where GPUs write each other's memory over NVLink.
//!
//! # Inside another engine
//! [`Step`] runs the same kernels on foreign memory and a foreign stream: it plans on the host and
//! uploads tables (`prepare`), then only launches (`run`), also inside a CUDA graph. [`Steps`] are those of all layers, for a
//! graph in which other sequences may take the places of those that it was captured with. [`Kernels`] is the level below:
//! addresses, strides and tables. The crate `moa-candle` runs it inside candle.

mod arena;
mod attention;
mod backend;
mod cache;
mod device;
mod error;
mod graph;
mod influence;
mod kernels;
mod library;
mod linear;
mod memory;
mod nccl;
mod ops;
mod peers;
mod pool;
mod tensor;

pub use arena::Arena;
pub use attention::step::{Batch, Rope, Step, Tensors};
pub use attention::steps::Steps;
pub use backend::CudaBackend;
pub use cache::Cache;
pub use device::{Device, RawStream, Watch};
pub use error::{Error, Result};
pub use graph::Graph;
pub use kernels::compile::{Architecture, HEAD_DIMS, Variant, compile};
pub use kernels::source::Source;
pub use kernels::{Kernels, tables};
pub use linear::{BlockWeight, E4m3Weight, Weight, e4m3, padded_rows};
pub use memory::Workspace;
pub use moa_core::{BlockType, Dtype};
pub use nccl::{Nccl, NcclId};
pub use ops::{AttentionGradients, Draw, Indices, Operations, Turns};
pub use peers::{PeerBuffer, PeerSums};
pub use tensor::Tensor;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
