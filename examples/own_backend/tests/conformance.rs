//! The backend of this example keeps every law.

use std::process::ExitCode;

use moa_conformance::{Subject, run, suite};
use own_backend::{FixedPoint, Tensor, decode, encode};

fn main() -> ExitCode {
    run(suite("fixed_point", || Ok(Own)))
}

struct Own;

impl Subject for Own {
    type Backend = FixedPoint;
    type Tensor = Tensor;

    fn backend(&self) -> &FixedPoint {
        &FixedPoint
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor { data: data.into(), shape: shape.into() }
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.data.clone()
    }

    fn round(&self, x: f32) -> f32 {
        decode(encode(x))
    }
}
