//! Made-up weights in quantised blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use moa_core::{BlockType, SplitMix64};

use crate::checkpoint::mapped::MappedTensor;
use crate::{Error, Result, memory};

/// Random blocks, of which tensors are parts.
pub(super) struct RandomBlocks {
    kind: BlockType,
    words: Arc<Vec<u64>>,
    count: usize,
    /// Where the next tensor begins, in blocks.
    next: AtomicUsize,
}

/// Blocks that repeat: a prime number, so that rows of matrices differ.
const PERIOD: usize = 8191;

impl RandomBlocks {
    /// So many blocks, whose elements are of variance `amplitude^2 / 3` or not far from it.
    pub(super) fn new(kind: BlockType, count: usize, amplitude: f32, seed: u32) -> Result<Self> {
        let mut random = SplitMix64::new(seed.into());
        let size = kind.block_bytes();
        let mut period: Vec<u8> =
            (0..PERIOD.min(count) * size).map(|_| (random.next_u64() >> 56) as u8).collect();
        for block in period.chunks_mut(size) {
            for (at, value) in factors(kind) {
                block[at..at + 2].copy_from_slice(&f16::from_f32(value * amplitude).to_le_bytes());
            }
        }
        let bytes = count * size;
        let mut words = memory::filled(bytes.div_ceil(8), 0u64, "made-up weights")?;
        for to in bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes].chunks_mut(period.len())
        {
            to.copy_from_slice(&period[..to.len()]);
        }
        Ok(Self { kind, words: Arc::new(words), count, next: AtomicUsize::new(0) })
    }

    pub(super) fn kind(&self) -> BlockType {
        self.kind
    }

    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let (len, size) = (self.kind.block_len(), self.kind.block_bytes());
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(len) {
            let expected = format!("rows of a multiple of {len} ({})", self.kind);
            return Err(Error::invalid("made-up tensor", expected, format!("{name} {shape:?}")));
        }
        let blocks = shape.iter().product::<usize>() / len;
        let Some(last) = self.count.checked_sub(blocks) else {
            let expected = format!("at most {} elements", self.count * len);
            return Err(Error::invalid("made-up tensor", expected, format!("{name} {shape:?}")));
        };
        let begin = |next: usize| if next <= last { next } else { 0 };
        let order = Ordering::Relaxed;
        let next = self.next.fetch_update(order, order, |next| Some(begin(next) + blocks));
        let first = begin(next.unwrap_or(0)) * size;
        Ok(MappedTensor::made_blocks(Arc::clone(&self.words), first, self.kind, shape))
    }
}

/// Places of the 16-bit factors of a block, and what they are for elements up to 1: random codes are uniform, and so
/// are random steps of 6 and 8 bits.
fn factors(kind: BlockType) -> Vec<(usize, f32)> {
    match kind {
        BlockType::Q4_0 => vec![(0, 1.0 / 8.0)],
        BlockType::Q4_1 => vec![(0, 1.0 / 7.5), (2, -1.0)],
        BlockType::Q5_0 => vec![(0, 1.0 / 16.0)],
        BlockType::Q5_1 => vec![(0, 1.0 / 15.5), (2, -1.0)],
        BlockType::Q8_0 => vec![(0, 1.0 / 128.0)],
        BlockType::Q4K => vec![(0, 1.0 / 7.5 / 60.0), (2, 1.0 / 60.0)],
        BlockType::Q5K => vec![(0, 1.0 / 15.5 / 60.0), (2, 1.0 / 60.0)],
        BlockType::Q6K => vec![(208, 1.0 / 32.0 / 74.0)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_about_the_variance_that_was_asked_for() {
        for kind in BlockType::ALL {
            let blocks = RandomBlocks::new(kind, 8192, 0.5, 3).unwrap();
            let [a, b] = [(); 2].map(|()| blocks.tensor("a", &[100, 512]).unwrap());
            assert_ne!(a.bytes(), b.bytes());
            let values = a.to_f32().unwrap();
            let n = values.len() as f32;
            let mean = values.iter().sum::<f32>() / n;
            let variance = values.iter().map(|x| x * x).sum::<f32>() / n;
            // Codes of one more negative number than positive ones have a mean of half a step.
            assert!(mean.abs() < 0.04, "{kind} {mean}");
            assert!((0.5..3.0).contains(&(variance * 12.0)), "{kind} {variance}");
            assert!(blocks.tensor("b", &[3, 100]).is_err());
            assert!(blocks.tensor("c", &[8193, 256]).is_err());
        }
    }
}
