//! Sums over several GPUs, by NCCL.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{Device, Dtype, Error, RawStream, Result, Tensor, library};

/// What ranks find each other by: one of them makes it and hands it to all others, which may be other
/// processes.
#[derive(Clone, Copy)]
pub struct NcclId(RawId);

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawId([u8; NcclId::BYTES]);

impl NcclId {
    /// Bytes of an id.
    pub const BYTES: usize = 128;

    /// A new one.
    ///
    /// # Errors
    /// [`Error::NoNccl`], [`Error::Nccl`].
    pub fn new() -> Result<Self> {
        let nccl = Library::get()?;
        let mut id = RawId([0; Self::BYTES]);
        // SAFETY: the function writes an id.
        nccl.check("ncclGetUniqueId", unsafe { (nccl.get_unique_id)(&raw mut id) })?;
        Ok(Self(id))
    }

    /// The id as bytes, to be sent to another process.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        self.0.0
    }

    /// The id that another process has sent.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(RawId(bytes))
    }
}

impl std::fmt::Debug for NcclId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NcclId")
    }
}

/// One rank of a group of GPUs.
pub struct Nccl {
    device: Device,
    library: &'static Library,
    /// `None` once it was aborted. Held while NCCL is called: it wants one thread at a time.
    comm: Mutex<Option<Comm>>,
    rank: usize,
    ranks: usize,
}

/// `ncclComm_t`.
struct Comm(*mut c_void);

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Comm {}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Nccl({} of {})", self.rank, self.ranks)
    }
}

/// `ncclInProgress`.
const IN_PROGRESS: c_int = 7;

/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

impl Nccl {
    /// Joins the group as `rank` of `ranks`; waits until all of them have. Each has a device of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such rank, [`Error::NoNccl`], [`Error::Nccl`],
    /// [`Error::Driver`].
    pub fn new(device: &Device, id: &NcclId, rank: usize, ranks: usize) -> Result<Self> {
        const OP: &str = "Nccl::new";
        let (Ok(own), Ok(all), true) =
            (c_int::try_from(rank), c_int::try_from(ranks), rank < ranks)
        else {
            return Err(Error::argument(OP, "rank", format_args!("below {ranks}"), rank));
        };
        let library = Library::get()?;
        device.bind()?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: the device's context is the thread's; NCCL writes the communicator.
        let status = unsafe { (library.comm_init_rank)(&raw mut comm, all, id.0, own) };
        library.check("ncclCommInitRank", status)?;
        let comm = Mutex::new(Some(Comm(comm)));
        let nccl = Self { device: device.clone(), library, comm, rank, ranks };
        // Connections are made at first use, where the host waits for the others: here is the place.
        nccl.all_reduce(&Tensor::zeros(device, &[8], Dtype::F32)?)?;
        device.synchronize()?;
        Ok(nccl)
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its number in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// GPUs of the group.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Adds up an f32 tensor over all ranks, in its own memory, which clones share. Only launches, on the
    /// device's own stream, so it can be captured.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is f32, on this device and without gaps,
    /// [`Error::Nccl`], also after [`abort`](Self::abort).
    pub fn all_reduce(&self, x: &Tensor) -> Result<()> {
        const OP: &str = "all_reduce";
        if x.dtype() != Dtype::F32 {
            return Err(Error::argument(OP, "tensor", Dtype::F32, x.dtype()));
        }
        if !x.device().is_same(&self.device) {
            return Err(Error::argument(OP, "tensor", "on the device of this rank", "on another"));
        }
        if !x.is_contiguous() {
            return Err(Error::shape(OP, "tensor", "rows without gaps", x.shape()));
        }
        let len = x.shape().iter().product::<usize>();
        if len == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = &*comm else {
            return Err(Error::Nccl { call: "ncclAllReduce", status: "was aborted".into() });
        };
        let (from, to) = (x.pointer() as *const c_void, x.pointer() as *mut c_void);
        let stream = self.device.stream();
        // SAFETY: the tensor has `len` f32 on this device, which nothing else uses on its way.
        let status =
            unsafe { (self.library.all_reduce)(from, to, len, FLOAT32, SUM, comm.0, stream) };
        self.library.check("ncclAllReduce", status)
    }

    /// Whether NCCL has noticed on its own that the group is broken, or the group was given up here.
    pub fn has_failed(&self) -> bool {
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = &*comm else { return true };
        let mut status = 0;
        // SAFETY: the communicator is alive; NCCL writes a status.
        let asked = unsafe { (self.library.get_async_error)(comm.0, &raw mut status) };
        // Work that is being set up is no error.
        asked != 0 || !matches!(status, 0 | IN_PROGRESS)
    }

    /// Whether [`abort`](Self::abort) was called.
    pub fn is_aborted(&self) -> bool {
        // Whoever holds it calls NCCL.
        self.comm.try_lock().is_ok_and(|comm| comm.is_none())
    }

    /// [`abort`](Self::abort) from another thread than the one that works with this rank, unless that one is in a
    /// call of NCCL.
    pub fn abort_from_outside(&self) {
        if let Ok(mut comm) = self.comm.try_lock() {
            self.end(comm.take());
        }
    }

    /// Gives up: sums under way on this GPU end soon, with whatever numbers, and later ones fail.
    pub fn abort(&self) {
        self.end(self.comm.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// NCCL tells the sums under way to end before anything else, but returns only once all graphs are gone that have captured
    /// sums of this communicator. Who calls this may own them, so that NCCL is called by a thread which nobody waits for.
    fn end(&self, comm: Option<Comm>) {
        let Some(comm) = comm else { return };
        let (device, abort) = (self.device.clone(), self.library.comm_abort);
        let call = move || {
            // All of it moves here, the communicator as a whole.
            let Comm(comm) = { comm };
            if device.bind().is_ok() {
                // SAFETY: it was taken, so that nothing uses it any more. There is nothing to do about a failure.
                let _ = unsafe { abort(comm) };
            }
        };
        // Without a thread the sums go on: nobody could end them and go on by itself.
        let _ = std::thread::Builder::new().name("nccl-abort".into()).spawn(call);
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(comm) = comm
            && self.device.bind().is_ok()
        {
            // SAFETY: as in `abort`; graphs that have captured it are gone, as they borrow the model.
            let _ = unsafe { (self.library.comm_destroy)(comm.0) };
        }
    }
}

/// What is called of NCCL. Not by cudarc, which does not look for `libnccl.so.2`, the only name that
/// NVIDIA's package has, and panics where it finds none.
struct Library {
    get_unique_id: unsafe extern "C" fn(*mut RawId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut *mut c_void, c_int, RawId, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        *mut c_void,
        RawStream,
    ) -> c_int,
    get_async_error: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(*mut c_void) -> c_int,
    comm_destroy: unsafe extern "C" fn(*mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Library {
    fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
        let missing = || Error::NoNccl { searched: library::NCCL };
        LIBRARY.get_or_init(Self::load).as_ref().ok_or_else(missing)
    }

    fn load() -> Option<Self> {
        let library = library::open(library::NCCL)?;
        // SAFETY: these are the functions' types in nccl.h, the same in all versions of NCCL 2. The
        // library stays for the life of the process.
        let loaded = unsafe {
            Self {
                get_unique_id: *library.get(b"ncclGetUniqueId").ok()?,
                comm_init_rank: *library.get(b"ncclCommInitRank").ok()?,
                all_reduce: *library.get(b"ncclAllReduce").ok()?,
                get_async_error: *library.get(b"ncclCommGetAsyncError").ok()?,
                comm_abort: *library.get(b"ncclCommAbort").ok()?,
                comm_destroy: *library.get(b"ncclCommDestroy").ok()?,
                get_error_string: *library.get(b"ncclGetErrorString").ok()?,
            }
        };
        std::mem::forget(library);
        Some(loaded)
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NCCL has a static text for every status.
        let text = unsafe {
            let text = (self.get_error_string)(status);
            if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
        };
        let text = text.map_or_else(|| "no description".into(), CStr::to_string_lossy);
        Err(Error::Nccl { call, status: format!("{text} (NCCL error {status})") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_bytes_and_a_missing_library_an_error_of_its_own() {
        match NcclId::new() {
            Ok(id) => assert_eq!(NcclId::from_bytes(id.to_bytes()).to_bytes(), id.to_bytes()),
            Err(error) => {
                assert!(matches!(error, Error::NoNccl { .. } | Error::Nccl { .. }), "{error}");
            }
        }
        let missing = Error::NoNccl { searched: library::NCCL }.to_string();
        assert!(missing.contains("nvidia-nccl") && missing.contains("libnccl"), "{missing}");
    }
}
