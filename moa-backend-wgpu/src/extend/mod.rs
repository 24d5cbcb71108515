//! One call of `extend`: sequence by sequence, attention over the old cache and the new tokens, then
//! the append.
//!
//! WebGPU kernels cannot follow pointers, and arrays of buffers are an extension; so each sequence
//! of a batch is a dispatch of its own. Nothing of a sequence's result can depend on the others.

mod check;
mod plan;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};

use crate::kernels::append::append;
use crate::kernels::attend::{Shape, attend};
use crate::kernels::fragments::Blocks;
use crate::kernels::merge::merge;
use crate::kernels::prefill::prefill;
use crate::kernels::words::narrow;
use crate::{Cache, Device, Dtype, MatrixUnits, Result, Tensor};

pub(crate) use check::check;
use plan::Step;
pub(crate) use plan::{Limits, Row, square};

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
    /// New keys in the words of the cache: see [`words`].
    pub(crate) k: &'a Handle,
    /// New values, the same.
    pub(crate) v: &'a Handle,
    pub(crate) dtype: Dtype,
    pub(crate) out: &'a Tensor,
    pub(crate) lse: &'a Tensor,
    pub(crate) query_heads: usize,
    pub(crate) scale: f32,
    pub(crate) matrix_units: MatrixUnits,
}

/// How a call's sequences are cut, and room for partial results.
#[derive(Debug)]
pub(crate) struct Plan {
    steps: Vec<Step>,
    scratch: Option<Scratch>,
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
        let head_dim = self.q.shape()[2];
        let blocks = self.matrix_units.blocks(self.device, &limits, self.dtype, head_dim);
        let step = |(cache, &tokens): (&&mut Cache, &usize)| {
            let (heads, row) = (&cache.geometry().heads, Row::of(cache.head_dim()));
            Step::new(&limits, heads, cache.len(), tokens, self.query_heads, row, blocks)
        };
        let steps = caches.iter().zip(tokens).map(step).collect::<Result<Vec<_>>>()?;
        let rows = |(step, tokens): (&Step, &usize)| match step.splits {
            1 => 0,
            splits => splits as usize * tokens * self.query_heads,
        };
        let scratch = match steps.iter().zip(tokens).map(rows).max() {
            None | Some(0) => None,
            Some(rows) => {
                let elements = rows.saturating_mul(self.q.shape()[2]);
                let out = self.device.alloc("partial results", elements, 4)?;
                Some(Scratch { out, stats: self.device.alloc("partial results", 2 * rows, 4)? })
            }
        };
        Ok(Plan { steps, scratch })
    }

    /// Queues the kernels and records the new tokens.
    pub(crate) fn run(&self, caches: &mut [&mut Cache], tokens: &[usize], plan: &Plan) {
        let mut first = 0;
        for ((cache, &tokens), step) in caches.iter_mut().zip(tokens).zip(&plan.steps) {
            let row = Row::of(cache.head_dim());
            match &plan.scratch {
                Some(scratch) if step.splits > 1 => {
                    self.attend(cache, first, tokens, row, step, &scratch.out, &scratch.stats);
                    self.merge(cache, first, tokens, row, step, scratch);
                }
                _ if let Some(blocks) = step.blocks => {
                    self.prefill(cache, first, tokens, blocks, step.tiles);
                }
                _ => {
                    let (out, lse) = (self.out.handle(), self.lse.handle());
                    self.attend(cache, first, tokens, row, step, out, lse);
                }
            }
            self.append(cache, first, tokens, row);
            cache.extent_mut().advance(tokens);
            first += tokens;
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        cache: &Cache,
        first: usize,
        tokens: usize,
        row: Row,
        step: &Step,
        out: &Handle,
        stats: &Handle,
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
                arg(self.k),
                arg(self.v),
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

    fn prefill(&self, cache: &Cache, first: usize, tokens: usize, blocks: Blocks, tiles: u32) {
        let kv_heads = cache.layout().heads().len();
        // SAFETY: as in `attend`; head dimensions are multiples of 8.
        unsafe {
            prefill::launch_unchecked(
                self.device.client(),
                CubeCount::Static(tiles, kv_heads as u32, 1),
                CubeDim::new_1d(blocks.units() as u32),
                arg(self.q.handle()),
                arg(self.k),
                arg(self.v),
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

    fn append(&self, cache: &Cache, first: usize, tokens: usize, row: Row) {
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
                arg(self.k),
                arg(self.v),
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
