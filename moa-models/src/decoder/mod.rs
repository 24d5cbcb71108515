//! The network: configuration, blocks, rotary angles, sequences, and its parts on several devices.

pub(crate) mod block;
mod block_savings;
pub(crate) mod config;
pub(crate) mod forward;
pub(crate) mod frequencies;
pub(crate) mod layer;
pub(crate) mod logits;
pub(crate) mod model;
pub(crate) mod names;
pub(crate) mod narrow_keys;
pub(crate) mod rope_scaling;
pub(crate) mod rotations;
pub(crate) mod saved_sequence;
pub(crate) mod sequence;
pub(crate) mod session;
pub(crate) mod shard;
