//! Llama-2, Llama-3 and Vicuna models whose KV caches are as small as a
//! [plan](moa_core::Plan) allows.
//!
//! Everything is written over [`Ops`], the operations of one device: [`CpuOps`], and `CudaOps` with the
//! feature `cuda`, which needs nothing to build, and to run a driver, NVRTC and cuBLASLt, and `WgpuOps`
//! with the feature `wgpu`, which runs on any GPU with a driver for Vulkan, Metal or DX12.

mod bench;
mod calibrate;
mod chat;
mod chat_session;
mod checkpoint;
mod compress;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod date;
mod decode;
#[cfg(feature = "hub")]
mod download;
mod error;
mod eval;
mod fingerprint;
mod generate;
mod generation_config;
mod json;
mod json_style;
mod jsonl;
mod layer;
mod llama;
mod mapped;
pub mod metrics;
mod objective;
mod ops;
mod perplexity;
mod probe;
mod profile;
mod random;
mod records;
mod refine;
mod retrieval;
mod rng;
mod rope;
mod rope_scaling;
mod running;
mod sampling;
mod serve;
mod shard;
mod special_tokens;
mod stop;
mod tasks;
mod thread_rank;
mod tokenizer;
mod weights;
#[cfg(feature = "wgpu")]
mod wgpu;

pub use bench::{BenchOptions, BenchReport, ProfileBenchReport};
pub use calibrate::{CalibrationData, CalibrationOptions, Prompt};
pub use chat::{ChatTemplate, Message};
pub use chat_session::ChatSession;
pub use checkpoint::{Checkpoint, Completion, TextProgress};
pub use compress::{
    CompressOptions, Compressed, DEFAULT_BLOCK, Stage, bound_decode_time, compress, describe,
    with_min_share,
};
pub use config::LlamaConfig;
pub use cpu::{CpuMatrix, CpuOps, CpuRotations};
#[cfg(feature = "cuda")]
pub use cuda::{CudaDtype, CudaMatrix, CudaOps, Joined, NcclRank};
pub use decode::Decode;
#[cfg(feature = "hub")]
pub use download::download;
pub use error::{Error, Result};
pub use eval::{
    Asked, DepthBin, EFFECTIVE_ACCURACY, EffectiveContext, ItemLog, Question, Reference,
    RetrievalItem, RetrievalReport, Scoring, Turn, effective_context,
};
pub use fingerprint::fingerprint;
pub use generate::{Finish, GenerateOptions, Generated, Generation, Next, Progress};
pub use generation_config::GenerationConfig;
pub use llama::{Llama, LogitRows, Sequence};
pub use mapped::MappedTensor;
pub use moa_backend_cpu::CacheDtype;
#[cfg(feature = "cuda")]
pub use moa_backend_cuda::NcclId;
pub use objective::{Objective, TokenWeight, WeightedObjective};
pub use ops::{BackwardOps, LinearWeights, Memory, Ops, RandomWeights};
pub use perplexity::PerplexityReport;
pub use profile::Item;
pub use records::{PHRASINGS, Phrasing, RecordPrompt};
pub use refine::{Refined, measured_losses, refine};
pub use retrieval::RetrievalCase;
pub use rope::RopeTable;
pub use rope_scaling::RopeScaling;
pub use sampling::{Sampler, SamplingOptions};
pub use serve::{Request, Served};
pub use shard::{Communicator, Rank, Shard, on_ranks};
pub use stop::StopStrings;
pub use tasks::Task;
pub use thread_rank::ThreadRank;
pub use tokenizer::{TokenStream, Tokenizer};
pub use weights::{DType, Weights};
#[cfg(feature = "wgpu")]
pub use wgpu::WgpuOps;
