//! Elements of quantised blocks. A matrix has its codes first, 16 bytes a load in the order of elements, and then
//! 16 bytes of steps for each 8 groups of 32 elements.

use cubecl::prelude::*;
use moa_core::BlockType;

use super::decode::{Floats, Words};
use super::lanes::part;
use super::words::{per_word, widen_f16};
use crate::Dtype;

/// What the words of a matrix hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Elements {
    Plain(Dtype),
    /// Of one of [`KEPT`].
    Blocks(BlockType),
}

/// The blocks that there are kernels for.
pub(crate) const KEPT: [BlockType; 3] = [BlockType::Q4_0, BlockType::Q8_0, BlockType::Q4K];

/// Elements of a group.
pub(crate) const GROUP: usize = 32;

impl Elements {
    /// Elements in 16 bytes.
    pub(crate) const fn per_load(self) -> usize {
        match self {
            Self::Plain(dtype) => 4 * per_word(dtype),
            Self::Blocks(BlockType::Q8_0) => 16,
            Self::Blocks(_) => 32,
        }
    }

    pub(crate) const fn is_blocks(self) -> bool {
        matches!(self, Self::Blocks(_))
    }
}

/// The step of a group, and its least element; `words` are those of its 8 groups.
#[cube]
pub(crate) fn factors(words: Words, group: usize, #[comptime] elements: Elements) -> Floats {
    let place = group % 8;
    let mut both = Vector::new(0.0f32);
    if comptime!(matches!(elements, Elements::Blocks(BlockType::Q4K))) {
        let (a, b, c) = (words.extract(1usize), words.extract(2usize), words.extract(3usize));
        let shift = 8 * (place % 4) as u32;
        let (a, b, c) = (a >> shift, b >> shift, c >> shift);
        // Those of the last four groups have their two highest bits where the first eight numbers have two left.
        let step = select(place < 4, a & 63, (c & 15) | ((a & 192) >> 2));
        let least = select(place < 4, b & 63, ((c >> 4) & 15) | ((b & 192) >> 2));
        let scales = words.extract(0usize);
        both.insert(0usize, widen_f16(scales & 0xffff) * f32::cast_from(step));
        both.insert(1usize, f32::new(0.0) - widen_f16(scales >> 16) * f32::cast_from(least));
    } else {
        let pair = words.extract_dynamic(place / 2);
        both.insert(0usize, widen_f16((pair >> (16 * (place % 2) as u32)) & 0xffff));
    }
    both
}

/// Four of a load's elements, with the factors of their group.
#[cube]
pub(crate) fn four(
    words: Words,
    factors: Floats,
    #[comptime] number: usize,
    #[comptime] elements: Elements,
    #[comptime] native: bool,
) -> Floats {
    match elements {
        Elements::Plain(dtype) => part::<Const<4>>(words, number, dtype, native),
        Elements::Blocks(kind) => {
            let word = words.extract(comptime!(number % 4));
            let mut codes = Vector::new(0.0f32);
            #[unroll]
            for i in 0..4usize {
                if comptime!(matches!(kind, BlockType::Q8_0)) {
                    let byte = (word >> comptime!(8 * i as u32)) & 0xff;
                    codes.insert(i, f32::cast_from(byte ^ 128) - 128.0);
                } else {
                    // The low halves of 16 bytes come first.
                    let code = (word >> comptime!((4 * (number / 4) + 8 * i) as u32)) & 15;
                    let zero =
                        comptime!(if matches!(kind, BlockType::Q4_0) { 8.0f32 } else { 0.0 });
                    codes.insert(i, f32::cast_from(code) - zero);
                }
            }
            codes * Vector::new(factors.extract(0usize)) + Vector::new(factors.extract(1usize))
        }
    }
}

/// Rows of a matrix in blocks times `factor`, a unit for each load: those of `ids`, or all in order.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn widen_blocks(
    table: &[Words],
    ids: &[u32],
    out: &mut [Floats],
    count: u32,
    loads: u32,
    steps: u32,
    has_ids: u32,
    factor: f32,
    #[comptime] elements: Elements,
) {
    if ABSOLUTE_POS < count as usize {
        let loads = loads as usize;
        let mut row = ABSOLUTE_POS / loads;
        if has_ids == 1 {
            row = ids[row] as usize;
        }
        let load = row * loads + ABSOLUTE_POS % loads;
        let group = load * comptime!(elements.per_load()) / GROUP;
        let factors = factors(table[steps as usize + group / 8], group, elements);
        let parts = comptime!(elements.per_load() / 4);
        #[unroll]
        for p in 0..parts {
            let four = four(table[load], factors, p, elements, false);
            out[ABSOLUTE_POS * parts + p] = four * Vector::new(factor);
        }
    }
}
