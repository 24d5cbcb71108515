//! Products of whole tiles by a plane of 32 units, which holds 16 rows: by the device's matrix units, or
//! by emulation, which any device runs and which shows that everything around the products is right.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;
use half::f16;

use super::blocks::{Blocks, CHUNK, SIDE, Words, lane, sync};
use super::cast::{elements, elements_mut};
use super::words::widen_f16;

/// A plane's queries, `[16, dim]`, and output, alike. Of the two sequences in each, one is empty.
#[derive(CubeType)]
pub(crate) struct Fragments {
    queries: Sequence<Matrix<f16>>,
    output: Sequence<Matrix<f32>>,
    /// The row of the unit.
    query: Sequence<Array<f32>>,
    /// The unit's half of each chunk of its row.
    sums: Sequence<Array<f32>>,
}

#[cube]
impl Fragments {
    /// Without queries, and with an output of zeros.
    pub(crate) fn new(#[comptime] blocks: Blocks) -> Self {
        let mut output = Sequence::<Matrix<f32>>::new();
        let mut query = Sequence::<Array<f32>>::new();
        let mut sums = Sequence::<Array<f32>>::new();
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for _ in 0..comptime!(blocks.dim / SIDE) {
                output.push(Matrix::<f32>::from_value(
                    MatrixIdent::Accumulator,
                    SIDE,
                    SIDE,
                    SIDE,
                    MatrixLayout::Undefined,
                    0.0f32,
                ));
            }
        } else {
            query.push(Array::<f32>::new(blocks.dim));
            let mut zeros = Array::<f32>::new(comptime!(blocks.dim / 2));
            for i in 0..comptime!(blocks.dim / 2) {
                zeros[i] = 0.0;
            }
            sums.push(zeros);
        }
        Fragments { queries: Sequence::new(), output, query, sums }
    }

    /// Takes a chunk of the queries, rounded, from the scratch, from word `at` on.
    pub(crate) fn load_queries(
        &mut self,
        scratch: &Shared<[Words]>,
        at: usize,
        #[comptime] chunk: usize,
        #[comptime] blocks: Blocks,
    ) {
        let stride = comptime!(blocks.scratch_stride());
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for i in 0..comptime!(CHUNK / SIDE) {
                self.queries.push(operand(
                    scratch,
                    at + comptime!(i * SIDE / 8),
                    stride,
                    MatrixIdent::A,
                    MatrixLayout::RowMajor,
                    blocks,
                ));
            }
        } else {
            let row = at + lane(blocks) / 2 * stride;
            let query = self.query.index_mut(0);
            #[unroll]
            for i in 0..comptime!(CHUNK / 8) {
                let words = scratch[row + i];
                #[unroll]
                for w in 0..4usize {
                    let word = words.extract(w);
                    query[comptime!(chunk * CHUNK + i * 8 + w * 2)] = widen_f16(word & 0xffff);
                    query[comptime!(chunk * CHUNK + i * 8 + w * 2 + 1)] = widen_f16(word >> 16);
                }
            }
        }
    }

    /// Writes the scores of all keys of a tile, as floats, to the scratch.
    pub(crate) fn scores(
        &self,
        keys: &Shared<[Words]>,
        scratch: &mut Shared<[Words]>,
        at: usize,
        #[comptime] blocks: Blocks,
    ) {
        let stride = comptime!(blocks.scratch_stride());
        let key_stride = comptime!(blocks.key_stride());
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for n in 0..comptime!(blocks.keys / SIDE) {
                let scores = Matrix::<f32>::from_value(
                    MatrixIdent::Accumulator,
                    SIDE,
                    SIDE,
                    SIDE,
                    MatrixLayout::Undefined,
                    0.0f32,
                );
                #[unroll]
                for d in 0..comptime!(blocks.dim / SIDE) {
                    let key = operand(
                        keys,
                        comptime!(n * SIDE * key_stride + d * SIDE / 8),
                        key_stride,
                        MatrixIdent::B,
                        MatrixLayout::ColMajor,
                        blocks,
                    );
                    cmma::execute(self.queries.index(d), &key, &scores, &scores);
                }
                store(scratch, at + comptime!(n * SIDE / 4), stride, &scores, blocks);
            }
        } else {
            let half = comptime!(blocks.keys / 2);
            let (row, first) = (lane(blocks) / 2, lane(blocks) % 2 * half);
            let query = self.query.index(0);
            for four in 0..comptime!(blocks.keys / 8) {
                let mut bits = Words::new(0);
                #[unroll]
                for i in 0..4usize {
                    let key = (first + four * 4 + i) * key_stride;
                    let mut score = 0.0f32;
                    for d in 0..comptime!(blocks.dim / 8) {
                        let words = keys[key + d];
                        #[unroll]
                        for w in 0..4usize {
                            let word = words.extract(w);
                            score += query[d * 8 + w * 2] * widen_f16(word & 0xffff);
                            score += query[d * 8 + w * 2 + 1] * widen_f16(word >> 16);
                        }
                    }
                    bits.insert(i, score.to_bits());
                }
                scratch[at + row * stride + first / 4 + four] = bits;
            }
        }
    }

    /// Adds the values of a tile by their weights, halves in the scratch.
    pub(crate) fn accumulate(
        &mut self,
        values: &Shared<[Words]>,
        scratch: &Shared<[Words]>,
        at: usize,
        #[comptime] blocks: Blocks,
    ) {
        let stride = comptime!(blocks.scratch_stride());
        let key_stride = comptime!(blocks.key_stride());
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for k in 0..comptime!(blocks.keys / SIDE) {
                let weights = operand(
                    scratch,
                    at + comptime!(k * SIDE / 8),
                    stride,
                    MatrixIdent::A,
                    MatrixLayout::RowMajor,
                    blocks,
                );
                #[unroll]
                for c in 0..comptime!(blocks.dim / SIDE) {
                    let value = operand(
                        values,
                        comptime!(k * SIDE * key_stride + c * SIDE / 8),
                        key_stride,
                        MatrixIdent::B,
                        MatrixLayout::RowMajor,
                        blocks,
                    );
                    let output = self.output.index(c);
                    cmma::execute(&weights, &value, output, output);
                }
            }
        } else {
            let (row, half) = (lane(blocks) / 2, lane(blocks) % 2);
            let sums = self.sums.index_mut(0);
            for eight in 0..comptime!(blocks.keys / 8) {
                let words = scratch[at + row * stride + eight];
                #[unroll]
                for i in 0..8usize {
                    let word = words.extract(comptime!(i / 2)) >> comptime!((i % 2 * 16) as u32);
                    let weight = widen_f16(word & 0xffff);
                    let key = (eight * 8 + i) * key_stride;
                    for chunk in 0..comptime!(blocks.dim / CHUNK) {
                        #[unroll]
                        for part in 0..comptime!(CHUNK / 16) {
                            let from = chunk * comptime!(CHUNK / 8) + half * comptime!(CHUNK / 16);
                            let value = values[key + from + part];
                            #[unroll]
                            for w in 0..4usize {
                                let word = value.extract(w);
                                let to = chunk * comptime!(CHUNK / 2) + comptime!(part * 8 + w * 2);
                                sums[to] += weight * widen_f16(word & 0xffff);
                                sums[to + 1] += weight * widen_f16(word >> 16);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Writes a chunk of the output to the scratch, as floats.
    pub(crate) fn store_output(
        &self,
        scratch: &mut Shared<[Words]>,
        at: usize,
        #[comptime] chunk: usize,
        #[comptime] blocks: Blocks,
    ) {
        let stride = comptime!(blocks.scratch_stride());
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for i in 0..comptime!(CHUNK / SIDE) {
                let output = self.output.index(comptime!(chunk * CHUNK / SIDE + i));
                store(scratch, at + comptime!(i * SIDE / 4), stride, output, blocks);
            }
        } else {
            let sums = self.sums.index(0);
            #[unroll]
            for i in 0..comptime!(CHUNK / 8) {
                let mut bits = Words::new(0);
                #[unroll]
                for w in 0..4usize {
                    bits.insert(w, sums[comptime!(chunk * CHUNK / 2 + i * 4 + w)].to_bits());
                }
                scratch[own(at, blocks) + i] = bits;
            }
        }
    }

    /// Takes a chunk of the output back from there.
    pub(crate) fn load_output(
        &mut self,
        scratch: &mut Shared<[Words]>,
        at: usize,
        #[comptime] chunk: usize,
        #[comptime] blocks: Blocks,
    ) {
        let stride = comptime!((4 * blocks.scratch_stride()) as u32);
        if comptime!(blocks.matrix_units) {
            #[unroll]
            for i in 0..comptime!(CHUNK / SIDE) {
                let output = self.output.index_mut(comptime!(chunk * CHUNK / SIDE + i));
                let from = at + comptime!(i * SIDE / 4);
                let words = &scratch[from..scratch.len()];
                if comptime!(blocks.words) {
                    cmma::load_with_layout(output, words, stride, MatrixLayout::RowMajor);
                } else {
                    let floats = elements::<f32>(words);
                    cmma::load_with_layout(output, floats, stride, MatrixLayout::RowMajor);
                }
            }
        } else {
            let sums = self.sums.index_mut(0);
            #[unroll]
            for i in 0..comptime!(CHUNK / 8) {
                let bits = scratch[own(at, blocks) + i];
                #[unroll]
                for w in 0..4usize {
                    sums[comptime!(chunk * CHUNK / 2 + i * 4 + w)] =
                        f32::from_bits(bits.extract(w));
                }
            }
        }
    }

    /// Multiplies the unit's row of the output.
    pub(crate) fn rescale(
        &mut self,
        factor: f32,
        scratch: &mut Shared<[Words]>,
        at: usize,
        #[comptime] blocks: Blocks,
    ) {
        #[unroll]
        for chunk in 0..comptime!(blocks.dim / CHUNK) {
            self.store_output(scratch, at, chunk, blocks);
            sync(blocks);
            #[unroll]
            for i in 0..comptime!(CHUNK / 8) {
                let mut bits = scratch[own(at, blocks) + i];
                #[unroll]
                for w in 0..4usize {
                    bits.insert(w, (f32::from_bits(bits.extract(w)) * factor).to_bits());
                }
                scratch[own(at, blocks) + i] = bits;
            }
            sync(blocks);
            self.load_output(scratch, at, chunk, blocks);
            sync(blocks);
        }
    }
}

/// Where a unit's half of a chunk of floats begins in the scratch.
#[cube]
pub(crate) fn own(at: usize, #[comptime] blocks: Blocks) -> usize {
    let lane = lane(blocks);
    at + lane / 2 * comptime!(blocks.scratch_stride()) + lane % 2 * comptime!(CHUNK / 8)
}

/// A matrix of halves from words in shared memory, `stride` of them a row.
#[cube]
fn operand(
    words: &Shared<[Words]>,
    at: usize,
    #[comptime] stride: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] blocks: Blocks,
) -> Matrix<f16> {
    // SAFETY: it is loaded before it is used.
    let mut matrix = unsafe { Matrix::<f16>::uninitialized(ident, SIDE, SIDE, SIDE, layout) };
    let words = &words[at..words.len()];
    // Strides are counted in elements: those of the vectors, or halves.
    if comptime!(blocks.words) {
        cmma::load(&mut matrix, words, comptime!(4 * stride as u32));
    } else {
        cmma::load(&mut matrix, elements::<f16>(words), comptime!(8 * stride as u32));
    }
    matrix
}

#[cube]
fn store(
    words: &mut Shared<[Words]>,
    at: usize,
    #[comptime] stride: usize,
    matrix: &Matrix<f32>,
    #[comptime] blocks: Blocks,
) {
    let end = words.len();
    let words = &mut words[at..end];
    let stride = comptime!(4 * stride as u32);
    if comptime!(blocks.words) {
        cmma::store(words, matrix, stride, MatrixLayout::RowMajor);
    } else {
        cmma::store(elements_mut::<f32>(words), matrix, stride, MatrixLayout::RowMajor);
    }
}
