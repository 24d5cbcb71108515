//! Weights on their way to the device.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use moa_backend_cuda::{BlockType, BlockWeight, Dtype, E4m3Weight, Tensor, Weight};

use super::Cuda;
use crate::checkpoint::mapped::MappedTensor;
use crate::{Error, Result};

/// A linear layer's or embedding's weight on the GPU, `[out, in]`.
#[derive(Debug)]
pub enum CudaMatrix {
    /// Of the type of the activations.
    Wide(Tensor),
    /// Of 8-bit floats; never an embedding or output matrix.
    E4m3(E4m3Weight),
    /// In the quantised blocks of its file.
    Blocks(BlockWeight),
}

impl<'a> From<&'a CudaMatrix> for Weight<'a> {
    fn from(matrix: &'a CudaMatrix) -> Self {
        match matrix {
            CudaMatrix::Wide(weight) => Self::Wide(weight),
            CudaMatrix::E4m3(weight) => Self::E4m3(weight),
            CudaMatrix::Blocks(weight) => Self::Blocks(weight),
        }
    }
}

impl Cuda {
    /// The weight where only 16 bits will do; one in blocks is widened for this once.
    pub(super) fn wide(&self, matrix: &CudaMatrix) -> Result<Tensor> {
        match matrix {
            CudaMatrix::Wide(weight) => Ok(weight.clone()),
            CudaMatrix::E4m3(_) => Err(Error::invalid("weight", "f16 or bf16", "e4m3")),
            CudaMatrix::Blocks(weight) => Ok(self.operations.widen_blocks(weight)?),
        }
    }

    /// The blocks that a weight stays in here.
    pub(super) fn kept_blocks(&self, tensor: &MappedTensor) -> Option<BlockType> {
        if self.fp8_weights { None } else { tensor.blocks() }
    }

    /// Weights of one kind of blocks, one after the other.
    pub(super) fn upload_blocks(
        &self,
        kind: BlockType,
        parts: &[&MappedTensor],
        shape: [usize; 2],
    ) -> Result<CudaMatrix> {
        let row_bytes = shape[1] / kind.block_len() * kind.block_bytes();
        let fill = |rows: Range<usize>, mut staged: &mut [u8]| {
            let elements = rows.start * shape[1]..rows.end * shape[1];
            for (part, own) in pieces(parts, elements) {
                let rows = own.start / shape[1]..own.end / shape[1];
                let (to, rest) = staged.split_at_mut(rows.len() * row_bytes);
                to.copy_from_slice(&part.bytes()[rows.start * row_bytes..rows.end * row_bytes]);
                staged = rest;
            }
        };
        Ok(CudaMatrix::Blocks(self.operations.upload_blocks(kind, shape, fill)?))
    }

    /// Weights one after the other in one tensor, converted piece by piece in page-locked memory.
    pub(super) fn upload(
        &self,
        parts: &[&MappedTensor],
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Tensor> {
        let mut values = Vec::new();
        let fill = |range: Range<usize>, mut staged: &mut [u8]| {
            for (part, own) in pieces(parts, range) {
                let (to, rest) = staged.split_at_mut(own.len() * dtype.bytes());
                convert(part, own, dtype, to, &mut values);
                staged = rest;
            }
        };
        Ok(self.operations.upload(shape, dtype, fill)?)
    }

    /// Linear layers' weights one after the other in one of the type that was asked for; they are in blocks of one
    /// kind, or not in any that are kept.
    pub(super) fn upload_linear(
        &self,
        parts: &[&MappedTensor],
        shape: [usize; 2],
    ) -> Result<CudaMatrix> {
        if let Some(kind) = parts.first().and_then(|part| self.kept_blocks(part)) {
            return self.upload_blocks(kind, parts, shape);
        }
        if !self.fp8_weights {
            return Ok(CudaMatrix::Wide(self.upload(parts, &shape, self.dtype())?));
        }
        let fill = |range: Range<usize>, values: &mut Vec<f32>| {
            for (part, own) in pieces(parts, range) {
                part.extend_f32(own, values);
            }
        };
        Ok(CudaMatrix::E4m3(self.operations.upload_e4m3(shape, fill)?))
    }
}

/// The elements of each part that some of all parts, one after the other, are.
fn pieces<'a>(
    parts: &'a [&MappedTensor],
    range: Range<usize>,
) -> impl Iterator<Item = (&'a MappedTensor, Range<usize>)> {
    let mut start = 0;
    parts.iter().filter_map(move |&part| {
        let first = start;
        start += part.shape().iter().product::<usize>();
        let own = range.start.max(first)..range.end.min(start);
        (!own.is_empty()).then(|| (part, own.start - first..own.end - first))
    })
}

/// Writes elements of a weight as `dtype`; `values` is scratch memory.
fn convert(
    from: &MappedTensor,
    elements: Range<usize>,
    dtype: Dtype,
    to: &mut [u8],
    values: &mut Vec<f32>,
) {
    if from.dtype() == Some(dtype) && cfg!(target_endian = "little") {
        let size = dtype.bytes();
        return to.copy_from_slice(&from.bytes()[elements.start * size..elements.end * size]);
    }
    values.clear();
    from.extend_f32(elements, values);
    match dtype {
        Dtype::F32 => to.copy_from_slice(bytemuck::cast_slice(values)),
        // Page-locked memory begins at a page.
        Dtype::F16 => bytemuck::cast_slice_mut::<u8, f16>(to).convert_from_f32_slice(values),
        _ => bytemuck::cast_slice_mut::<u8, bf16>(to).convert_from_f32_slice(values),
    }
}
