//! Influence of every attention value on the objective, in blocks.

use std::sync::Arc;

use moa_core::{
    AttentionShape, Gradients, InfluenceInputs, InfluenceOutput, InfluenceSign, check_influence,
};

use crate::kernels::Kernels;
use crate::kernels::compile::Variant;
use crate::kernels::tables::{DevicePointer, InfluenceArgs, Packed};
use crate::tensor::Form;
use crate::{Device, Dtype, Error, Operations, RawStream, Result, Tensor};

const OP: &str = "influence";

/// Tokens per side of the kernel's blocks, of which larger ones are summed here.
const BLOCK: usize = 64;

/// See [`moa_core::SparseAttentionBackend::influence`].
pub(crate) fn influence(
    device: &Device,
    dtype: Dtype,
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
) -> Result<InfluenceOutput<Tensor>> {
    let InfluenceInputs { q, k, v, out, lse, d_out, .. } = *inputs;
    let all = [("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse), ("d_out", d_out)];
    for (what, tensor) in all {
        if !tensor.device().is_same(device) {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    let call = Call::new(device, dtype, inputs)?;
    let packed = [q, k, v, out, d_out].map(Tensor::packed);
    // SAFETY: the shapes were checked; everything is on the device's own stream.
    unsafe { call.launch(device.stream(), packed, lse.pointer(), scale) }?;
    call.finish()
}

/// The same from q, k, v and the output's gradient alone, with the gradients by them if wanted.
pub(crate) fn with_gradients(
    operations: &Operations,
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
) -> Result<InfluenceOutput<Tensor>> {
    let absolute = inputs.sign == InfluenceSign::Absolute;
    let InfluenceInputs { q, k, v, d_out, window, block, gradients, .. } = *inputs;
    let tensors = [q, k, v, d_out];
    let found =
        operations.attention_backward(tensors, scale, window, block, absolute, gradients)?;
    let blocks = found.blocks.to_f32()?.into_iter().map(f64::from).collect();
    let gradients = found.by_inputs.map(|[d_q, d_k, d_v]| Gradients { d_q, d_k, d_v });
    Ok(InfluenceOutput { blocks, gradients })
}

/// One call, checked, with room for its result.
pub(crate) struct Call {
    kernels: Arc<Kernels>,
    /// Sums over the kernel's blocks, allocated on the device's own stream. Those above the diagonal
    /// stay 0.
    sums: Tensor,
    /// Tokens, query heads, KV heads.
    dims: [usize; 3],
    window: usize,
    block: usize,
    sign: InfluenceSign,
}

impl Call {
    pub(crate) fn new<T: Form>(
        device: &Device,
        dtype: Dtype,
        inputs: &InfluenceInputs<'_, T>,
    ) -> Result<Self> {
        let AttentionShape { tokens, query_heads, kv_heads, head_dim } = check(dtype, inputs)?;
        let side = tokens.div_ceil(BLOCK);
        Ok(Self {
            kernels: device.kernels(Variant { head_dim, dtype })?,
            sums: Tensor::zeros(device, &[kv_heads, side, side], Dtype::F32)?,
            dims: [tokens, query_heads, kv_heads],
            window: inputs.window.min(tokens),
            block: inputs.block,
            sign: inputs.sign,
        })
    }

    /// # Safety
    /// As [`Kernels::influence`]: q, k, v, out, d_out and the log-sum-exp, without gaps, have the
    /// shapes that `new` saw; `stream` runs after the device's own stream has come this far.
    pub(crate) unsafe fn launch(
        &self,
        stream: RawStream,
        [q, k, v, out, d_out]: [Packed; 5],
        lse: DevicePointer,
        scale: f32,
    ) -> Result<()> {
        let [tokens, query_heads, kv_heads] = self.dims.map(|n| n as i32);
        let args = InfluenceArgs {
            q,
            k,
            v,
            out,
            d_out,
            lse,
            blocks: self.sums.pointer(),
            tokens,
            query_heads,
            kv_heads,
            absolute: i32::from(self.sign == InfluenceSign::Absolute),
            scale,
            window: self.window as i32,
        };
        // SAFETY: as the caller promises.
        unsafe { self.kernels.influence(stream, &args) }
    }

    /// The result, once the device's own stream has come to it.
    pub(crate) fn finish<T>(self) -> Result<InfluenceOutput<T>> {
        let side = self.dims[0].div_ceil(BLOCK);
        let blocks = coarsen(&self.sums.to_f32()?, side, self.block / BLOCK)?;
        Ok(InfluenceOutput { blocks, gradients: None })
    }
}

/// Sums `factor` x `factor` blocks of `[heads, side, side]`.
fn coarsen(fine: &[f32], side: usize, factor: usize) -> Result<Vec<f64>> {
    let coarse = side.div_ceil(factor);
    let sums = fine.len() / (side * side) * coarse * coarse;
    let mut sums: Vec<f64> = Error::host_zeros("sums of influence", sums)?;
    for (at, &x) in fine.iter().enumerate() {
        let (head, i, j) = (at / (side * side), at / side % side, at % side);
        sums[(head * coarse + i / factor) * coarse + j / factor] += f64::from(x);
    }
    Ok(sums)
}

fn check<T: Form>(dtype: Dtype, inputs: &InfluenceInputs<'_, T>) -> Result<AttentionShape> {
    let shape = check_influence(inputs, T::shape)?;
    if i32::try_from(shape.tokens).is_err() {
        return Err(Error::shape(OP, "q", "fewer than 2^31 tokens", inputs.q.shape()));
    }
    let InfluenceInputs { q, k, v, out, d_out, lse, .. } = *inputs;
    let wide = ("lse", lse, Dtype::F32);
    let all = [("q", q), ("k", k), ("v", v), ("out", out), ("d_out", d_out)];
    for (what, tensor, dtype) in all.map(|(what, x)| (what, x, dtype)).into_iter().chain([wide]) {
        if tensor.dtype() != dtype {
            return Err(Error::argument(OP, what, dtype, tensor.dtype()));
        }
    }
    if !inputs.block.is_multiple_of(BLOCK) {
        let expected = format_args!("a multiple of {BLOCK}").to_string();
        return Err(Error::argument(OP, "block", expected, inputs.block));
    }
    if inputs.gradients {
        let operation = "gradients of influence";
        return Err(moa_core::Error::Unsupported { backend: "cuda", operation }.into());
    }
    Ok(shape)
}

#[cfg(test)]
mod tests {
    use super::coarsen;

    #[test]
    fn coarse_blocks_are_sums_of_fine_ones() {
        let fine: Vec<f32> = (0..2 * 9).map(|x| x as f32).collect();
        assert_eq!(coarsen(&fine, 3, 1).unwrap(), (0..18).map(f64::from).collect::<Vec<_>>());
        // [0 1 2; 3 4 5; 6 7 8] in blocks of 2.
        assert_eq!(coarsen(&fine, 3, 2).unwrap()[..4], [8.0, 7.0, 13.0, 8.0]);
        assert_eq!(coarsen(&fine, 3, 4).unwrap(), [36.0, 36.0 + 81.0]);
    }
}
