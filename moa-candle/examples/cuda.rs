//! moa's attention on candle's CUDA tensors, checked against candle's own with the same mask: views of larger
//! tensors in, nothing copied, all on candle's stream.
//!
//! ```sh
//! CUDA_COMPUTE_CAP=90 cargo run --release -p moa-candle --features cuda --example cuda
//! ```
//!
//! Needs a GPU, and the CUDA toolkit to build candle's kernels (`nvcc` on `PATH`).

use candle_core::{D, DType, Device, Tensor};
use moa_candle::SparseAttention;
use moa_core::{ModelShape, Plan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (batch, tokens) = (2, 1024);
    let shape = ModelShape { layers: 1, query_heads: 32, kv_heads: 8, head_dim: 128 };
    let plan = Plan::retrieval_heads(shape, 4, 252, &[(0, 1), (0, 6)])?;
    let device = Device::new_cuda_with_stream(0)?;
    let random = |heads| {
        Tensor::randn(0f32, 1., (batch, tokens, heads, 128), &device)?
            .to_dtype(DType::BF16)?
            .transpose(1, 2)
    };
    let (q, k, v) = (random(32)?, random(8)?, random(8)?);
    let scale = 1. / 128f32.sqrt();

    let attention = SparseAttention::new(&device, DType::BF16)?;
    let mut sequences = [attention.open(&plan, tokens)?, attention.open(&plan, tokens)?];
    // Prompts in two chunks, then token by token.
    let (mut outputs, mut at) = (Vec::new(), 0);
    for chunk in [700, 300].into_iter().chain([1; 24]) {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, at, chunk));
        let mut caches: Vec<_> = sequences.iter_mut().map(|layers| &mut layers[0]).collect();
        outputs.push(attention.forward(&mut caches, &q?, &k?, &v?, scale)?);
        at += chunk;
    }
    let out = Tensor::cat(&outputs, 2)?.to_dtype(DType::F32)?;

    let mask = plan.additive_mask(0, tokens, 0..tokens)?;
    let mask = Tensor::from_vec(mask, (1, 8, 1, tokens, tokens), &device)?;
    let wide = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
    let repeat = |x: &Tensor| {
        let groups = wide(x)?.unsqueeze(2)?.broadcast_as((batch, 8, 4, tokens, 128))?;
        groups.contiguous()?.reshape((batch, 32, tokens, 128))
    };
    let scores = (wide(&q)?.matmul(&repeat(&k)?.t()?.contiguous()?)? * f64::from(scale))?;
    let scores = scores.reshape((batch, 8, 4, tokens, tokens))?.broadcast_add(&mask)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
    let expected = weights.reshape((batch, 32, tokens, tokens))?.matmul(&repeat(&v)?)?;
    let difference = (out - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("largest difference from candle's attention: {difference:.5}");
    // bf16 keeps 8 bits.
    if difference.is_nan() || difference > 1e-2 {
        return Err(format!("expected at most 1e-2, got {difference}").into());
    }
    Ok(())
}
