//! A Llama block of burn's parts. What attends is given: burn's own attention, or moa's.

use burn::module::Module;
use burn::nn::{
    Linear, LinearConfig, RmsNorm, RmsNormConfig, RotaryEncoding, RotaryEncodingConfig, SwiGlu,
    SwiGluConfig,
};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Tensor};
use moa_core::ModelShape;

#[derive(Module, Debug)]
pub(crate) struct Block {
    norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    rope: RotaryEncoding,
    mlp_norm: RmsNorm,
    up: SwiGlu,
    down: Linear,
    heads: [usize; 2],
    head_dim: usize,
}

impl Block {
    /// With random weights.
    pub(crate) fn new(shape: ModelShape, positions: usize, device: &Device) -> Self {
        let ModelShape { query_heads, kv_heads, head_dim, .. } = shape;
        let hidden = query_heads * head_dim;
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        Self {
            norm: RmsNormConfig::new(hidden).init(device),
            q: linear(hidden, hidden),
            k: linear(hidden, kv_heads * head_dim),
            v: linear(hidden, kv_heads * head_dim),
            o: linear(hidden, hidden),
            rope: RotaryEncodingConfig::new(positions, head_dim).init(device),
            mlp_norm: RmsNormConfig::new(hidden).init(device),
            up: SwiGluConfig::new(hidden, 2 * hidden).init(device),
            down: linear(2 * hidden, hidden),
            heads: [query_heads, kv_heads],
            head_dim,
        }
    }

    /// `x` `[batch, tokens, hidden]` from position `start` on. `attend` gets queries, keys and values
    /// `[batch, heads, tokens, head_dim]`: this is where a plan comes in.
    pub(crate) fn forward<E>(
        &self,
        x: Tensor<3>,
        start: usize,
        attend: impl FnOnce([Tensor<4>; 3]) -> Result<Tensor<4>, E>,
    ) -> Result<Tensor<3>, E> {
        let [batch, tokens, hidden] = x.dims();
        let [query_heads, kv_heads] = self.heads;
        let split =
            |x: Tensor<3>, heads| x.reshape([batch, tokens, heads, self.head_dim]).swap_dims(1, 2);
        let y = self.norm.forward(x.clone());
        let q = self.rope.apply(split(self.q.forward(y.clone()), query_heads), start);
        let k = self.rope.apply(split(self.k.forward(y.clone()), kv_heads), start);
        let v = split(self.v.forward(y), kv_heads);
        let y = attend([q, k, v])?.swap_dims(1, 2).reshape([batch, tokens, hidden]);
        let x = x + self.o.forward(y);
        let y = self.up.forward(self.mlp_norm.forward(x.clone()));
        Ok(x + self.down.forward(y))
    }
}

/// burn's own causal attention of a whole prompt, which knows no grouped queries: KV heads are repeated.
pub(crate) fn dense([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    let group = q.dims()[1] / k.dims()[1];
    let repeat = |x: Tensor<4>| {
        let [batch, heads, tokens, dim] = x.dims();
        let x = x.reshape([batch, heads, 1, tokens, dim]).repeat_dim(2, group);
        x.reshape([batch, heads * group, tokens, dim])
    };
    let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
    attention(q, repeat(k), repeat(v), None, None, options)
}
