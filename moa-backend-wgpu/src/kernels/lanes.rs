//! What the units that share a row of [`super::decode`] do with their loads: sums over them, and elements
//! of the cache's type.

use cubecl::prelude::*;

use super::decode::{DECODE_UNITS, Floats, Shape, Words};
use super::words::{narrow_bf16, narrow_f16, widen_word};
use crate::Dtype;

/// Sums of the row's units, for each of `count` numbers. All units of the cube call it.
#[cube]
pub(crate) fn add(
    numbers: &mut Array<f32>,
    sums: &mut [f32],
    #[comptime] count: usize,
    #[comptime] shape: Shape,
) {
    let lanes = comptime!(shape.lanes);
    if comptime!(shape.planes) {
        #[unroll]
        for step in 0..comptime!(lanes.ilog2()) {
            #[unroll]
            for i in 0..count {
                numbers[i] += plane_shuffle_xor(numbers[i], comptime!(1u32 << step));
            }
        }
    } else {
        let unit = UNIT_POS as usize;
        // The sums before were read.
        sync_cube();
        #[unroll]
        for i in 0..count {
            sums[i * DECODE_UNITS + unit] = numbers[i];
        }
        sync_cube();
        let first = unit - unit % lanes;
        let mut i = unit % lanes;
        while i < count {
            let mut total = 0.0f32;
            for lane in 0..lanes {
                total += sums[i * DECODE_UNITS + first + lane];
            }
            sums[i * DECODE_UNITS + first] = total;
            i += lanes;
        }
        sync_cube();
        #[unroll]
        for i in 0..count {
            numbers[i] = sums[i * DECODE_UNITS + first];
        }
    }
}

/// Four of a load's elements.
#[cube]
pub(crate) fn part(words: Words, #[comptime] part: usize, #[comptime] shape: Shape) -> Floats {
    let mut wide = Vector::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        if comptime!(shape.dtype == Dtype::F32) {
            wide.insert(i, f32::from_bits(words.extract(i)));
        } else {
            let word = words.extract(comptime!(2 * part + i / 2));
            wide.insert(i, widen_word(word, comptime!(i % 2), shape.dtype, shape.native));
        }
    }
    wide
}

/// New elements as the cache holds them: rounded before the token attends to them, so that a key is one
/// number wherever it is read.
#[cube]
pub(crate) fn round(from: &[Floats], at: usize, #[comptime] shape: Shape) -> Words {
    let mut words = Vector::new(0u32);
    #[unroll]
    for i in 0..4usize {
        match shape.dtype {
            Dtype::F32 => words.insert(i, from[at].extract(i).to_bits()),
            _ => {
                let four = from[at + comptime!(i / 2)];
                let low = four.extract(comptime!(2 * (i % 2)));
                let high = four.extract(comptime!(2 * (i % 2) + 1));
                match shape.dtype {
                    Dtype::F16 => words.insert(i, narrow_f16(low) | (narrow_f16(high) << 16)),
                    _ => words.insert(i, narrow_bf16(low) | (narrow_bf16(high) << 16)),
                }
            }
        }
    }
    words
}
