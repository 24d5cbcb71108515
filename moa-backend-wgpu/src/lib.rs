#![doc = include_str!("../README.md")]

mod backend;
#[cfg(feature = "burn")]
mod burn;
mod cache;
mod device;
mod dtype;
mod error;
mod extend;
mod influence;
mod kernels;
mod matrix;
mod matrix_units;
pub mod ops;
#[cfg(feature = "vulkan")]
mod products;
mod tensor;
mod timing;

pub use backend::WgpuBackend;
pub use cache::{Cache, MAX_HEAD_DIM};
pub use cubecl;
pub use device::Device;
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use matrix::Matrix;
pub use matrix_units::MatrixUnits;
pub use tensor::Tensor;
