//! Many rows on machines that multiply tiles of bf16 (AMX): weights are brought to bf16 once for all rows, 32 outputs
//! at a time, and each output is summed over its whole row in the registers of tiles.

mod amx;
mod sources;

use half::bf16;
use pulp::x86::V4;

pub(super) use self::amx::Amx;
use self::sources::{Halves, Narrow, Source};
pub(super) use self::sources::{round, store};
use super::blocks::Blocks;
use super::{WeightData, WeightRef, range};
use crate::pool::{self, SharedMut};
use crate::simd::transpose::transpose;
use crate::workspace::Workspace;
use crate::{Result, Tensor};

/// Rows of a tile: outputs where it has weights and in the result, pairs of summands where it has activations.
pub(super) const SIDE: usize = 16;

/// Summands of a product of two tiles.
const DEPTH: usize = 2 * SIDE;

/// Tiles of weights, and of activations, that are multiplied with each other at a time.
const TOGETHER: usize = 2;

/// Outputs that are computed together.
const OUTPUTS: usize = TOGETHER * SIDE;

/// Bytes of widened weights that stay in near memory while all rows pass.
const NEAR: usize = 1 << 19;

/// Rows of a task, at least, where rows are cut too: each task lays out its weights anew.
const LEAST_ROWS: usize = 128;

/// One operand of a product: of weights `[output][summand]`, of activations `[pair of summands][row][2]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [[bf16; DEPTH]; SIDE]);

// SAFETY: an array of 16-bit floats, whose size is a multiple of the alignment.
unsafe impl bytemuck::Zeroable for Tile {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Tile {}

/// Sums `[activations][weights][output][row]` of [`TOGETHER`] tiles of both.
#[repr(C, align(64))]
pub(super) struct Sums([[[[f32; SIDE]; SIDE]; TOGETHER]; TOGETHER]);

/// Weights that are multiplied in tiles.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a> {
    Narrow(Narrow<'a>),
    Halves(Halves<'a>),
    Blocks(Blocks<'a>),
}

impl<'a> Weights<'a> {
    /// Those of a weight, if its activations may be rounded.
    pub(super) fn new(weight: &WeightRef<'a>) -> Option<Self> {
        let k = weight.cols;
        weight.narrow.then_some(match weight.data {
            WeightData::F32(_) => return None,
            WeightData::Bf16(w) => Self::Narrow(Narrow { w, k }),
            WeightData::F16(w) => Self::Halves(Halves { w, k }),
            WeightData::Blocks(kind, bytes) => Self::Blocks(Blocks { kind, bytes }),
        })
    }
}

/// Products with several matrices `[n, k]`. Activations are rounded once for all weights that take as many parts of them.
pub(super) fn forward_all<M: Multiply>(
    machine: M,
    x: &Tensor,
    layers: &[(Weights<'_>, usize, &SharedMut<'_, f32>)],
) -> Result<()> {
    if x.rows() * x.row_len() == 0 {
        return Ok(());
    }
    let mut rounded: [Option<Activations>; 2] = [None, None];
    for (weights, n, out) in layers {
        match weights {
            Weights::Narrow(w) => product(machine, x, *w, *n, &mut rounded, out)?,
            Weights::Halves(w) => product(machine, x, *w, *n, &mut rounded, out)?,
            Weights::Blocks(w) => product(machine, x, *w, *n, &mut rounded, out)?,
        }
    }
    Ok(())
}

fn product<M: Multiply, S: Source>(
    machine: M,
    x: &Tensor,
    w: S,
    n: usize,
    rounded: &mut [Option<Activations>; 2],
    out: &SharedMut<'_, f32>,
) -> Result<()> {
    let own = &mut rounded[S::PARTS - 1];
    let x = match own {
        Some(own) => own,
        None => own.insert(Activations::new(machine.simd(), x, S::PARTS)?),
    };
    x.product(machine, w, n, out)
}

/// A machine that multiplies tiles, and has AVX-512 with VNNI and BF16.
pub(super) trait Multiply: Copy + Send + Sync {
    /// What a thread holds while it multiplies.
    type Ready;

    fn simd(self) -> V4;

    fn ready(self) -> Self::Ready;

    /// Sums of `steps` products of each tile of weights with each of activations, from zero on. A step has as many
    /// tiles as weights, and activations, have parts; the product of two second parts is left out.
    ///
    /// # Safety
    /// So many tiles must be readable, of one step at least.
    unsafe fn products<S: Source>(
        ready: &Self::Ready,
        w: [*const Tile; TOGETHER],
        x: [*const Tile; TOGETHER],
        steps: usize,
        sums: &mut Sums,
    );
}

/// Rows of activations in bf16, or in two of them whose sum has 16 bits, in tiles: `[tile][step][part]`, with zeros
/// for what is missing.
pub(super) struct Activations {
    data: Tensor,
    /// Where the tiles begin in `data`, which is not aligned.
    first: usize,
    rows: usize,
    steps: usize,
    parts: usize,
}

impl Activations {
    /// `x` is `[m, k]`.
    pub(super) fn new(simd: V4, x: &Tensor, parts: usize) -> Result<Self> {
        let (rows, k) = (x.rows(), x.row_len());
        let steps = k.div_ceil(DEPTH);
        let (tiles, len) = (rows.div_ceil(SIDE), steps * parts);
        let floats = size_of::<Tile>() / size_of::<f32>();
        let mut data = Tensor::scratch(&[tiles * len * floats + SIDE])?;
        let first = data.data().as_ptr().align_offset(align_of::<Tile>());
        let all = bytemuck::cast_slice_mut(&mut data.data_mut()[first..][..tiles * len * floats]);
        let shared = SharedMut::new(all);
        pool::for_each(tiles, 4 * x.data().len() as u64, |tile| {
            // SAFETY: each task has a tile of rows of its own.
            let to = unsafe { shared.slice(tile * len, len) };
            let own = range(tile, SIDE, rows);
            let x = &x.data()[own.start * k..own.end * k];
            // SAFETY: the machine has AVX-512 BF16, as all that multiply tiles have.
            unsafe { sources::pack(simd, x, k, parts, to) };
        });
        Ok(Self { data, first, rows, steps, parts })
    }

    fn tiles(&self) -> &[Tile] {
        let len = self.rows.div_ceil(SIDE) * self.steps * self.parts;
        let floats = size_of::<Tile>() / size_of::<f32>();
        bytemuck::cast_slice(&self.data.data()[self.first..][..len * floats])
    }

    /// Products with `w`, of `n` outputs. Each is summed in order of its inputs, whatever the cut.
    pub(super) fn product<M: Multiply, S: Source>(
        &self,
        machine: M,
        w: S,
        n: usize,
        out: &SharedMut<'_, f32>,
    ) -> Result<()> {
        if n == 0 || self.rows == 0 {
            return Ok(());
        }
        assert!(self.parts == S::PARTS);
        let len = self.steps * S::PARTS;
        // Some tasks for each thread, so that none waits long for the others.
        let (panels, wanted) = (n.div_ceil(OUTPUTS), 4 * rayon::current_num_threads());
        let most = NEAR / (TOGETHER * len * size_of::<Tile>()).max(1);
        let each = (panels / wanted).clamp(1, most.max(1));
        let groups = panels.div_ceil(each);
        let parts = wanted.div_ceil(groups).min(self.rows / LEAST_ROWS).max(1);
        let rows = self.rows.div_ceil(parts).next_multiple_of(OUTPUTS);
        let parts = self.rows.div_ceil(rows);
        let work = self.rows * n * self.steps * DEPTH;
        pool::try_for_each(groups * parts, work as u64, |task| {
            let panels = range(task / parts, each, panels);
            let rows = range(task % parts, rows, self.rows);
            Workspace::with(|workspace| {
                let floats = panels.len() * TOGETHER * len * size_of::<Tile>() / size_of::<f32>();
                let [w_tiles] = workspace.parts([floats])?;
                let w_tiles: &mut [Tile] = bytemuck::cast_slice_mut(w_tiles);
                for (i, to) in w_tiles.chunks_exact_mut(len).enumerate() {
                    let side = panels.start * TOGETHER + i;
                    // SAFETY: the machine has AVX-512 BF16.
                    unsafe { w.fill((side * SIDE).min(n)..((side + 1) * SIDE).min(n), to) };
                }
                // SAFETY: the task has these outputs of these rows to itself.
                unsafe { self.panels::<M, S>(machine, w_tiles, panels.start, rows, n, out) };
                Ok(())
            })
        })
    }

    /// # Safety
    /// Needs AVX-512. No other code may write these outputs at the same time.
    #[target_feature(enable = "avx512f")]
    unsafe fn panels<M: Multiply, S: Source>(
        &self,
        machine: M,
        w: &[Tile],
        first: usize,
        rows: std::ops::Range<usize>,
        n: usize,
        out: &SharedMut<'_, f32>,
    ) {
        let (len, tiles) = (self.steps * S::PARTS, self.tiles());
        let (simd, ready) = (machine.simd(), machine.ready());
        let mut sums = Sums([[[[0.0; SIDE]; SIDE]; TOGETHER]; TOGETHER]);
        let mut y = [[0.0; OUTPUTS]; SIDE];
        for row in rows.clone().step_by(OUTPUTS) {
            // What is missing beside the last tile is that tile again.
            let last = (rows.end - 1) / SIDE;
            let x = [0, 1].map(|i| tiles[(row / SIDE + i).min(last) * len..][..len].as_ptr());
            for (panel, w) in w.chunks_exact(TOGETHER * len).enumerate() {
                let w = [0, 1].map(|i| w[i * len..][..len].as_ptr());
                // SAFETY: `steps` times the parts of both.
                unsafe { M::products::<S>(&ready, w, x, self.steps, &mut sums) };
                let start = (first + panel) * OUTPUTS;
                let width = OUTPUTS.min(n - start);
                for (i, sums) in sums.0.iter().enumerate() {
                    let own = row + i * SIDE..(row + (i + 1) * SIDE).min(rows.end);
                    if own.is_empty() {
                        break;
                    }
                    for (j, sums) in sums.iter().enumerate() {
                        let to = &mut y.as_flattened_mut()[j * SIDE..];
                        transpose(simd, sums.as_flattened(), SIDE, to, OUTPUTS);
                    }
                    for (row, y) in own.zip(&y) {
                        // SAFETY: promised by the caller.
                        let to = unsafe { out.slice(row * n + start, width) };
                        to.copy_from_slice(&y[..width]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
