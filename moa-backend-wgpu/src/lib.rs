#![doc = include_str!("../README.md")]

mod attention;
mod backend;
mod cache;
mod device;
mod error;
mod influence;
mod kernels;
mod linear;
pub mod ops;
mod replay;
mod tensor;

pub use attention::matrix_units::MatrixUnits;
pub use backend::WgpuBackend;
pub use cache::{Cache, MAX_HEAD_DIM};
pub use cubecl;
pub use device::Device;
pub use error::{Error, Result};
pub use linear::matrix::Matrix;
pub use moa_core::{BlockType, Dtype};
pub use replay::{Recording, Step, StepShape};
pub use tensor::Tensor;
