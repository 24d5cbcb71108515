//! Weights of 4 bits as GPTQ and AWQ pack them in safetensors, as blocks that devices know.

use std::sync::Arc;

use bytemuck::Pod;
use half::f16;
use moa_backend_cpu::ops::BlockType;
use moa_core::Dtype;
use rayon::prelude::*;

use crate::checkpoint::mapped::MappedTensor;
use crate::{Result, memory};

/// Elements of a block.
const BLOCK: usize = 32;

/// Where the 8 columns of a word of AWQ's stand in it.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// One in each of a word's 8 zero points. GPTQ's first format stores words less this: a zero point of 0 becomes 15 and
/// borrows from the next one, and adding to the whole word gives both back.
const ONES: u32 = 0x1111_1111;

/// How weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Words of 8 inputs. Words of zero points are stored as they are (`gptq_v2`), or less [`ONES`].
    Gptq { less_one: bool },
    /// Words of 8 outputs.
    Awq,
}

/// The tensors of one matrix `[out, in]`, little-endian.
pub(crate) struct Parts<'a> {
    /// 32-bit words: `[in / 8, out]` for GPTQ, `[in, out / 8]` for AWQ.
    pub(crate) codes: &'a [u8],
    /// 32-bit words `[groups, out / 8]`.
    pub(crate) zeros: &'a [u8],
    /// f16 `[groups, out]`.
    pub(crate) scales: &'a [u8],
    /// The group of each input, 32 bits, where they do not follow on each other.
    pub(crate) groups: Option<&'a [u8]>,
}

fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.as_chunks::<4>().0.get(index).map_or(0, |word| u32::from_le_bytes(*word))
}

impl Packing {
    fn code(self, codes: &[u8], outputs: usize, (output, input): (usize, usize)) -> u8 {
        let (word, place) = match self {
            Self::Gptq { .. } => (word(codes, input / 8 * outputs + output), input % 8),
            Self::Awq => (word(codes, (input * outputs + output) / 8), AWQ_PLACES[output % 8]),
        };
        (word >> (4 * place) & 15) as u8
    }

    fn zero(self, zeros: &[u8], outputs: usize, (output, group): (usize, usize)) -> u8 {
        let word = word(zeros, (group * outputs + output) / 8);
        let (place, word) = match self {
            Self::Gptq { less_one: true } => (output % 8, word.wrapping_add(ONES)),
            Self::Gptq { less_one: false } => (output % 8, word),
            Self::Awq => (AWQ_PLACES[output % 8], word),
        };
        (word >> (4 * place) & 15) as u8
    }

    /// The matrix: in blocks of Q4_0, which are these numbers, where all zero points are 8, in blocks of Q4_1,
    /// whose least elements are rounded to f16, where they are others, and in f16 where blocks would mix
    /// groups.
    ///
    /// The caller has checked the sizes of the parts; `outputs` is a multiple of 8.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub(crate) fn matrix(
        self,
        parts: &Parts<'_>,
        outputs: usize,
        inputs: usize,
    ) -> Result<MappedTensor> {
        let groups = parts.scales.len() / 2 / outputs.max(1);
        let len = inputs.div_ceil(groups.max(1)).max(1);
        let group = |input: usize| match parts.groups {
            Some(groups) => word(groups, input) as usize,
            None => input / len,
        };
        let scale = |output: usize, group: usize| {
            let all = parts.scales.as_chunks::<2>().0;
            let scale = all.get(group * outputs + output);
            scale.map_or(f16::NAN, |bytes| f16::from_le_bytes(*bytes))
        };
        let zero = |output: usize, group: usize| self.zero(parts.zeros, outputs, (output, group));
        let follow = (0..inputs).all(|input| group(input) == input / len);
        let shape = [outputs, inputs];
        if !follow || !inputs.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
            let words = rows(outputs, inputs, |output, row: &mut [[u8; 2]]| {
                for (input, to) in row.iter_mut().enumerate() {
                    let group = group(input);
                    let code = self.code(parts.codes, outputs, (output, input));
                    let steps = f32::from(code) - f32::from(zero(output, group));
                    *to = f16::from_f32(scale(output, group).to_f32() * steps).to_le_bytes();
                }
            });
            return Ok(MappedTensor::of_words(words?, Dtype::F16, &shape));
        }
        let symmetric = (0..groups).all(|group| (0..outputs).all(|o| zero(o, group) == 8));
        let kind = if symmetric { BlockType::Q4_0 } else { BlockType::Q4_1 };
        let size = kind.block_bytes();
        let words = rows(outputs, inputs / BLOCK * size, |output, row: &mut [u8]| {
            for (block, to) in row.chunks_exact_mut(size).enumerate() {
                let group = group(block * BLOCK);
                let scale = scale(output, group);
                let (factors, codes) = to.split_at_mut(size - BLOCK / 2);
                factors[..2].copy_from_slice(&scale.to_le_bytes());
                if let Some(to) = factors.get_mut(2..4) {
                    let least = -scale.to_f32() * f32::from(zero(output, group));
                    to.copy_from_slice(&f16::from_f32(least).to_le_bytes());
                }
                let code = |i: usize| self.code(parts.codes, outputs, (output, block * BLOCK + i));
                for (i, to) in codes.iter_mut().enumerate() {
                    *to = code(i) | code(i + BLOCK / 2) << 4;
                }
            }
        });
        Ok(MappedTensor::blocks_of_words(words?, kind, &shape))
    }
}

/// Aligned memory of `count` rows of `len` elements each, which are written side by side.
pub(crate) fn rows<T: Pod + Send>(
    count: usize,
    len: usize,
    write: impl Fn(usize, &mut [T]) + Sync,
) -> Result<Arc<Vec<u64>>> {
    let bytes = count * len * size_of::<T>();
    let mut words = memory::filled(bytes.div_ceil(8), 0u64, "unpacked weights")?;
    let all: &mut [T] =
        bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes]);
    all.par_chunks_exact_mut(len.max(1)).enumerate().for_each(|(row, to)| write(row, to));
    Ok(Arc::new(words))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::tensor::{Dtype as Tensor, TensorView};

    use super::*;
    use crate::Error;
    use crate::checkpoint::safetensors::Weights;

    /// A file of `tests/fixtures/packed/make.py` as a folder.
    fn open(name: &str) -> Result<(tempfile::TempDir, Weights)> {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/packed");
        let dir = tempfile::tempdir().map_err(|e| Error::io(&from, e))?;
        let to = dir.path().join("model.safetensors");
        let copied = std::fs::copy(from.join(format!("{name}.safetensors")), &to);
        copied.map_err(|e| Error::io(&from, e))?;
        let weights = Weights::open(dir.path())?;
        Ok((dir, weights))
    }

    /// A matrix of one, and its numbers.
    fn read(name: &str, packing: Packing) -> Result<(MappedTensor, Vec<f32>)> {
        let (_dir, mut weights) = open(name)?;
        weights.set_packing(Some(packing));
        let matrix = weights.tensor("m.weight", &[16, 64])?;
        Ok((matrix, weights.tensor("m.expected", &[16, 64])?.to_f32()?))
    }

    #[test]
    fn matrices_of_8_bits_are_what_torch_makes_of_them() -> Result<()> {
        let read = |name: &str, block| {
            let (_dir, mut weights) = open(name)?;
            weights.set_fp8_block(block);
            let matrix = weights.tensor("m.weight", &[16, 64])?;
            assert_eq!(matrix.dtype(), Some(Dtype::Bf16));
            Ok::<_, Error>((matrix.to_f32()?, weights.tensor("m.expected", &[16, 64])?.to_f32()?))
        };
        for name in ["fp8_blocks", "fp8_matrix", "fp8_rows"] {
            let (found, expected) = read(name, [8, 16])?;
            assert!(expected.iter().any(|x| x.abs() > 0.5), "{name}");
            assert_eq!(found, expected, "{name}");
        }
        let error = read("fp8_blocks", [128, 128]).unwrap_err();
        assert!(
            matches!(&error, Error::TensorShape { name, got, .. } if name == "m.weight_scale_inv" && got == &[2, 4]),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn matrices_are_what_was_packed() -> Result<()> {
        let gptq = Packing::Gptq { less_one: true };
        for (name, packing, blocks, most) in [
            ("gptq", gptq, Some(BlockType::Q4_0), 1e-7),
            // Scale times zero point is rounded to f16: up to .3 at a thousandth of it.
            ("gptq_zeros", gptq, Some(BlockType::Q4_1), 2e-4),
            ("gptq_borrow", gptq, Some(BlockType::Q4_1), 2e-4),
            ("gptq_v2", Packing::Gptq { less_one: false }, Some(BlockType::Q4_1), 2e-4),
            ("gptq_order", gptq, None, 2e-4),
            ("awq", Packing::Awq, Some(BlockType::Q4_1), 2e-4),
        ] {
            let (matrix, expected) = read(name, packing)?;
            assert_eq!(matrix.blocks(), blocks, "{name}");
            let found = matrix.to_f32()?;
            let errors = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let error = errors.fold(0.0, f32::max);
            assert!(error <= most, "{name} {error}");
        }
        Ok(())
    }

    /// Opens a matrix `m` of 8 outputs in a file of these parts and reads it.
    fn made(parts: &[(&str, Tensor, &[usize], Vec<u8>)], packing: Packing, cols: usize) -> Error {
        let views = parts.iter().map(|(end, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.to_vec(), bytes).unwrap();
            (format!("m.{end}"), view)
        });
        let dir = tempfile::tempdir().unwrap();
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let mut weights = Weights::open(dir.path()).unwrap();
        weights.set_packing(Some(packing));
        weights.tensor("m.weight", &[8, cols]).map(|_| ()).unwrap_err()
    }

    #[test]
    fn groups_that_are_not_there_or_of_no_size_are_refused() {
        for group in [2i32, -1, i32::MAX] {
            let groups = (0..64).flat_map(|i| if i == 63 { group } else { i / 32 }.to_le_bytes());
            let error = made(
                &[
                    ("qweight", Tensor::I32, &[8, 8], vec![0; 256]),
                    ("qzeros", Tensor::I32, &[2, 1], vec![0; 8]),
                    ("scales", Tensor::F16, &[2, 8], vec![0; 32]),
                    ("g_idx", Tensor::I32, &[64], groups.collect()),
                ],
                Packing::Gptq { less_one: true },
                64,
            );
            let Error::Safetensors { reason, .. } = &error else { panic!("{error}") };
            assert!(reason.ends_with(&format!("got {group}")), "{reason}");
        }
        let error = made(
            &[
                ("qweight", Tensor::I32, &[64, 1], vec![0; 256]),
                ("qzeros", Tensor::I32, &[3, 1], vec![0; 12]),
                ("scales", Tensor::F16, &[3, 8], vec![0; 48]),
            ],
            Packing::Awq,
            64,
        );
        assert!(error.to_string().contains("3 groups of one size"), "{error}");
    }

    #[test]
    fn parts_of_other_sizes_are_refused() -> Result<()> {
        let error = read("awq", Packing::Gptq { less_one: true }).map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, Error::TensorShape { name, .. } if name == "m.qweight"),
            "{error}"
        );
        Ok(())
    }
}
