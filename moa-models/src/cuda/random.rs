use moa_backend_cuda::{Dtype, Tensor};

use super::{CudaMatrix, CudaOps, Joined};
use crate::ops::RandomWeights;
use crate::{Error, Result};

impl RandomWeights for CudaOps {
    fn random_matrix(&self, out: usize, input: usize, seed: u32) -> Result<CudaMatrix> {
        let shape = [out, input];
        let weight = self.operations.random(&shape, self.dtype(), amplitude(input), seed)?;
        Ok(CudaMatrix::Wide(weight))
    }

    fn random_linear(&self, out: usize, input: usize, seed: u32) -> Result<CudaMatrix> {
        if !self.fp8_weights {
            return self.random_matrix(out, input, seed);
        }
        let weight = self.operations.random_e4m3([out, input], amplitude(input), seed)?;
        Ok(CudaMatrix::E4m3(weight))
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
        Ok(Joined { weight: self.random_linear(end, input, seed)?, bias: None, ends })
    }

    fn ones(&self, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_f32(self.device(), &vec![1.0; len], &[len], Dtype::F32)?)
    }
}

/// Of uniform numbers in `[-a, a)`, whose variance is `a^2 / 3`.
fn amplitude(input: usize) -> f32 {
    (3.0 / input.max(1) as f32).sqrt()
}
