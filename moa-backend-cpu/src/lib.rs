//! Mixture-of-spans attention on CPU threads and SIMD.
//!
//! [`CpuBackend`] implements [`moa_core::SparseAttentionBackend`]: `extend` on per-head sink + ring
//! caches in f32, f16 or bf16, and `influence` for profiling. Work and memory are proportional to
//! the (query, key) pairs that the spans keep. [`ops`] has the rest of what a Llama needs, on the
//! same [`Tensor`].
//!
//! ```
//! use moa_backend_cpu::{CpuBackend, Tensor};
//! use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};
//!
//! let backend = CpuBackend::default();
//! // One KV head that sees 2 sinks and 6 recent keys, for sequences of at most 100 tokens.
//! let layout = LayerLayout::new(&[Span::new(2, 6)?], 100, 0)?;
//! let mut cache = backend.open(&layout, 4)?;
//!
//! // A prompt of 10 tokens, 2 query heads of 4 elements.
//! let q = Tensor::zeros(&[10, 2, 4])?;
//! let (k, v) = (Tensor::zeros(&[10, 1, 4])?, Tensor::zeros(&[10, 1, 4])?);
//! let inputs = ExtendInputs::new(&q, &k, &v, 0.5);
//! let extended = backend.extend(&mut [Append { cache: &mut cache, tokens: 10 }], &inputs)?;
//! assert_eq!(extended.out.shape(), [10, 2, 4]);
//! assert_eq!(cache.as_ref().len(), 10);
//! # Ok::<(), moa_backend_cpu::Error>(())
//! ```
//!
//! # Which kernel runs
//! Chunks go through a tile kernel (64 rows of queries x 128 keys, online softmax, a
//! SIMD outer-product micro-kernel), one or a few new tokens through a row kernel that reads every cached
//! key once for the whole group of query heads. Where a head's keys and values are bf16 and [`CpuBackend::narrow_products`] is asked for, the tile kernel takes products
//! of bf16 on machines that have them (AVX-512 BF16), about twice as many a second as of f32. Both kernels cut their work by the sequence alone, so the
//! result of a sequence is bitwise the same whatever else is in the batch and however many threads
//! there are. Within one kernel a token's result does not depend on how its sequence was cut either
//! ([`FEW_ROWS`], [`MANY_ROWS`]). The instruction set (AVX-512, AVX2, NEON, none) is found at run time;
//! the environment variable `MOA_NO_AVX512=1` leaves AVX-512 out, and `MOA_NO_AMX=1` AMX, to try what machines without them
//! run.
//!
//! # Threads
//! Work above a measured threshold is spread over the current rayon pool; smaller calls, such as one
//! decode step of a small model, run on the calling thread.

mod attention;
mod backend;
mod cache;
mod element;
mod error;
mod influence;
mod linear;
pub mod ops;
mod pool;
mod saved;
mod simd;
mod tensor;
mod workspace;
mod zeroed;

pub use backend::CpuBackend;
pub use cache::Cache;
pub use error::{Error, Result};
pub use tensor::Tensor;

/// Rows up to which a call computes each row to the bits that a call of this row alone gives: in attention the new
/// tokens of a sequence, in [`ops`] the rows of a tensor. So many tokens can be checked at once as if they had come
/// one after the other.
pub const FEW_ROWS: usize = 7;

/// Rows from which a call computes each row to the same bits, however many others there are. Between this and
/// [`FEW_ROWS`], either may be.
pub const MANY_ROWS: usize = 16;

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
