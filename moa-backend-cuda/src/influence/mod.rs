//! Influence of every attention value on the objective, in blocks.

use std::sync::Arc;

use moa_core::{Gradients, InfluenceInputs, InfluenceOutput, InfluenceSign};

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
        if tensor.device().context() != device.context() {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    let sweep = Sweep::new(device, dtype, inputs)?;
    let packed = [q, k, v, out, d_out].map(Tensor::packed);
    // SAFETY: the shapes were checked; everything is on the device's own stream.
    unsafe { sweep.launch(device.stream(), packed, lse.pointer(), scale) }?;
    sweep.finish()
}

/// The same from q, k, v and the output's gradient alone, with the gradients by them if wanted.
pub(crate) fn with_gradients(
    operations: &Operations,
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
) -> Result<InfluenceOutput<Tensor>> {
    let absolute = inputs.sign == InfluenceSign::Absolute;
    let InfluenceInputs { q, k, v, d_out, block, gradients, .. } = *inputs;
    let tensors = [q, k, v, d_out];
    let found = operations.attention_backward(tensors, scale, block, absolute, gradients)?;
    let blocks = found.blocks.to_f32()?.into_iter().map(f64::from).collect();
    let gradients = found.by_inputs.map(|[d_q, d_k, d_v]| Gradients { d_q, d_k, d_v });
    Ok(InfluenceOutput { blocks, gradients })
}

/// One call, checked, with room for its result.
pub(crate) struct Sweep {
    kernels: Arc<Kernels>,
    /// Sums over the kernel's blocks, allocated on the device's own stream. Those above the diagonal
    /// stay 0.
    sums: Tensor,
    /// Tokens, query heads, KV heads.
    dims: [usize; 3],
    block: usize,
    sign: InfluenceSign,
}

impl Sweep {
    pub(crate) fn new<T: Form>(
        device: &Device,
        dtype: Dtype,
        inputs: &InfluenceInputs<'_, T>,
    ) -> Result<Self> {
        let [tokens, query_heads, kv_heads, head_dim] = check(dtype, inputs)?;
        let side = tokens.div_ceil(BLOCK);
        Ok(Self {
            kernels: device.kernels(Variant { head_dim, dtype })?,
            sums: Tensor::zeros(device, &[kv_heads, side, side], Dtype::F32)?,
            dims: [tokens, query_heads, kv_heads],
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
            padding: 0,
        };
        // SAFETY: as the caller promises.
        unsafe { self.kernels.influence(stream, &args) }
    }

    /// The result, once the device's own stream has come to it.
    pub(crate) fn finish<T>(self) -> Result<InfluenceOutput<T>> {
        let side = self.dims[0].div_ceil(BLOCK);
        let blocks = coarsen(&self.sums.to_f32()?, side, self.block / BLOCK);
        Ok(InfluenceOutput { blocks, gradients: None })
    }
}

/// Sums `factor` x `factor` blocks of `[heads, side, side]`.
fn coarsen(fine: &[f32], side: usize, factor: usize) -> Vec<f64> {
    let coarse = side.div_ceil(factor);
    let mut sums = vec![0.0; fine.len() / (side * side) * coarse * coarse];
    for (at, &x) in fine.iter().enumerate() {
        let (head, i, j) = (at / (side * side), at / side % side, at % side);
        sums[(head * coarse + i / factor) * coarse + j / factor] += f64::from(x);
    }
    sums
}

/// Tokens, query heads, KV heads, head dim.
fn check<T: Form>(dtype: Dtype, inputs: &InfluenceInputs<'_, T>) -> Result<[usize; 4]> {
    let &[tokens, query_heads, head_dim] = inputs.q.shape() else {
        return Err(Error::shape(OP, "q", "[tokens, query heads, head dim]", inputs.q.shape()));
    };
    let &[_, kv_heads, _] = inputs.k.shape() else {
        return Err(Error::shape(OP, "k", "[tokens, kv heads, head dim]", inputs.k.shape()));
    };
    if tokens == 0 || i32::try_from(tokens).is_err() || query_heads == 0 {
        return Err(Error::shape(OP, "q", "1 to 2^31 tokens, some heads", inputs.q.shape()));
    }
    if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected = format!("[{tokens}, a divisor of {query_heads}, {head_dim}]");
        return Err(Error::shape(OP, "k", expected, inputs.k.shape()));
    }
    let (of_q, of_k) = ([tokens, query_heads, head_dim], [tokens, kv_heads, head_dim]);
    let all: [(&'static str, &T, &[usize], Dtype); 6] = [
        ("q", inputs.q, &of_q, dtype),
        ("k", inputs.k, &of_k, dtype),
        ("v", inputs.v, &of_k, dtype),
        ("out", inputs.out, &of_q, dtype),
        ("d_out", inputs.d_out, &of_q, dtype),
        ("lse", inputs.lse, &of_q[..2], Dtype::F32),
    ];
    for (what, tensor, shape, dtype) in all {
        if tensor.shape() != shape {
            return Err(Error::shape(OP, what, format_args!("{shape:?}"), tensor.shape()));
        }
        if tensor.dtype() != dtype {
            return Err(Error::argument(OP, what, dtype, tensor.dtype()));
        }
    }
    if inputs.block == 0 || !inputs.block.is_multiple_of(BLOCK) {
        let expected = format_args!("a multiple of {BLOCK}").to_string();
        return Err(Error::argument(OP, "block", expected, inputs.block));
    }
    if inputs.gradients {
        let operation = "gradients of influence";
        return Err(moa_core::Error::Unsupported { backend: "cuda", operation }.into());
    }
    Ok([tokens, query_heads, kv_heads, head_dim])
}

#[cfg(test)]
mod tests {
    use super::coarsen;

    #[test]
    fn coarse_blocks_are_sums_of_fine_ones() {
        let fine: Vec<f32> = (0..2 * 9).map(|x| x as f32).collect();
        assert_eq!(coarsen(&fine, 3, 1), (0..18).map(f64::from).collect::<Vec<_>>());
        // [0 1 2; 3 4 5; 6 7 8] in blocks of 2.
        assert_eq!(coarsen(&fine, 3, 2)[..4], [8.0, 7.0, 13.0, 8.0]);
        assert_eq!(coarsen(&fine, 3, 4), [36.0, 36.0 + 81.0]);
    }
}
