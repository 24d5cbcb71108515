use cubecl::prelude::*;

use super::words::{narrow_bf16, narrow_f16};
use crate::Dtype;

/// Fills words with uniform numbers in `[-amplitude, amplitude)`, which depend on seed and place alone.
#[cube(launch_unchecked)]
pub(crate) fn random(
    to: &mut [u32],
    words: u32,
    seed: u32,
    amplitude: f32,
    #[comptime] dtype: Dtype,
) {
    if ABSOLUTE_POS < words as usize {
        let place = ABSOLUTE_POS as u32;
        to[ABSOLUTE_POS] = match dtype {
            Dtype::F32 => (uniform(place, seed) * amplitude).to_bits(),
            Dtype::F16 => {
                narrow_f16(uniform(2 * place, seed) * amplitude)
                    | (narrow_f16(uniform(2 * place + 1, seed) * amplitude) << 16)
            }
            _ => {
                narrow_bf16(uniform(2 * place, seed) * amplitude)
                    | (narrow_bf16(uniform(2 * place + 1, seed) * amplitude) << 16)
            }
        };
    }
}

/// In `[-1, 1)`, from a permuted congruential generator's output function.
#[cube]
fn uniform(place: u32, seed: u32) -> f32 {
    let state = (place ^ seed) * 747_796_405 + seed;
    let word = ((state >> ((state >> 28) + 4)) ^ state) * 277_803_737;
    let word = (word >> 22) ^ word;
    (word >> 8) as f32 * 1.192_092_9e-7 - 1.0
}
