//! One call of `extend`: attention over the old caches and the new tokens, and the append.
//!
//! Heads of one type are a group, with buffers and kernels of their own. Sequences next to each other whose heads have
//! the same types go through the groups together.
//!
//! WebGPU kernels cannot follow pointers, and arrays of buffers are an extension; so each sequence with
//! several new tokens is a dispatch of its own. Those with one token share a dispatch, up to eight of them,
//! which branches where it loads (see `decode`). Nothing of a sequence's result can depend on the others.

mod decode;
mod fresh;
pub(crate) mod matrix_units;
pub(crate) mod recorded;
mod schedule;
pub(crate) mod timing;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};
use moa_core::{Append, AttentionShape, CacheType, Dtype, ExtendInputs, Extended, check_extend};

use crate::cache::Group;
use crate::kernels::append::append;
use crate::kernels::attend::{Shape, attend};
use crate::kernels::blocks::Blocks;
use crate::kernels::codes::row_words;
use crate::kernels::merge::merge;
use crate::kernels::prefill::prefill;
use crate::kernels::scores::{SINK_UNITS, add_sinks};
use crate::kernels::words::{narrow, per_word};
use crate::{Cache, Device, Error, MatrixUnits, Result, Tensor};

use decode::Decode;
use fresh::{Fresh, is_narrow};
use schedule::Cut;
pub(crate) use schedule::{Limits, Row, square};

const OP: &str = "extend";

/// A buffer as a kernel's argument. Kernels that count by themselves need no length.
pub(crate) fn arg(handle: &Handle) -> BufferArg {
    let elements = (handle.size_in_used() / 4) as usize;
    // SAFETY: that many elements of 4 bytes are in the buffer.
    unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
}

/// A cube for each of so many rows, along two axes where one is too short.
pub(crate) fn grid(device: &Device, count: usize) -> CubeCount {
    let along_x = count.min(Limits::of(device).cubes as usize);
    CubeCount::Static(along_x as u32, count.div_ceil(along_x.max(1)) as u32, 1)
}

/// A tensor's elements in words of this type.
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
    let mut jobs = Vec::new();
    let (mut at, mut first) = (0, 0);
    while let Some(Append { cache, .. }) = batch.get(at) {
        let alike = batch[at..].iter().take_while(|append| append.cache.is_like(cache)).count();
        let sequences = at..at + alike;
        for (group, Group { own, .. }) in cache.groups().iter().enumerate() {
            let (own, out, lse) = (*own, &out, &lse);
            let call = Call { device, inputs, shape, group, own, out, lse, matrix_units };
            let schedule = call.schedule(&batch[sequences.clone()])?;
            jobs.push((call, schedule, sequences.clone(), first));
        }
        first += batch[sequences].iter().map(|append| append.tokens).sum::<usize>();
        at += alike;
    }
    for (call, schedule, sequences, first) in &jobs {
        call.run(&batch[sequences.clone()], schedule, *first);
    }
    if let Some(sinks) = inputs.scores.sinks {
        bring_sinks(device, &shape, &out, &lse, sinks);
    }
    for Append { cache, tokens } in batch {
        cache.state_mut().append(*tokens)?;
    }
    Ok(Extended { out, lse: inputs.lse.then_some(lse) })
}

/// Queues the kernel that brings learned sinks to what all others of a call have made: they have no part in the sums
/// over keys, and so no buffer in kernels that have few to spare.
fn bring_sinks(
    device: &Device,
    shape: &AttentionShape,
    out: &Tensor,
    lse: &Tensor,
    sinks: &Tensor,
) {
    let rows = shape.tokens * shape.query_heads;
    // SAFETY: the output and its log-sum-exps have these rows, the sinks are one for each query head.
    unsafe {
        add_sinks::launch_unchecked(
            device.client(),
            grid(device, rows),
            CubeDim::new_1d(SINK_UNITS as u32),
            arg(out.handle()),
            arg(lse.handle()),
            arg(sinks.handle()),
            rows as u32,
            shape.query_heads as u32,
            shape.head_dim as u32,
        );
    }
}

/// Everything about a call that can be wrong.
fn check(
    device: &Device,
    batch: &[Append<'_, Cache>],
    inputs: &ExtendInputs<'_, Tensor>,
) -> Result<AttentionShape> {
    let shape = check_extend(batch, inputs, Tensor::shape)?;
    let sinks = inputs.scores.sinks.map(|sinks| ("sinks", sinks));
    let feedback = inputs.key_feedback.map(|feedback| ("key_feedback", feedback));
    let tensors = [("q", inputs.q), ("k", inputs.k), ("v", inputs.v)];
    for (what, tensor) in tensors.into_iter().chain(sinks).chain(feedback) {
        if !tensor.device().is(device) {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    for Append { cache, .. } in batch {
        if !cache.device().is(device) {
            return Err(Error::argument(OP, "cache", "on the backend's device", "on another"));
        }
    }
    Ok(shape)
}

/// What sequences whose heads have the same types share, of the heads of one type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) device: &'a Device,
    pub(crate) inputs: &'a ExtendInputs<'a, Tensor>,
    pub(crate) shape: AttentionShape,
    /// Number of the heads' group in the caches.
    pub(crate) group: usize,
    /// How they hold keys and values.
    pub(crate) own: CacheType,
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
    /// New rows as the caches hold them, where a part reads them.
    fresh: Option<Fresh>,
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
        let head_dim = self.shape.head_dim;
        let decode = Decode::new(self, &limits);
        let blocks = self.matrix_units.blocks(self.device, &limits, self.own, head_dim);
        let (mut parts, mut at, mut rows) = (Vec::new(), 0, 0);
        while let Some(Append { cache, tokens }) = batch.get(at) {
            if let Some(decode) = decode.filter(|_| *tokens == 1) {
                let run = decode.run(self, &batch[at..])?;
                at += run.sequences;
                parts.push(Part::Run(run));
                continue;
            }
            let (heads, len) = (&cache.groups()[self.group].heads, cache.as_ref().len());
            let (row, own_heads) = (Row::of(head_dim), heads.len() * self.shape.group());
            let cut = Cut::new(&limits, heads, len, *tokens, own_heads, row, blocks)?;
            if cut.splits > 1 {
                rows = rows.max(cut.splits as usize * *tokens * own_heads);
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
        let read = parts.iter().any(|part| matches!(part, Part::One(_))) || is_narrow(self.own);
        let fresh = if read { Some(Fresh::new(self)?) } else { None };
        Ok(Schedule { decode, parts, scratch, fresh })
    }

    /// Queues the kernels. The sequences' first token is `first`, and there is room for the new ones.
    fn run(&self, batch: &[Append<'_, Cache>], schedule: &Schedule, first: usize) {
        let (mut next, mut at) = (first, 0);
        for part in &schedule.parts {
            let sequences = match (part, &schedule.decode, &schedule.fresh) {
                (Part::Run(run), Some(decode), fresh) => {
                    let run_batch = &batch[at..at + run.sequences];
                    match fresh.as_ref().filter(|_| is_narrow(self.own)) {
                        Some(fresh) => decode.launch(self, run_batch, next, run, fresh),
                        // Decode rounds these itself.
                        None => decode.launch(self, run_batch, next, run, &Fresh::raw(self)),
                    }
                    run.sequences
                }
                (Part::One(cut), _, Some(fresh)) => {
                    let Append { cache, tokens } = &batch[at];
                    self.one(cache, next, *tokens, cut, schedule.scratch.as_ref(), fresh);
                    1
                }
                // A schedule has what its parts need.
                _ => 0,
            };
            next += batch[at..at + sequences].iter().map(|append| append.tokens).sum::<usize>();
            at += sequences;
        }
        if let Some(Append { cache, .. }) = batch.first() {
            let group = &cache.groups()[self.group];
            self.rotate_back(&group.table, group.heads.len(), first, next - first);
        }
    }

    fn one(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        cut: &Cut,
        scratch: Option<&Scratch>,
        fresh: &Fresh,
    ) {
        let row = Row::of(self.shape.head_dim);
        match scratch {
            _ if let Some(blocks) = cut.blocks => {
                self.prefill(cache, first, tokens, blocks, cut.tiles, fresh);
            }
            Some(scratch) if cut.splits > 1 => {
                let results = [&scratch.out, &scratch.stats];
                self.attend(cache, first, tokens, row, cut, fresh, results);
                self.merge(cache, first, tokens, row, cut, scratch);
            }
            _ => {
                let results = [self.out.handle(), self.lse.handle()];
                self.attend(cache, first, tokens, row, cut, fresh, results);
            }
        }
        self.append(cache, first, tokens, row, fresh);
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        row: Row,
        cut: &Cut,
        fresh: &Fresh,
        [out, stats]: [&Handle; 2],
    ) {
        let (group, store) = (&cache.groups()[self.group], cache.store(self.group));
        let columns = row.vectors.div_ceil(cut.tile.units_x);
        let (own, partial) = (self.own, cut.splits > 1);
        let has_cap = self.has_cap();
        let shape = Shape { tile: cut.tile, columns, own, partial, has_cap };
        // SAFETY: the tensors have `first + tokens` tokens of as many heads as is said, the cache
        // is filled up to its length, and the outputs have room as planned.
        unsafe {
            attend::launch_unchecked(
                self.device.client(),
                CubeCount::Static(cut.tiles, group.heads.len() as u32, cut.splits),
                CubeDim::new_1d(cut.tile.units() as u32),
                row.width,
                self.width(row),
                arg(&fresh.q),
                arg(&fresh.k),
                arg(&fresh.v),
                arg(&store.keys),
                arg(&store.values),
                arg(&group.table),
                arg(out),
                arg(stats),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                self.shape.kv_heads as u32,
                row.vectors as u32,
                self.scale(),
                self.cap(),
                fresh.scales,
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
        fresh: &Fresh,
    ) {
        let (group, store) = (&cache.groups()[self.group], cache.store(self.group));
        // SAFETY: as in `attend`; head dimensions are multiples of 8.
        unsafe {
            prefill::launch_unchecked(
                self.device.client(),
                CubeCount::Static(tiles, group.heads.len() as u32, 1),
                CubeDim::new_1d(blocks.units() as u32),
                arg(&fresh.q),
                arg(&fresh.k),
                arg(&fresh.v),
                arg(&store.keys),
                arg(&store.values),
                arg(&group.table),
                arg(self.out.handle()),
                arg(self.lse.handle()),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                self.shape.kv_heads as u32,
                self.inputs.scores.scale,
                self.cap(),
                blocks,
                self.has_cap(),
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
        let group = &cache.groups()[self.group];
        let rows = tokens * group.heads.len() * self.shape.group();
        let (cubes, dim) = self.device.cubes(rows * row.vectors);
        // SAFETY: as in `attend`, which wrote the partial results.
        unsafe {
            merge::launch_unchecked(
                self.device.client(),
                cubes,
                dim,
                row.width,
                arg(&scratch.out),
                arg(&scratch.stats),
                arg(&group.table),
                arg(self.out.handle()),
                arg(self.lse.handle()),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.query_heads as u32,
                self.shape.kv_heads as u32,
                group.heads.len() as u32,
                cut.splits,
                row.vectors as u32,
            );
        }
    }

    /// Words of a row's vector where elements are whole, else one.
    fn width(&self, row: Row) -> usize {
        self.own.dtype().map_or(1, |dtype| row.width / per_word(dtype))
    }

    fn append(&self, cache: &Cache, first: usize, tokens: usize, row: Row, fresh: &Fresh) {
        let (group, store) = (&cache.groups()[self.group], cache.store(self.group));
        let (heads, width) = (group.heads.len(), self.width(row));
        let vectors = |rows| row_words(rows, self.shape.head_dim) / width;
        let [key_vectors, value_vectors] = [self.own.keys(), self.own.values()].map(vectors);
        let has_scales = is_narrow(self.own);
        let columns = key_vectors + value_vectors + usize::from(has_scales);
        let (cubes, dim) = self.device.cubes(tokens * heads * columns);
        // SAFETY: the tensors have `first + tokens` tokens, the cache has the slots of its table and
        // room for the tokens.
        unsafe {
            append::launch_unchecked(
                self.device.client(),
                cubes,
                dim,
                width,
                arg(&fresh.k),
                arg(&fresh.v),
                arg(&group.table),
                arg(&store.keys),
                arg(&store.values),
                first as u32,
                tokens as u32,
                cache.as_ref().len() as u32,
                self.shape.kv_heads as u32,
                heads as u32,
                key_vectors as u32,
                value_vectors as u32,
                fresh.scales,
                has_scales,
            );
        }
    }
}
