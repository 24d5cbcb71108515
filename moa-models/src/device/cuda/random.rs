use moa_backend_cuda::{Dtype, Tensor};

use super::{Cuda, CudaMatrix, Joined};
use crate::device::{RandomWeights, random_amplitude};
use crate::{Error, Result};

impl RandomWeights for Cuda {
    fn random_matrix(&self, out: usize, input: usize, seed: u32) -> Result<CudaMatrix> {
        let shape = [out, input];
        let weight = self.operations.random(&shape, self.dtype(), random_amplitude(input), seed)?;
        Ok(CudaMatrix::Wide(weight))
    }

    fn random_linear(&self, out: usize, input: usize, seed: u32) -> Result<CudaMatrix> {
        if !self.fp8_weights {
            return self.random_matrix(out, input, seed);
        }
        let weight = self.operations.random_e4m3([out, input], random_amplitude(input), seed)?;
        Ok(CudaMatrix::E4m3(weight))
    }

    fn random_joined(&self, outs: &[usize], input: usize, seed: u32) -> Result<Joined> {
        let mut ends = Vec::new();
        for out in outs {
            ends.push(ends.last().unwrap_or(&0) + out);
        }
        let Some(&end) = ends.last() else {
            return Err(Error::invalid("joined layers", "at least 1", 0));
        };
        Ok(Joined { weight: self.random_linear(end, input, seed)?, bias: None, ends })
    }

    fn ones(&self, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_f32(self.gpu(), &vec![1.0; len], &[len], Dtype::F32)?)
    }
}
