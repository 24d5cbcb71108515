//! Decode steps as CUDA graphs, launched again for every token.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use moa_backend_cuda::{
    Arena, Cache, Device as Gpu, Dtype, Graph, Indices, Rope, Steps, Tensor, Tensors, padded_rows,
};

use super::{Cuda, CudaMatrix, tokens, turns};
use crate::device::Draw;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::rope_table::RopeTable;
use crate::{Error, Result};

/// Decode steps of batches of several sizes, each captured as one CUDA graph.
///
/// A step is captured for a [padded](padded_rows) number of sequences. Which they are, and how long, its tables alone say: one that
/// comes or goes costs an upload of tables, unless a step of that size, or for sequences that need as much work, is
/// the first of its kind.
pub(super) struct Recorded {
    /// The one that runs.
    current: Recording,
    /// The one that was used last is the last one.
    others: Vec<Recording>,
    gpu: Gpu,
    /// Whether a step may still run.
    runs: Cell<bool>,
    recordings: usize,
}

/// Most captured steps that are kept, and most bytes of those that do not run.
const MOST_KEPT: usize = 24;
const MOST_KEPT_BYTES: u64 = 256 << 20;

/// Fewest positions of a table of angles: 4 MB of heads of 128 elements.
const LEAST_POSITIONS: usize = 8192;

/// A decode step that was captured as one CUDA graph, with the tables it reads.
///
/// Every layer's attention is planned for all lengths that its sequences can reach. The first step
/// runs by these plans, and the next one is captured: from then on a step costs the host one upload of
/// ids and lengths, one launch and one copy back.
struct Recording {
    /// Dropped first: it refers to all the others.
    graph: Option<Graph>,
    arena: Arena,
    rehearsed: bool,
    /// Whether the model is on this device as a whole.
    alone: bool,
    steps: Steps,
    /// Whether a layer's queries and keys are rotated.
    rotary: Vec<bool>,
    /// Where what is added to a layer's rotated keys lies, or 0.
    key_shifts: Vec<u64>,
    /// Where the feedback of a layer's keys lies, or 0.
    key_feedback: Vec<u64>,
    /// Sequences at its places, and new tokens of each.
    sequences: usize,
    tokens: usize,
    /// What a step brings: the ids of tokens, and for each layer the lengths of sequences in its own order.
    inputs: Indices,
    /// The sequences in the order of each layer, and numbers of vacant places.
    order: Vec<usize>,
    /// Most that an input may be, and 1.
    limit: usize,
    angles: Arc<Angles>,
    ids: Indices,
    /// Of all places, and of those of sequences.
    padded_logits: Tensor,
    logits: Tensor,
    padded_chosen: Indices,
    chosen: Indices,
    /// Heads of queries, keys and values, and their width.
    heads: [usize; 3],
    head_dim: usize,
    scale: f32,
}

/// Rotary angles of all positions, f32 `[positions, head_dim]`.
struct Angles {
    rope: RopeTable,
    positions: usize,
    table: Tensor,
}

impl Angles {
    fn new(device: &Cuda, batch: &ReplayBatch<'_, Cuda>) -> Result<Self> {
        let rope = batch.rope.clone();
        let positions = match batch.changes {
            // Longer sequences may come.
            true => batch.capacity.next_power_of_two().max(LEAST_POSITIONS),
            false => batch.capacity,
        };
        let table = device.operations.turns(&[turns(&rope, 0..positions)])?;
        Ok(Self { rope, positions, table })
    }

    fn fit(&self, batch: &ReplayBatch<'_, Cuda>) -> bool {
        self.rope.turns_like(batch.rope) && batch.capacity <= self.positions
    }
}

/// Where the second rows of tables, and feedback, lie for each layer, or 0.
fn places(batch: &ReplayBatch<'_, Cuda>) -> [Vec<u64>; 2] {
    let shift = |table: &Tensor| {
        let row = table.shape()[1..].iter().product::<usize>();
        table.pointer() + (row * size_of::<f32>()) as u64
    };
    [
        batch.key_shifts.iter().map(|table| table.map_or(0, shift)).collect(),
        batch.key_feedback.iter().map(|own| own.map_or(0, Tensor::pointer)).collect(),
    ]
}

/// Whether another thread ended what was captured.
fn is_invalidated(error: &Error) -> bool {
    let Error::Backend(source) = error else { return false };
    matches!(source.downcast_ref(), Some(moa_backend_cuda::Error::CaptureInvalidated))
}

/// Places for so many sequences.
fn padded(batch: &ReplayBatch<'_, Cuda>, sequences: usize) -> usize {
    if batch.changes { padded_rows(sequences) } else { sequences }
}

impl Recording {
    /// # Safety
    /// As [`Device::replay`](crate::Device::replay).
    unsafe fn new(
        device: &Cuda,
        batch: &ReplayBatch<'_, Cuda>,
        angles: Arc<Angles>,
    ) -> Result<Self> {
        let (gpu, operations) = (device.gpu(), &device.operations);
        let Some(first) = batch.caches.first() else {
            return Err(Error::invalid("layers", "at least 1", 0));
        };
        let kv_heads = first.first().map_or(0, |cache| cache.as_ref().layout().heads().len());
        let sequences = first.len();
        let shape = [batch.tokens, batch.query_heads, padded(batch, sequences)];
        // SAFETY: everything of this device is on its own stream, which is not being captured.
        let mut steps = unsafe { Steps::new(gpu, &batch.caches, shape, gpu.stream()) }?;
        let (rows, padded_rows) = (batch.tokens * sequences, batch.tokens * steps.places());
        let zeros = |many| std::iter::repeat_n(0, many);
        let order: Vec<usize> = steps.order().collect();
        let inputs = operations.indices(zeros(padded_rows + order.len()), 1)?;
        let lengths = inputs.part(padded_rows..inputs.len())?;
        // SAFETY: the inputs live as long as the steps, and `run` puts the lengths there.
        unsafe { steps.read_lengths_at(lengths.pointer()) }?;
        let [key_shifts, key_feedback] = places(batch);
        let padded_logits = Tensor::empty(gpu, &[padded_rows, batch.vocab_size], Dtype::F32)?;
        let padded_chosen = operations.indices(zeros(padded_rows), 1)?;
        Ok(Self {
            graph: None,
            arena: Arena::new(),
            rehearsed: false,
            alone: batch.changes,
            sequences,
            tokens: batch.tokens,
            ids: inputs.part(0..padded_rows)?,
            inputs,
            order,
            limit: batch.vocab_size.max(batch.capacity + 1),
            angles,
            logits: padded_logits.rows(0..rows)?,
            padded_logits,
            chosen: padded_chosen.part(0..rows)?,
            padded_chosen,
            steps,
            rotary: batch.rotary.clone(),
            key_shifts,
            key_feedback,
            heads: [batch.query_heads, kv_heads, kv_heads],
            head_dim: batch.head_dim,
            scale: batch.scale,
        })
    }

    /// Has other sequences take the places, if they fit.
    ///
    /// # Safety
    /// As [`Device::replay`](crate::Device::replay).
    unsafe fn replace(&mut self, device: &Cuda, batch: &ReplayBatch<'_, Cuda>) -> Result<bool> {
        let sequences = batch.caches.first().map_or(0, Vec::len);
        let fits = padded(batch, sequences) == self.steps.places()
            && batch.tokens == self.tokens
            && places(batch) == [&self.key_shifts, &self.key_feedback].map(Vec::clone)
            && self.angles.fit(batch);
        // SAFETY: as the caller promises; everything of this device is on its own stream.
        if !fits || !unsafe { self.steps.replace(&batch.caches, device.gpu().stream()) }? {
            return Ok(false);
        }
        let rows = batch.tokens * sequences;
        self.sequences = sequences;
        self.order = self.steps.order().collect();
        self.limit = batch.vocab_size.max(batch.capacity + 1);
        self.logits = self.padded_logits.rows(0..rows)?;
        self.chosen = self.padded_chosen.part(0..rows)?;
        Ok(true)
    }

    /// Bytes of device memory, but for those of angles and of the driver's own.
    fn bytes(&self) -> u64 {
        let logits: usize = self.padded_logits.shape().iter().product();
        self.steps.bytes() + self.arena.bytes() + (logits * Dtype::F32.bytes()) as u64
    }
}

impl Recorded {
    /// # Safety
    /// As [`Device::replay`](crate::Device::replay).
    pub(super) unsafe fn new(device: &Cuda, batch: &ReplayBatch<'_, Cuda>) -> Result<Self> {
        let angles = Arc::new(Angles::new(device, batch)?);
        // SAFETY: as the caller promises.
        let current = unsafe { Recording::new(device, batch, angles) }?;
        let (gpu, runs) = (device.gpu().clone(), Cell::new(false));
        Ok(Self { current, others: Vec::new(), gpu, runs, recordings: 0 })
    }

    /// Makes another recording the one that runs.
    fn set(&mut self, recording: Recording) {
        self.others.push(std::mem::replace(&mut self.current, recording));
    }

    /// Drops those that were used longest ago while there are too many.
    fn limit(&mut self) -> Result<()> {
        let mut bytes: u64 = self.others.iter().map(Recording::bytes).sum();
        while self.others.len() > MOST_KEPT || bytes > MOST_KEPT_BYTES {
            // What it launched last may still run.
            self.gpu.synchronize()?;
            bytes -= self.others.remove(0).bytes();
        }
        Ok(())
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
    unsafe fn replace(
        &mut self,
        device: &Cuda,
        batch: &ReplayBatch<'_, Cuda>,
        prepares: bool,
    ) -> Result<bool> {
        // SAFETY: as the caller promises.
        if unsafe { self.current.replace(device, batch) }? {
            return Ok(true);
        }
        for at in (0..self.others.len()).rev() {
            // SAFETY: as the caller promises.
            if unsafe { self.others[at].replace(device, batch) }? {
                let fitting = self.others.remove(at);
                self.set(fitting);
                return Ok(true);
            }
        }
        if prepares {
            let angles = match self.current.angles.fit(batch) {
                true => Arc::clone(&self.current.angles),
                false => Arc::new(Angles::new(device, batch)?),
            };
            // SAFETY: as the caller promises.
            let recording = unsafe { Recording::new(device, batch, angles) }?;
            self.set(recording);
            self.limit()?;
        }
        Ok(prepares)
    }

    fn is_rehearsed(&self) -> bool {
        self.current.rehearsed
    }

    fn is_recorded(&self) -> bool {
        self.current.graph.is_some()
    }

    fn recordings(&self) -> usize {
        self.recordings
    }

    fn run(
        &mut self,
        device: &Cuda,
        tokens: &[u32],
        lens: &[usize],
        step: &dyn Fn(&dyn Replay<Cuda>) -> Result<()>,
    ) -> Result<()> {
        let own = &self.current;
        let mut inputs = Vec::with_capacity(own.inputs.len());
        inputs.extend(tokens.iter().map(|id| *id as usize));
        inputs.resize(own.ids.len(), 0);
        let length = |sequence: &usize| lens.get(*sequence).copied().unwrap_or(0);
        inputs.extend(own.order.iter().map(length));
        device.operations.set_indices(&own.inputs, inputs.into_iter(), own.limit)?;
        self.runs.set(true);
        if !own.rehearsed {
            own.arena.rehearse(|| step(self))?;
            self.current.rehearsed = true;
            return Ok(());
        }
        if own.graph.is_none() {
            // SAFETY: whoever made this promised that `step` only launches, and drops what it makes;
            // what else it uses is in `self`, or lives as long by the same promise.
            let graph = match unsafe { device.gpu().capture(&own.arena, || step(self)) } {
                // This step runs as the one before it did, and the next one is captured. Other ranks would wait for sums that
                // this one has begun already.
                Err(error) if own.alone && is_invalidated(&error) => {
                    tracing::debug!("another thread ended the capture of a step");
                    return own.arena.rehearse(|| step(self));
                }
                graph => graph?,
            };
            self.current.graph = Some(graph);
            self.recordings += 1;
        }
        match &mut self.current.graph {
            // SAFETY: as above.
            Some(graph) => Ok(unsafe { graph.launch() }?),
            None => Ok(()),
        }
    }

    fn embed(&self, device: &Cuda, table: &CudaMatrix, factor: f32) -> Result<Tensor> {
        // SAFETY: `run` has put tokens there that its caller has checked.
        Ok(match table {
            CudaMatrix::Blocks(table) => {
                unsafe { device.operations.embed_blocks_at(table, &self.current.ids, factor) }?
            }
            table => unsafe {
                device.operations.embed_at(&device.wide(table)?, &self.current.ids, factor)
            }?,
        })
    }

    fn attend(&self, device: &Cuda, layer: usize, qkv: [Tensor; 3]) -> Result<Tensor> {
        let own = &self.current;
        for (tensor, heads) in qkv.iter().zip(own.heads) {
            let expected = [own.ids.len(), heads, own.head_dim];
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
        let (table, key_shift) = (own.angles.table.pointer(), own.key_shifts[layer]);
        let rope = || Rope { table, interleaved: false, q, k, scratch: true, key_shift };
        let tensors = Tensors {
            q,
            k,
            v: v.packed(),
            out: out.packed(),
            lse: 0,
            scale: own.scale,
            sinks: 0,
            key_feedback: own.key_feedback[layer],
            rope: own.rotary[layer].then(rope),
        };
        // SAFETY: all of it is on the device's own stream, and of the shapes that were prepared; whoever
        // made this promised that the caches live and that no sequence exceeds its capacity.
        unsafe { own.steps.run(layer, &tensors, device.gpu().stream()) }?;
        Ok(out)
    }

    fn write_logits(
        &self,
        device: &Cuda,
        h: &Tensor,
        matrix: &CudaMatrix,
        columns: Range<usize>,
    ) -> Result<()> {
        let logits = &self.current.padded_logits;
        match columns.len() == logits.shape()[1] {
            true => Ok(device.operations.linear_into(h, matrix, logits)?),
            false => device.logits_into(h, matrix, columns, logits),
        }
    }

    fn finish(&self, device: &Cuda) -> Result<()> {
        Ok(device.operations.argmax(&self.current.padded_logits, &self.current.padded_chosen)?)
    }

    fn sample(&self, device: &Cuda, draws: &[Draw], units: &[f64]) -> Result<()> {
        device.sample_into(&self.current.logits, draws, units, &self.current.chosen)
    }

    fn logits(&self) -> &Tensor {
        &self.current.logits
    }

    fn chosen(&self) -> Result<Vec<Option<u32>>> {
        let chosen = tokens(&self.current.chosen)?;
        self.runs.set(false);
        Ok(chosen)
    }

    fn advance(&self, cache: &mut Cache) -> Result<()> {
        Ok(cache.advance(self.current.tokens)?)
    }
}
