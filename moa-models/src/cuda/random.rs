use moa_backend_cuda::{Dtype, Tensor};

use super::{CudaOps, Joined};
use crate::ops::RandomWeights;
use crate::{Error, Result};

impl RandomWeights for CudaOps {
    fn random_matrix(&self, out: usize, input: usize, seed: u32) -> Result<Tensor> {
        // The variance of a uniform number in [-a, a) is a^2 / 3.
        let amplitude = (3.0 / input.max(1) as f32).sqrt();
        Ok(self.operations.random(&[out, input], self.dtype(), amplitude, seed)?)
    }

    fn random_joined(&self, outs: &[usize], input: usize, seed: u32) -> Result<Joined> {
        let mut end = 0;
        let ends: Vec<usize> = outs
            .iter()
            .map(|out| {
                end += out;
                end
            })
            .collect();
        if ends.is_empty() {
            return Err(Error::invalid("joined layers", "at least 1", 0));
        }
        Ok(Joined { weight: self.random_matrix(end, input, seed)?, bias: None, ends })
    }

    fn ones(&self, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_f32(self.device(), &vec![1.0; len], &[len], Dtype::F32)?)
    }
}
