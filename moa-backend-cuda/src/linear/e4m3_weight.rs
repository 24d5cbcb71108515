//! Weights of 8-bit floats.

use std::ops::Range;
use std::sync::Arc;

use super::blas::Product;
use super::e4m3;
use crate::Operations;
use crate::arena::Memory;
use crate::graph::is_capturing;
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::{E4M3, OpArgs, OpKernels};
use crate::ops::{PIECE_BYTES, shaped};
use crate::{Device, Dtype, Error, Result, Tensor};

/// A linear layer's weight in e4m3, with one f32 factor for each output: a byte per element.
///
/// Activations are not rounded: their products are those of a weight in the 16-bit type that holds
/// the same numbers.
#[derive(Debug)]
pub struct E4m3Weight {
    device: Device,
    pub(super) bytes: Memory,
    pub(super) layout: Layout,
    /// f32 `[out]`.
    pub(super) scales: Tensor,
    pub(super) shape: [usize; 2],
}

/// How the bytes of a weight lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[out, in]`, without gaps: for the kernels that every GPU has, and for cuBLASLt.
    Rows,
    /// As `kernels/e4m3.cuh` says: for warpgroup instructions.
    Tiles,
}

impl E4m3Weight {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

/// Rows and columns of a tile.
pub(super) const TILE: usize = 64;

impl Layout {
    /// Rows that lie together.
    fn rows(self) -> usize {
        match self {
            Self::Rows => 1,
            Self::Tiles => TILE,
        }
    }

    /// Rows and columns that the memory of a weight has.
    fn size(self, [out, input]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Rows => [out, input],
            Self::Tiles => [out.next_multiple_of(TILE), input.next_multiple_of(TILE)],
        }
    }
}

/// Where a tile's row has 16 bytes of each of four lanes for its columns, as `kernels/e4m3.cuh` says.
fn pack(columns: &[u8; TILE], to: &mut [u8; TILE]) {
    for (step, columns) in columns.as_chunks::<16>().0.iter().enumerate() {
        for lane in 0..4 {
            let [front, back] = [2 * lane, 2 * lane + 8];
            let word = [columns[back], columns[front], columns[back + 1], columns[front + 1]];
            to[lane * 16 + step * 4..][..4].copy_from_slice(&word);
        }
    }
}

/// As in `kernels/e4m3.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct E4m3Args {
    x: DevicePointer,
    weight: DevicePointer,
    scales: DevicePointer,
    out: DevicePointer,
    x_stride: i64,
    out_stride: i64,
    rows: i32,
    n: i32,
    k: i32,
    wide: i32,
    accumulate: i32,
    settled: i32,
}

const _: () = assert!(size_of::<E4m3Args>() == 72);

/// A kernel of products of few rows for every GPU.
#[derive(Clone, Copy, Debug)]
struct Few {
    name: &'static str,
    /// Rows of `x` that a block takes.
    tokens: usize,
    /// Rows of the weight that it takes.
    block_rows: usize,
    shared_bytes: usize,
}

/// Bytes of a stretch of 64 elements of 4 pairs of warps: `groups` of 8 tokens, `tiles` of 32 weights.
const fn stretch_bytes(groups: usize, tiles: usize) -> usize {
    4 * (groups * 8 * 128 + tiles * 2048)
}

/// By the rows that they take; numbers as in `kernels/e4m3.cu`.
const FEW: [Few; 4] = [
    Few { name: E4M3[0], tokens: 8, block_rows: 32, shared_bytes: 6 * stretch_bytes(1, 1) },
    Few { name: E4M3[1], tokens: 16, block_rows: 64, shared_bytes: 4 * stretch_bytes(2, 2) },
    Few { name: E4M3[2], tokens: 32, block_rows: 64, shared_bytes: 3 * stretch_bytes(4, 2) },
    Few { name: E4M3[3], tokens: 64, block_rows: 64, shared_bytes: 4 * stretch_bytes(8, 2) },
];

impl Few {
    /// The kernel for a product of so many rows and outputs: all rows in one block, unless blocks are then
    /// too few for the device. Results are the same, bit for bit.
    fn choose(
        rows: usize,
        n: usize,
        shared_bytes: usize,
        processors: usize,
    ) -> Option<&'static Self> {
        let able = FEW.iter().take_while(|few| few.shared_bytes <= shared_bytes);
        let able = &FEW[..able.count()];
        let wide = able.iter().position(|few| few.tokens >= rows).unwrap_or(able.len().max(1) - 1);
        let mut fitting = able.iter().take(wide + 1).rev();
        let busy =
            |few: &&Self| 4 * few.grid(rows, n)[..2].iter().product::<usize>() >= 3 * processors;
        fitting.find(busy).or(able.first())
    }

    /// Blocks of the same weights follow each other, and find them in the L2 cache.
    fn grid(&self, rows: usize, n: usize) -> [usize; 3] {
        [rows.div_ceil(self.tokens), n.div_ceil(self.block_rows), 1]
    }
}

/// Rows of `x` from which on cuBLASLt is faster, although the weight is first widened in memory:
/// what that costs, five bytes of traffic for each weight, is then little beside the arithmetic.
pub(super) const MANY: usize = 129;

/// A part of a weight that is widened at once.
const WIDENED_BYTES: usize = 128 << 20;

impl Operations {
    /// A weight `[out, in]` from rows made piece by piece: `fill` is given elements and appends them,
    /// which are then rounded by [`e4m3::encode_row`].
    ///
    /// # Errors
    /// [`Error::NotFinite`] if an element is, [`Error::Argument`] unless `in` is a multiple of 16,
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn upload_e4m3(
        &self,
        shape: [usize; 2],
        mut fill: impl FnMut(Range<usize>, &mut Vec<f32>),
    ) -> Result<E4m3Weight> {
        const OP: &str = "Operations::upload_e4m3";
        let [out, input] = shape;
        let (layout, bytes) = self.e4m3_memory(OP, shape)?;
        let (mut values, mut scales) = (Vec::new(), Vec::with_capacity(out));
        let [_, width] = layout.size(shape);
        let mut encoded = vec![0; width];
        let piece = (PIECE_BYTES / width.max(1)).max(1).next_multiple_of(layout.rows());
        for start in (0..out).step_by(piece) {
            let rows = start..out.min(start + piece);
            values.clear();
            fill(rows.start * input..rows.end * input, &mut values);
            if values.len() != rows.len() * input {
                let expected = format!("{} elements", rows.len() * input);
                return Err(Error::argument(OP, "fill", expected, values.len()));
            }
            let mut failed = None;
            let to = bytes.address() + (start * width) as u64;
            self.stage(rows.len().next_multiple_of(layout.rows()) * width, to, |staged| {
                if !rows.len().is_multiple_of(layout.rows()) {
                    staged.fill(0);
                }
                for (row, values) in values.chunks(input).enumerate() {
                    match e4m3::encode_row(values, &mut encoded) {
                        Ok(scale) => scales.push(scale),
                        Err(error) => return failed = Some(error.in_row(start + row)),
                    }
                    if layout == Layout::Rows {
                        staged[row * width..][..width].copy_from_slice(&encoded);
                        continue;
                    }
                    let tiles = staged[row / TILE * TILE * width..].chunks_mut(TILE * TILE);
                    for (columns, tile) in encoded.as_chunks().0.iter().zip(tiles) {
                        pack(columns, &mut tile.as_chunks_mut().0[row % TILE]);
                    }
                }
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        scales.resize(out, 1.0);
        let scales = Tensor::from_f32(&self.device, &scales, &[out], Dtype::F32)?;
        Ok(E4m3Weight { device: self.device.clone(), bytes, layout, scales, shape })
    }

    /// [`random`](Self::random) numbers in e4m3.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if `amplitude` is not finite, [`Error::Argument`] unless `in` is a
    /// multiple of 16, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn random_e4m3(&self, shape: [usize; 2], amplitude: f32, seed: u32) -> Result<E4m3Weight> {
        const OP: &str = "random_e4m3";
        let [out, _] = shape;
        let scale = e4m3::encode_row(&[amplitude], &mut [0])?;
        let (layout, bytes) = self.e4m3_memory(OP, shape)?;
        let [rows, cols] = layout.size(shape);
        let args = OpArgs {
            out: bytes.address(),
            out_stride: cols as i64,
            rows: rows as i32,
            cols: cols as i32,
            eps: amplitude / scale,
            flag: seed as i32,
            ..OpArgs::default()
        };
        // SAFETY: the memory has this shape; all of it is on the device's stream.
        unsafe { self.e4m3_kernels()?.by_elements("randomise_e4m3", 16, &args) }?;
        let scales = Tensor::from_f32(&self.device, &vec![scale; out], &[out], Dtype::F32)?;
        Ok(E4m3Weight { device: self.device.clone(), bytes, layout, scales, shape })
    }

    /// Memory for a weight, and how it lies there.
    fn e4m3_memory(&self, op: &'static str, [out, input]: [usize; 2]) -> Result<(Layout, Memory)> {
        // Padded as well.
        let fits = |n: usize| n <= i32::MAX as usize / TILE * TILE;
        if !input.is_multiple_of(16) || !fits(input) || !fits(out) {
            let expected = "fewer than 2^31 rows of a multiple of 16 elements";
            return Err(Error::shape(op, "weight", expected, &[out, input]));
        }
        // cuBLASLt reads rows, and a tensor map has no empty axis.
        let layout = match self.has_wgmma && !self.rounds_activations && input > 0 {
            true => Layout::Tiles,
            false => Layout::Rows,
        };
        let [rows, cols] = layout.size([out, input]);
        Ok((layout, Memory::new(&self.device, "weight", rows.saturating_mul(cols))?))
    }

    pub(crate) fn e4m3_kernels(&self) -> Result<Arc<OpKernels>> {
        self.lazily(&self.e4m3, Source::E4m3, &E4M3)
    }

    /// `d (+)= x . weight^T`; shapes, types and places were checked.
    pub(crate) fn product_e4m3(
        &self,
        x: &Tensor,
        weight: &E4m3Weight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let (rows, [n, k]) = (x.shape()[0], weight.shape);
        if self.takes_e4m3(x, weight, d) {
            return self.product_of_e4m3(x, weight, d, accumulate);
        }
        // Rows of blocks are fewer than 2^16 in a grid.
        if rows >= MANY || !x.stride().is_multiple_of(8) || n.div_ceil(TILE) >= 1 << 15 {
            return self.widened_product(x, weight, d, accumulate);
        }
        if weight.layout == Layout::Tiles {
            return self.grouped_product(x, weight, d, accumulate);
        }
        let (room, processors) = (self.device.shared_bytes(), self.device.multiprocessors());
        let Some(few) = Few::choose(rows, n, room, processors) else {
            return self.widened_product(x, weight, d, accumulate);
        };
        let args = E4m3Args {
            x: x.pointer(),
            weight: weight.bytes.address(),
            scales: weight.scales.pointer(),
            out: d.pointer(),
            x_stride: x.stride() as i64,
            out_stride: d.stride() as i64,
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            wide: i32::from(d.dtype() == Dtype::F32),
            accumulate: i32::from(accumulate),
            settled: i32::from(is_capturing()),
        };
        let kernels = self.e4m3_kernels()?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch_shared(few.name, few.grid(rows, n), 256, few.shared_bytes, &args) }
    }

    /// As [`product_e4m3`](Self::product_e4m3), by cuBLASLt on widened parts of the weight.
    fn widened_product(
        &self,
        x: &Tensor,
        weight: &E4m3Weight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        const OP: &str = "widen_e4m3";
        let [n, k] = weight.shape;
        let [_, width] = weight.layout.size(weight.shape);
        let widen = match weight.layout {
            Layout::Rows => OP,
            Layout::Tiles => "widen_tiles_e4m3",
        };
        // Whole tiles of cuBLASLt's kernels, and of the weight.
        let part = (WIDENED_BYTES / (k * self.dtype.bytes()).max(1)).max(256) / 256 * 256;
        let kernels = self.e4m3_kernels()?;
        for start in (0..n).step_by(part) {
            let rows = part.min(n - start);
            let wide = Tensor::uninitialised(&self.device, OP, &[rows, k], self.dtype)?;
            let args = OpArgs {
                x: weight.bytes.address() + (start * width) as u64,
                w: weight.scales.pointer() + (start * size_of::<f32>()) as u64,
                x_stride: width as i64,
                ..shaped(&wide)
            };
            let product = Product {
                m: x.shape()[0],
                n: rows,
                k,
                a_stride: x.stride(),
                a_transposed: false,
                weight_stride: k,
                d_stride: d.stride(),
                transposed: true,
                input: self.dtype.into(),
                output: d.dtype(),
                accumulate,
            };
            let to = d.pointer() + (start * d.dtype().bytes()) as u64;
            // SAFETY: the shapes are checked; all of it is on the device's stream.
            unsafe {
                kernels.by_elements(widen, 16, &args)?;
                self.blas.run(product, x.pointer(), wide.pointer(), to)?;
            }
        }
        Ok(())
    }
}

/// Of the kernels that a source makes of its template.
#[cfg(test)]
pub(super) fn numbers(source: Source) -> Vec<Vec<usize>> {
    let lines = source.text().lines();
    lines
        .filter_map(|line| line.strip_prefix("PRODUCT(")?.strip_suffix(')'))
        .map(|numbers| numbers.split(", ").map(|n| n.parse().unwrap()).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_wide_enough_but_leave_no_device_idle() {
        let tokens = |rows, n, room, processors| {
            Few::choose(rows, n, room, processors).map(|few| few.tokens)
        };
        let hopper = 227 << 10;
        for (rows, expected) in [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (64, 64), (128, 64)] {
            assert_eq!(tokens(rows, 8192, hopper, 132), Some(expected), "{rows} rows");
        }
        // 64 blocks would be half of them.
        assert_eq!(tokens(64, 4096, hopper, 132), Some(32));
        assert_eq!(tokens(16, 4096, hopper, 132), Some(8));
        assert_eq!(tokens(64, 64, hopper, 132), Some(8));
        // Other GPUs have less shared memory, and none with too little has kernels.
        assert_eq!(tokens(64, 57344, 99 << 10, 128), Some(32));
        assert_eq!(tokens(1, 4096, 48 << 10, 16), None);
    }

    /// What is launched has the tile and the memory that the kernel was written for.
    #[test]
    fn products_of_few_rows_are_as_in_the_source() {
        let (text, kernels) = (Source::E4m3.text(), numbers(Source::E4m3));
        assert_eq!(kernels.len(), FEW.len());
        for (few, kernel) in FEW.iter().zip(&kernels) {
            let &[tokens, groups, tiles, stretches, stages, blocks] = &kernel[..] else { panic!() };
            assert_eq!(few.name, format!("e4m3_{tokens}"));
            assert_eq!([few.tokens, tokens], [8 * groups; 2]);
            assert_eq!(few.block_rows, 32 * tiles);
            assert_eq!(few.shared_bytes, stretches * stages * stretch_bytes(groups, tiles));
            // Of a Hopper multiprocessor's 228 KiB, each block costs one more.
            assert!(blocks * (few.shared_bytes + 1024) <= 228 << 10, "{}", few.name);
            // Of other GPUs' blocks, 99 KiB.
            assert!(few.shared_bytes <= 99 << 10 || tokens == 64, "{}", few.name);
            // The sums of three pairs of warps.
            assert!(few.shared_bytes >= 3 * 2 * 128 * 4 * tiles * groups, "{}", few.name);
        }
        for name in &E4M3[FEW.len()..] {
            assert!(text.contains(&format!(" {name}(const ")), "{name}");
        }
    }

    /// What the kernel takes for columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a step: bytes 1, 3, 0 and 2 of its word.
    #[test]
    fn columns_lie_where_fragments_want_them() {
        let columns: [u8; TILE] = std::array::from_fn(|column| column as u8);
        let mut packed = [0; TILE];
        pack(&columns, &mut packed);
        for step in 0..4 {
            for t in 0..4 {
                let word = &packed[t * 16 + step * 4..][..4];
                let first = (step * 16 + 2 * t) as u8;
                assert_eq!([word[1], word[3], word[0], word[2]], [0, 1, 8, 9].map(|i| first + i));
            }
        }
    }
}
