//! What the units that share a row of [`super::decode`] do with their loads: sums over them, and elements
//! of the cache's type.

use cubecl::prelude::*;
use moa_core::RowType;

use super::codes::component;
use super::decode::{Floats, Words};
use super::words::{narrow_bf16, narrow_f16, widen_word};
use crate::Dtype;

/// Sums of the row's units, for each of `count` numbers. All units of the cube call it.
#[cube]
pub(crate) fn add(
    numbers: &mut Array<f32>,
    sums: &mut [f32],
    #[comptime] count: usize,
    #[comptime] lanes: usize,
    #[comptime] units: usize,
    #[comptime] planes: bool,
) {
    if comptime!(planes) {
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
            sums[i * units + unit] = numbers[i];
        }
        sync_cube();
        let first = unit - unit % lanes;
        let mut i = unit % lanes;
        while i < count {
            let mut total = 0.0f32;
            for lane in 0..lanes {
                total += sums[i * units + first + lane];
            }
            sums[i * units + first] = total;
            i += lanes;
        }
        sync_cube();
        #[unroll]
        for i in 0..count {
            numbers[i] = sums[i * units + first];
        }
    }
}

/// Sums over the row's units of each of `count` numbers, a power of two, dealt out to them: a unit's first
/// numbers become the sums of those from [`number_of`] on.
#[cube]
pub(crate) fn scatter_add(
    numbers: &mut Array<f32>,
    lane: usize,
    #[comptime] count: usize,
    #[comptime] lanes: usize,
) {
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        let left = comptime!(count >> (step + 1));
        if comptime!(left > 0) {
            // Half of them stay, the others go to the unit that keeps those.
            let upper = (lane >> comptime!(step as usize)) % 2 == 1;
            #[unroll]
            for i in 0..left {
                let keep = select(upper, numbers[i + left], numbers[i]);
                let give = select(upper, numbers[i], numbers[i + left]);
                numbers[i] = keep + plane_shuffle_xor(give, comptime!(1u32 << step));
            }
        } else {
            numbers[0] += plane_shuffle_xor(numbers[0], comptime!(1u32 << step));
        }
    }
}

/// The first of the numbers whose sums [`scatter_add`] leaves with a unit.
#[cube]
pub(crate) fn number_of(lane: usize, #[comptime] count: usize, #[comptime] lanes: usize) -> usize {
    let mut number = 0usize.runtime();
    #[unroll]
    for step in 0..comptime!(count.min(lanes).ilog2()) {
        number += ((lane >> comptime!(step as usize)) % 2) * comptime!(count >> (step + 1));
    }
    number
}

/// The unit with which [`scatter_add`] leaves a number's sum, the first of them.
pub(crate) fn holder(number: usize, count: usize, lanes: usize) -> usize {
    (0..count.min(lanes).ilog2()).map(|step| (number / (count >> (step + 1)) % 2) << step).sum()
}

/// `sum` and the product of two vectors, element by element and each rounded once.
#[cube]
pub(crate) fn dot_onto(sum: f32, a: Floats, b: Floats) -> f32 {
    let mut sum = sum;
    #[unroll]
    for i in 0..4usize {
        sum = fma(a.extract(i), b.extract(i), sum);
    }
    sum
}

/// Four of a load's elements.
#[cube]
pub(crate) fn part<W: Size>(
    words: Vector<u32, W>,
    #[comptime] part: usize,
    #[comptime] dtype: Dtype,
    #[comptime] native: bool,
) -> Floats {
    let mut wide = Vector::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        if comptime!(dtype == Dtype::F32) {
            wide.insert(i, f32::from_bits(words.extract(i)));
        } else {
            let word = words.extract(comptime!(2 * part + i / 2));
            wide.insert(i, widen_word(word, comptime!(i % 2), dtype, native));
        }
    }
    wide
}

/// A load of a new row as the cache holds it: rounded before the token attends to it, so that a key is one number
/// wherever it is read. `from` holds the bits of numbers, four of them from vector `at` on; or of narrow rows what
/// [`super::prepare`] made of them, in loads of which `at` is one.
#[cube]
pub(crate) fn round<W: Size>(
    from: &[Words],
    at: usize,
    #[comptime] own: RowType,
) -> Vector<u32, W> {
    let mut words = Vector::<u32, W>::new(0u32);
    #[unroll]
    for i in 0..W::value() {
        match own {
            RowType::Plain(Dtype::F32) => words.insert(i, from[at].extract(i)),
            RowType::Plain(dtype) => {
                let four = from[at + comptime!(i / 2)];
                let low = f32::from_bits(four.extract(comptime!(2 * (i % 2))));
                let high = f32::from_bits(four.extract(comptime!(2 * (i % 2) + 1)));
                words.insert(i, pair(low, high, dtype));
            }
            _ => words.insert(i, word(from, at * W::value() + i)),
        }
    }
    words
}

/// Two numbers as a word of 16-bit elements.
#[cube]
fn pair(low: f32, high: f32, #[comptime] dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F16 => narrow_f16(low) | (narrow_f16(high) << 16),
        _ => narrow_bf16(low) | (narrow_bf16(high) << 16),
    }
}

/// [`round`] of vectors `vector..` of the row of `vectors` of them that begins at vector `row`, [turned](turned).
#[cube]
pub(crate) fn round_turned<W: Size>(
    from: &[Words],
    row: usize,
    vector: usize,
    vectors: usize,
    brought: &[Words],
    #[comptime] own: RowType,
) -> Vector<u32, W> {
    let mut words = Vector::<u32, W>::new(0u32);
    let per_word = comptime!(match own {
        RowType::Plain(Dtype::F32) => 1,
        _ => 2,
    });
    #[unroll]
    for p in 0..per_word {
        let at = vector + p;
        let own_part = floats(from[row + at]);
        let other = floats(from[row + (at + vectors / 2) % vectors]);
        let four = turned(own_part, other, at, vectors, brought);
        match own {
            RowType::Plain(Dtype::F32) =>
            {
                #[unroll]
                for i in 0..4usize {
                    words.insert(i, four.extract(i).to_bits());
                }
            }
            RowType::Plain(dtype) =>
            {
                #[unroll]
                for i in 0..2usize {
                    let low = four.extract(comptime!(2 * i));
                    let high = four.extract(comptime!(2 * i + 1));
                    words.insert(comptime!(2 * p + i), pair(low, high, dtype));
                }
            }
            _ => {}
        }
    }
    words
}

/// Vector `vector` of a row of `vectors`, turned by the angles that a step has [brought](super::decode::Brought), as
/// [`super::rows::rope`] does it; `other` is the vector half a row away.
#[cube]
pub(crate) fn turned(
    own: Floats,
    other: Floats,
    vector: usize,
    vectors: usize,
    brought: &[Words],
) -> Floats {
    let half = vectors / 2;
    let at = 1 + vector % half;
    let (cos, sin) = (floats(brought[at]), floats(brought[at + half]));
    let sign = select(vector < half, f32::new(-1.0), f32::new(1.0));
    fma(own, cos, other * sin * Vector::new(sign))
}

/// Four numbers of their bits.
#[cube]
fn floats(bits: Words) -> Floats {
    let mut floats = Vector::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        floats.insert(i, f32::from_bits(bits.extract(i)));
    }
    floats
}

/// One word of a buffer of vectors.
#[cube]
pub(crate) fn word(from: &[Words], at: usize) -> u32 {
    component::<Const<4>>(from[at / 4], at % 4)
}

#[cfg(test)]
mod tests {
    use super::{holder, number_of};

    #[test]
    fn a_sums_holder_knows_its_number() {
        for count in [1, 2, 4, 8, 16, 32] {
            for lanes in [1, 2, 4, 8, 16, 32] {
                let held = (count / lanes).max(1);
                for number in 0..count {
                    let unit = holder(number, count, lanes);
                    assert!(unit < lanes);
                    let first = number_of(unit, count, lanes);
                    assert!(first.is_multiple_of(held) && (first..first + held).contains(&number));
                }
            }
        }
    }
}
