use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, PinnedHostSlice, result};

use crate::graph::current;
use crate::kernels::Kernels;
use crate::kernels::compile::{Architecture, Variant};
use crate::kernels::narrow::NarrowKernels;
use crate::kernels::tables::DevicePointer;
use crate::memory::Downloads;
use crate::pool::Pool;
use crate::{Error, Result, library};

/// A `CUstream` of any library in this process; null is the default stream.
pub type RawStream = *mut c_void;

/// Asked about once a millisecond while the host waits for a device, with the time that the wait has taken so far;
/// `false` ends it. So a device that waits for others which never come can be given up.
pub type Watch = Arc<dyn Fn(Duration) -> bool + Send + Sync>;

/// How often a wait is watched.
const WATCHED: Duration = Duration::from_millis(1);
/// Times that a wait asks for its end without a pause: most steps end within milliseconds.
const EAGER: usize = 20_000;

/// Device memory that the driver keeps for the next allocation instead of giving it back.
const KEPT_BYTES: u64 = 256 << 20;

/// One GPU: its primary context, which all libraries of a process share, and a stream of our own.
///
/// Clones are the same device.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

struct Inner {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    architecture: Architecture,
    multiprocessors: usize,
    shared_bytes: usize,
    /// By variant, and whether scores have a softcap.
    kernels: Mutex<HashMap<(Variant, bool), Arc<Kernels>>>,
    narrow_kernels: Mutex<HashMap<(Variant, bool), Arc<NarrowKernels>>>,
    watch: Mutex<Option<Watch>>,
    downloads: Mutex<Option<Downloads>>,
    /// Where [`Device::read`] has the driver copy to: for other memory it has a buffer of its own, which takes longer.
    read: Mutex<Option<PinnedHostSlice<i32>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?})", self.name, self.architecture)
    }
}

impl Device {
    /// Opens device `ordinal`, counted from 0.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], [`Error::OldDevice`], [`Error::Driver`].
    pub fn open(ordinal: usize) -> Result<Self> {
        library::driver()?;
        let count = match CudaContext::device_count() {
            Ok(count) => usize::try_from(count).unwrap_or(0),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
            Err(error) => return Err(Error::driver("cuInit")(error)),
        };
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let context =
            CudaContext::new(ordinal).map_err(Error::driver("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: whatever this crate allocates is used on the stream that it was allocated on, or
        // under the contract of an unsafe function. Events would only cost time, and break captures.
        unsafe { context.disable_event_tracking() };
        let attribute = |attribute| {
            let value = context.attribute(attribute).map_err(Error::driver("cuDeviceGetAttribute"));
            value.map(|value| usize::try_from(value).unwrap_or(0))
        };
        let name = context.name().map_err(Error::driver("cuDeviceGetName"))?;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
        if major < 8 {
            return Err(Error::OldDevice { name, major, minor });
        }
        Pool::of(&context)?.keep(KEPT_BYTES)?;
        Ok(Self(Arc::new(Inner {
            stream: context.new_stream().map_err(Error::driver("cuStreamCreate"))?,
            name,
            architecture: Architecture { major, minor },
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            kernels: Mutex::default(),
            watch: Mutex::default(),
            downloads: Mutex::default(),
            read: Mutex::default(),
            narrow_kernels: Mutex::default(),
            context,
        })))
    }

    /// Whether both are clones of one device. Two that were opened with one ordinal have a context in common but
    /// not a stream: what one frees, the other may still read.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What kernels are compiled for.
    pub fn architecture(&self) -> Architecture {
        self.0.architecture
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self.0.context.mem_get_info().map_err(Error::driver("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Bytes that can still be had: those that are free, and those that the driver keeps of what was
    /// freed.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn available(&self) -> Result<u64> {
        let kept = Pool::of(&self.0.context)?.unused()?;
        Ok(self.memory()?.0 + kept)
    }

    /// Lets the driver keep up to so many bytes of freed memory for the next allocations: a program
    /// that has the GPU to itself allocates faster if it keeps all.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn keep_freed(&self, bytes: u64) -> Result<()> {
        Pool::of(&self.0.context)?.keep(bytes)
    }

    /// Most bytes that were in use at once since [`reset_peak`](Self::reset_peak), those inside of
    /// graphs included.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn peak_bytes(&self) -> Result<u64> {
        Pool::of(&self.0.context)?.peak()
    }

    /// Forgets the peak before.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn reset_peak(&self) -> Result<()> {
        Pool::of(&self.0.context)?.reset_peak()
    }

    /// The stream that tensors and caches are allocated on and that the safe operations run on; inside
    /// of [`capture`](Self::capture), the one that captures.
    pub fn stream(&self) -> RawStream {
        current(self.0.stream.cu_stream().cast())
    }

    /// Waits for everything on [`stream`](Self::stream).
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    pub fn synchronize(&self) -> Result<()> {
        self.settle()?;
        self.0.stream.synchronize().map_err(Error::driver("cuStreamSynchronize"))
    }

    /// Pieces of memory one after the other, as they are when all that was launched on [`stream`](Self::stream) is done:
    /// what is launched there meanwhile does not wait for the copies.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel; [`Error::HostMemory`].
    ///
    /// # Safety
    /// They are this device's memory, and nobody writes or frees them until this returns.
    pub(crate) unsafe fn download(&self, pieces: &[(DevicePointer, usize)]) -> Result<Vec<u8>> {
        self.settle()?;
        self.bind()?;
        let mut downloads = self.0.downloads.lock().unwrap_or_else(PoisonError::into_inner);
        let downloads = match &mut *downloads {
            Some(downloads) => downloads,
            none => none.insert(Downloads::new(&self.0.context)?),
        };
        // SAFETY: as the caller promises.
        unsafe { downloads.read(&self.0.stream, pieces) }
    }

    /// Numbers as they are when all that was launched on [`stream`](Self::stream) is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    ///
    /// # Safety
    /// There are `len` of them, in this device's memory, until this returns.
    pub(crate) unsafe fn read(&self, from: DevicePointer, len: usize) -> Result<Vec<i32>> {
        self.settle()?;
        self.bind()?;
        let mut place = self.0.read.lock().unwrap_or_else(PoisonError::into_inner);
        if place.as_ref().is_none_or(|place| place.len() < len) {
            let room = len.next_power_of_two().max(1024);
            // SAFETY: what is read of it was copied there before.
            let new = unsafe { self.0.context.alloc_pinned_with_flags(room, 0) };
            let mut new = new.map_err(Error::driver("cuMemHostAlloc"))?;
            new.as_mut_slice().map_err(Error::driver("cuEventSynchronize"))?.fill(0);
            *place = Some(new);
        }
        let Some(place) = &mut *place else { return Ok(Vec::new()) };
        let all = place.as_mut_slice().map_err(Error::driver("cuEventSynchronize"))?;
        let to = &mut all[..len];
        // SAFETY: as the caller promises; all copies to this place are on one stream, which was settled before.
        unsafe { result::memcpy_dtoh_async(to, from, self.0.stream.cu_stream()) }
            .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
        self.synchronize()?;
        Ok(to.to_vec())
    }

    /// Has all waits of the host for this device's stream watched from now on, or none.
    pub fn set_watch(&self, watch: Option<Watch>) {
        *self.0.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }

    /// Where waits are watched, waits for everything on [`stream`](Self::stream): before calls of the driver that
    /// would wait for it themselves, unwatched.
    ///
    /// # Errors
    /// [`Error::GivenUp`], [`Error::Driver`].
    pub(crate) fn settle(&self) -> Result<()> {
        let stream = self.0.stream.cu_stream();
        // SAFETY: the stream is this device's.
        self.watched("cuStreamQuery", || unsafe { sys::cuStreamQuery(stream) })
    }

    /// Where waits are watched, asks `query` until it is no longer [not ready](sys::CUresult::CUDA_ERROR_NOT_READY).
    pub(crate) fn watched(
        &self,
        call: &'static str,
        query: impl Fn() -> sys::CUresult,
    ) -> Result<()> {
        let watch = self.0.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(watch) = watch else { return Ok(()) };
        self.bind()?;
        let (begin, mut asked, mut rounds) = (Instant::now(), Duration::ZERO, 0);
        loop {
            match query() {
                sys::CUresult::CUDA_ERROR_NOT_READY => {}
                done => return done.result().map_err(Error::driver(call)),
            }
            rounds += 1;
            match rounds < EAGER {
                true => std::hint::spin_loop(),
                false => std::thread::sleep(Duration::from_micros(20)),
            }
            let waited = begin.elapsed();
            if waited >= asked + WATCHED {
                asked = waited;
                if !watch(waited) {
                    return Err(Error::GivenUp);
                }
            }
        }
    }

    /// The kernels of a variant, compiled (or read from the cache on disk) the first time.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`].
    pub fn kernels(&self, variant: Variant) -> Result<Arc<Kernels>> {
        self.kernels_of(variant, false)
    }

    /// The same of scores with a softcap or without.
    pub(crate) fn kernels_of(&self, variant: Variant, has_softcap: bool) -> Result<Arc<Kernels>> {
        let load = || Kernels::load(self, variant, has_softcap);
        once(&self.0.kernels, (variant, has_softcap), load)
    }

    /// Those of narrow heads, which only caches that have such heads need.
    ///
    /// # Errors
    /// As [`kernels`](Self::kernels).
    pub(crate) fn narrow_kernels(
        &self,
        variant: Variant,
        has_softcap: bool,
    ) -> Result<Arc<NarrowKernels>> {
        let load = || NarrowKernels::load(self, variant, has_softcap);
        once(&self.0.narrow_kernels, (variant, has_softcap), load)
    }

    /// Makes the device's context the calling thread's, which calls below cudarc's need.
    pub(crate) fn bind(&self) -> Result<()> {
        self.0.context.bind_to_thread().map_err(Error::driver("cuCtxSetCurrent"))
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    pub(crate) fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.0.stream
    }

    /// Most dynamic shared memory of a block, in bytes.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.0.shared_bytes
    }

    /// Uninitialised memory on the device's stream; at least one element, so that it has an address.
    pub(crate) fn alloc<T: DeviceRepr>(
        &self,
        what: &'static str,
        len: usize,
    ) -> Result<CudaSlice<T>> {
        let len = len.max(1);
        let out_of_memory = |bytes| {
            let free = self.available().unwrap_or(0);
            Error::OutOfMemory { what, bytes, free }
        };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| out_of_memory(u64::MAX))?;
        // SAFETY: callers write before they read.
        unsafe { self.0.stream.alloc(len) }.map_err(|error| {
            match error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                true => out_of_memory(bytes as u64),
                false => Error::driver("cuMemAllocAsync")(error),
            }
        })
    }
}

/// Kernels of a variant, with a softcap or without, loaded the first time.
fn once<K>(
    all: &Mutex<HashMap<(Variant, bool), Arc<K>>>,
    of: (Variant, bool),
    load: impl FnOnce() -> Result<K>,
) -> Result<Arc<K>> {
    // Held while compiling: two threads want the same kernels, not two compilations.
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = all.get(&of) {
        return Ok(Arc::clone(kernels));
    }
    let kernels = Arc::new(load()?);
    all.insert(of, Arc::clone(&kernels));
    Ok(kernels)
}
