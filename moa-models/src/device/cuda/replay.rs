//! Decode steps as one CUDA graph, launched again for every token.

use std::cell::Cell;
use std::ops::Range;

use moa_backend_cuda::{
    Arena, Batch, Cache, Device as Gpu, Dtype, Graph, Indices, Rope, Step, Tensor, Tensors,
    Workspace,
};

use super::{Cuda, CudaMatrix, tokens, turns};
use crate::device::Draw;
use crate::device::replay::{Replay, ReplayBatch};
use crate::{Error, Result};

/// A decode step that was captured as one CUDA graph, with the tables it reads.
///
/// Every layer's attention is planned for all lengths that its sequences can reach. The first step
/// runs by these plans, and the next one is captured: from then on a step costs the host one upload of
/// ids and lengths, one launch and one copy back.
pub(super) struct Recorded {
    /// Dropped first: it refers to all the others.
    graph: Option<Graph>,
    gpu: Gpu,
    /// Whether a step may still run.
    runs: Cell<bool>,
    arena: Arena,
    rehearsed: bool,
    layers: Vec<Step>,
    /// Whether a layer's queries and keys are rotated.
    rotary: Vec<bool>,
    /// Where what is added to a layer's rotated keys lies, or 0.
    key_shifts: Vec<u64>,
    /// Where the feedback of a layer's keys lies, or 0.
    key_feedback: Vec<u64>,
    workspace: Workspace,
    /// New tokens of each sequence.
    tokens: usize,
    /// What a step brings: the ids of tokens, and for each layer the lengths of sequences in its own order.
    inputs: Indices,
    /// The sequences in the order of each layer.
    order: Vec<usize>,
    /// Most that an input may be, and 1.
    limit: usize,
    /// Rotary angles of all positions, f32 `[positions, head_dim]`.
    table: Tensor,
    ids: Indices,
    logits: Tensor,
    chosen: Indices,
    /// Heads of queries, keys and values, and their width.
    heads: [usize; 3],
    head_dim: usize,
    scale: f32,
}

impl Recorded {
    /// # Safety
    /// As [`Device::replay`](crate::Device::replay).
    pub(super) unsafe fn new(device: &Cuda, batch: &ReplayBatch<'_, Cuda>) -> Result<Self> {
        let (gpu, operations) = (device.gpu(), &device.operations);
        let Some(first) = batch.caches.first() else {
            return Err(Error::invalid("layers", "at least 1", 0));
        };
        let kv_heads = first.first().map_or(0, |cache| cache.as_ref().layout().heads().len());
        let count = first.len();
        let tokens = vec![batch.tokens; count];
        let rows = batch.tokens * count;
        let mut workspace = Workspace::new(gpu);
        let mut layers = Vec::with_capacity(batch.caches.len());
        for caches in &batch.caches {
            let query_heads = batch.query_heads;
            let batch = Batch { caches, tokens: &tokens, query_heads, grows: true, softcap: None };
            let mut step = Step::new(gpu);
            // SAFETY: everything of this device is on its own stream, which is not being captured.
            unsafe { step.prepare(&mut workspace, &batch, gpu.stream()) }?;
            layers.push(step);
        }
        let zeros = |many| std::iter::repeat_n(0, many);
        let order: Vec<usize> = layers.iter().flat_map(Step::order).copied().collect();
        let inputs = operations.indices(zeros(rows + order.len()), 1)?;
        for (index, layer) in layers.iter_mut().enumerate() {
            let first = rows + index * count;
            let lengths = inputs.part(first..first + count)?;
            // SAFETY: the inputs live as long as the layers, and `run` puts the lengths there.
            unsafe { layer.read_lengths_at(lengths.pointer()) }?;
        }
        // The second row of a table.
        let shift = |table: &Tensor| {
            let row = table.shape()[1..].iter().product::<usize>();
            table.pointer() + (row * size_of::<f32>()) as u64
        };
        Ok(Self {
            graph: None,
            gpu: gpu.clone(),
            runs: Cell::new(false),
            arena: Arena::new(),
            rehearsed: false,
            tokens: batch.tokens,
            ids: inputs.part(0..rows)?,
            inputs,
            order,
            limit: batch.vocab_size.max(batch.capacity + 1),
            table: operations.turns(&[turns(batch.rope, 0..batch.capacity)])?,
            logits: Tensor::empty(gpu, &[rows, batch.vocab_size], Dtype::F32)?,
            chosen: operations.indices(zeros(rows), 1)?,
            layers,
            rotary: batch.rotary.clone(),
            key_shifts: batch.key_shifts.iter().map(|table| table.map_or(0, shift)).collect(),
            key_feedback: batch
                .key_feedback
                .iter()
                .map(|own| own.map_or(0, Tensor::pointer))
                .collect(),
            workspace,
            heads: [batch.query_heads, kv_heads, kv_heads],
            head_dim: batch.head_dim,
            scale: batch.scale,
        })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.runs.get() {
            // A failure here is the stream's, and whoever waits for that learns of it.
            let _ = self.gpu.synchronize();
        }
    }
}

impl Replay<Cuda> for Recorded {
    fn run(
        &mut self,
        device: &Cuda,
        tokens: &[u32],
        lens: &[usize],
        step: &dyn Fn(&dyn Replay<Cuda>) -> Result<()>,
    ) -> Result<()> {
        let mut inputs = Vec::with_capacity(self.inputs.len());
        inputs.extend(tokens.iter().map(|id| *id as usize));
        inputs.extend(self.order.iter().filter_map(|sequence| lens.get(*sequence)));
        device.operations.set_indices(&self.inputs, inputs.into_iter(), self.limit)?;
        self.runs.set(true);
        if !self.rehearsed {
            self.arena.rehearse(|| step(self))?;
            self.rehearsed = true;
            return Ok(());
        }
        if self.graph.is_none() {
            // SAFETY: whoever made this promised that `step` only launches, and drops what it makes;
            // what else it uses is in `self`, or lives as long by the same promise.
            let graph = unsafe { device.gpu().capture(&self.arena, || step(self)) }?;
            self.graph = Some(graph);
        }
        match &mut self.graph {
            // SAFETY: as above.
            Some(graph) => Ok(unsafe { graph.launch() }?),
            None => Ok(()),
        }
    }

    fn embed(&self, device: &Cuda, table: &CudaMatrix, factor: f32) -> Result<Tensor> {
        // SAFETY: `run` has put tokens there that its caller has checked.
        Ok(match table {
            CudaMatrix::Blocks(table) => {
                unsafe { device.operations.embed_blocks_at(table, &self.ids, factor) }?
            }
            table => {
                unsafe { device.operations.embed_at(&device.wide(table)?, &self.ids, factor) }?
            }
        })
    }

    fn attend(&self, device: &Cuda, layer: usize, qkv: [Tensor; 3]) -> Result<Tensor> {
        for (tensor, heads) in qkv.iter().zip(self.heads) {
            let expected = [self.ids.len(), heads, self.head_dim];
            if tensor.shape() != expected || tensor.dtype() != device.dtype() {
                let got = format!("{:?} of {:?}", tensor.shape(), tensor.dtype());
                return Err(Error::invalid(
                    "queries, keys or values",
                    format!("{expected:?}"),
                    got,
                ));
            }
        }
        let [q, k, v] = qkv;
        let out = Tensor::empty(device.gpu(), q.shape(), device.dtype())?;
        let (q, k) = (q.packed(), k.packed());
        let (table, key_shift) = (self.table.pointer(), self.key_shifts[layer]);
        let rope = || Rope { table, interleaved: false, q, k, scratch: true, key_shift };
        let tensors = Tensors {
            q,
            k,
            v: v.packed(),
            out: out.packed(),
            lse: 0,
            scale: self.scale,
            sinks: 0,
            key_feedback: self.key_feedback[layer],
            rope: self.rotary[layer].then(rope),
        };
        // SAFETY: all of it is on the device's own stream, and of the shapes that were prepared; whoever
        // made this promised that the caches live and that no sequence exceeds its capacity.
        unsafe { self.layers[layer].run(&self.workspace, &tensors, device.gpu().stream()) }?;
        Ok(out)
    }

    fn write_logits(
        &self,
        device: &Cuda,
        h: &Tensor,
        matrix: &CudaMatrix,
        columns: Range<usize>,
    ) -> Result<()> {
        match columns.len() == self.logits.shape()[1] {
            true => Ok(device.operations.linear_into(h, matrix, &self.logits)?),
            false => device.logits_into(h, matrix, columns, &self.logits),
        }
    }

    fn finish(&self, device: &Cuda) -> Result<()> {
        Ok(device.operations.argmax(&self.logits, &self.chosen)?)
    }

    fn sample(&self, device: &Cuda, draws: &[Draw], units: &[f64]) -> Result<()> {
        device.sample_into(&self.logits, draws, units, &self.chosen)
    }

    fn logits(&self) -> &Tensor {
        &self.logits
    }

    fn chosen(&self) -> Result<Vec<Option<u32>>> {
        let chosen = tokens(&self.chosen)?;
        self.runs.set(false);
        Ok(chosen)
    }

    fn advance(&self, cache: &mut Cache) -> Result<()> {
        Ok(cache.advance(self.tokens)?)
    }
}
