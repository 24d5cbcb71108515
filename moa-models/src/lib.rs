//! Llama-2, Llama-3 and Vicuna models whose KV caches are as small as a
//! [plan](moa_core::Plan) allows.

mod calibrate;
mod chat;
mod chat_session;
mod checkpoint;
mod compress;
mod config;
mod cpu;
mod date;
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
mod llama;
pub mod metrics;
mod objective;
mod ops;
mod perplexity;
mod probe;
mod profile;
mod records;
mod refine;
mod retrieval;
mod rng;
mod rope;
mod rope_scaling;
mod sampling;
mod special_tokens;
mod stop;
mod tasks;
mod tokenizer;
mod weights;
#[cfg(feature = "wgpu")]
mod wgpu;

pub use calibrate::{CalibrationData, CalibrationOptions, Prompt};
pub use chat::{ChatTemplate, Message};
pub use chat_session::ChatSession;
pub use checkpoint::{Checkpoint, Completion, TextProgress};
pub use compress::{
    CompressOptions, Compressed, DEFAULT_BLOCK, Stage, bound_decode_time, compress, describe,
};
pub use config::LlamaConfig;
pub use cpu::{CpuMatrix, CpuOps};
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
pub use moa_backend_cpu::CacheDtype;
pub use objective::{Objective, TokenWeight, WeightedObjective};
pub use ops::{BackwardOps, Ops};
pub use perplexity::PerplexityReport;
pub use profile::Item;
pub use records::{PHRASINGS, Phrasing, RecordPrompt};
pub use refine::{Refined, measured_losses, refine};
pub use retrieval::RetrievalCase;
pub use rope::RopeTable;
pub use rope_scaling::RopeScaling;
pub use sampling::{Sampler, SamplingOptions};
pub use stop::StopStrings;
pub use tasks::Task;
pub use tokenizer::{TokenStream, Tokenizer};
pub use weights::{DType, MappedTensor, Weights};
#[cfg(feature = "wgpu")]
pub use wgpu::WgpuOps;
