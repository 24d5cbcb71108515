//! Mixture of attention spans, without a framework.
//!
//! Attention heads differ: a few must see the whole context, most only their neighbourhood, and
//! some widen as the input grows. This crate holds what every engine needs to use that:
//!
//! * the mask: [`Span`] and its predicate, one pure function that every kernel is tested against;
//! * [`ElasticRule`] and [`Plan`]: one span rule per layer and KV head, as files too;
//! * the cache geometry: [`LayerLayout`] says where each head's sink and ring lie in one flat
//!   buffer, what an append writes and what a query may see, and [`CacheState`] how far it is filled;
//! * [`CacheType`] and [`RowType`]: how keys and values are rounded to 16, 8 and 4 bits;
//! * [`Influence`] and [`Profile`]: how much each head needs each part of the context;
//! * [`search`]: the best plans for a memory budget;
//! * [`BlockType`]: how quantised weights lie in their blocks;
//! * [`Sharding`]: which of several devices owns which heads;
//! * [`SparseAttentionBackend`]: what a device has to offer, and [`mod@reference`], the specification.
//!
//! Method: "MoA: Mixture of Sparse Attention for Automatic LLM Compression", arXiv 2406.14909.
//!
//! # Embedding
//! An engine with its own kernels needs a plan and a layout:
//!
//! ```
//! use std::sync::Arc;
//!
//! use moa_core::{CacheState, ElasticRule, LayerLayout, ModelShape, Plan};
//!
//! let shape = ModelShape { layers: 2, query_heads: 8, kv_heads: 2, head_dim: 64 };
//! let plan = Plan::uniform(shape, 64, ElasticRule::new(0.0, 0.25)?)?;
//!
//! let context = 4096;
//! let layout = LayerLayout::new(&plan.layer_spans(0, context), context, 0)?;
//! let mut cache = CacheState::new(Arc::new(layout), shape.head_dim);
//!
//! // Append a chunk of 100 tokens: which stretches of which head's slots to write.
//! cache.check_append(100)?;
//! for head in cache.layout().heads() {
//!     for run in head.append(cache.len(), 100) {
//!         // copy keys of tokens run.position.. of the chunk to slots run.slot..
//!         assert!(run.slot.0 + run.len <= cache.layout().slots());
//!     }
//! }
//! cache.append(100)?;
//! # Ok::<(), moa_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod backend;
mod blocks;
mod cache;
mod cost;
mod dtype;
mod error;
mod far_losses;
mod file;
mod head_scores;
mod influence;
mod mask;
mod plan;
mod plan_file;
mod plan_search;
mod provenance;
pub mod reference;
mod rule;
pub mod search;
mod sharding;
mod space;
mod span_tables;
mod split_mix;

pub use backend::{
    Append, AttentionShape, ExtendInputs, Extended, Gradients, InfluenceInputs, InfluenceOutput,
    InfluenceSign, Scores, SparseAttentionBackend, check_batch, check_extend, check_influence,
    check_softcap,
};
pub use blocks::BlockType;
pub use cache::{
    CacheState, CacheType, Extent, HeadLayout, HeadRow, LayerLayout, RowType, Run, Slot,
    e4m3_to_f32, key_feedback, rotate, rotation, widen_scale,
};
pub use cost::{CostBound, CostCurve};
pub use dtype::Dtype;
pub use error::{ArgumentError, Error, Result};
pub use far_losses::FarLosses;
pub use file::{open_file, read_file, read_text_file, write_atomic};
pub use head_scores::{FullHeads, HeadScores};
pub use influence::{ByDistance, Influence, Profile, ProfileInfo};
pub use mask::{Position, Span};
pub use plan::{DEFAULT_SINK, MAX_LENGTH, ModelShape, Plan};
pub use plan_search::{FoundPlans, PlanRequest};
pub use provenance::{AtLength, Provenance, Trial};
pub use rule::{ElasticRule, HeadRule};
pub use sharding::Sharding;
pub use space::Space;
pub use split_mix::SplitMix64;

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
