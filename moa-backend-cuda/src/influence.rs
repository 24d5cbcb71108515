//! Influence of every attention value on the objective, in blocks.

use moa_core::{InfluenceInputs, InfluenceOutput, InfluenceSign};

use crate::compile::Variant;
use crate::tables::InfluenceArgs;
use crate::{Device, Dtype, Error, Result, Tensor};

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
    let [tokens, query_heads, kv_heads, head_dim] = check(device, dtype, inputs)?;
    let side = tokens.div_ceil(BLOCK);
    // Entries above the diagonal stay 0.
    let sums = Tensor::zeros(device, &[kv_heads, side, side], Dtype::F32)?;
    let int = |n: usize| n as i32;
    let args = InfluenceArgs {
        q: inputs.q.packed(),
        k: inputs.k.packed(),
        v: inputs.v.packed(),
        out: inputs.out.packed(),
        d_out: inputs.d_out.packed(),
        lse: inputs.lse.pointer(),
        blocks: sums.pointer(),
        tokens: int(tokens),
        query_heads: int(query_heads),
        kv_heads: int(kv_heads),
        absolute: i32::from(inputs.sign == InfluenceSign::Absolute),
        scale,
        padding: 0,
    };
    let kernels = device.kernels(Variant { head_dim, dtype })?;
    // SAFETY: the shapes were checked; everything is on the device's own stream.
    unsafe { kernels.influence(device.stream(), &args) }?;
    let blocks = coarsen(&sums.to_f32()?, side, inputs.block / BLOCK);
    Ok(InfluenceOutput { blocks, gradients: None })
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
fn check(
    device: &Device,
    dtype: Dtype,
    inputs: &InfluenceInputs<'_, Tensor>,
) -> Result<[usize; 4]> {
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
    let all: [(&'static str, &Tensor, &[usize], Dtype); 6] = [
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
        if tensor.device().context() != device.context() {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
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
