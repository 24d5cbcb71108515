//! Language models whose KV caches are as small as a [plan](moa_core::Plan) allows: loading, generation,
//! and everything that finds a plan and measures what it costs.
//!
//! # Where to begin
//! [`Checkpoint::open`] opens a Hugging Face model folder on a device, [`Checkpoint::complete`] answers one
//! prompt, and an [`Engine`] runs many requests in one batch:
//!
//! ```no_run
//! use moa_core::Plan;
//! use moa_models::{Checkpoint, Cpu, EngineOptions, Event, GenerateOptions};
//!
//! let checkpoint = Checkpoint::open(Cpu::default(), "path/to/model")?;
//! let plan = Plan::load("plan.json")?;
//! println!("{}", checkpoint.complete(&plan, "What is in line 7?", 256)?.text);
//!
//! let mut engine = checkpoint.engine(EngineOptions::default());
//! for prompt in ["Once upon a time", "It was a dark night"] {
//!     engine.submit(prompt, &plan, GenerateOptions::default());
//! }
//! while let Some(event) = engine.step()? {
//!     if let Event::Done { id, completion } = event {
//!         println!("{id}: {}", completion.text);
//!     }
//! }
//! # Ok::<(), moa_models::Error>(())
//! ```
//!
//! [`compress()`] makes such a plan for a checkpoint. [`Plan::full`](moa_core::Plan::full) is dense attention.
//!
//! # Where things stand
//! | folder | what it holds |
//! |---|---|
//! | `checkpoint` | a model folder or GGUF file: [`Checkpoint`], [`quantize`], [`Weights`], [`Gguf`], [`Tokenizer`], [`ChatTemplate`] |
//! | `families` | how the `config.json` of a family of models is read: [`Family`], [`FAMILIES`] |
//! | `decoder` | the network, written once for all families and devices: [`Decoder`], [`ModelConfig`], [`Sequence`], and [`Shard`] for a model that several devices share |
//! | `device` | the operations of a device, [`Device`], [`Load`], [`Math`] and [`Backward`]: [`Cpu`], and by features `Cuda` and `Wgpu` |
//! | `engine` | generation: [`Engine`], [`ChatSession`], [`SamplingOptions`] |
//! | `find_plan` | from calibration data to a plan: [`Checkpoint::calibrate`], [`Decoder::profile`], [`refine()`], [`compress()`] |
//! | `eval` | what a plan leaves of a model: [`Checkpoint::evaluate`], [`Decoder::agreement`], [`Decoder::perplexity`], [`Decoder::bench`], [`metrics`] |
//!
//! # Devices
//! [`Cpu`] needs nothing. `Cuda` (feature `cuda`) needs nothing to build, and to run a driver, NVRTC and
//! cuBLASLt. `Wgpu` (feature `wgpu`) runs on any GPU with a driver for Vulkan, Metal or DX12. The feature
//! `hub` adds `fetch`, the folder or GGUF file of a model of the Hugging Face hub by its [`HubId`], and `download`.

mod any;
mod book;
mod checkpoint;
mod date;
mod decoder;
mod device;
mod engine;
mod error;
mod eval;
mod evict;
mod families;
mod find_plan;
mod memory;
mod progress;

pub use any::{AnyChatSession, AnyCheckpoint, AnyEngine, DeviceName};
pub use checkpoint::Checkpoint;
pub use checkpoint::fingerprint::fingerprint;
pub use checkpoint::generation_config::GenerationConfig;
pub use checkpoint::gguf::tensor_type::TensorType;
pub use checkpoint::gguf::write::{Quantized, quantize};
pub use checkpoint::gguf::{Gguf, is_gguf, open_tensors};
#[cfg(feature = "hub")]
pub use checkpoint::hub::{download, fetch};
pub use checkpoint::hub_id::HubId;
pub use checkpoint::json::JsonObject;
pub use checkpoint::known_texts::KnownTexts;
pub use checkpoint::mapped::MappedTensor;
pub use checkpoint::open_options::OpenOptions;
pub use checkpoint::prompt_style::PromptStyle;
pub use checkpoint::random::RandomTensors;
pub use checkpoint::safetensors::{Tensors, Weights};
pub use checkpoint::template::{ChatTemplate, Message};
pub use checkpoint::text::read_text;
pub use checkpoint::tokenizer::{TokenStream, Tokenizer};
pub use decoder::config::{LayerKind, ModelConfig, QueryScaling};
pub use decoder::logits::LogitRows;
pub use decoder::model::Decoder;
pub use decoder::names::TensorNames;
pub use decoder::rope_scaling::RopeScaling;
pub use decoder::saved_sequence::OffloadedSequence;
pub use decoder::sequence::Sequence;
pub use decoder::session::{Recordings, Session};
pub use decoder::shard::Shard;
pub use device::cpu::{Cpu, CpuMatrix, CpuRotations};
#[cfg(feature = "cuda")]
pub use device::cuda::{Cuda, CudaMatrix, Joined, NcclRank};
pub use device::rank::{Brought, Communicator, PATIENCE, Rank, Wait, on_ranks};
pub use device::replay::{Replay, ReplayBatch};
pub use device::rope_table::RopeTable;
pub use device::thread_rank::ThreadRank;
#[cfg(feature = "wgpu")]
pub use device::wgpu::Wgpu;
pub use device::{Backward, Device, Draw, LinearWeights, Load, Math, Memory};
pub use engine::chat_session::ChatSession;
pub use engine::constraint::Constraint;
pub use engine::logprobs::TokenLogprobs;
pub use engine::request::{Completion, Event, Finish, GenerateOptions, Prompt, RequestId, Usage};
pub use engine::sampling::{Sampler, SamplingOptions};
pub use engine::serve::{Engine, EngineOptions};
pub use engine::speculate::Speculation;
pub use engine::stop::StopStrings;
pub use error::{Error, Result};
pub use eval::agreement::Agreement;
pub use eval::bench::{BenchOptions, BenchReport, ProfileBenchReport};
pub use eval::longbench::{LongBenchCase, LongBenchDataset};
pub use eval::metrics;
pub use eval::perplexity::{PerplexityReport, PooledPerplexity};
pub use eval::retrieval::RetrievalCase;
pub use eval::tasks::{Documents, Task, TaskSources};
pub use eval::{
    Asked, DepthBin, EFFECTIVE_ACCURACY, EffectiveContext, Evaluation, HELD_OUT_TEXT, ItemLog,
    Prompting, Question, Reference, RetrievalItem, RetrievalReport, Scoring, SizedQuestion, Turn,
    effective_context,
};
pub use evict::{Eviction, EvictionKind};
pub use families::granite::Granite;
pub use families::llama::Llama;
pub use families::ministral3::Ministral3;
pub use families::mistral::Mistral;
pub use families::phi3::Phi3;
pub use families::qwen2::Qwen2;
pub use families::qwen3::Qwen3;
pub use families::smollm3::SmolLm3;
pub use families::{FAMILIES, Family};
pub use find_plan::calibrate::{Calibration, CalibrationData, CalibrationOptions, Part};
pub use find_plan::compress::{
    CompressOptions, Compressed, bound_decode_time, compress, compress_profile, plan_warnings,
    profile_warnings, with_min_share,
};
pub use find_plan::evidence::{Evidence, HeldOut, Measured, TextGoal};
pub use find_plan::measure::measured_losses;
pub use find_plan::objective::{Objective, TokenWeight, WeightedObjective};
pub use find_plan::precision::{CacheTypes, PER_HEAD};
pub use find_plan::profile::Item;
pub use find_plan::profile_all::DEFAULT_BLOCK;
pub use find_plan::prompts::CalibrationPrompt;
pub use find_plan::records::{PHRASINGS, Phrasing, RecordPrompt};
pub use find_plan::refine::{Refined, refine};
#[cfg(feature = "cuda")]
pub use moa_backend_cuda::NcclId;
pub use moa_core::{BlockType, CacheType, Dtype};
pub use progress::{Progress, Stage};
