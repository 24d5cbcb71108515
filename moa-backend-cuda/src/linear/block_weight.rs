//! Weights in quantised blocks.

use std::ops::Range;
use std::sync::Arc;

use moa_core::BlockType;

use super::blas::Product;
use super::block_row::Row;
use crate::arena::Memory;
use crate::graph::is_capturing;
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::{BLOCKS, EMBED_BLOCKS, OpArgs, OpKernels, PACK_BLOCKS, WIDEN_BLOCKS};
use crate::ops::{Indices, PIECE_BYTES, shaped};
use crate::{Device, Dtype, Error, Operations, Result, Tensor};

/// A linear layer's or embedding's weight in the quantised blocks of its file, in as many bytes but for what makes
/// up whole records of 16 rows and 256 columns.
///
/// Products of few rows multiply codes, which are integers, and are exact but for sums in f32. Those of many round the
/// weight to the 16-bit type first.
#[derive(Debug)]
pub struct BlockWeight {
    device: Device,
    /// Records `[out / 16, in / 256]`.
    bytes: Memory,
    kind: BlockType,
    shape: [usize; 2],
}

/// Rows and columns of a record.
pub(super) const RECORD: [usize; 2] = [16, 256];

pub(super) const fn record_bytes(kind: BlockType) -> usize {
    RECORD[0] * RECORD[1] / kind.block_len() * kind.block_bytes()
}

impl BlockWeight {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The kind of blocks.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        Self::bytes_of(self.kind, self.shape)
    }

    /// Bytes on a device of a weight of this kind and shape `[out, in]`.
    pub const fn bytes_of(kind: BlockType, [out, input]: [usize; 2]) -> u64 {
        (out.div_ceil(RECORD[0]) * input.div_ceil(RECORD[1]) * record_bytes(kind)) as u64
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn address(&self) -> DevicePointer {
        self.bytes.address()
    }

    /// Records of 16 rows.
    pub(super) fn records(&self) -> usize {
        self.shape[1].div_ceil(RECORD[1])
    }

    /// The kernels' number of the kind.
    fn number(&self) -> i32 {
        number(self.kind) as i32
    }
}

/// The place among all, by which kernels know a kind.
pub(super) fn number(kind: BlockType) -> usize {
    BlockType::ALL.iter().position(|other| *other == kind).unwrap_or(0)
}

/// As in `kernels/blocks.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BlockArgs {
    x: DevicePointer,
    weight: DevicePointer,
    out: DevicePointer,
    x_stride: i64,
    out_stride: i64,
    rows: i32,
    n: i32,
    k: i32,
    records: i32,
    wide: i32,
    accumulate: i32,
    settled: i32,
    padding: i32,
}

const _: () = assert!(size_of::<BlockArgs>() == 72);

/// Warps of a block, each with records of its own.
pub(crate) const WARPS: usize = 8;

/// Records that a warp has in memory, by the kind's number.
const STAGES: [usize; 8] = [3, 3, 3, 2, 2, 3, 2, 2];

/// Steps of a record of blocks of 256, as f32.
pub(crate) fn factors_bytes(kind: BlockType) -> usize {
    if kind.block_len() == 256 { 16 * 20 * 4 } else { 0 }
}

/// Shared memory of a product whose warps have so many records each.
fn shared_bytes(kind: BlockType) -> usize {
    WARPS * (STAGES[number(kind)] * record_bytes(kind) + factors_bytes(kind))
}

/// Tokens that a kernel takes, of those of each kind.
const TOKENS: [usize; 2] = [8, 16];

/// Rows of `x` from which on cuBLASLt is faster, although the weight is first widened in memory: 4 bytes of traffic
/// for each weight beside its own, against the blocks again for each 16 rows.
const MANY: usize = 65;

/// A part of a weight that is widened at once.
const WIDENED_BYTES: usize = 128 << 20;

impl Operations {
    /// A weight `[out, in]` from the blocks of its rows, made piece by piece: `fill` is given rows and where to put
    /// their blocks, one row after the other as they lie in files.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `in` is a multiple of the block's length, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn upload_blocks(
        &self,
        kind: BlockType,
        shape: [usize; 2],
        mut fill: impl FnMut(Range<usize>, &mut [u8]),
    ) -> Result<BlockWeight> {
        const OP: &str = "Operations::upload_blocks";
        let [out, input] = shape;
        let fits = |n: usize| i32::try_from(n).is_ok();
        if !input.is_multiple_of(kind.block_len()) || !fits(input) || !fits(out) {
            let len = kind.block_len();
            let expected = format!("fewer than 2^31 rows of a multiple of {len} elements ({kind})");
            return Err(Error::shape(OP, "weight", expected, &shape));
        }
        let bytes = usize::try_from(BlockWeight::bytes_of(kind, shape)).unwrap_or(usize::MAX);
        let bytes = Memory::new(&self.device, "weight", bytes)?;
        let weight = BlockWeight { device: self.device.clone(), bytes, kind, shape };
        let row_bytes = input / kind.block_len() * kind.block_bytes();
        let piece = (PIECE_BYTES / row_bytes.max(1) / RECORD[0]).max(1) * RECORD[0];
        let raw = Memory::new(&self.device, "blocks", piece.min(out) * row_bytes)?;
        let records = weight.records();
        let kernels = self.block_kernels()?;
        for start in (0..out).step_by(piece) {
            let rows = start..out.min(start + piece);
            let count = rows.len();
            self.stage(count * row_bytes, raw.address(), |staged| fill(rows, staged))?;
            let first = start / RECORD[0] * records * record_bytes(kind);
            let args = OpArgs {
                x: raw.address(),
                x_stride: row_bytes as i64,
                out: weight.bytes.address() + first as u64,
                rows: count as i32,
                cols: input as i32,
                flag: weight.number(),
                ..OpArgs::default()
            };
            let grid = [records, count.div_ceil(RECORD[0]), 1];
            // SAFETY: the memory has so many records; all of it is on the device's stream.
            unsafe { kernels.launch(PACK_BLOCKS, grid, 256, &args) }?;
        }
        Ok(weight)
    }

    fn block_kernels(&self) -> Result<Arc<OpKernels>> {
        self.lazily(&self.blocks, Source::Blocks, &BLOCKS)
    }

    /// The weight as a tensor of the operations' type.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is on another device, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn widen_blocks(&self, weight: &BlockWeight) -> Result<Tensor> {
        const OP: &str = "widen_blocks";
        let shape = self.weight_shape(OP, weight.into())?;
        let wide = Tensor::uninitialised(&self.device, OP, &shape, self.dtype)?;
        self.widen_rows(weight, 0, &wide)?;
        Ok(wide)
    }

    /// Rows of a weight from `first` on, as many as `wide` has.
    fn widen_rows(&self, weight: &BlockWeight, first: usize, wide: &Tensor) -> Result<()> {
        let args = OpArgs { y_stride: first as i64, ..self.elements(weight, wide) };
        // SAFETY: the caller has checked the shapes; all of it is on the device's stream.
        unsafe { self.by_units(WIDEN_BLOCKS, weight, &args) }
    }

    fn elements(&self, weight: &BlockWeight, out: &Tensor) -> OpArgs {
        OpArgs {
            x: weight.bytes.address(),
            x_stride: weight.records() as i64,
            eps: 1.0,
            flag: weight.number(),
            ..shaped(out)
        }
    }

    /// One thread for eight elements of whole records.
    ///
    /// # Safety
    /// As [`OpKernels::by_elements`].
    unsafe fn by_units(
        &self,
        name: &'static str,
        weight: &BlockWeight,
        args: &OpArgs,
    ) -> Result<()> {
        let rows = args.rows as usize;
        let y = rows.min(1 << 15);
        let grid = [(weight.records() * RECORD[1] / 8).div_ceil(256), y, rows.div_ceil(y.max(1))];
        // SAFETY: as the caller promises.
        unsafe { self.block_kernels()?.launch(name, grid, 256, args) }
    }

    /// [`embed`](Self::embed) from blocks.
    ///
    /// # Errors
    /// [`Error::Argument`] if an id is not a row of the table, or it is on another device;
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn embed_blocks(&self, table: &BlockWeight, ids: &[u32], factor: f32) -> Result<Tensor> {
        let ids = self.indices(ids.iter().map(|&id| id as usize), table.shape[0])?;
        // SAFETY: every id is a row of the table.
        unsafe { self.embed_blocks_at(table, &ids, factor) }
    }

    /// [`embed_blocks`](Self::embed_blocks) of ids that are on the device already.
    ///
    /// # Errors
    /// [`Error::Argument`] if the table is on another device, [`Error::OutOfMemory`], [`Error::Driver`].
    ///
    /// # Safety
    /// When the device comes to it, every id is a row of the table.
    pub unsafe fn embed_blocks_at(
        &self,
        table: &BlockWeight,
        ids: &Indices,
        factor: f32,
    ) -> Result<Tensor> {
        const OP: &str = "embed_blocks";
        let [_, hidden] = self.weight_shape(OP, table.into())?;
        let out = Tensor::uninitialised(&self.device, OP, &[ids.len(), hidden], Dtype::F32)?;
        let args = OpArgs { ids: ids.pointer(), eps: factor, ..self.elements(table, &out) };
        // SAFETY: as the caller promises; all of it is on the device's stream.
        unsafe { self.by_units(EMBED_BLOCKS, table, &args) }?;
        Ok(out)
    }

    /// `d (+)= x . weight^T`; shapes, types and places were checked.
    pub(crate) fn product_blocks(
        &self,
        x: &Tensor,
        weight: &BlockWeight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let (rows, number) = (x.shape()[0], number(weight.kind));
        if self.has_row_product(rows, weight) {
            return self.row_product(Row::Plain(x), weight, d, accumulate, false);
        }
        let [n, k] = weight.shape;
        let shared_bytes = shared_bytes(weight.kind);
        let tiles = n.div_ceil(RECORD[0]);
        // Rows of blocks are fewer than 2^16 in a grid, and tokens are counted by 32 bits.
        let fits = tiles < 1 << 16 && x.stride() < 1 << 24 && x.stride().is_multiple_of(8);
        if rows >= MANY || shared_bytes > self.device.shared_bytes() || !fits {
            return self.widened_blocks_product(x, weight, d, accumulate);
        }
        let size = usize::from(rows > TOKENS[0]);
        let args = BlockArgs {
            x: x.pointer(),
            weight: weight.bytes.address(),
            out: d.pointer(),
            x_stride: x.stride() as i64,
            out_stride: d.stride() as i64,
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            records: weight.records() as i32,
            wide: i32::from(d.dtype() == Dtype::F32),
            accumulate: i32::from(accumulate),
            settled: i32::from(is_capturing()),
            padding: 0,
        };
        let name = BLOCKS[2 * number + size];
        // Blocks of the same weights follow each other, and find them in the L2 cache.
        let grid = [rows.div_ceil(TOKENS[size]), tiles, 1];
        let kernels = self.block_kernels()?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch_shared(name, grid, WARPS * 32, shared_bytes, &args) }
    }

    /// As [`product_blocks`](Self::product_blocks), by cuBLASLt on widened parts of the weight.
    fn widened_blocks_product(
        &self,
        x: &Tensor,
        weight: &BlockWeight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let [n, k] = weight.shape;
        // Whole tiles of cuBLASLt's kernels.
        let part = (WIDENED_BYTES / (k * self.dtype.bytes()).max(1)).max(256) / 256 * 256;
        for start in (0..n).step_by(part) {
            let rows = part.min(n - start);
            let wide = Tensor::uninitialised(&self.device, "widen_blocks", &[rows, k], self.dtype)?;
            self.widen_rows(weight, start, &wide)?;
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
            unsafe { self.blas.run(product, x.pointer(), wide.pointer(), to) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is launched has the memory that the kernel was written for.
    #[test]
    fn products_are_as_in_the_source() {
        let text = Source::Blocks.text();
        let kernels: Vec<Vec<&str>> = text
            .lines()
            .filter_map(|line| line.strip_prefix("PRODUCT(")?.strip_suffix(')'))
            .map(|fields| fields.split(", ").collect())
            .collect();
        for kind in BlockType::ALL {
            assert!(kernels.iter().any(|fields| fields[0] == kind.name()), "{kind:?}");
        }
        // A type may have two lines: one for the GPUs before Hopper.
        for fields in &kernels {
            let &[name, upper, stages, blocks] = &fields[..] else { panic!("{fields:?}") };
            let kind = BlockType::ALL.into_iter().find(|kind| kind.name() == name).unwrap();
            assert_eq!(upper.to_lowercase(), name);
            let at = number(kind);
            assert_eq!(stages.parse(), Ok(STAGES[at]));
            for (size, tokens) in TOKENS.into_iter().enumerate() {
                assert_eq!(BLOCKS[2 * at + size], format!("{name}_{tokens}"));
            }
            let shared = shared_bytes(kind);
            // Of a Hopper multiprocessor's 228 KiB, each block costs one more; other GPUs' blocks have 99 KiB.
            assert!(blocks.parse::<usize>().unwrap() * (shared + 1024) <= 228 << 10, "{name}");
            assert!(shared <= 99 << 10, "{name}");
            // The sums of a warp.
            assert!(record_bytes(kind) * STAGES[at] >= 16 * 20 * 4, "{name}");
            // Copies of 16 bytes.
            assert!(record_bytes(kind).is_multiple_of(16), "{name}");
        }
        for name in [WIDEN_BLOCKS, EMBED_BLOCKS, PACK_BLOCKS] {
            assert!(text.contains(&format!(" {name}(const ")), "{name}");
        }
    }

    #[test]
    fn whole_records_are_as_large_as_their_blocks() {
        for kind in BlockType::ALL {
            let file = 4096 * 4096 / kind.block_len() * kind.block_bytes();
            assert_eq!(BlockWeight::bytes_of(kind, [4096, 4096]), file as u64);
        }
        assert_eq!(BlockWeight::bytes_of(BlockType::Q4_0, [17, 288]), 4 * 2304);
    }
}
