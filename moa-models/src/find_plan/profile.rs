//! Profiling: the influence of every attention value on an objective, layer by layer.
//!
//! The forward pass keeps each layer's input, attention output and log-sum-exp; the backward pass
//! then recomputes one layer at a time. Memory is one layer's activations plus two hidden states
//! per layer; nothing of size `tokens x tokens` is stored.

use std::ops::Range;

use moa_core::{
    Append, DEFAULT_SINK, ElasticRule, Extended, Gradients, Influence, InfluenceInputs,
    LayerLayout, Plan, SparseAttentionBackend,
};

use crate::decoder::block::parts;
use crate::decoder::layer::Layer;
use crate::decoder::model::Decoder;
use crate::decoder::rotations::Rotations;
use crate::device::Backward;
use crate::find_plan::objective::{Objective, WeightedObjective, cross_entropy};
use crate::{Error, Result};

/// One calibration text: a prompt and the response that the objective looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Token ids of prompt and response.
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt_len: usize,
    /// Tokens at the end of the response that hold the answer; all of it where that is not known.
    answer_len: usize,
}

impl Item {
    /// An item from its prompt and response.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the prompt or the response is empty.
    pub fn new(prompt: &[u32], response: &[u32]) -> Result<Self> {
        if prompt.is_empty() || response.is_empty() {
            return Err(Error::invalid(
                "calibration item",
                "a prompt and a response of at least one token each",
                format!("{} and {} tokens", prompt.len(), response.len()),
            ));
        }
        let (prompt_len, answer_len) = (prompt.len(), response.len());
        Ok(Self { tokens: [prompt, response].concat(), prompt_len, answer_len })
    }

    /// The same item, whose answer is the last `tokens` tokens of the response. They count as much as all of it
    /// once more: what is said around an answer depends on nothing far away, and longer sentences would
    /// otherwise outweigh their answers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the response does not have so many tokens, or the answer none.
    pub fn with_answer(self, tokens: usize) -> Result<Self> {
        let most = self.response().len();
        if !(1..=most).contains(&tokens) {
            return Err(Error::invalid("answer", format!("1 to {most} tokens"), tokens));
        }
        Ok(Self { answer_len: tokens, ..self })
    }

    /// How much each token of the response counts; the sum is 1.
    pub(crate) fn weights(&self) -> Vec<f64> {
        let (response, answer) = (self.response().len(), self.answer_len);
        let share = |tokens: usize| 0.5 / tokens as f64;
        let of =
            |at: usize| share(response) + if at + answer >= response { share(answer) } else { 0.0 };
        (0..response).map(of).collect()
    }

    /// Prompt and response.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    /// The response.
    pub fn response(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// The end of the response that holds the answer, or all of it ([`Item::with_answer`]).
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.answer_len..]
    }

    /// Tokens the model reads to predict the whole response: all but the last.
    pub(crate) fn inputs(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }

    /// Rows of [`Item::inputs`] that predict the response.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.prompt_len - 1..self.tokens.len() - 1
    }
}

/// What the backward pass needs of one layer.
struct Saved<T> {
    x: T,
    out: T,
    lse: T,
}

impl<D: Backward> Decoder<D> {
    /// Adds one item's influence to `into` and returns the item's loss under dense attention.
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if `into` is for a
    /// model of other dimensions, or with [`Invalid`](moa_core::Error::Invalid) naming layer, head and position of
    /// an influence that is no number; [`Error::Invalid`] if the item is longer than `into` or has a token that is
    /// not in the vocabulary, the model's weights have 8 bits, or its ranks are in several processes;
    /// [`Error::ContextExceeded`] if the item is longer than the model's context; [`Error::OutOfMemory`] or
    /// [`Error::Backend`] if the device fails, [`Error::Rank`] if another rank does.
    pub fn profile(
        &self,
        item: &Item,
        objective: impl Into<WeightedObjective>,
        into: &mut Influence,
    ) -> Result<f64> {
        Ok(self.sweep(item, objective.into(), into)?.0)
    }

    /// [`Decoder::profile`], and the cross entropy that the response grows by when every head sees only
    /// the sink and a window of a quarter of the context.
    pub(crate) fn profile_with_far_loss(
        &self,
        item: &Item,
        objective: WeightedObjective,
        into: &mut Influence,
    ) -> Result<()> {
        self.device.check_gradients()?;
        let near = ElasticRule::new(DEFAULT_SINK as f64, 0.25)?;
        let near = Plan::uniform(self.shape(), DEFAULT_SINK, near)?;
        let near = self.response_loss(std::slice::from_ref(item), &near, item.inputs().len())?;
        let (_, dense) = self.sweep(item, objective, into)?;
        into.add_far_loss(near - dense);
        Ok(())
    }

    /// Adds one item's influence to `into`; returns the item's loss and cross entropy.
    fn sweep(
        &self,
        item: &Item,
        objective: WeightedObjective,
        into: &mut Influence,
    ) -> Result<(f64, f64)> {
        self.device.check_gradients()?;
        let tokens = item.inputs();
        self.check_tokens(item.tokens())?;
        if into.shape() != self.shape() {
            let (expected, got) = (self.shape(), into.shape());
            return Err(moa_core::Error::ShapeMismatch { what: "influence", expected, got }.into());
        }
        if tokens.len() > into.length() {
            return Err(Error::invalid(
                "calibration item",
                format!("at most {} tokens", into.length()),
                tokens.len(),
            ));
        }
        let rope = self.rope(tokens.len())?;
        let rotations = self.rotations(&[(&rope, 0..tokens.len())])?;
        let saved = self.forward_saving(tokens, &rotations)?;

        let rows = item.rows();
        let (losses, mut d_x) = self.top_gradient(&saved, item, objective)?;
        if !(losses.0.is_finite() && losses.1.is_finite()) {
            let what = "loss of a calibration item under dense attention".to_string();
            return Err(Error::NotFinite { what, got: losses.0.max(losses.1).to_string() });
        }
        let mut active = rows;
        for (index, (layer, saved)) in self.layers.iter().zip(saved).enumerate().rev() {
            let d_y = self.mlp_backward(layer, &saved, &active, d_x)?;
            let (blocks, below) = self.attention_backward(
                layer,
                &saved,
                &active,
                d_y,
                &rotations,
                (objective.objective, into.block(), index > 0),
            )?;
            let side = tokens.len().div_ceil(into.block());
            let blocks = self.all_heads(index, blocks, side * side)?;
            into.add_layer(index, side, &blocks, 1.0)?;
            active = 0..tokens.len();
            match below {
                Some(gradient) => d_x = gradient,
                None => break,
            }
        }
        into.count_sample();
        Ok(losses)
    }

    fn forward_saving(
        &self,
        tokens: &[u32],
        rotations: &Rotations<D>,
    ) -> Result<Vec<Saved<D::Tensor>>> {
        let n = tokens.len();
        let dense = Plan::full(self.shape())?;
        let dense = self.own_plan(&dense)?;
        let mut x = self.embed(tokens)?;
        let mut saved = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let input = x.clone();
            let layout = LayerLayout::new(&dense.layer_spans(index, n), n, 0)?;
            let attend = |qkv| {
                let attention = self.device.exact_attention();
                let mut cache =
                    attention.open(&layout, self.config.head_dim).map_err(Into::into)?;
                let batch = &mut [Append { cache: &mut cache, tokens: n }];
                let Extended { out, lse } =
                    self.extend(layer, attention, batch, qkv, rotations, true)?;
                let lse = lse.ok_or(Error::invalid("backend", "a log-sum-exp output", "none"))?;
                saved.push(Saved { x: input, out: out.clone(), lse });
                Ok(out)
            };
            // What follows attention in the top layer is left to `top_gradient`.
            match index + 1 == self.layers.len() {
                true => drop(attend(self.qkv(layer, &x)?)?),
                false => x = self.block(layer, x, attend)?,
            }
        }
        Ok(saved)
    }

    /// Loss and cross entropy, and the loss's gradient by the top layer's output at the rows that
    /// predict the response.
    fn top_gradient(
        &self,
        saved: &[Saved<D::Tensor>],
        item: &Item,
        WeightedObjective { objective, weight }: WeightedObjective,
    ) -> Result<((f64, f64), D::Tensor)> {
        let (device, eps) = (&self.device, self.eps());
        let (Some(layer), Some(top)) = (self.layers.last(), saved.last()) else {
            return Err(Error::invalid("layers", "at least 1", 0));
        };
        let y = self.residual(layer, top, &item.rows())?;
        let z = self.mlp(layer, y)?;
        let h = device.rms_norm(&z, &self.norm, eps)?;
        let mut values = self.values(self.output(&h)?)?;
        let response = item.response();
        let vocab = self.config.vocab_size;
        let rows = values.chunks(vocab).zip(response);
        let certain: Vec<f64> = rows.map(|(row, y)| cross_entropy(row, *y as usize)).collect();
        let own = item.weights();
        let weights = weight.weights(&certain, &own);
        let entropy = certain.iter().zip(own).map(|(loss, weight)| loss * weight).sum::<f64>();
        let mut loss = 0.0;
        for ((row, &target), weight) in values.chunks_mut(vocab).zip(response).zip(weights) {
            loss += objective.gradient(row, target as usize) * weight;
            row.iter_mut().for_each(|g| *g *= weight as f32);
        }
        // Of the vocabulary that is here.
        let columns = self.shard.as_ref().map_or(0..vocab, |shard| shard.vocabulary(&self.config));
        let shape = [response.len(), columns.len()];
        if columns.len() < vocab {
            let own = values.chunks(vocab).flat_map(|row| &row[columns.clone()]);
            values = own.copied().collect();
        }
        let d_logits = device.tensor(values, &shape)?;
        let d_h = self.summed(device.linear_backward(&d_logits, self.output_matrix())?)?;
        Ok(((loss, entropy), device.rms_norm_backward(&z, &self.norm, eps, &d_h)?))
    }

    /// The stream between attention and MLP, at `rows`.
    fn residual(
        &self,
        layer: &Layer<D>,
        saved: &Saved<D::Tensor>,
        rows: &Range<usize>,
    ) -> Result<D::Tensor> {
        let total = self.device.shape(&saved.x)[0];
        if rows.len() == total {
            return self.after_attention(layer, saved.x.clone(), saved.out.clone());
        }
        let rows: Vec<usize> = rows.clone().collect();
        let x = self.device.rows(&saved.x, &rows)?;
        self.after_attention(layer, x, self.device.rows(&saved.out, &rows)?)
    }

    /// Gradient by the stream before the MLP, from the gradient after it, both at `rows`.
    fn mlp_backward(
        &self,
        layer: &Layer<D>,
        saved: &Saved<D::Tensor>,
        rows: &Range<usize>,
        d_z: D::Tensor,
    ) -> Result<D::Tensor> {
        let device = &self.device;
        let y = self.residual(layer, saved, rows)?;
        let h = device.rms_norm(&y, &layer.mlp_norm, self.eps())?;
        let [gate, up] = parts(device.linears(&h, &layer.gate_up)?)?;
        let d_act = device.linear_backward(&d_z, &layer.down.weight)?;
        let (d_gate, d_up) = device.swiglu_backward(&gate, &up, &d_act)?;
        let d_h = self.summed(device.linears_backward(&[d_gate, d_up], &layer.gate_up)?)?;
        device.add(d_z, &device.rms_norm_backward(&y, &layer.mlp_norm, self.eps(), &d_h)?)
    }

    /// Block sums of one layer and, unless it is the lowest, the gradient by its input.
    fn attention_backward(
        &self,
        layer: &Layer<D>,
        saved: &Saved<D::Tensor>,
        rows: &Range<usize>,
        d_y: D::Tensor,
        rotations: &Rotations<D>,
        (objective, block, gradients): (Objective, usize, bool),
    ) -> Result<(Vec<f64>, Option<D::Tensor>)> {
        let (device, c) = (&self.device, &self.config);
        let heads = self.local.query_heads;
        let total = device.shape(&saved.x)[0];
        let [raw_q, raw_k, v] = self.projections(layer, &saved.x)?;
        let [q, k] = self.normed_heads(layer, raw_q.clone(), raw_k.clone())?;
        let [q, k] = self.rotated(layer, q, k, rotations)?;
        let d_out = device.linear_backward(&d_y, &layer.o.weight)?;
        let d_out = self.place(d_out, rows, total)?;
        let d_out = device.reshape(d_out, &[total, heads, c.head_dim])?;
        let inputs = InfluenceInputs {
            q: &q,
            k: &k,
            v: &v,
            out: &saved.out,
            lse: &saved.lse,
            d_out: &d_out,
            window: layer.kind.sliding_window.unwrap_or(usize::MAX),
            block,
            sign: objective.sign(),
            gradients,
        };
        let output =
            device.exact_attention().influence(&inputs, self.scale()).map_err(Into::into)?;
        let Some(Gradients { d_q, d_k, d_v }) = output.gradients else {
            return Ok((output.blocks, None));
        };
        let unrotate = |g, angles| match layer.kind.rotary {
            true => device.rope(g, c.head_dim, angles, true),
            false => Ok(g),
        };
        let mut d_q = unrotate(d_q, rotations.queries())?;
        let mut d_k = unrotate(d_k, &rotations.keys)?;
        if let Some([query, key]) = &layer.head_norms {
            d_q = self.head_norm_backward(raw_q, query, d_q)?;
            d_k = self.head_norm_backward(raw_k, key, d_k)?;
        }
        let d_qkv = [self.flatten(d_q)?, self.flatten(d_k)?, self.flatten(d_v)?];
        let d_h = self.summed(device.linears_backward(&d_qkv, &layer.qkv)?)?;
        let through =
            device.rms_norm_backward(&saved.x, &layer.attention_norm, self.eps(), &d_h)?;
        let d_x = device.add(through, &self.place(d_y, rows, total)?)?;
        Ok((output.blocks, Some(d_x)))
    }

    /// Gradient by heads before their norm, `[tokens, heads, head_dim]`.
    fn head_norm_backward(
        &self,
        x: D::Tensor,
        weight: &D::Vector,
        d_y: D::Tensor,
    ) -> Result<D::Tensor> {
        let device = &self.device;
        let shape = device.shape(&x);
        let heads = |x| device.reshape(x, &[shape[0] * shape[1], shape[2]]);
        let d_x = device.rms_norm_backward(&heads(x)?, weight, self.head_eps(), &heads(d_y)?)?;
        device.reshape(d_x, &shape)
    }

    fn place(&self, x: D::Tensor, rows: &Range<usize>, total: usize) -> Result<D::Tensor> {
        if rows.len() == total { Ok(x) } else { self.device.place_rows(&x, rows.clone(), total) }
    }

    fn flatten(&self, x: D::Tensor) -> Result<D::Tensor> {
        let shape = self.device.shape(&x);
        self.device.reshape(x, &[shape[0], shape[1..].iter().product()])
    }
}
