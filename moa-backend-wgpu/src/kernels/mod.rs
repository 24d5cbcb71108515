//! The kernels: functions that CubeCL compiles for the device at hand, and that nothing but
//! [`crate::attention`] and its like launch.
//!
//! Numbers are u32, as WebGPU has no larger integers. Functions that host and device must agree
//! on are called by both.

pub(crate) mod append;
pub(crate) mod attend;
pub(crate) mod blocks;
pub(crate) mod cast;
pub(crate) mod codes;
pub(crate) mod copy;
pub(crate) mod decode;
pub(crate) mod few_rows;
pub(crate) mod fragments;
pub(crate) mod influence;
pub(crate) mod join;
pub(crate) mod keys;
pub(crate) mod lanes;
pub(crate) mod linear;
pub(crate) mod merge;
pub(crate) mod none;
pub(crate) mod prefill;
pub(crate) mod prepare;
pub(crate) mod quants;
pub(crate) mod rows;
pub(crate) mod scores;
pub(crate) mod tile;
pub(crate) mod words;
