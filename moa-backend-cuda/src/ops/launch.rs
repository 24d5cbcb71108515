//! The kernels beside attention, loaded on a device.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::CudaFunction;
use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute as Attribute, CUlaunchAttribute, CUlaunchConfig,
};
use cudarc::nvrtc::Ptx;

use crate::kernels::compile::{HEAD_DIMS, Variant, compile};
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::kernels::{clusters, overlapping};
use crate::{Device, Dtype, Error, Result};

/// Arguments of every kernel, field by field as in `kernels/rows.cuh`; the kernels say what each one
/// reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OpArgs {
    pub(crate) x: DevicePointer,
    pub(crate) y: DevicePointer,
    pub(crate) w: DevicePointer,
    pub(crate) out: DevicePointer,
    pub(crate) ids: DevicePointer,
    pub(crate) x_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) out_stride: i64,
    pub(crate) rows: i32,
    pub(crate) cols: i32,
    pub(crate) eps: f32,
    pub(crate) flag: i32,
}

const _: () = assert!(size_of::<OpArgs>() == 80);

/// Names of the kernels of a forward pass.
pub(crate) const FORWARD: [&str; 13] = [
    "rms_norm",
    "embed",
    "rows",
    "swiglu",
    "add",
    "add_rows",
    "add_bias",
    "cast",
    "rope",
    "turns",
    "argmax_parts",
    "argmax",
    "randomise",
];

/// Most rows of blocks in a grid, which goes on along its third axis.
const GRID_ROWS: usize = 1 << 15;

#[derive(Debug)]
pub(crate) struct OpKernels {
    device: Device,
    functions: HashMap<&'static str, CudaFunction>,
    /// Whether they may be launched before the kernel before has ended, as they wait for that themselves.
    overlap: bool,
}

/// Names of the kernels of products of few rows, by how many.
pub(crate) const GEMV: [&str; 2] = ["gemv_1", "gemv_2"];

/// Names of the kernels of 8-bit weights, those of products of few rows first.
pub(crate) const E4M3: [&str; 7] =
    ["e4m3_8", "e4m3_16", "e4m3_32", "e4m3_64", "widen_e4m3", "widen_tiles_e4m3", "randomise_e4m3"];

/// Names of the kernels of 8-bit activations.
pub(crate) const E4M3_ROWS: [&str; 1] = ["round_rows_e4m3"];

/// Names of the kernels of 8-bit weights with warpgroup instructions.
pub(crate) const E4M3_WGMMA: [&str; 10] = [
    "e4m3_wgmma_8",
    "e4m3_wgmma_16",
    "e4m3_wgmma_32",
    "e4m3_wgmma_40",
    "e4m3_wgmma_48",
    "e4m3_wgmma_64",
    "e4m3_wgmma_80",
    "e4m3_wgmma_96",
    "e4m3_wgmma_112",
    "e4m3_wgmma_128",
];

/// Names of the kernels of weights in blocks: products, two of each kind, and those that make elements or records.
#[rustfmt::skip]
pub(crate) const BLOCKS: [&str; 19] = [
    "q4_0_8", "q4_0_16", "q4_1_8", "q4_1_16", "q5_0_8", "q5_0_16", "q5_1_8", "q5_1_16",
    "q8_0_8", "q8_0_16", "q4_k_8", "q4_k_16", "q5_k_8", "q5_k_16", "q6_k_8", "q6_k_16",
    WIDEN_BLOCKS, EMBED_BLOCKS, PACK_BLOCKS,
];
pub(crate) const WIDEN_BLOCKS: &str = "widen_blocks";
pub(crate) const EMBED_BLOCKS: &str = "embed_blocks";
pub(crate) const PACK_BLOCKS: &str = "pack_blocks";

/// Names of the kernels of products of one row with weights in blocks.
#[rustfmt::skip]
pub(crate) const BLOCKS_ROW: [&str; 8] =
    ["q4_0_1", "q4_1_1", "q5_0_1", "q5_1_1", "q8_0_1", "q4_k_1", "q5_k_1", "q6_k_1"];

/// Names of the kernels of sampling.
pub(crate) const SAMPLE: [&str; 1] = ["sample"];

/// Names of the kernels of a backward pass.
pub(crate) const BACKWARD: [&str; 5] =
    ["attend_backward", "add_blocks", "finite", "rms_norm_backward", "swiglu_backward"];

impl OpKernels {
    pub(crate) fn load(
        device: &Device,
        dtype: Dtype,
        source: Source,
        names: &[&'static str],
    ) -> Result<Self> {
        // Nothing in them depends on the head dimension.
        let variant = Variant { head_dim: HEAD_DIMS[0], dtype };
        let cubin = compile(source, variant, device.architecture())?;
        let module = device
            .context()
            .load_module(Ptx::from_binary(cubin))
            .map_err(Error::driver("cuModuleLoadData"))?;
        let load = |&name| {
            let function = module.load_function(name);
            let function = function.map_err(Error::driver("cuModuleGetFunction"))?;
            if matches!(
                source,
                Source::E4m3 | Source::E4m3Wgmma | Source::Blocks | Source::BlocksRow
            ) {
                function
                    .set_attribute(
                        Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        device.shared_bytes() as i32,
                    )
                    .map_err(Error::driver("cuFuncSetAttribute"))?;
            }
            if source == Source::BlocksRow {
                // Kernels after each other share a multiprocessor only if it is divided alike for both.
                function
                    .set_attribute(
                        Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                        100,
                    )
                    .map_err(Error::driver("cuFuncSetAttribute"))?;
            }
            Ok((name, function))
        };
        let functions = names.iter().map(load).collect::<Result<_>>()?;
        let overlap = device.architecture().major >= 9
            && matches!(
                source,
                Source::Ops
                    | Source::Gemv
                    | Source::E4m3
                    | Source::E4m3Rows
                    | Source::E4m3Wgmma
                    | Source::Blocks
                    | Source::BlocksRow
                    | Source::AllReduce
            );
        Ok(Self { device: device.clone(), functions, overlap })
    }

    /// One block for each row.
    ///
    /// # Safety
    /// What `args` points to is device memory of the sizes that the kernel says, in use by nothing
    /// else before the device's stream has passed this launch.
    pub(crate) unsafe fn by_rows(&self, name: &'static str, args: &OpArgs) -> Result<()> {
        let threads = (args.cols as usize / 8).next_multiple_of(32).clamp(32, 1024);
        // SAFETY: as the caller promises.
        unsafe { self.launch(name, [args.rows as usize, 1, 1], threads, args) }
    }

    /// One thread for `each` elements of a row.
    ///
    /// # Safety
    /// As [`by_rows`](Self::by_rows).
    pub(crate) unsafe fn by_elements(
        &self,
        name: &'static str,
        each: usize,
        args: &OpArgs,
    ) -> Result<()> {
        let rows = args.rows as usize;
        let y = rows.min(GRID_ROWS);
        let grid = [(args.cols as usize / each).div_ceil(256), y, rows.div_ceil(y.max(1))];
        // SAFETY: as the caller promises.
        unsafe { self.launch(name, grid, 256, args) }
    }

    /// # Safety
    /// As [`by_rows`](Self::by_rows); `args` is the kernel's one argument.
    pub(crate) unsafe fn launch<A>(
        &self,
        name: &'static str,
        grid: [usize; 3],
        threads: usize,
        args: &A,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_shared(name, grid, threads, 0, args) }
    }

    /// With dynamic shared memory.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub(crate) unsafe fn launch_shared<A>(
        &self,
        name: &'static str,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        args: &A,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_clusters(name, grid, 1, threads, shared_bytes, args) }
    }

    /// With dynamic shared memory, which `cluster` blocks side by side along x see of each other.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub(crate) unsafe fn launch_clusters<A>(
        &self,
        name: &'static str,
        grid: [usize; 3],
        cluster: usize,
        threads: usize,
        shared_bytes: usize,
        args: &A,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(name)?;
        self.device.bind()?;
        let mut arguments = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let mut both = [overlapping(), clusters(cluster)];
        let own = &mut both[usize::from(!self.overlap)..1 + usize::from(cluster > 1)];
        let config = self.config(grid, threads, shared_bytes, own);
        // SAFETY: each kernel takes one argument, by value, which the launch copies; the rest is as
        // the caller promises.
        unsafe {
            sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(Error::driver(name))
    }

    /// Clusters of so many blocks that run at once.
    pub(crate) fn clusters_at_once(
        &self,
        name: &'static str,
        cluster: usize,
        threads: usize,
        shared_bytes: usize,
    ) -> Result<usize> {
        let function = self.function(name)?;
        self.device.bind()?;
        let mut attributes = [clusters(cluster)];
        let config = self.config([cluster, 1, 1], threads, shared_bytes, &mut attributes);
        let mut at_once = 0;
        // SAFETY: both pointers are valid for the call.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut at_once, function, &config) }
            .result()
            .map_err(Error::driver("cuOccupancyMaxActiveClusters"))?;
        Ok(at_once.max(0) as usize)
    }

    fn function(&self, name: &'static str) -> Result<CUfunction> {
        match self.functions.get(name) {
            Some(function) => Ok(function.cu_function()),
            None => Err(Error::argument("Operations", "kernel", "one that was loaded", name)),
        }
    }

    fn config(
        &self,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        attributes: &mut [CUlaunchAttribute],
    ) -> CUlaunchConfig {
        let [x, y, z] = grid.map(|n| n as u32);
        CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.device.stream().cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that is not named here is found missing only on a GPU.
    #[test]
    fn every_kernel_of_a_source_is_named() {
        for (source, names) in [
            (Source::Ops, &FORWARD[..]),
            (Source::Sample, &SAMPLE[..]),
            (Source::E4m3Rows, &E4M3_ROWS[..]),
            (Source::Backward, &BACKWARD[..]),
        ] {
            let text = source.text();
            assert_eq!(text.matches("extern \"C\"").count(), names.len(), "{}", source.name());
            for name in names {
                assert!(text.contains(&format!(" {name}(const ")), "{name}");
            }
        }
    }
}
