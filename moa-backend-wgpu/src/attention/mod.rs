//! One call of `extend`: attention over the old caches and the new tokens, and the append.
//!
//! WebGPU kernels cannot follow pointers, and arrays of buffers are an extension; so each sequence with
//! several new tokens is a dispatch of its own. Those with one token share a dispatch, up to eight of them,
//! which branches where it loads (see `decode`). Nothing of a sequence's result can depend on the others.

mod check;
mod decode;
pub(crate) mod matrix_units;
mod schedule;
pub(crate) mod timing;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};

use crate::kernels::append::append;
use crate::kernels::attend::{Shape, attend};
use crate::kernels::blocks::Blocks;
use crate::kernels::merge::merge;
use crate::kernels::prefill::prefill;
use crate::kernels::words::narrow;
use crate::{Cache, Device, Dtype, MatrixUnits, Result, Tensor};

pub(crate) use check::check;
use decode::Decode;
use schedule::Step;
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
    let words = tensor.len() / dtype.per_word();
    let narrowed = device.alloc("new keys and values", words, 4)?;
    let (cubes, dim) = device.cubes(words);
    let (from, to) = (arg(tensor.handle()), arg(&narrowed));
    // SAFETY: there are that many pairs and words; head dimensions are even.
    unsafe {
        narrow::launch_unchecked(device.client(), cubes, dim, from, to, words as u32, dtype);
    }
    Ok(narrowed)
}

/// What all sequences of a call share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) device: &'a Device,
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    /// Element type of the caches.
    pub(crate) dtype: Dtype,
    pub(crate) out: &'a Tensor,
    pub(crate) lse: &'a Tensor,
    pub(crate) query_heads: usize,
    pub(crate) scale: f32,
    pub(crate) matrix_units: MatrixUnits,
}

/// How a call's sequences are cut, and room for what lies between kernels.
#[derive(Debug)]
pub(crate) struct Plan {
    decode: Option<Decode>,
    parts: Vec<Part>,
    scratch: Option<Scratch>,
    /// New keys and values in the words of the caches, where a part reads them: see [`words`].
    words: Option<[Handle; 2]>,
}

/// Sequences that are computed together.
#[derive(Debug)]
enum Part {
    One(Step),
    Run(decode::Run),
}

/// Partial results of one sequence after the other: outputs, then (maximum, sum) of each row.
#[derive(Debug)]
struct Scratch {
    out: Handle,
    stats: Handle,
}

impl Call<'_> {
    /// Everything of a call that can fail. Shapes were checked.
    pub(crate) fn plan(&self, caches: &[&mut Cache], tokens: &[usize]) -> Result<Plan> {
        let limits = Limits::of(self.device);
        let (head_dim, kv_heads) = (self.q.shape()[2], caches[0].layout().heads().len());
        let decode = Decode::new(self, &limits, head_dim, self.query_heads / kv_heads);
        let blocks = self.matrix_units.blocks(self.device, &limits, self.dtype, head_dim);
        let (mut parts, mut at, mut rows) = (Vec::new(), 0, 0);
        while at < caches.len() {
            if let Some(decode) = decode.filter(|_| tokens[at] == 1) {
                let run = decode.run(self, &caches[at..], &tokens[at..])?;
                at += run.sequences;
                parts.push(Part::Run(run));
                continue;
            }
            let (heads, len) = (&caches[at].geometry().heads, caches[at].len());
            let row = Row::of(head_dim);
            let step = Step::new(&limits, heads, len, tokens[at], self.query_heads, row, blocks)?;
            if step.splits > 1 {
                rows = rows.max(step.splits as usize * tokens[at] * self.query_heads);
            }
            parts.push(Part::One(step));
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
                words(self.device, self.k, self.dtype)?,
                words(self.device, self.v, self.dtype)?,
            ]),
            false => None,
        };
        Ok(Plan { decode, parts, scratch, words })
    }

    /// Queues the kernels and records the new tokens.
    pub(crate) fn run(&self, caches: &mut [&mut Cache], tokens: &[usize], plan: &Plan) {
        let (mut first, mut at) = (0, 0);
        for part in &plan.parts {
            let sequences = match (part, &plan.decode, &plan.words) {
                (Part::Run(run), Some(decode), _) => {
                    decode.launch(self, &caches[at..at + run.sequences], first, run);
                    run.sequences
                }
                (Part::One(step), _, Some(words)) => {
                    self.one(caches[at], first, tokens[at], step, plan.scratch.as_ref(), words);
                    1
                }
                // A plan has what its parts need.
                _ => 0,
            };
            for (cache, &tokens) in caches[at..].iter_mut().zip(&tokens[at..]).take(sequences) {
                cache.extent_mut().advance(tokens);
                first += tokens;
            }
            at += sequences;
        }
    }

    fn one(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        step: &Step,
        scratch: Option<&Scratch>,
        words: &[Handle; 2],
    ) {
        let row = Row::of(cache.head_dim());
        match scratch {
            _ if let Some(blocks) = step.blocks => {
                self.prefill(cache, first, tokens, blocks, step.tiles, words);
            }
            Some(scratch) if step.splits > 1 => {
                let results = [&scratch.out, &scratch.stats];
                self.attend(cache, first, tokens, row, step, words, results);
                self.merge(cache, first, tokens, row, step, scratch);
            }
            _ => {
                let results = [self.out.handle(), self.lse.handle()];
                self.attend(cache, first, tokens, row, step, words, results);
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
        step: &Step,
        [k, v]: &[Handle; 2],
        [out, stats]: [&Handle; 2],
    ) {
        let kv_heads = cache.layout().heads().len();
        let columns = row.vectors.div_ceil(step.tile.units_x);
        let (dtype, partial) = (self.dtype, step.splits > 1);
        let shape = Shape { tile: step.tile, columns, dtype, partial };
        // SAFETY: the tensors have `first + tokens` tokens of as many heads as is said, the cache
        // is filled up to its length, and the outputs have room as planned.
        unsafe {
            attend::launch_unchecked(
                self.device.client(),
                CubeCount::Static(step.tiles, kv_heads as u32, step.splits),
                CubeDim::new_1d(step.tile.units() as u32),
                row.width,
                row.width / self.dtype.per_word(),
                arg(self.q.handle()),
                arg(k),
                arg(v),
                arg(&cache.keys),
                arg(&cache.values),
                arg(&cache.geometry().table),
                arg(out),
                arg(stats),
                first as u32,
                tokens as u32,
                cache.len() as u32,
                self.query_heads as u32,
                kv_heads as u32,
                row.vectors as u32,
                self.scale,
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
        let kv_heads = cache.layout().heads().len();
        // SAFETY: as in `attend`; head dimensions are multiples of 8.
        unsafe {
            prefill::launch_unchecked(
                self.device.client(),
                CubeCount::Static(tiles, kv_heads as u32, 1),
                CubeDim::new_1d(blocks.units() as u32),
                arg(self.q.handle()),
                arg(k),
                arg(v),
                arg(&cache.keys),
                arg(&cache.values),
                arg(&cache.geometry().table),
                arg(self.out.handle()),
                arg(self.lse.handle()),
                first as u32,
                tokens as u32,
                cache.len() as u32,
                self.query_heads as u32,
                kv_heads as u32,
                self.scale,
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
        step: &Step,
        scratch: &Scratch,
    ) {
        let (cubes, dim) = self.device.cubes(tokens * self.query_heads * row.vectors);
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
                cache.len() as u32,
                self.query_heads as u32,
                cache.layout().heads().len() as u32,
                step.splits,
                row.vectors as u32,
            );
        }
    }

    fn append(&self, cache: &Cache, first: usize, tokens: usize, row: Row, [k, v]: &[Handle; 2]) {
        let kv_heads = cache.layout().heads().len();
        let (cubes, dim) = self.device.cubes(tokens * kv_heads * row.vectors);
        // SAFETY: the tensors have `first + tokens` tokens, the cache has the slots of its table and
        // room for the tokens.
        unsafe {
            append::launch_unchecked(
                self.device.client(),
                cubes,
                dim,
                row.width / self.dtype.per_word(),
                arg(k),
                arg(v),
                arg(&cache.geometry().table),
                arg(&cache.keys),
                arg(&cache.values),
                first as u32,
                tokens as u32,
                cache.len() as u32,
                kv_heads as u32,
                row.vectors as u32,
            );
        }
    }
}
