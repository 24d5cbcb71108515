//! Weights of 8 bits with scales of a matrix, of its rows or of blocks, in safetensors.

use half::bf16;
use moa_core::{Dtype, e4m3_to_f32};

use crate::Result;
use crate::checkpoint::mapped::MappedTensor;
use crate::checkpoint::packed::rows;

/// How scales of weights end.
pub(crate) const SCALES: [&str; 2] = [".weight_scale_inv", ".weight_scale"];

/// How scales of a layer's inputs end, for products in 8 bits, which no device here computes.
pub(crate) const INPUTS: [&str; 3] = [".input_scale", ".input_scale_ub", ".activation_scale"];

/// The scales of a matrix.
pub(crate) struct Scales {
    /// Row by row, as many as the tensor that has them.
    pub(crate) values: Vec<f32>,
    /// Rows and columns of the matrix that one is for.
    pub(crate) block: [usize; 2],
}

impl Scales {
    /// Rows and columns of a part of `[rows, cols]` that one of `[down, across]` scales is for, if they are so many: all, a
    /// single one, or those of `block`.
    pub(crate) fn block(
        [down, across]: [usize; 2],
        [rows, cols]: [usize; 2],
        block: [usize; 2],
    ) -> Option<[usize; 2]> {
        let part = |count: usize, all: usize, block: usize| match count {
            1 => Some(all),
            _ if count == all => Some(1),
            _ => (all.div_ceil(block) == count).then_some(block),
        };
        Some([part(down, rows, block[0])?, part(across, cols, block[1])?])
    }

    /// The matrix of these codes of e4m3, in bf16.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn matrix(&self, codes: &[u8], [count, cols]: [usize; 2]) -> Result<MappedTensor> {
        let [high, wide] = self.block;
        let across = cols.div_ceil(wide);
        let words = rows(count, cols, |row, to: &mut [[u8; 2]]| {
            let scales = &self.values[row / high * across..][..across];
            let codes = &codes[row * cols..][..cols];
            let parts = to.chunks_mut(wide).zip(codes.chunks(wide)).zip(scales);
            for ((to, codes), scale) in parts {
                for (to, code) in to.iter_mut().zip(codes) {
                    *to = bf16::from_f32(e4m3_to_f32(*code) * scale).to_le_bytes();
                }
            }
        });
        Ok(MappedTensor::of_words(words?, Dtype::Bf16, &[count, cols]))
    }
}
