//! One call of `extend`: attention over the old caches and the new tokens, and the append.
//!
//! WebGPU kernels cannot follow pointers, and arrays of buffers are an extension; so each sequence with
//! several new tokens is a dispatch of its own. Those with one token share a dispatch, up to eight of them,
//! which branches where it loads (see `decode`). Nothing of a sequence's result can depend on the others.

mod decode;
pub(crate) mod matrix_units;
mod schedule;
pub(crate) mod timing;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};
use moa_core::{Append, AttentionShape, Dtype, ExtendInputs, Extended, check_extend};

use crate::kernels::append::append;
use crate::kernels::attend::{Shape, attend};
use crate::kernels::blocks::Blocks;
use crate::kernels::merge::merge;
use crate::kernels::prefill::prefill;
use crate::kernels::words::{narrow, per_word};
use crate::{Cache, Device, Error, MatrixUnits, Result, Tensor};

use decode::Decode;
use schedule::Cut;
pub(crate) use schedule::{Limits, Row, square};

const OP: &str = "extend";

/// A buffer as a kernel's argument. Kernels that count by themselves need no length.
pub(crate) fn arg(handle: &Handle) -> BufferArg {
    let elements = (handle.size_in_used() / 4) as usize;
    // SAFETY: that many elements of 4 bytes are in the buffer.
    unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
}

/// New keys or values as a cache of this type holds them: rounded before the chunk attends to them, so
/// that a key is one number wherever it is read.
pub(crate) fn words(device: &Device, tensor: &Tensor, dtype: Dtype) -> Result<Handle> {
    if dtype == Dtype::F32 {
        return Ok(tensor.handle().clone());
    }
    let words = tensor.len() / per_word(dtype);
    let narrowed = device.alloc("new keys and values", words, 4)?;
    let (cubes, dim) = device.cubes(words);
    let (from, to) = (arg(tensor.handle()), arg(&narrowed));
    // SAFETY: there are that many pairs and words; head dimensions are even.
    unsafe {
        narrow::launch_unchecked(device.client(), cubes, dim, from, to, words as u32, dtype);
    }
    Ok(narrowed)
}

/// See [`moa_core::SparseAttentionBackend::extend`].
pub(crate) fn extend(
    device: &Device,
    matrix_units: MatrixUnits,
    batch: &mut [Append<'_, Cache>],
    inputs: &ExtendInputs<'_, Tensor>,
) -> Result<Extended<Tensor>> {
    let shape = check(device, batch, inputs)?;
    let rows = &inputs.q.shape()[..2];
    let [out, lse] = device.alloc_two("tensor", inputs.q.len(), rows.iter().product())?;
    let out = Tensor::from_handle(device, out, inputs.q.shape())?;
    let lse = Tensor::from_handle(device, lse, rows)?;
    let dtype = batch[0].cache.dtype();
    let call = Call { device, inputs, shape, dtype, out: &out, lse: &lse, matrix_units };
    let schedule = call.schedule(batch)?;
    call.run(batch, &schedule)?;
    Ok(Extended { out, lse: inputs.lse.then_some(lse) })
}

/// Everything about a call that can be wrong.
fn check(
    device: &Device,
    batch: &[Append<'_, Cache>],
    inputs: &ExtendInputs<'_, Tensor>,
) -> Result<AttentionShape> {
    let shape = check_extend(batch, inputs, Tensor::shape)?;
    for (what, tensor) in [("q", inputs.q), ("k", inputs.k), ("v", inputs.v)] {
        if !tensor.device().is(device) {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    let dtype = batch[0].cache.dtype();
    for Append { cache, .. } in batch {
        if cache.dtype() != dtype {
            return Err(Error::argument(OP, "cache dtype", dtype, cache.dtype()));
        }
        if !cache.device().is(device) {
            return Err(Error::argument(OP, "cache", "on the backend's device", "on another"));
        }
    }
    Ok(shape)
}

/// What all sequences of a call share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) device: &'a Device,
    pub(crate) inputs: &'a ExtendInputs<'a, Tensor>,
    pub(crate) shape: AttentionShape,
    /// Element type of the caches.
    pub(crate) dtype: Dtype,
    pub(crate) out: &'a Tensor,
    pub(crate) lse: &'a Tensor,
    pub(crate) matrix_units: MatrixUnits,
}

/// How a call's sequences are cut, and room for what lies between kernels.
#[derive(Debug)]
struct Schedule {
    decode: Option<Decode>,
    parts: Vec<Part>,
    scratch: Option<Scratch>,
    /// New keys and values in the words of the caches, where a part reads them: see [`words`].
    words: Option<[Handle; 2]>,
}

/// Sequences that are computed together.
#[derive(Debug)]
enum Part {
    One(Cut),
    Run(decode::Run),
}

/// Partial results of one sequence after the other: outputs, then (maximum, sum) of each row.
#[derive(Debug)]
struct Scratch {
    out: Handle,
    stats: Handle,
}

impl Call<'_> {
    /// How a batch whose shapes were checked is cut, with the memory that it needs.
    fn schedule(&self, batch: &[Append<'_, Cache>]) -> Result<Schedule> {
        let limits = Limits::of(self.device);
        let AttentionShape { query_heads, head_dim, .. } = self.shape;
        let decode = Decode::new(self, &limits);
        let blocks = self.matrix_units.blocks(self.device, &limits, self.dtype, head_dim);
        let (mut parts, mut at, mut rows) = (Vec::new(), 0, 0);
        while let Some(Append { cache, tokens }) = batch.get(at) {
            if let Some(decode) = decode.filter(|_| *tokens == 1) {
                let run = decode.run(self, &batch[at..])?;
                at += run.sequences;
                parts.push(Part::Run(run));
                continue;
            }
            let (heads, len) = (&cache.geometry().heads, cache.as_ref().len());
            let row = Row::of(head_dim);
            let cut = Cut::new(&limits, heads, len, *tokens, query_heads, row, blocks)?;
            if cut.splits > 1 {
                rows = rows.max(cut.splits as usize * *tokens * query_heads);
            }
            parts.push(Part::One(cut));
            at += 1;
        }
        let scratch = match rows {
            0 => None,
            rows => {
                let elements = rows.saturating_mul(head_dim);
                let [out, stats] = self.device.alloc_two("partial results", elements, 2 * rows)?;
                Some(Scratch { out, stats })
            }
        };
        let words = match parts.iter().any(|part| matches!(part, Part::One(_))) {
            true => Some([
                words(self.device, self.inputs.k, self.dtype)?,
                words(self.device, self.inputs.v, self.dtype)?,
            ]),
            false => None,
        };
        Ok(Schedule { decode, parts, scratch, words })
    }

    /// Queues the kernels and records the new tokens, for which there is room.
    fn run(&self, batch: &mut [Append<'_, Cache>], schedule: &Schedule) -> Result<()> {
        let (mut first, mut at) = (0, 0);
        for part in &schedule.parts {
            let sequences = match (part, &schedule.decode, &schedule.words) {
                (Part::Run(run), Some(decode), _) => {
                    decode.launch(self, &batch[at..at + run.sequences], first, run);
                    run.sequences
                }
                (Part::One(cut), _, Some(words)) => {
                    let Append { cache, tokens } = &batch[at];
                    self.one(cache, first, *tokens, cut, schedule.scratch.as_ref(), words);
                    1
                }
                // A schedule has what its parts need.
                _ => 0,
            };
            for Append { cache, tokens } in &mut batch[at..at + sequences] {
                cache.state_mut().append(*tokens)?;
                first += *tokens;
            }
            at += sequences;
        }
        Ok(())
    }

    fn one(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        cut: &Cut,
        scratch: Option<&Scratch>,
        words: &[Handle; 2],
    ) {
        let row = Row::of(self.shape.head_dim);
        match scratch {
            _ if let Some(blocks) = cut.blocks => {
                self.prefill(cache, first, tokens, blocks, cut.tiles, words);
            }
            Some(scratch) if cut.splits > 1 => {
                let results = [&scratch.out, &scratch.stats];
                self.attend(cache, first, tokens, row, cut, words, results);
                self.merge(cache, first, tokens, row, cut, scratch);
            }
            _ => {
                let results = [self.out.handle(), self.lse.handle()];
                self.attend(cache, first, tokens, row, cut, words, results);
            }
        }
        self.append(cache, first, tokens, row, words);
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        row: Row,
        cut: &Cut,
        [k, v]: &[Handle; 2],
        [out, stats]: [&Handle; 2],
    ) {
        let kv_heads = self.shape.kv_heads;
        let columns = row.vectors.div_ceil(cut.tile.units_x);
        let (dtype, partial) = (self.dtype, cut.splits > 1);
        let shape = Shape { tile: cut.tile, columns, dtype, partial };
        // SAFETY: the tensors have `first + tokens` tokens of as many heads as is said, the cache
        // is filled up to its length, and the outputs have room as planned.
        unsafe {
            attend::launch_unchecked(
                self.device.client(),
                CubeCount::Static(cut.tiles, kv_heads as u32, cut.splits),
                CubeDim::new_1d(cut.tile.units() as u32),
                row.width,
                row.width / per_word(self.dtype),
                arg(self.inputs.q.handle()),
                arg(k),
                arg(v),
                arg(&cache.keys),
                arg(&cache.values),
                arg(&cache.geometry().table),
                arg(out),
                arg(stats),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                kv_heads as u32,
                row.vectors as u32,
                self.inputs.scale,
                shape,
            );
        }
    }

    fn prefill(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        blocks: Blocks,
        tiles: u32,
        [k, v]: &[Handle; 2],
    ) {
        let kv_heads = self.shape.kv_heads;
        // SAFETY: as in `attend`; head dimensions are multiples of 8.
        unsafe {
            prefill::launch_unchecked(
                self.device.client(),
                CubeCount::Static(tiles, kv_heads as u32, 1),
                CubeDim::new_1d(blocks.units() as u32),
                arg(self.inputs.q.handle()),
                arg(k),
                arg(v),
                arg(&cache.keys),
                arg(&cache.values),
                arg(&cache.geometry().table),
                arg(self.out.handle()),
                arg(self.lse.handle()),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                kv_heads as u32,
                self.inputs.scale,
                blocks,
            );
        }
    }

    fn merge(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        row: Row,
        cut: &Cut,
        scratch: &Scratch,
    ) {
        let (cubes, dim) = self.device.cubes(tokens * self.shape.query_heads * row.vectors);
        // SAFETY: as in `attend`, which wrote the partial results.
        unsafe {
            merge::launch_unchecked(
                self.device.client(),
                cubes,
                dim,
                row.width,
                arg(&scratch.out),
                arg(&scratch.stats),
                arg(&cache.geometry().table),
                arg(self.out.handle()),
                arg(self.lse.handle()),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                self.shape.kv_heads as u32,
                cut.splits,
                row.vectors as u32,
            );
        }
    }

    fn append(&self, cache: &Cache, first: usize, tokens: usize, row: Row, [k, v]: &[Handle; 2]) {
        let kv_heads = self.shape.kv_heads;
        let (cubes, dim) = self.device.cubes(tokens * kv_heads * row.vectors);
        // SAFETY: the tensors have `first + tokens` tokens, the cache has the slots of its table and
        // room for the tokens.
        unsafe {
            append::launch_unchecked(
                self.device.client(),
                cubes,
                dim,
                row.width / per_word(self.dtype),
                arg(k),
                arg(v),
                arg(&cache.geometry().table),
                arg(&cache.keys),
                arg(&cache.values),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                kv_heads as u32,
                row.vectors as u32,
            );
        }
    }
}
