//! Weights in quantised blocks, as GGUF has them. Products round the activations to 15 bits, 32 at a time, and
//! are exact but for that and for sums in f32.

mod activations;
mod few;
mod formats;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "x86_64")]
mod narrow;
mod vector;

use self::activations::{Activations, Tile};
use self::formats::{Format, GROUP, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use self::vector::{Scalar, Vector};
use moa_core::BlockType;

use super::panels::{self, Side};
#[cfg(target_arch = "x86_64")]
use super::range;
use super::stretches::for_each_stretch;
#[cfg(target_arch = "x86_64")]
use super::tiles;
use crate::Result;
#[cfg(target_arch = "x86_64")]
use crate::pool;
use crate::pool::SharedMut;
#[cfg(target_arch = "x86_64")]
use crate::simd::allows_avx512;
#[cfg(target_arch = "x86_64")]
use crate::workspace::Workspace;

/// Rows of activations from which unpacking the weights is faster than reading them in their blocks.
const MANY: usize = 8;

const _: () = assert!(crate::FEW_ROWS < MANY && MANY <= crate::MANY_ROWS);

/// Rows of activations whose codes stay in near memory while the weights pass.
#[cfg(target_arch = "x86_64")]
const STRETCH_ROWS: usize = 512;

macro_rules! with_format {
    ($blocks:expr, $F:ident => $body:expr) => {
        match $blocks {
            BlockType::Q4_0 => with_format!(@ Q4_0, $F, $body),
            BlockType::Q4_1 => with_format!(@ Q4_1, $F, $body),
            BlockType::Q5_0 => with_format!(@ Q5_0, $F, $body),
            BlockType::Q5_1 => with_format!(@ Q5_1, $F, $body),
            BlockType::Q8_0 => with_format!(@ Q8_0, $F, $body),
            BlockType::Q4K => with_format!(@ Q4K, $F, $body),
            BlockType::Q5K => with_format!(@ Q5K, $F, $body),
            BlockType::Q6K => with_format!(@ Q6K, $F, $body),
        }
    };
    (@ $format:ident, $F:ident, $body:expr) => {{
        type $F = $format;
        $body
    }};
}

/// Elements of blocks from `start` on as f32, by the machine's best instructions: those of
/// [`BlockType::widen`], bit for bit.
///
/// # Panics
/// If `blocks` has not so many elements.
pub(super) fn widen_blocks(kind: BlockType, blocks: &[u8], start: usize, to: &mut [f32]) {
    widen_with(Level::best(), kind, blocks, start, to);
}

fn widen_with(level: Level, kind: BlockType, blocks: &[u8], start: usize, to: &mut [f32]) {
    let (len, size) = (kind.block_len(), kind.block_bytes());
    assert!((start + to.len()).div_ceil(len) * size <= blocks.len());
    with_format!(kind, F => level.widen::<F>(blocks, start, to));
}

/// A weight matrix of whole blocks in each row.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) kind: BlockType,
    pub(super) bytes: &'a [u8],
}

/// Widens some rows, at most as many as a tile has, and rounds them to bf16: a tile for each 32 columns.
///
/// # Safety
/// Needs AVX-512 with VNNI and BF16.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn fill_tiles(
    w: Blocks<'_>,
    rows: std::ops::Range<usize>,
    to: &mut [tiles::Tile],
) {
    // SAFETY: promised by the caller.
    with_format!(w.kind, F => unsafe { narrow::fill::<F>(w.bytes, rows, to) });
}

/// Products with several matrices `[n, k]`. Activations are rounded once, and threads are handed a few rows'
/// work once.
pub(super) fn forward_all(
    level: Level,
    x: &[f32],
    (m, k): (usize, usize),
    layers: &[(Blocks<'_>, usize, &SharedMut<'_, f32>)],
) -> Result<()> {
    if m * k == 0 || layers.is_empty() {
        return Ok(());
    }
    if m < MANY {
        return few_rows(level, x, (m, k), layers);
    }
    #[cfg(target_arch = "x86_64")]
    if level.unpacks() {
        let rounded = round(level, x, k, activations::TILE, layers)?;
        for (Blocks { kind, bytes }, n, out) in layers {
            let (_, x) = &rounded[rounded.iter().position(|(own, _)| own == kind).unwrap_or(0)];
            with_format!(*kind, F => many_rows::<F>(x, bytes, (m, *n, k), out))?;
        }
        return Ok(());
    }
    // Elsewhere products of floats are faster than two of bytes.
    let product = |(blocks, n, out): &(_, usize, &SharedMut<'_, f32>)| {
        panels::product(x, *blocks, Side::Forward, (m, *n, k), out)
    };
    layers.iter().try_for_each(product)
}

/// Rounded activations for each kind of blocks among some layers: what is added to codes and sums depends on
/// the format.
fn round(
    level: Level,
    x: &[f32],
    k: usize,
    side: usize,
    layers: &[(Blocks<'_>, usize, &SharedMut<'_, f32>)],
) -> Result<Vec<(BlockType, Activations)>> {
    let mut rounded: Vec<(BlockType, Activations)> = Vec::new();
    for (Blocks { kind, .. }, ..) in layers {
        if rounded.iter().all(|(known, _)| known != kind) {
            let own = with_format!(*kind, F => Activations::new::<F>(level, x, k / GROUP, side))?;
            rounded.push((*kind, own));
        }
    }
    Ok(rounded)
}

fn few_rows(
    level: Level,
    x: &[f32],
    (m, k): (usize, usize),
    layers: &[(Blocks<'_>, usize, &SharedMut<'_, f32>)],
) -> Result<()> {
    let rounded = round(level, x, k, 1, layers)?;
    let outputs: Vec<_> = layers.iter().map(|(_, n, out)| (*n, *out)).collect();
    for_each_stretch((m, k), &outputs, |layer, outputs, y| {
        let (Blocks { kind, bytes }, ..) = layers[layer];
        let row_bytes = k / kind.block_len() * kind.block_bytes();
        let w = &bytes[outputs.start * row_bytes..outputs.end * row_bytes];
        for (_, x) in rounded.iter().filter(|(known, _)| *known == kind) {
            with_format!(kind, F => level.few::<F>(x, w, y));
        }
    });
    Ok(())
}

/// Tasks are 16 weight rows and a stretch of activations. Needs a machine with VNNI.
#[cfg(target_arch = "x86_64")]
fn many_rows<F: Format>(
    x: &Activations,
    w: &[u8],
    (m, n, k): (usize, usize, usize),
    out: &SharedMut<'_, f32>,
) -> Result<()> {
    assert!(Level::has_vnni());
    let row_bytes = k / F::LEN * F::BYTES;
    let stretches = m.div_ceil(STRETCH_ROWS);
    pool::try_for_each(n.div_ceil(many::ROWS) * stretches, (m * n * k) as u64, |task| {
        let cols = range(task / stretches, many::ROWS, n);
        let rows = range(task % stretches, STRETCH_ROWS, m);
        let w = &w[cols.start * row_bytes..cols.end * row_bytes];
        Workspace::with(|workspace| {
            let scratch = workspace.parts(many::scratch(x.groups))?;
            // SAFETY: the machine was checked above, and each task has a block of its own.
            unsafe { many::many::<F>(x, w, scratch, rows, cols, n, out) };
            Ok(())
        })
    })
}

/// What a machine has for products of 8-bit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

/// Runs a generic kernel with the instructions of a level. The kernels are inlined into functions that are
/// compiled for them.
macro_rules! at_level {
    ($level:expr, $F:ident, $kernel:ident ($($arg:ident : $type:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<$F: Format>($($arg: $type),*) {
            // SAFETY: the caller has checked the machine.
            unsafe { $kernel::<vector::Avx2, $F>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        unsafe fn vnni<$F: Format>($($arg: $type),*) {
            // SAFETY: the caller has checked the machine.
            unsafe { $kernel::<vector::Vnni, $F>($($arg),*) }
        }
        // SAFETY: a level is only made on a machine that has it.
        unsafe {
            match $level {
                Level::Scalar => $kernel::<Scalar, $F>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::<$F>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                Level::Vnni => vnni::<$F>($($arg),*),
            }
        }
    }};
}

impl Level {
    /// The best of this machine.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if Self::has_vnni() {
                return Self::Vnni;
            }
            if Self::has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Scalar
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_vnni() -> bool {
        Self::has_avx2()
            && allows_avx512()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
    }

    /// Whether many rows are multiplied as integers.
    fn unpacks(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Vnni {
            return true;
        }
        false
    }

    fn few<F: Format>(self, x: &Activations, w: &[u8], y: &mut [f32]) {
        use few::few;
        at_level!(self, F, few(x: &Activations, w: &[u8], y: &mut [f32]));
    }

    fn fill<F: Format>(self, rows: &[f32], len: usize, to: Tile<'_>) {
        use activations::fill;
        at_level!(self, F, fill(rows: &[f32], len: usize, to: Tile<'_>));
    }

    fn widen<F: Format>(self, blocks: &[u8], start: usize, to: &mut [f32]) {
        at_level!(self, F, widen(blocks: &[u8], start: usize, to: &mut [f32]));
    }
}

/// Elements from `start` on.
///
/// # Safety
/// Needs the machine of `V`; `blocks` must have the elements.
#[inline(always)]
unsafe fn widen<V: Vector, F: Format>(blocks: &[u8], start: usize, to: &mut [f32]) {
    let end = start + to.len();
    let mut at = start;
    while at < end {
        let block = at / F::LEN;
        let own = &blocks[block * F::BYTES..(block + 1) * F::BYTES];
        // SAFETY: a whole block.
        let scales = unsafe { F::scales::<V>(own.as_ptr()) };
        while at < end && at / F::LEN == block {
            let group = at % F::LEN / GROUP;
            let mut codes = [0u8; GROUP];
            // SAFETY: as above.
            unsafe { V::store(F::codes::<V>(own.as_ptr(), group), codes.as_mut_ptr()) };
            let mut values = [0.0; GROUP];
            for (i, value) in values.iter_mut().enumerate() {
                let code = (i32::from(codes[i]) - F::OFFSET) as f32;
                *value = scales.steps[group][i / (GROUP / 2)] * code;
                if F::LEAST {
                    *value += scales.least[group];
                }
            }
            let from = at % GROUP;
            let count = (GROUP - from).min(end - at);
            to[at - start..at - start + count].copy_from_slice(&values[from..from + count]);
            at += count;
        }
    }
}

#[cfg(test)]
mod tests;
