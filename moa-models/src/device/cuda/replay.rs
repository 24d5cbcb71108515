//! Decode steps as one CUDA graph, launched again for every token.

use moa_backend_cuda::{
    Arena, Batch, Cache, Draw, Dtype, Graph, Indices, Lengths, Rope, Step, Tensor, Tensors,
    Workspace,
};

use super::{CudaOps, turns};
use crate::decoder::llama::{Llama, LogitRows, Sequence};
use crate::device::Ops;
use crate::engine::decode::{Decode, Stepwise};
use crate::engine::sampling::SamplingOptions;
use crate::{Error, Result};

/// Steps before a graph is worth its preparation: many answers are shorter.
const PLAIN_STEPS: usize = 2;

/// Decode steps of one batch.
///
/// The first ones are plain. Then every layer's attention is planned for all lengths that its
/// sequences can reach, one step runs by these plans, and the next one is captured: from then on a
/// token costs the host one upload of ids, one launch and one copy back.
pub(super) struct Replay<'a> {
    model: &'a Llama<CudaOps>,
    batch: Vec<&'a mut Sequence<CudaOps>>,
    steps: usize,
    prepared: Option<Prepared>,
}

/// What the captured kernels read and write.
struct Prepared {
    /// Dropped first: it refers to all the others.
    graph: Option<Graph>,
    arena: Arena,
    layers: Vec<Step>,
    workspace: Workspace,
    lengths: Lengths,
    /// Rotary angles of all positions, f32 `[positions, head_dim]`.
    table: Tensor,
    ids: Indices,
    logits: Tensor,
    likeliest: Indices,
}

impl<'a> Replay<'a> {
    pub(super) fn new(model: &'a Llama<CudaOps>, batch: Vec<&'a mut Sequence<CudaOps>>) -> Self {
        Self { model, batch, steps: 0, prepared: None }
    }

    /// Sequences that were opened with different rotary frequencies have no table in common, and sums
    /// over the host cannot be captured.
    fn can_replay(&self) -> bool {
        if self.model.shard.as_ref().is_some_and(|shard| !shard.only_launches()) {
            return false;
        }
        let Some(first) = self.batch.first().map(|s| &s.rope) else { return false };
        self.batch.iter().all(|s| {
            s.rope.inv_freq() == first.inv_freq()
                && s.rope.attention_scale() == first.attention_scale()
        })
    }

    fn prepare(&self) -> Result<Prepared> {
        let (model, ops) = (self.model, &self.model.ops);
        let (device, config) = (ops.device(), &model.config);
        let count = self.batch.len();
        let mut workspace = Workspace::new(device);
        let tokens = vec![1; count];
        let mut layers = Vec::with_capacity(model.layers.len());
        for layer in 0..model.layers.len() {
            let caches: Vec<&Cache> = self.batch.iter().map(|s| &s.caches[layer]).collect();
            let query_heads = model.local.query_heads;
            let batch = Batch { caches: &caches, tokens: &tokens, query_heads, grows: true };
            let mut step = Step::new(device);
            // SAFETY: everything of this model is on the device's own stream, not in a capture.
            unsafe { step.prepare(&mut workspace, &batch, device.stream()) }
                .map_err(Error::backend)?;
            layers.push(step);
        }
        let capacity = self.batch.iter().map(|s| s.capacity()).max().unwrap_or(0);
        let Some(first) = self.batch.first() else {
            return Err(Error::invalid("batch", "at least 1 sequence", 0));
        };
        let none = || std::iter::repeat_n(0, count);
        let shape = [count, config.vocab_size];
        let operations = &ops.operations;
        let prepare = || -> moa_backend_cuda::Result<Prepared> {
            Ok(Prepared {
                graph: None,
                arena: Arena::new(),
                lengths: operations.lengths(&layers)?,
                table: operations.turns(&[turns(&first.rope, 0..capacity)])?,
                ids: operations.indices(none(), config.vocab_size)?,
                logits: Tensor::empty(device, &shape, Dtype::F32)?,
                likeliest: operations.indices(none(), config.vocab_size)?,
                layers: Vec::new(),
                workspace,
            })
        };
        let prepared = prepare().map_err(Error::backend)?;
        Ok(Prepared { layers, ..prepared })
    }

    /// Appends tokens and leaves logits and the likeliest tokens on the device.
    fn run(&mut self, tokens: &[u32]) -> Result<&Prepared> {
        if let Err(error) = self.try_run(tokens) {
            self.model.tell_failure();
            return Err(error);
        }
        let missing = || Error::invalid("decoder", "a prepared one", "none");
        self.prepared.as_ref().ok_or_else(missing)
    }

    fn try_run(&mut self, tokens: &[u32]) -> Result<()> {
        let mut prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => self.prepare()?,
        };
        let result = prepared.step(self.model, tokens, self.steps > PLAIN_STEPS);
        for sequence in &mut self.batch {
            match &result {
                Ok(()) => sequence.replayed()?,
                Err(_) => sequence.broken = true,
            }
        }
        result?;
        self.prepared = Some(prepared);
        Ok(())
    }

    /// Checks a step before it changes anything; whether it is to be replayed.
    fn begin(&mut self, tokens: &[u32]) -> Result<bool> {
        let each: Vec<&[u32]> = tokens.chunks(1).collect();
        self.model.check_ranks()?;
        self.model.check_step(&self.batch, &each)?;
        Ok(self.prepared.is_some() || self.steps >= PLAIN_STEPS && self.can_replay())
    }

    fn plainly<T>(
        &mut self,
        step: impl FnOnce(&mut Stepwise<'_, CudaOps>) -> Result<T>,
    ) -> Result<T> {
        let batch = self.batch.iter_mut().map(|s| &mut **s).collect();
        step(&mut Stepwise::new(self.model, batch))
    }
}

impl Decode for Replay<'_> {
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let logits = match self.begin(tokens)? {
            true => {
                let logits = self.run(tokens)?.logits.clone();
                self.model.values(logits)?
            }
            false => self.plainly(|plain| plain.step(tokens))?,
        };
        self.steps += 1;
        Ok(logits)
    }

    fn step_greedy(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        let chosen = match self.begin(tokens)? {
            true => {
                let chosen = self.run(tokens)?.likeliest.to_host()?;
                self.model.check_ranks()?;
                valid(&chosen)?
            }
            false => self.plainly(|plain| plain.step_greedy(tokens))?,
        };
        self.steps += 1;
        Ok(chosen)
    }

    fn can_sample(&self) -> bool {
        true
    }

    fn step_sampled(
        &mut self,
        tokens: &[u32],
        sampling: &SamplingOptions,
        units: &[f64],
    ) -> Result<Vec<u32>> {
        let operations = &self.model.ops.operations;
        let draw = Draw {
            temperature: sampling.temperature,
            top_k: sampling.top_k.unwrap_or(0),
            top_p: sampling.top_p,
            min_p: sampling.min_p,
        };
        let chosen = match self.begin(tokens)? {
            true => {
                let prepared = self.run(tokens)?;
                operations.sample(&prepared.logits, draw, units, &prepared.likeliest)?;
                prepared.likeliest.to_host()?
            }
            false => {
                let each: Vec<&[u32]> = tokens.chunks(1).collect();
                let logits = self.model.forward(&mut self.batch, &each, LogitRows::Last)?;
                let chosen = operations.indices(std::iter::repeat_n(0, tokens.len()), 1)?;
                operations.sample(&logits, draw, units, &chosen)?;
                chosen.to_host()?
            }
        };
        self.model.check_ranks()?;
        let chosen = valid(&chosen)?;
        self.steps += 1;
        Ok(chosen)
    }
}

/// Tokens that the device has chosen.
fn valid(chosen: &[i32]) -> Result<Vec<u32>> {
    let token = |(row, id): (usize, &i32)| {
        let got = || format!("a NaN or infinity, sequence {row}");
        u32::try_from(*id).map_err(|_| Error::Logits { got: got() })
    };
    chosen.iter().enumerate().map(token).collect()
}

impl Prepared {
    fn step(&mut self, model: &Llama<CudaOps>, tokens: &[u32], capture: bool) -> Result<()> {
        let operations = &model.ops.operations;
        let ids = tokens.iter().map(|id| *id as usize);
        operations.set_indices(&self.ids, ids, model.config.vocab_size).map_err(Error::backend)?;
        if !capture {
            return self.arena.rehearse(|| self.launch(model));
        }
        if self.graph.is_none() {
            // SAFETY: `launch` only launches, and drops what it makes; what else it uses is in
            // `self`, in the model and in sequences that the owner of `self` borrows.
            let capture = |work| unsafe { model.ops.device().capture(&self.arena, work) };
            self.graph = Some(capture(|| self.launch(model))?);
        }
        match &mut self.graph {
            // SAFETY: as above.
            Some(graph) => unsafe { graph.launch() }.map_err(Error::backend),
            None => Ok(()),
        }
    }

    /// One step of all sequences, by the plans that were made.
    fn launch(&self, model: &Llama<CudaOps>) -> Result<()> {
        let (ops, config) = (&model.ops, &model.config);
        let (operations, device) = (&ops.operations, ops.device());
        let out_shape = [self.ids.len(), model.local.query_heads, config.head_dim];
        // SAFETY: `step` has put tokens of the vocabulary there.
        let mut x = unsafe { operations.embed_at(model.embedding.wide()?, &self.ids) }
            .map_err(Error::backend)?;
        for (layer, step) in model.layers.iter().zip(&self.layers) {
            let [q, k, v] = model.projections(layer, &x)?;
            let out = Tensor::empty(device, &out_shape, ops.dtype()).map_err(Error::backend)?;
            let (q, k) = (q.packed(), k.packed());
            let rope = Rope { table: self.table.pointer(), interleaved: false, q, k };
            let tensors = Tensors {
                q,
                k,
                v: v.packed(),
                out: out.packed(),
                lse: 0,
                scale: model.scale(),
                rope: Some(rope),
            };
            // SAFETY: all of it is on the device's own stream, and of the shapes that were prepared;
            // the owner has checked that no sequence exceeds its capacity.
            unsafe { step.run(&self.workspace, &tensors, device.stream()) }
                .map_err(Error::backend)?;
            x = model.after_attention(layer, x, out)?;
            x = model.mlp(layer, x)?;
        }
        let h = ops.rms_norm(&x, &model.norm, model.eps())?;
        match &model.shard {
            None => operations.linear_into(&h, model.output_matrix(), &self.logits)?,
            Some(shard) => {
                let columns = shard.vocabulary(config);
                ops.logits_into(&h, model.output_matrix(), columns, &self.logits)?;
                shard.all_reduce(ops, &mut self.logits.clone())?;
            }
        }
        let finish = || -> moa_backend_cuda::Result<()> {
            operations.argmax(&self.logits, &self.likeliest)?;
            // SAFETY: the steps are alive and were not prepared again.
            unsafe { operations.grow(&self.lengths) }
        };
        finish().map_err(Error::backend)
    }
}

impl Sequence<CudaOps> {
    /// Records the token that a replayed step has appended.
    fn replayed(&mut self) -> Result<()> {
        for cache in &mut self.caches {
            cache.advance(1).map_err(Error::backend)?;
        }
        Ok(self.state.append(1)?)
    }
}
