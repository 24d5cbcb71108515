//! Launching the kernels on any stream and any memory of the device.

pub(crate) mod compile;
mod cubin_cache;
pub(crate) mod narrow;
pub(crate) mod source;
pub mod tables;

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUfunction_attribute as Attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim,
    CUlaunchConfig,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use crate::attention::schedule::Path;
use crate::kernels::compile::{Variant, compile, compile_anew};
use crate::kernels::source::Source;
use crate::kernels::tables::{AppendArgs, DevicePointer, ExtendArgs, InfluenceArgs, PutArgs};
use crate::{Device, Error, RawStream, Result};

/// Dynamic shared memory that needs no permission beside the kernels' own static memory, which
/// counts against the same 48 KiB.
const STATIC_LIMIT_BYTES: usize = 32 << 10;

/// The kernels of one variant, loaded on a device: the raw launch interface.
///
/// Its functions take addresses, strides and a stream, and know no tensor type, so that an engine
/// can use them on its own memory. [`crate::Step`] fills their arguments from caches.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    variant: Variant,
    multiprocessors: usize,
    append: Kernel,
    advance: Kernel,
    put: Kernel,
    split: Kernel,
    tile: Kernel,
    /// Only where the architecture and the head dimension have it.
    wgmma: Option<Kernel>,
    /// With `wgmma`.
    gangs: Option<Kernel>,
    merge: Option<Kernel>,
    influence: Kernel,
}

#[derive(Debug)]
struct Kernel {
    function: CudaFunction,
    call: &'static str,
    threads: u32,
    shared_bytes: usize,
    /// Whether it may be launched before the kernel before it has ended, as it waits for that itself.
    overlaps: bool,
}

impl Kernels {
    /// Of scores with a softcap or without.
    pub(crate) fn load(device: &Device, variant: Variant, has_softcap: bool) -> Result<Self> {
        let of = |source: Source| if has_softcap { source.with_softcap() } else { source };
        let wants = |source: Source| {
            source.is_attention() && of(source) == source && (has_softcap || !source.has_softcap())
        };
        let modules = Modules::load(device, variant, wants)?;
        let kernel = |source, symbol, threads, shared_bytes| {
            modules.kernel(of(source), symbol, threads, shared_bytes)
        };
        let dim = variant.head_dim;
        Ok(Self {
            context: Arc::clone(device.context()),
            variant,
            multiprocessors: device.multiprocessors(),
            append: kernel(Source::Append, "append", 256, 0)?,
            advance: kernel(Source::Append, "advance", 256, 0)?,
            put: kernel(Source::Append, "put", 256, 0)?,
            split: kernel(Source::Decode, "extend_split", 128, split_shared_bytes(dim))?,
            tile: kernel(Source::Tile, "extend_tile", 128, tile_shared_bytes(dim))?,
            influence: kernel(Source::Influence, "influence", 128, influence_shared_bytes(dim))?,
            merge: modules.find(of(Source::Wgmma), "merge_tiles", 256, 0)?,
            wgmma: modules.find(of(Source::Wgmma), "extend_wgmma", 384, wgmma_shared_bytes(dim))?,
            gangs: modules.find(of(Source::Wgmma), "extend_gangs", 384, wgmma_shared_bytes(dim))?,
        })
    }

    /// What they were compiled for.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    pub(crate) fn has_wgmma(&self) -> bool {
        self.wgmma.is_some()
    }

    /// Rotates queries and keys (RoPE) and writes keys and values into the caches.
    /// `max_tokens` is the largest number of new tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// Every address in `args` and in the tables that it points to is device memory of this device
    /// of the size that [`AppendArgs`], [`SequenceRow`](tables::SequenceRow) and [`moa_core::HeadRow`] say,
    /// alive until the stream has passed this launch and written by nothing else meanwhile;
    /// `lens[s] + tokens` is at most the capacity of the layout; `stream` is a stream of this
    /// device's primary context.
    pub unsafe fn append(
        &self,
        stream: RawStream,
        args: &AppendArgs,
        max_tokens: usize,
    ) -> Result<()> {
        let heads = (args.query_heads + 2 * args.kv_heads) as usize;
        let rows = self.append.threads as usize / (self.variant.head_dim / 8);
        let blocks = (max_tokens * heads).div_ceil(rows);
        // SAFETY: as the caller promises.
        unsafe { self.launch(&self.append, stream, [blocks, args.num_sequences as usize], args) }
    }

    /// Attention of sequences with at most 16 rows (new tokens x query heads per KV head): one block
    /// for each of the `num_items` items.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// As [`append`](Self::append) with [`ExtendArgs`]; `partial` has room for
    /// [`Workspace`](crate::Workspace)'s bytes, `finished` is zero.
    pub unsafe fn extend_split(&self, stream: RawStream, args: &ExtendArgs) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch(&self.split, stream, [args.num_items as usize, 1], args) }
    }

    /// Attention in tiles of 64 rows, one block each: `ceil(tokens * group / 64) * kv_heads` per
    /// sequence, `num_tiles` in all.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// As [`append`](Self::append) with [`ExtendArgs`]; `first_item` of the sequences counts the
    /// tiles before them.
    pub unsafe fn extend_tile(&self, stream: RawStream, args: &ExtendArgs) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch(&self.tile, stream, [args.num_tiles as usize, 1], args) }
    }

    /// The same in tiles of 128 rows, on Hopper and for head dimensions 64 and 128; as many blocks as
    /// the device runs at once take the tiles in turn.
    ///
    /// # Errors
    /// [`moa_core::Error::Unsupported`] elsewhere, [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// As [`extend_tile`](Self::extend_tile); `tickets` are zero.
    pub unsafe fn extend_wgmma(&self, stream: RawStream, args: &ExtendArgs) -> Result<()> {
        let Some(kernel) = &self.wgmma else { return Err(no_wgmma()) };
        let blocks = (args.num_tiles as usize).min(self.multiprocessors);
        // SAFETY: as the caller promises.
        unsafe { self.launch(kernel, stream, [blocks, 1], args) }
    }

    /// The same of pieces of tiles, by gangs of `gang` blocks; `merges` tells which pieces [`merge_tiles`](Self::merge_tiles)
    /// puts together then, with the same arguments and right after it.
    ///
    /// # Errors
    /// As [`extend_wgmma`](Self::extend_wgmma).
    ///
    /// # Safety
    /// As [`extend_tile`](Self::extend_tile): `items` are `num_tiles` [`Piece`](tables::Piece)s, which belong to
    /// `multiprocessors / gang` gangs in turn.
    pub unsafe fn extend_gangs(
        &self,
        stream: RawStream,
        args: &ExtendArgs,
        gang: usize,
    ) -> Result<()> {
        let Some(kernel) = &self.gangs else { return Err(no_wgmma()) };
        // SAFETY: as the caller promises.
        unsafe { self.launch(kernel, stream, [self.multiprocessors / gang, gang], args) }
    }

    /// Puts together what gangs of `gang` blocks found of the tiles that they share, after
    /// [`extend_gangs`](Self::extend_gangs) with the same arguments.
    ///
    /// # Errors
    /// As [`extend_wgmma`](Self::extend_wgmma).
    ///
    /// # Safety
    /// As [`extend_gangs`](Self::extend_gangs): `splits` are `merges` [`Merge`](tables::Merge)s.
    pub unsafe fn merge_tiles(
        &self,
        stream: RawStream,
        args: &ExtendArgs,
        merges: usize,
        gang: usize,
    ) -> Result<()> {
        let Some(kernel) = &self.merge else { return Err(no_wgmma()) };
        let grid = [merges, gang * Path::Wgmma.tile_rows() / 8];
        // SAFETY: as the caller promises.
        unsafe { self.launch(kernel, stream, grid, args) }
    }

    /// Adds each sequence's new tokens to its entry of `lens`, so that a captured step can be
    /// replayed.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// As [`append`](Self::append): `lens` and `sequences` have `sequences_len` entries.
    pub unsafe fn advance(
        &self,
        stream: RawStream,
        lens: DevicePointer,
        sequences: DevicePointer,
        sequences_len: usize,
    ) -> Result<()> {
        let count = sequences_len as i32;
        let mut arguments: [*mut c_void; 3] =
            [&raw const lens as _, &raw const sequences as _, &raw const count as _];
        let grid = [sequences_len.div_ceil(self.advance.threads as usize), 1];
        // SAFETY: the arguments are those of the kernel; the rest is as the caller promises.
        unsafe { self.advance.launch_raw(&self.context, 0, stream, grid, &mut arguments) }
    }

    /// Writes a few bytes. A copy from the host's memory would take it several calls, and the device longer to begin.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// There is room for the bytes at their address; all else is as [`append`](Self::append).
    pub(crate) unsafe fn put(&self, stream: RawStream, args: &PutArgs) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch(&self.put, stream, [1, 1], args) }
    }

    /// Sums of influence over blocks of 64 x 64 tokens.
    ///
    /// # Errors
    /// [`Error::Driver`] if the launch is refused.
    ///
    /// # Safety
    /// As [`append`](Self::append) with [`InfluenceArgs`].
    pub unsafe fn influence(&self, stream: RawStream, args: &InfluenceArgs) -> Result<()> {
        let grid = [(args.tokens as usize).div_ceil(64), args.kv_heads as usize];
        // SAFETY: as the caller promises.
        unsafe { self.launch(&self.influence, stream, grid, args) }
    }

    pub(crate) unsafe fn extend(
        &self,
        path: Path,
        stream: RawStream,
        args: &ExtendArgs,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe {
            match path {
                Path::Split => self.extend_split(stream, args),
                Path::Tile => self.extend_tile(stream, args),
                Path::Wgmma => self.extend_wgmma(stream, args),
                // Of these kernels none: `Step` sends narrow heads to the others.
                Path::Narrow8 | Path::Narrow16 => Err(no_narrow()),
            }
        }
    }

    unsafe fn launch<A>(
        &self,
        kernel: &Kernel,
        stream: RawStream,
        grid: [usize; 2],
        args: &A,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { kernel.launch(&self.context, stream, grid, args) }
    }
}

/// Compiled sources of a variant, loaded on a device.
struct Modules<'a> {
    device: &'a Device,
    variant: Variant,
    modules: Vec<(Source, Arc<CudaModule>)>,
}

impl<'a> Modules<'a> {
    /// Of the sources that are wanted, those that exist for the variant.
    fn load(device: &'a Device, variant: Variant, wants: impl Fn(Source) -> bool) -> Result<Self> {
        variant.check("Device::kernels")?;
        let architecture = device.architecture();
        let wanted: Vec<Source> = Source::ALL
            .into_iter()
            .filter(|source| wants(*source))
            .filter(|source| source.exists_for(variant.head_dim, architecture))
            .collect();
        // NVRTC takes seconds for some of them.
        let compiled: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = wanted
                .iter()
                .map(|&source| scope.spawn(move || compile(source, variant, architecture)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        let mut modules = Vec::with_capacity(wanted.len());
        for (source, cubin) in wanted.into_iter().zip(compiled) {
            let load = |cubin| {
                let module = device.context().load_module(Ptx::from_binary(cubin));
                module.map_err(Error::driver("cuModuleLoadData"))
            };
            // A stored file that the driver does not take is made again, once.
            let module = match load(cubin?) {
                Ok(module) => module,
                Err(_) => load(compile_anew(source, variant, architecture, true)?)?,
            };
            modules.push((source, module));
        }
        Ok(Self { device, variant, modules })
    }

    /// A kernel, unless its source does not exist for the variant.
    fn find(
        &self,
        source: Source,
        symbol: &'static str,
        threads: u32,
        shared_bytes: usize,
    ) -> Result<Option<Kernel>> {
        let Some((_, module)) = self.modules.iter().find(|(of, _)| *of == source) else {
            return Ok(None);
        };
        let function =
            module.load_function(symbol).map_err(Error::driver("cuModuleGetFunction"))?;
        if shared_bytes > self.device.shared_bytes() {
            let expected = format!(
                "one whose {symbol} needs at most the {} bytes of shared memory of {}",
                self.device.shared_bytes(),
                self.device.name()
            );
            return Err(Error::argument("open", "head_dim", expected, self.variant.head_dim));
        }
        if shared_bytes > STATIC_LIMIT_BYTES {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, shared_bytes as i32)
                .map_err(Error::driver("cuFuncSetAttribute"))?;
        }
        if MANY_BLOCKS.contains(&symbol) {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            function.set_attribute(attribute, 100).map_err(Error::driver("cuFuncSetAttribute"))?;
        }
        let overlaps = self.device.architecture().major >= 9 && OVERLAPPING.contains(&symbol);
        Ok(Some(Kernel { function, call: symbol, threads, shared_bytes, overlaps }))
    }

    fn kernel(
        &self,
        source: Source,
        symbol: &'static str,
        threads: u32,
        shared_bytes: usize,
    ) -> Result<Kernel> {
        self.find(source, symbol, threads, shared_bytes)?
            .ok_or_else(|| Error::argument("Device::kernels", source.name(), "compiled", "absent"))
    }
}

/// Kernels of which several blocks share a multiprocessor, if all of its memory is made shared memory.
const MANY_BLOCKS: [&str; 2] = ["extend_narrow_8", "extend_narrow_16"];

/// Kernels that wait for the one before them themselves.
const OVERLAPPING: [&str; 9] = [
    "append",
    "append_narrow",
    "append_narrow_fed",
    "extend_gangs",
    "extend_narrow_8",
    "extend_narrow_16",
    "extend_split",
    "extend_wgmma",
    "merge_tiles",
];

impl Kernel {
    unsafe fn launch<A>(
        &self,
        context: &CudaContext,
        stream: RawStream,
        grid: [usize; 2],
        args: &A,
    ) -> Result<()> {
        // SAFETY: each of these kernels takes one argument, by value, which the launch copies.
        unsafe {
            let arguments = &mut [std::ptr::from_ref(args).cast_mut().cast()];
            self.launch_raw(context, self.shared_bytes, stream, grid, arguments)
        }
    }

    unsafe fn launch_raw(
        &self,
        context: &CudaContext,
        shared_bytes: usize,
        stream: RawStream,
        [x, y]: [usize; 2],
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if x == 0 || y == 0 {
            return Ok(());
        }
        let (Ok(x), Ok(y)) = (i32::try_from(x), u16::try_from(y)) else {
            let got = format_args!("{x} x {y}").to_string();
            return Err(Error::argument(self.call, "blocks", "fewer than 2^31 x 2^16", got));
        };
        context.bind_to_thread().map_err(Error::driver("cuCtxSetCurrent"))?;
        let mut overlap = overlapping();
        let config = CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: u32::from(y),
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: stream.cast(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.overlaps),
        };
        let function = self.function.cu_function();
        // SAFETY: the function is loaded; the arguments are as the caller promises.
        unsafe {
            sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(Error::driver(self.call))
    }
}

/// Lets a kernel start before the one before it has ended.
pub(crate) fn overlapping() -> CUlaunchAttribute {
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// Of a launch whose blocks come in clusters of so many along x.
pub(crate) fn clusters(blocks: usize) -> CUlaunchAttribute {
    let along_x = ClusterDim { x: blocks as u32, y: 1, z: 1 };
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { clusterDim: along_x },
    }
}

fn no_wgmma() -> Error {
    let operation = "extend_wgmma on this architecture and head dimension";
    moa_core::Error::Unsupported { backend: "cuda", operation }.into()
}

fn no_narrow() -> Error {
    let operation = "kernels of narrow heads among the others";
    moa_core::Error::Unsupported { backend: "cuda", operation }.into()
}

/// As `kernels/decode.cu` says.
fn split_shared_bytes(head_dim: usize) -> usize {
    let stages = if head_dim > 128 { 2 } else { 3 + usize::from(head_dim <= 64) };
    4 * stages * 2 * 16 * head_dim * 2
}

/// As `kernels/tile.cu` says.
fn tile_shared_bytes(head_dim: usize) -> usize {
    let keys = if head_dim > 128 { 16 } else { 64 };
    2 * 2 * keys * head_dim * 2
}

/// As `kernels/wgmma.cu` says.
fn wgmma_shared_bytes(head_dim: usize) -> usize {
    (2 * 128 + 2 * 2 * 128) * head_dim * 2 + 1024
}

/// As `kernels/influence.cu` says.
fn influence_shared_bytes(head_dim: usize) -> usize {
    let stages = if head_dim > 128 { 1 } else { 2 };
    stages * 2 * 64 * head_dim * 2
}
