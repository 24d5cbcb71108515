//! A Llama of candle's parts, with moa's attention in place of candle's.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::rope_thd;
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, linear_no_bias, rms_norm};
use candle_transformers::models::llama::Config;
use moa_candle::{LayerCache, SparseAttention};
use moa_core::{ModelShape, Plan};

pub(crate) struct Llama {
    embed: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    /// Cosines and sines, `[positions, head_dim / 2]`.
    rope: (Tensor, Tensor),
    attention: SparseAttention,
    pub(crate) shape: ModelShape,
}

struct Block {
    norms: [RmsNorm; 2],
    qkvo: [Linear; 4],
    gate_up_down: [Linear; 3],
    shape: ModelShape,
}

impl Block {
    fn load(vb: &VarBuilder, config: &Config, shape: ModelShape) -> Result<Self> {
        let (hidden, inner, eps) =
            (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let (q, kv) = (shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let linear = |from, to, name: &str| linear_no_bias(from, to, vb.pp(name));
        Ok(Self {
            norms: [
                rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
                rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            ],
            qkvo: [
                linear(hidden, q, "self_attn.q_proj")?,
                linear(hidden, kv, "self_attn.k_proj")?,
                linear(hidden, kv, "self_attn.v_proj")?,
                linear(q, hidden, "self_attn.o_proj")?,
            ],
            gate_up_down: [
                linear(hidden, inner, "mlp.gate_proj")?,
                linear(hidden, inner, "mlp.up_proj")?,
                linear(inner, hidden, "mlp.down_proj")?,
            ],
            shape,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        attention: &SparseAttention,
        caches: &mut [&mut LayerCache],
    ) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let ModelShape { query_heads, kv_heads, head_dim, .. } = self.shape;
        let y = self.norms[0].forward(x)?;
        let project =
            |i: usize, heads| self.qkvo[i].forward(&y)?.reshape((batch, tokens, heads, head_dim));
        let q = rope_thd(&project(0, query_heads)?, cos, sin)?.transpose(1, 2)?;
        let k = rope_thd(&project(1, kv_heads)?, cos, sin)?.transpose(1, 2)?;
        let v = project(2, kv_heads)?.transpose(1, 2)?;
        // Here candle's own block grows its cache, repeats KV heads, masks, and multiplies twice.
        let y = attention.forward(caches, &q, &k, &v, 1. / (head_dim as f32).sqrt())?;
        let x = (x + self.qkvo[3].forward(&y.transpose(1, 2)?.flatten_from(2)?)?)?;
        let y = self.norms[1].forward(&x)?;
        let [gate, up, down] = &self.gate_up_down;
        let y = (candle_nn::ops::silu(&gate.forward(&y)?)? * up.forward(&y)?)?;
        x + down.forward(&y)?
    }
}

impl Llama {
    pub(crate) fn load(vb: VarBuilder, config: &Config, positions: usize) -> Result<Self> {
        let shape = ModelShape {
            layers: config.num_hidden_layers,
            query_heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.hidden_size / config.num_attention_heads,
        };
        let device = vb.device();
        let embed = candle_nn::embedding(
            config.vocab_size,
            config.hidden_size,
            vb.pp("model.embed_tokens"),
        )?;
        let block = |i| Block::load(&vb.pp(format!("model.layers.{i}")), config, shape);
        let head = match config.tie_word_embeddings {
            true => Linear::new(embed.embeddings().clone(), None),
            false => linear_no_bias(config.hidden_size, config.vocab_size, vb.pp("lm_head"))?,
        };
        Ok(Self {
            blocks: (0..shape.layers).map(block).collect::<Result<_>>()?,
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("model.norm"))?,
            head,
            embed,
            rope: rope(config.rope_theta, shape.head_dim, positions, vb.dtype(), device)?,
            attention: SparseAttention::new(device, vb.dtype())?,
            shape,
        })
    }

    pub(crate) fn open(&self, plan: &Plan, context_length: usize) -> Result<Vec<LayerCache>> {
        self.attention.open(plan, context_length)
    }

    /// Logits `[vocab]` after the last of `ids`, which follow what the caches hold.
    pub(crate) fn forward(&self, ids: &[u32], caches: &mut [LayerCache]) -> Result<Tensor> {
        let at = caches.first().map_or(0, |cache| cache.state().len());
        let ids = Tensor::new(ids, self.embed.embeddings().device())?.unsqueeze(0)?;
        let tokens = ids.dim(1)?;
        let (cos, sin) = (self.rope.0.narrow(0, at, tokens)?, self.rope.1.narrow(0, at, tokens)?);
        let mut x = self.embed.forward(&ids)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.forward(&x, (&cos, &sin), &self.attention, &mut [cache])?;
        }
        let last = self.norm.forward(&x.narrow(1, tokens - 1, 1)?.contiguous()?)?;
        self.head.forward(&last)?.flatten_all()?.to_dtype(DType::F32)
    }
}

fn rope(
    theta: f32,
    head_dim: usize,
    positions: usize,
    dtype: DType,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let rate = |i: usize| 1. / theta.powf(2. * i as f32 / head_dim as f32);
    let rates: Vec<f32> = (0..head_dim / 2).map(rate).collect();
    let rates = Tensor::new(rates, device)?.reshape((1, head_dim / 2))?;
    let positions = Tensor::arange(0u32, positions as u32, device)?.to_dtype(DType::F32)?;
    let angles = positions.unsqueeze(1)?.matmul(&rates)?;
    Ok((angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?))
}
