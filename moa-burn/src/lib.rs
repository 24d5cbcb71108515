#![doc = include_str!("../README.md")]

mod attention;
mod backend;
mod bridge;
mod error;

pub use attention::{LayerCache, SparseAttention};
pub use error::{Error, Result};
pub use moa_backend_wgpu::MatrixUnits;
