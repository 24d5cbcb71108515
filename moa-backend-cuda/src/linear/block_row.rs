//! Products of one row with weights in quantised blocks, and what stands before and after them in a layer.

use moa_core::BlockType;

use super::Weight;
use super::block_weight::{BlockWeight, RECORD, WARPS, factors_bytes, number, record_bytes};
use crate::graph::is_capturing;
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::BLOCKS_ROW;
use crate::ops::{check_dtype, check_shape};
use crate::{Dtype, Error, Operations, Result, Tensor};

/// As in `kernels/blocks_row.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RowArgs {
    x: DevicePointer,
    norm: DevicePointer,
    weight: DevicePointer,
    out: DevicePointer,
    n: i32,
    k: i32,
    records: i32,
    eps: f32,
    wide: i32,
    accumulate: i32,
    gated: i32,
    settled: i32,
}

const _: () = assert!(size_of::<RowArgs>() == 64);

/// Stages that a warp has in memory, and tiles of which each holds a record, by the kind's number.
const STAGES: [[usize; 2]; 8] = [[2, 2], [4, 1], [4, 1], [3, 1], [2, 1], [4, 1], [3, 1], [3, 1]];

/// Tiles whose sums wait in shared memory until all warps have theirs.
const CHUNK: usize = 16;

/// Tiles of a block from which on a multiprocessor takes two blocks, which hide each other's waits: of fewer, one with
/// two would still be at work when the others are done.
const MANY_TILES: usize = 16;

/// Shared memory of a product with rows of so many records.
fn shared_bytes(kind: BlockType, records: usize) -> usize {
    let sums = if kind == BlockType::Q6K { 2 } else { 1 } * 16;
    let row = records * (RECORD[1] * 2 + RECORD[1] / 32 * sums);
    let [stages, pair] = STAGES[number(kind)];
    let factors = match (kind.block_len(), has_least(kind)) {
        (256, _) => factors_bytes(kind),
        (_, true) => 1024,
        (_, false) => 512,
    };
    let records = WARPS * pair * (stages * record_bytes(kind) + factors);
    records + row + 32 * 4 + CHUNK * (WARPS + 1) * 16 * 4
}

/// Whether its blocks have least elements.
fn has_least(kind: BlockType) -> bool {
    matches!(kind, BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K)
}

/// What a row is before it is multiplied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    /// Of the operations' type.
    Plain(&'a Tensor),
    /// f32, to be normed with this weight and eps.
    Normed(&'a Tensor, &'a Tensor, f32),
}

impl Operations {
    /// Whether there is memory for [`row_product`](Self::row_product).
    pub(crate) fn has_row_product(&self, rows: usize, weight: &BlockWeight) -> bool {
        rows == 1 && shared_bytes(weight.kind(), weight.records()) <= self.device.shared_bytes()
    }

    /// `d (+)= x . weight^T` of one row, or silu of the first half of it times the second half; shapes, types and
    /// places were checked.
    pub(crate) fn row_product(
        &self,
        row: Row<'_>,
        weight: &BlockWeight,
        d: &Tensor,
        accumulate: bool,
        gated: bool,
    ) -> Result<()> {
        let [n, k] = weight.shape();
        let (x, norm, eps) = match row {
            Row::Plain(x) => (x, 0, 0.0),
            Row::Normed(x, norm, eps) => (x, norm.pointer(), eps),
        };
        let args = RowArgs {
            x: x.pointer(),
            norm,
            weight: weight.address(),
            out: d.pointer(),
            n: n as i32,
            k: k as i32,
            records: weight.records() as i32,
            eps,
            wide: i32::from(d.dtype() == Dtype::F32),
            accumulate: i32::from(accumulate),
            gated: i32::from(gated),
            settled: i32::from(is_capturing()),
        };
        let kind = weight.kind();
        let tiles = n.div_ceil(RECORD[0]) / if gated { 2 } else { 1 };
        let mut shared = shared_bytes(kind, weight.records());
        let multiprocessors = self.device.multiprocessors();
        let blocks = if tiles >= 2 * MANY_TILES * multiprocessors { 2 } else { 1 };
        let grid = [tiles.min(blocks * multiprocessors), 1, 1];
        if accumulate {
            // So much that a multiprocessor does not take two blocks: where one becomes free first, it would, and
            // others would have none. Other products start beside what they follow, with room for one block each.
            shared = shared.max((self.device.shared_bytes() + 1024) / 2 - 1024 + 128);
        }
        let kernels = self.lazily(&self.blocks_row, Source::BlocksRow, &BLOCKS_ROW)?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch_shared(BLOCKS_ROW[number(kind)], grid, WARPS * 32, shared, &args) }
    }

    /// [`linears`](Self::linears) of [`rms_norm`](Self::rms_norm): one kernel for each weight in blocks where `x` has one
    /// row, with the same result to the bit.
    ///
    /// # Errors
    /// As these.
    pub fn normed_linears(
        &self,
        x: &Tensor,
        (norm, eps): (&Tensor, f32),
        weights: &[Weight<'_>],
        bias: Option<&Tensor>,
        output: Dtype,
    ) -> Result<Tensor> {
        const OP: &str = "normed_linears";
        let Some(blocks) = self.row_blocks(x, weights) else {
            return self.linears(&self.rms_norm(x, norm, eps)?, weights, bias, output);
        };
        let out = weights.iter().map(|weight| Ok(self.weight_shape(OP, *weight)?[0]));
        let out = out.sum::<Result<usize>>()?;
        self.check_normed(OP, x, norm, &blocks)?;
        let y = Tensor::uninitialised(&self.device, OP, &[1, out], output)?;
        self.check_output(OP, &y)?;
        let mut start = 0;
        for weight in blocks {
            let [own, _] = weight.shape();
            let part = y.columns(start..start + own)?;
            self.row_product(Row::Normed(x, norm, eps), weight, &part, false, false)?;
            start += own;
        }
        self.add_bias(&y, bias)?;
        Ok(y)
    }

    /// [`swiglu`](Self::swiglu) of both halves of the outputs of `weights` on [`rms_norm`](Self::rms_norm): one kernel where
    /// `x` has one row and there is one weight, in blocks, with the same result to the bit.
    ///
    /// # Errors
    /// As these, [`Error::Argument`] if there are not two halves.
    pub fn normed_swiglu(
        &self,
        x: &Tensor,
        (norm, eps): (&Tensor, f32),
        weights: &[Weight<'_>],
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "normed_swiglu";
        if let (Some(blocks), None) = (self.row_blocks(x, weights), bias)
            && let &[weight] = &blocks[..]
            && weight.shape()[0].is_multiple_of(2 * RECORD[0])
        {
            let [both, _] = self.weight_shape(OP, weight.into())?;
            self.check_normed(OP, x, norm, &blocks)?;
            let y = Tensor::uninitialised(&self.device, OP, &[1, both / 2], self.dtype)?;
            self.row_product(Row::Normed(x, norm, eps), weight, &y, false, true)?;
            return Ok(y);
        }
        let y = self.normed_linears(x, (norm, eps), weights, bias, self.dtype)?;
        let both = y.row_len();
        if both % 2 != 0 {
            return Err(Error::argument(OP, "weights", "an even number of outputs", both));
        }
        self.swiglu(&y.columns(0..both / 2)?, &y.columns(both / 2..both)?)
    }

    /// The weights, where all are in blocks that have products of one row and `x` is one.
    fn row_blocks<'w>(&self, x: &Tensor, weights: &[Weight<'w>]) -> Option<Vec<&'w BlockWeight>> {
        let of = |weight: &Weight<'w>| match *weight {
            Weight::Blocks(weight) if self.has_row_product(x.shape()[0], weight) => Some(weight),
            _ => None,
        };
        if weights.is_empty() {
            return None;
        }
        weights.iter().map(of).collect()
    }

    fn check_normed(
        &self,
        op: &'static str,
        x: &Tensor,
        norm: &Tensor,
        weights: &[&BlockWeight],
    ) -> Result<()> {
        check_dtype(op, "x", x, Dtype::F32)?;
        self.check_rows(op, "x", x)?;
        for weight in weights {
            check_shape(op, "x", x, &[1, weight.shape()[1]])?;
        }
        self.check_vector(op, "weight", norm, x.row_len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is launched has the memory that the kernel was written for.
    #[test]
    fn products_are_as_in_the_source() {
        let text = Source::BlocksRow.text();
        let kernels: Vec<Vec<&str>> = text
            .lines()
            .filter_map(|line| line.strip_prefix("PRODUCT(")?.strip_suffix(')'))
            .map(|fields| fields.split(", ").collect())
            .collect();
        assert_eq!(kernels.len(), BlockType::ALL.len());
        for kind in BlockType::ALL {
            let fields = kernels.iter().find(|fields| fields[0] == kind.name()).unwrap();
            let at = number(kind);
            assert_eq!(fields[1].to_lowercase(), kind.name());
            assert_eq!([fields[2].parse(), fields[3].parse()], STAGES[at].map(Ok));
            assert_eq!(BLOCKS_ROW[at], format!("{}_1", kind.name()));
            // Two kernels after each other share a multiprocessor of Hopper, at the width of Llama-3-8B.
            assert!(2 * (shared_bytes(kind, 16) + 1024) <= 228 << 10, "{kind}");
        }
    }
}
