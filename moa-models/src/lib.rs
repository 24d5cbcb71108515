//! Llama-2, Llama-3 and Vicuna models whose KV caches are as small as a
//! [plan](moa_core::Plan) allows.
//!
//! Everything is written over [`Math`], the operations of one device: [`Cpu`], and `Cuda` with the
//! feature `cuda`, which needs nothing to build, and to run a driver, NVRTC and cuBLASLt, and `Wgpu`
//! with the feature `wgpu`, which runs on any GPU with a driver for Vulkan, Metal or DX12.

mod checkpoint;
mod date;
mod decoder;
mod device;
mod engine;
mod error;
mod eval;
mod families;
mod find_plan;
mod progress;
mod rng;

pub use checkpoint::Checkpoint;
pub use checkpoint::fingerprint::fingerprint;
pub use checkpoint::generation_config::GenerationConfig;
#[cfg(feature = "hub")]
pub use checkpoint::hub::download;
pub use checkpoint::json::JsonObject;
pub use checkpoint::mapped::MappedTensor;
pub use checkpoint::random::RandomTensors;
pub use checkpoint::safetensors::{DType, Tensors, Weights};
pub use checkpoint::template::{ChatTemplate, Message};
pub use checkpoint::tokenizer::{TokenStream, Tokenizer};
pub use decoder::config::ModelConfig;
pub use decoder::logits::LogitRows;
pub use decoder::model::Decoder;
pub use decoder::names::TensorNames;
pub use decoder::rope::RopeTable;
pub use decoder::rope_scaling::RopeScaling;
pub use decoder::sequence::Sequence;
pub use decoder::session::Session;
pub use decoder::shard::{Communicator, Rank, Shard, on_ranks};
pub use decoder::thread_rank::ThreadRank;
pub use device::cpu::{Cpu, CpuMatrix, CpuRotations};
#[cfg(feature = "cuda")]
pub use device::cuda::{Cuda, CudaDtype, CudaMatrix, Joined, NcclRank};
pub use device::replay::{Replay, ReplayBatch};
#[cfg(feature = "wgpu")]
pub use device::wgpu::Wgpu;
pub use device::{Backward, Device, Draw, LinearWeights, Load, Math, Memory};
pub use engine::chat_session::ChatSession;
pub use engine::request::{Completion, Event, Finish, GenerateOptions, Prompt, RequestId, Usage};
pub use engine::sampling::{Sampler, SamplingOptions};
pub use engine::serve::{Engine, EngineOptions};
pub use engine::stop::StopStrings;
pub use error::{Error, Result};
pub use eval::bench::{BenchOptions, BenchReport, ProfileBenchReport};
pub use eval::metrics;
pub use eval::perplexity::{PerplexityReport, PooledPerplexity};
pub use eval::retrieval::RetrievalCase;
pub use eval::tasks::Task;
pub use eval::{
    Asked, DepthBin, EFFECTIVE_ACCURACY, EffectiveContext, Evaluation, ItemLog, Question,
    Reference, RetrievalItem, RetrievalReport, Scoring, SizedQuestion, Turn, effective_context,
};
pub use families::llama::Llama;
pub use families::{FAMILIES, Family};
pub use find_plan::calibrate::{CalibrationData, CalibrationOptions, CalibrationPrompt};
pub use find_plan::compress::{
    CompressOptions, Compressed, DEFAULT_BLOCK, bound_decode_time, compress, describe,
    with_min_share,
};
pub use find_plan::objective::{Objective, TokenWeight, WeightedObjective};
pub use find_plan::profile::Item;
pub use find_plan::records::{PHRASINGS, Phrasing, RecordPrompt};
pub use find_plan::refine::{Refined, measured_losses, refine};
pub use moa_backend_cpu::CacheDtype;
#[cfg(feature = "cuda")]
pub use moa_backend_cuda::NcclId;
pub use progress::{Progress, Stage};
