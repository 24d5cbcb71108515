use std::ops::Range;

use moa_backend_cuda::{CudaBackend, Tensor};

use super::{Cuda, CudaMatrix, Joined};
use crate::device::{Backward, Device};
use crate::{Error, Result};

/// Gradients are f32, and rounded where they enter a matrix product: bf16 holds the smallest of them,
/// f16 may not.
impl Backward for Cuda {
    fn exact_attention(&self) -> &CudaBackend {
        &self.exact
    }

    fn check_gradients(&self) -> Result<()> {
        match self.fp8_weights {
            true => Err(Error::invalid("weights of a model with gradients", "f16 or bf16", "fp8")),
            false => Ok(()),
        }
    }

    fn linear_backward(&self, d_y: &Tensor, weight: &CudaMatrix) -> Result<Tensor> {
        Ok(self.operations.linear_backward(d_y, &self.wide(weight)?)?)
    }

    fn linears_backward(&self, d_y: &[Tensor], joined: &Joined) -> Result<Tensor> {
        if d_y.len() != joined.ends.len() {
            return Err(Error::invalid("gradients", joined.ends.len().to_string(), d_y.len()));
        }
        let (mut before, mut sum) = (0, None);
        let mut layers = d_y.iter().zip(&joined.ends);
        for (weight, count) in &joined.weights {
            let (weight, first) = (self.wide(weight)?, before);
            for (d_y, &end) in layers.by_ref().take(*count) {
                let own = std::mem::replace(&mut before, end) - first..end - first;
                let weight = weight.rows(own)?;
                sum = Some(match sum {
                    Some(sum) => self.operations.linear_backward_add(sum, d_y, &weight)?,
                    None => self.operations.linear_backward(d_y, &weight)?,
                });
            }
        }
        sum.ok_or_else(|| Error::invalid("joined layers", "at least 1", 0))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        d_y: &Tensor,
    ) -> Result<Tensor> {
        let (x, d_y) = (self.widened(x)?, self.widened(d_y)?);
        Ok(self.operations.rms_norm_backward(&x, weight, eps, &d_y)?)
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let both = self.operations.swiglu_backward(gate, up, d_y)?;
        let cols = self.shape(gate)[1];
        Ok((both.columns(0..cols)?, both.columns(cols..2 * cols)?))
    }

    fn place_rows(&self, x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
        Ok(self.operations.place_rows(x, rows, total)?)
    }
}
