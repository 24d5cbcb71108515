//! Products of few rows with weights of 8-bit floats by warpgroup instructions.

use std::ffi::c_void;
use std::ops::RangeInclusive;
use std::sync::PoisonError;

use cudarc::driver::sys::{self, CUtensorMapDataType as TensorMapType};

use super::E4m3Weight;
use super::e4m3_weight::TILE;
use crate::graph::is_capturing;
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::{E4M3_WGMMA, OpKernels};
use crate::{Dtype, Error, Operations, Result, Tensor};

/// As in `kernels/e4m3_wgmma.cu`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct E4m3WgmmaArgs {
    x: [u64; 16],
    weight: DevicePointer,
    scales: DevicePointer,
    out: DevicePointer,
    out_stride: i64,
    rows: i32,
    n: i32,
    k: i32,
    wide: i32,
    accumulate: i32,
    settled: i32,
    stages: i32,
    tokens: i32,
}

const _: () = assert!(size_of::<E4m3WgmmaArgs>() == 192);

/// A kernel of products of few rows by warpgroup instructions.
#[derive(Clone, Copy, Debug)]
struct Grouped {
    name: &'static str,
    /// Rows of `x` that a block takes.
    tokens: usize,
    /// Blocks of a multiprocessor, at most.
    most_blocks: usize,
}

/// By the rows that they take; numbers as in `kernels/e4m3_wgmma.cu`.
const GROUPED: [Grouped; 10] = [
    Grouped { name: E4M3_WGMMA[0], tokens: 8, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[1], tokens: 16, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[2], tokens: 32, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[3], tokens: 40, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[4], tokens: 48, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[5], tokens: 64, most_blocks: 4 },
    Grouped { name: E4M3_WGMMA[6], tokens: 80, most_blocks: 3 },
    Grouped { name: E4M3_WGMMA[7], tokens: 96, most_blocks: 3 },
    Grouped { name: E4M3_WGMMA[8], tokens: 112, most_blocks: 3 },
    Grouped { name: E4M3_WGMMA[9], tokens: 128, most_blocks: 3 },
];

/// Threads of a block.
const THREADS: usize = 160;

/// Shared memory of a Hopper multiprocessor, of which each block costs 1 KiB more than it asks for.
const HOPPER_BYTES: usize = 228 << 10;

/// Blocks of a multiprocessor that keep it busy, and that all kernels have room for.
const BLOCKS: RangeInclusive<usize> = 2..=3;

/// Parts of k, at most: a cluster of more blocks finds room on few multiprocessors.
const MOST_PARTS: usize = 5;

/// Stretches of k that are worth a block's start and end.
const LEAST_STRETCHES: usize = 8;

impl Grouped {
    /// The kernel that takes so many rows, or the one that takes the most.
    fn of(rows: usize) -> &'static Self {
        let enough = GROUPED.iter().find(|grouped| grouped.tokens >= rows);
        enough.unwrap_or(&GROUPED[GROUPED.len() - 1])
    }

    /// A stage has a tile of the weight, a stretch of `x` and two barriers.
    const fn stage_bytes(&self) -> usize {
        TILE * TILE + self.tokens * 2 * TILE + 16
    }

    /// Stages of each of as many blocks of a multiprocessor.
    const fn stages(&self, blocks: usize) -> usize {
        (HOPPER_BYTES / blocks - 1024) / self.stage_bytes()
    }
}

/// Clusters of 1, 2, .. blocks that a device runs at once with one block on a multiprocessor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clusters([usize; MOST_PARTS]);

impl Clusters {
    /// What share of the device so many tiles keep busy, in thousandths, with these parts of k and blocks of a
    /// multiprocessor.
    fn busy(&self, tiles: usize, parts: usize, blocks: usize) -> usize {
        let at_once = (blocks * self.0[parts - 1]).max(1);
        let rounds = tiles.div_ceil(at_once).max(1);
        1000 * tiles * parts / (rounds * blocks * self.0[0]).max(1)
    }

    /// Parts of k that blocks of a cluster multiply: the fewest that keep four fifths of the device busy. What sums are,
    /// bit for bit, depends on this and on nothing else, so that it may not depend on the rows of `x`.
    fn parts(&self, [n, k]: [usize; 2]) -> usize {
        let most = (k.div_ceil(TILE) / LEAST_STRETCHES).clamp(1, MOST_PARTS);
        let busy = |parts: usize| {
            BLOCKS.map(|blocks| self.busy(n.div_ceil(TILE), parts, blocks)).max().unwrap_or(0)
        };
        let enough = (1..=most).find(|&parts| busy(parts) >= 800);
        enough.or((1..=most).rev().max_by_key(|&parts| busy(parts))).unwrap_or(1)
    }

    /// Blocks of a multiprocessor, which divide its shared memory: the most if they are more than two rounds, whose ends
    /// then even out.
    fn blocks(&self, n: usize, parts: usize, kernel: &Grouped) -> usize {
        let (tiles, most) = (n.div_ceil(TILE), kernel.most_blocks);
        if tiles > 2 * most * self.0[parts - 1] {
            return most;
        }
        (2..=most).max_by_key(|&blocks| self.busy(tiles, parts, blocks)).unwrap_or(2)
    }
}

/// How bulk copies find boxes of a matrix of 16-bit numbers, rows of 128 bytes swizzled as warpgroup instructions read them.
fn boxes(x: &Tensor, [rows, columns]: [usize; 2]) -> Result<[u64; 16]> {
    let [x_rows, x_columns] = [x.shape()[0], x.row_len()].map(|n| n as u64);
    let (sizes, stride) = ([x_columns, x_rows], (x.stride() * x.dtype().bytes()) as u64);
    let (size, steps) = ([columns as u32, rows as u32], [1, 1]);
    let mut map = Aligned([0; 16]);
    // SAFETY: the map has its size and alignment, and the arrays their two axes; strides are those of all but the first.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            match x.dtype() {
                Dtype::Bf16 => TensorMapType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                _ => TensorMapType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            },
            2,
            x.pointer() as *mut c_void,
            sizes.as_ptr(),
            &stride,
            size.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(Error::driver("cuTensorMapEncodeTiled"))?;
    Ok(map.0)
}

/// As the driver wants a tensor map's memory.
#[repr(C, align(128))]
struct Aligned([u64; 16]);

impl Operations {
    /// [`product_e4m3`](Self::product_e4m3) by warpgroup instructions.
    pub(super) fn grouped_product(
        &self,
        x: &Tensor,
        weight: &E4m3Weight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let (rows, [n, k]) = (x.shape()[0], weight.shape);
        let kernels = self.lazily(&self.e4m3_wgmma, Source::E4m3Wgmma, &E4M3_WGMMA)?;
        let clusters = self.clusters(&kernels)?;
        let (kernel, parts) = (Grouped::of(rows), clusters.parts(weight.shape));
        let stages = kernel.stages(clusters.blocks(n, parts, kernel));
        let blocks = rows.div_ceil(kernel.tokens);
        let tokens = rows.div_ceil(blocks.max(1));
        let args = E4m3WgmmaArgs {
            x: boxes(x, [tokens, TILE])?,
            weight: weight.bytes.address(),
            scales: weight.scales.pointer(),
            out: d.pointer(),
            out_stride: d.stride() as i64,
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            wide: i32::from(d.dtype() == Dtype::F32),
            accumulate: i32::from(accumulate),
            settled: i32::from(is_capturing()),
            stages: stages as i32,
            tokens: tokens as i32,
        };
        let grid = [parts, n.div_ceil(TILE), blocks];
        let room = stages * kernel.stage_bytes();
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch_clusters(kernel.name, grid, parts, THREADS, room, &args) }
    }

    fn clusters(&self, kernels: &OpKernels) -> Result<Clusters> {
        let mut kept = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(clusters) = *kept {
            return Ok(clusters);
        }
        let kernel = &GROUPED[0];
        let room = kernel.stages(1) * kernel.stage_bytes();
        let mut clusters = [0; MOST_PARTS];
        for (clusters, blocks) in clusters.iter_mut().zip(1..) {
            *clusters = kernels.clusters_at_once(kernel.name, blocks, THREADS, room)?;
        }
        Ok(*kept.insert(Clusters(clusters)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::e4m3_weight::{MANY, numbers};

    #[test]
    fn products_by_warpgroups_are_as_in_the_source() {
        let kernels = numbers(Source::E4m3Wgmma);
        assert_eq!(kernels.len(), GROUPED.len());
        let threads = format!("#define THREADS {THREADS} ");
        assert!(Source::E4m3Wgmma.text().contains(&threads));
        for (grouped, kernel) in GROUPED.iter().zip(&kernels) {
            assert_eq!(kernel[..], [grouped.tokens, grouped.most_blocks]);
            assert_eq!(grouped.name, format!("e4m3_wgmma_{}", grouped.tokens));
            assert!(grouped.most_blocks >= *BLOCKS.end());
            for blocks in 1..=grouped.most_blocks {
                let room = grouped.stages(blocks) * grouped.stage_bytes();
                assert!(blocks * (room + 1024) <= HOPPER_BYTES && room <= 227 << 10);
                // The sums, in place of the stages but for their barriers.
                let sums = grouped.tokens * (TILE + 4) * size_of::<f32>();
                assert!(sums <= room - 16 * grouped.stages(blocks), "{}", grouped.name);
            }
            assert!(grouped.stages(grouped.most_blocks) >= 3, "{}", grouped.name);
        }
        for rows in 1..MANY {
            assert!(Grouped::of(rows).tokens >= rows);
        }
    }

    /// As was fastest on an H200, whose clusters these are.
    #[test]
    fn k_is_divided_so_that_multiprocessors_are_busy() {
        let clusters = Clusters([132, 66, 41, 31, 23]);
        for (shape, parts, few, many) in [
            ([8192, 8192], 2, 2, 2),
            ([8192, 28_672], 2, 2, 2),
            ([10_240, 8192], 2, 3, 3),
            ([57_344, 8192], 1, 4, 3),
            ([6144, 4096], 2, 2, 2),
            ([4096, 4096], 5, 3, 3),
            ([4096, 14_336], 5, 3, 3),
            ([28_672, 4096], 1, 4, 2),
            // Not timed: an output matrix, of more rounds.
            ([128_256, 8192], 1, 4, 3),
            // Too short to be divided.
            ([4096, 960], 1, 2, 2),
            ([1, 16], 1, 2, 2),
        ] {
            assert_eq!(clusters.parts(shape), parts, "{shape:?}");
            for (rows, blocks) in [(1, few), (64, few), (65, many), (128, many)] {
                let kernel = Grouped::of(rows);
                assert_eq!(clusters.blocks(shape[0], parts, kernel), blocks, "{rows}, {shape:?}");
            }
        }
    }
}
