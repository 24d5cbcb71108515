use std::sync::Arc;

use moa_core::{
    Append, CacheState, ExtendInputs, LayerLayout, ModelShape, Plan, SparseAttentionBackend,
};

use crate::checkpoint::safetensors::Weights;
use crate::decoder::block::{Layer, LayerPart};
use crate::decoder::config::LlamaConfig;
use crate::decoder::rope::RopeTable;
use crate::decoder::shard::Shard;
use crate::device::Ops;
use crate::{Error, Result};

/// A Llama-type decoder on one device, or one device's part of it.
pub struct Llama<O: Ops> {
    pub(crate) ops: O,
    pub(crate) config: LlamaConfig,
    pub(crate) embedding: O::Matrix,
    pub(crate) layers: Vec<Layer<O>>,
    pub(crate) norm: O::Vector,
    /// `None` when the embedding is tied and whole.
    pub(crate) lm_head: Option<O::Matrix>,
    pub(crate) fingerprint: String,
    /// What of the model this is, where several devices share it.
    pub(crate) shard: Option<Shard<O>>,
    /// Dimensions of what is here.
    pub(crate) local: ModelShape,
}

impl<O: Ops> std::fmt::Debug for Llama<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Llama").field("config", &self.config).finish_non_exhaustive()
    }
}

/// One sequence: its caches in every layer, as large as its plan allows and no larger.
pub struct Sequence<O: Ops> {
    pub(crate) caches: Vec<<O::Attention as SparseAttentionBackend>::Cache>,
    /// How far the sequence is filled; that of the first layer's cache between steps.
    pub(crate) state: CacheState,
    pub(crate) rope: RopeTable,
    /// A device failed half-way through a step: layers disagree on the length.
    pub(crate) broken: bool,
}

impl<O: Ops> std::fmt::Debug for Sequence<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sequence({} of {} tokens)", self.len(), self.capacity())
    }
}

impl<O: Ops> Sequence<O> {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.state.len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.state.is_empty()
    }

    /// Most tokens it may hold.
    pub fn capacity(&self) -> usize {
        self.state.capacity()
    }
}

/// Which rows of a step get logits.
#[derive(Clone, Copy, Debug)]
pub enum LogitRows<'a> {
    /// The last token of each sequence.
    Last,
    /// These rows of the packed batch.
    Rows(&'a [usize]),
    /// None: the step only fills caches; the result has no rows.
    None,
}

impl<O: Ops> Llama<O> {
    /// Loads the weights of a Hugging Face checkpoint.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration says.
    pub fn load(ops: O, config: LlamaConfig, weights: &Weights) -> Result<Self> {
        Self::load_part(ops, config, weights, None)
    }

    pub(crate) fn load_part(
        ops: O,
        config: LlamaConfig,
        weights: &Weights,
        shard: Option<Shard<O>>,
    ) -> Result<Self> {
        let local = Shard::local_shape(shard.as_ref(), &config)?;
        ops.check_room("weights", Shard::weights(shard.as_ref(), &config).bytes(&ops))?;
        let table = [config.vocab_size, config.hidden_size];
        let embedding = weights.tensor("model.embed_tokens.weight", &table)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let part = LayerPart::of(shard.as_ref(), &config, index);
                Layer::load(&ops, &config, weights, index, &part)
            })
            .collect::<Result<_>>()?;
        let norm = ops.vector(weights.tensor("model.norm.weight", &[config.hidden_size])?)?;
        let output = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weights.tensor("lm_head.weight", &table)?,
        };
        let lm_head = match &shard {
            None if config.tie_word_embeddings => None,
            None => Some(ops.matrix(output)?),
            Some(shard) => Some(ops.matrix(output.rows(&[shard.vocabulary(&config)])?)?),
        };
        let embedding = ops.matrix(embedding)?;
        let fingerprint = weights.fingerprint();
        Ok(Self { ops, config, embedding, layers, norm, lm_head, fingerprint, shard, local })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device.
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// Bytes of the weights on the device, 0 where they stay in their file's map.
    pub fn weight_bytes(&self) -> u64 {
        Shard::weights(self.shard.as_ref(), &self.config).bytes(&self.ops)
    }

    /// Fingerprint of the weights, as plan files hold it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The dimensions that plans depend on.
    pub fn shape(&self) -> ModelShape {
        self.config.shape()
    }

    /// Bytes of one slot of a cache, key and value together.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.ops.attention().slot_bytes(self.config.head_dim)
    }

    pub(crate) fn scale(&self) -> f32 {
        (self.config.head_dim as f32).sqrt().recip()
    }

    pub(crate) fn output_matrix(&self) -> &O::Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    pub(crate) fn rope(&self, capacity: usize) -> Result<RopeTable> {
        RopeTable::new(&self.config, capacity)
    }

    /// Opens an empty sequence of at most `capacity` tokens with the spans of `plan` at that
    /// length. `slack` more tokens per head can be rolled back (speculative decoding).
    ///
    /// # Errors
    /// If the plan is for another model or `capacity` is longer than the model's context.
    pub fn open(&self, plan: &Plan, capacity: usize, slack: usize) -> Result<Sequence<O>> {
        let plan = self.own_plan(plan)?;
        self.config.check_context(capacity)?;
        let layouts = (0..self.layers.len())
            .map(|layer| LayerLayout::new(&plan.layer_spans(layer, capacity), capacity, slack))
            .collect::<moa_core::Result<Vec<_>>>()?;
        let bytes = layouts.iter().map(|layout| layout.bytes(self.slot_bytes())).sum();
        self.ops.check_room("keys and values", bytes)?;
        let open = |layout| self.ops.attention().open(layout, self.config.head_dim);
        let caches = layouts.iter().map(open).collect::<Result<_, _>>().map_err(Error::backend)?;
        let rope = self.rope(capacity)?;
        let state = CacheState::new(Arc::new(layouts[0].clone()), self.config.head_dim);
        Ok(Sequence { caches, state, rope, broken: false })
    }

    /// An independent copy of a sequence, for a shared prefix.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn fork(&self, sequence: &Sequence<O>) -> Result<Sequence<O>> {
        let fork = |cache| self.ops.attention().fork(cache);
        Ok(Sequence {
            caches: sequence
                .caches
                .iter()
                .map(fork)
                .collect::<Result<_, _>>()
                .map_err(Error::backend)?,
            state: sequence.state.clone(),
            rope: sequence.rope.clone(),
            broken: sequence.broken,
        })
    }

    /// Forgets all tokens after the first `len`.
    ///
    /// # Errors
    /// [`moa_core::Error::Evicted`] if keys that were overwritten would be needed; nothing changes.
    pub fn truncate(&self, sequence: &mut Sequence<O>, len: usize) -> Result<()> {
        // Layers differ in spans: ask all of them before changing one.
        for cache in &sequence.caches {
            cache.as_ref().clone().truncate(len)?;
        }
        for cache in &mut sequence.caches {
            self.ops.attention().truncate(cache, len).map_err(Error::backend)?;
        }
        Ok(sequence.state.truncate(len)?)
    }

    /// Bytes of keys and values that a sequence really holds.
    pub fn kv_bytes(&self, sequence: &Sequence<O>) -> u64 {
        sequence.caches.iter().map(|c| self.ops.attention().bytes(c)).sum()
    }

    /// Appends `tokens[i]` to `batch[i]` and returns logits `[rows, vocab]`.
    ///
    /// # Errors
    /// If a sequence has no room or a token is outside the vocabulary; then nothing changes. If the
    /// device fails half-way, the sequences of the batch refuse further use.
    pub fn forward(
        &self,
        batch: &mut [&mut Sequence<O>],
        tokens: &[&[u32]],
        logits: LogitRows<'_>,
    ) -> Result<O::Tensor> {
        self.check_step(batch, tokens)?;
        let total = tokens.iter().map(|new| new.len()).sum::<usize>();
        if let LogitRows::Rows(rows) = logits
            && let Some(row) = rows.iter().find(|row| **row >= total)
        {
            return Err(Error::invalid("logit row", format!("below {total}"), row));
        }
        let result = self.step(batch, tokens, logits);
        if result.is_err() {
            self.tell_failure();
        }
        result
    }

    fn step(
        &self,
        batch: &mut [&mut Sequence<O>],
        tokens: &[&[u32]],
        logits: LogitRows<'_>,
    ) -> Result<O::Tensor> {
        let positions: Vec<_> = batch
            .iter()
            .zip(tokens)
            .map(|(s, new)| (&s.rope, s.len()..s.len() + new.len()))
            .collect();
        let rotations = self.ops.rotations(&positions)?;
        let counts: Vec<usize> = tokens.iter().map(|t| t.len()).collect();
        let ids = tokens.concat();
        let rows: Vec<usize> = match logits {
            LogitRows::Last => counts
                .iter()
                .scan(0, |end, n| {
                    *end += n;
                    Some(*end - 1)
                })
                .collect(),
            LogitRows::Rows(rows) => rows.to_vec(),
            LogitRows::None => Vec::new(),
        };
        let x = self.ops.embed(&self.embedding, &ids)?;
        let result = self.run_layers(batch, &counts, x, &rotations);
        for (sequence, n) in batch.iter_mut().zip(&counts) {
            match result {
                Ok(_) => sequence.state.append(*n)?,
                Err(_) => sequence.broken = true,
            }
        }
        self.logits(&result?, &rows)
    }

    pub(crate) fn check_step(&self, batch: &[&mut Sequence<O>], tokens: &[&[u32]]) -> Result<()> {
        if batch.len() != tokens.len() || batch.is_empty() {
            return Err(Error::invalid(
                "tokens",
                format!("one list for each of {} sequences", batch.len()),
                tokens.len(),
            ));
        }
        for (sequence, new) in batch.iter().zip(tokens) {
            if sequence.broken {
                return Err(Error::invalid(
                    "sequence",
                    "one whose last step did not fail",
                    "a broken one",
                ));
            }
            if new.is_empty() {
                return Err(Error::invalid("tokens", "at least 1 per sequence", 0));
            }
            sequence.state.check_append(new.len())?;
            self.check_tokens(new)?;
        }
        Ok(())
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        match tokens.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::invalid("token id", format!("below {vocab}"), id)),
            None => Ok(()),
        }
    }

    fn run_layers(
        &self,
        batch: &mut [&mut Sequence<O>],
        counts: &[usize],
        mut x: O::Tensor,
        rotations: &O::Rotations,
    ) -> Result<O::Tensor> {
        for (index, layer) in self.layers.iter().enumerate() {
            let [q, k, v] = self.qkv(layer, &x, rotations)?;
            let mut appends: Vec<_> = batch
                .iter_mut()
                .zip(counts)
                .map(|(s, &tokens)| Append { cache: &mut s.caches[index], tokens })
                .collect();
            let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale: self.scale(), lse: false };
            let out =
                self.ops.attention().extend(&mut appends, &inputs).map_err(Error::backend)?.out;
            x = self.after_attention(layer, x, out)?;
            x = self.mlp(layer, x)?;
        }
        Ok(x)
    }

    /// Rotated queries and keys, and values, `[tokens, heads, head_dim]`.
    pub(crate) fn qkv(
        &self,
        layer: &Layer<O>,
        x: &O::Tensor,
        rotations: &O::Rotations,
    ) -> Result<[O::Tensor; 3]> {
        let (ops, dim) = (&self.ops, self.config.head_dim);
        let [q, k, v] = self.projections(layer, x)?;
        Ok([ops.rope(q, dim, rotations, false)?, ops.rope(k, dim, rotations, false)?, v])
    }

    /// Queries, keys and values before rotation, `[tokens, heads, head_dim]`.
    pub(crate) fn projections(&self, layer: &Layer<O>, x: &O::Tensor) -> Result<[O::Tensor; 3]> {
        let (ops, c) = (&self.ops, &self.config);
        let tokens = ops.shape(x)[0];
        let h = ops.rms_norm(x, &layer.attention_norm, self.eps())?;
        let [q, k, v] = parts(ops.linears(&h, &layer.qkv)?)?;
        let heads = |y, heads| ops.reshape(y, &[tokens, heads, c.head_dim]);
        let (query, kv) = (self.local.query_heads, self.local.kv_heads);
        Ok([heads(q, query)?, heads(k, kv)?, heads(v, kv)?])
    }

    /// `x + o_proj(out)`.
    pub(crate) fn after_attention(
        &self,
        layer: &Layer<O>,
        x: O::Tensor,
        out: O::Tensor,
    ) -> Result<O::Tensor> {
        let rows = self.ops.shape(&out)[0];
        let width = self.local.query_heads * self.config.head_dim;
        let flat = self.ops.reshape(out, &[rows, width])?;
        self.add_branch(x, &flat, &layer.o)
    }

    /// `x + mlp(norm(x))`.
    pub(crate) fn mlp(&self, layer: &Layer<O>, x: O::Tensor) -> Result<O::Tensor> {
        let ops = &self.ops;
        let h = ops.rms_norm(&x, &layer.mlp_norm, self.eps())?;
        let [gate, up] = parts(ops.linears(&h, &layer.gate_up)?)?;
        let act = ops.swiglu(gate, &up)?;
        self.add_branch(x, &act, &layer.down)
    }

    pub(crate) fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// Logits of some rows of the last layer's output.
    fn logits(&self, x: &O::Tensor, rows: &[usize]) -> Result<O::Tensor> {
        let picked = self.ops.rows(x, rows)?;
        let h = self.ops.rms_norm(&picked, &self.norm, self.eps())?;
        self.output(&h)
    }
}

/// What joined layers gave.
pub(crate) fn parts<T, const N: usize>(tensors: Vec<T>) -> Result<[T; N]> {
    let got = tensors.len();
    tensors.try_into().map_err(|_| Error::invalid("joined layers", N.to_string(), got))
}
