//! One layer's work, and the one loop over layers.

use moa_core::{Append, ExtendInputs, Extended, SparseAttentionBackend};

use crate::decoder::layer::Layer;
use crate::decoder::model::Decoder;
use crate::decoder::rotations::Rotations;
use crate::device::{Device, Math};
use crate::{Error, Result};

/// Keys and values of one sequence in one layer.
pub(crate) type Cache<D> = <<D as Device>::Attention as SparseAttentionBackend>::Cache;

impl<D: Math> Decoder<D> {
    /// Runs all layers on `x`. `attend` gets the number of a layer with its queries, keys and values, not
    /// yet rotated, and gives its attention.
    pub(crate) fn blocks(
        &self,
        mut x: D::Tensor,
        mut attend: impl FnMut(usize, [D::Tensor; 3]) -> Result<D::Tensor>,
    ) -> Result<D::Tensor> {
        let mut normed = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let out = attend(index, self.qkv_of(layer, &x, normed)?)?;
            (x, normed) = self.after_attention_normed(layer, x, out, Some(&layer.mlp_norm))?;
            let next = self.layers.get(index + 1).map(|next| &next.attention_norm);
            (x, normed) = self.mlp_normed(layer, x, normed, next)?;
        }
        Ok(x)
    }

    /// Runs one layer on `x`; see [`blocks`](Self::blocks).
    pub(crate) fn block(
        &self,
        layer: &Layer<D>,
        x: D::Tensor,
        attend: impl FnOnce([D::Tensor; 3]) -> Result<D::Tensor>,
    ) -> Result<D::Tensor> {
        let out = attend(self.qkv(layer, &x)?)?;
        self.finish_block(layer, x, out)
    }

    /// What a layer makes of its input `x` and its attention `out`.
    pub(crate) fn finish_block(
        &self,
        layer: &Layer<D>,
        x: D::Tensor,
        out: D::Tensor,
    ) -> Result<D::Tensor> {
        self.mlp(layer, self.after_attention(layer, x, out)?)
    }

    /// Queries, keys and values before rotation, `[tokens, heads, head_dim]`.
    pub(crate) fn qkv(&self, layer: &Layer<D>, x: &D::Tensor) -> Result<[D::Tensor; 3]> {
        self.qkv_of(layer, x, None)
    }

    /// [`qkv`](Self::qkv) of a stream whose norm may be there already.
    fn qkv_of(
        &self,
        layer: &Layer<D>,
        x: &D::Tensor,
        normed: Option<D::Tensor>,
    ) -> Result<[D::Tensor; 3]> {
        let [q, k, v] = self.projections_of(layer, x, normed)?;
        let [q, k] = self.normed_heads(layer, q, k)?;
        Ok([q, k, v])
    }

    /// Queries, keys and values as the linear layers give them, `[tokens, heads, head_dim]`.
    pub(crate) fn projections(&self, layer: &Layer<D>, x: &D::Tensor) -> Result<[D::Tensor; 3]> {
        self.projections_of(layer, x, None)
    }

    fn projections_of(
        &self,
        layer: &Layer<D>,
        x: &D::Tensor,
        normed: Option<D::Tensor>,
    ) -> Result<[D::Tensor; 3]> {
        let (device, dim) = (&self.device, self.config.head_dim);
        let tokens = device.shape(x)[0];
        let qkv = match normed {
            Some(h) => device.linears(&h, &layer.qkv)?,
            None => device.normed_linears(x, &layer.attention_norm, self.eps(), &layer.qkv)?,
        };
        let [q, k, v] = parts(qkv)?;
        let heads = |y, heads| device.reshape(y, &[tokens, heads, dim]);
        let (query, kv) = (self.local.query_heads, self.local.kv_heads);
        Ok([heads(q, query)?, heads(k, kv)?, heads(v, kv)?])
    }

    /// Queries and keys with each head normed, where the model does that.
    pub(crate) fn normed_heads(
        &self,
        layer: &Layer<D>,
        q: D::Tensor,
        k: D::Tensor,
    ) -> Result<[D::Tensor; 2]> {
        let norm = |x: D::Tensor, weight: &D::Vector| {
            let shape = self.device.shape(&x);
            let heads = self.device.reshape(x, &[shape[0] * shape[1], shape[2]])?;
            self.device.reshape(self.device.rms_norm(&heads, weight, self.head_eps())?, &shape)
        };
        match &layer.head_norms {
            None => Ok([q, k]),
            Some([query, key]) => Ok([norm(q, query)?, norm(k, key)?]),
        }
    }

    /// Rotates queries and keys, appends keys ([less their mean and with feedback](crate::decoder::narrow_keys) where the
    /// cache has keys of 4 bits) and values to each cache of `batch`, and attends as `layer` does; with `lse` also the
    /// log-sum-exp of each row of scores.
    pub(crate) fn extend(
        &self,
        layer: &Layer<D>,
        attention: &D::Attention,
        batch: &mut [Append<'_, Cache<D>>],
        [q, k, v]: [D::Tensor; 3],
        rotations: &Rotations<D>,
        lse: bool,
    ) -> Result<Extended<D::Tensor>> {
        let [q, k] = self.rotated(layer, q, k, rotations)?;
        // Log-sum-exps are those of the keys as they are.
        let keys = match lse {
            true => None,
            false => self.narrow_keys(layer.index, batch.iter().map(|append| &*append.cache))?,
        };
        let (k, key_feedback) = match keys {
            None => (k, None),
            Some((keys, places)) => {
                let own = batch.iter().zip(places);
                let rows =
                    own.flat_map(|(append, place)| std::iter::repeat_n(place, append.tokens));
                let rows: Vec<usize> = rows.collect();
                (self.device.add_rows(k, &keys.shifts, &rows)?, Some(&keys.feedback))
            }
        };
        let inputs =
            ExtendInputs { lse, key_feedback, ..ExtendInputs::new(&q, &k, &v, self.scale()) };
        attention.extend(batch, &inputs).map_err(Into::into)
    }

    /// [`extend`](Self::extend) where each KV head has a cache of its own; `counts` are the new tokens of the
    /// sequences, whose heads' caches follow one another in `batch`.
    pub(crate) fn extend_heads(
        &self,
        layer: &Layer<D>,
        batch: &mut [Append<'_, Cache<D>>],
        counts: &[usize],
        [q, k, v]: [D::Tensor; 3],
        rotations: &Rotations<D>,
    ) -> Result<D::Tensor> {
        let [q, k] = self.rotated(layer, q, k, rotations)?;
        let (device, dim) = (&self.device, self.config.head_dim);
        let (heads, query) = (self.local.kv_heads, self.local.query_heads);
        let (tokens, group) = (counts.iter().sum::<usize>(), query / heads);
        // Rows of a head of a sequence, one after the other; one token a sequence has them so already.
        let starts = counts.iter().scan(0, |end, n| {
            *end += n;
            Some(*end - n..*end)
        });
        let order: Vec<usize> = starts
            .flat_map(|own| (0..heads).map(move |head| (own.clone(), head)))
            .flat_map(|(own, head)| own.map(move |token| token * heads + head))
            .collect();
        let ordered = order.is_sorted();
        let apart = |x: D::Tensor, of: usize| {
            let rows = device.reshape(x, &[tokens * heads, of * dim])?;
            let rows = if ordered { rows } else { device.rows(&rows, &order)? };
            device.reshape(rows, &[tokens * heads, of, dim])
        };
        let (q, k, v) = (apart(q, group)?, apart(k, 1)?, apart(v, 1)?);
        let inputs = ExtendInputs::new(&q, &k, &v, self.scale());
        let out = device.attention().extend(batch, &inputs).map_err(Into::into)?.out;
        let rows = device.reshape(out, &[tokens * heads, group * dim])?;
        let mut back = vec![0; order.len()];
        order.iter().enumerate().for_each(|(at, row)| back[*row] = at);
        let rows = if ordered { rows } else { device.rows(&rows, &back)? };
        device.reshape(rows, &[tokens, query, dim])
    }

    /// Queries and keys turned by their positions, where the layer does that.
    pub(crate) fn rotated(
        &self,
        layer: &Layer<D>,
        q: D::Tensor,
        k: D::Tensor,
        rotations: &Rotations<D>,
    ) -> Result<[D::Tensor; 2]> {
        if !layer.kind.rotary {
            return Ok([q, k]);
        }
        let rope = |x, angles| self.device.rope(x, self.config.head_dim, angles, false);
        Ok([rope(q, rotations.queries())?, rope(k, &rotations.keys)?])
    }

    /// `x + o_proj(out)`.
    pub(crate) fn after_attention(
        &self,
        layer: &Layer<D>,
        x: D::Tensor,
        out: D::Tensor,
    ) -> Result<D::Tensor> {
        Ok(self.after_attention_normed(layer, x, out, None)?.0)
    }

    /// [`after_attention`](Self::after_attention), and the norm of it where that comes with a sum over ranks.
    fn after_attention_normed(
        &self,
        layer: &Layer<D>,
        x: D::Tensor,
        out: D::Tensor,
        norm: Option<&D::Vector>,
    ) -> Result<(D::Tensor, Option<D::Tensor>)> {
        let rows = self.device.shape(&out)[0];
        let width = self.local.query_heads * self.config.head_dim;
        let flat = self.device.reshape(out, &[rows, width])?;
        self.add_branch(x, &flat, &layer.o, norm)
    }

    /// `x + mlp(norm(x))`.
    pub(crate) fn mlp(&self, layer: &Layer<D>, x: D::Tensor) -> Result<D::Tensor> {
        Ok(self.mlp_normed(layer, x, None, None)?.0)
    }

    /// [`mlp`](Self::mlp) of a stream whose norm may be there already, and the norm that is read `next` where that comes
    /// with a sum over ranks.
    fn mlp_normed(
        &self,
        layer: &Layer<D>,
        x: D::Tensor,
        normed: Option<D::Tensor>,
        next: Option<&D::Vector>,
    ) -> Result<(D::Tensor, Option<D::Tensor>)> {
        let device = &self.device;
        let act = match normed {
            Some(h) => {
                let [gate, up] = parts(device.linears(&h, &layer.gate_up)?)?;
                device.swiglu(gate, &up)?
            }
            None => device.normed_swiglu(&x, &layer.mlp_norm, self.eps(), &layer.gate_up)?,
        };
        self.add_branch(x, &act, &layer.down, next)
    }

    /// The residual stream of new tokens, divided by `residual_multiplier`, so that branches add to it as they
    /// are. A norm does not see the divisor once its `eps` is divided by the square.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<D::Tensor> {
        self.device.embed(&self.embedding, tokens, self.embedding_factor())
    }

    pub(crate) fn embedding_factor(&self) -> f32 {
        (self.config.embedding_multiplier / self.config.residual_multiplier) as f32
    }

    /// Of norms of the residual stream.
    pub(crate) fn eps(&self) -> f32 {
        (self.config.rms_norm_eps / self.config.residual_multiplier.powi(2)) as f32
    }

    /// Of norms of heads.
    pub(crate) fn head_eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// Factor of attention scores.
    pub(crate) fn scale(&self) -> f32 {
        match self.config.attention_multiplier {
            Some(scale) => scale as f32,
            None => (self.config.head_dim as f32).sqrt().recip(),
        }
    }
}

/// What joined layers gave.
pub(crate) fn parts<T, const N: usize>(tensors: Vec<T>) -> Result<[T; N]> {
    let got = tensors.len();
    tensors.try_into().map_err(|_| Error::invalid("joined layers", N.to_string(), got))
}
