use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cubecl::client::Client;
use cubecl::future::block_on;
use cubecl::ir::features::Plane;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::server::{Handle, ServerError};
use cubecl::wgpu::{
    AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuInitError, WgpuRuntime, WgpuSetup,
    WgslCompiler, try_init_device, try_init_setup, wgpu::Features,
};
use cubecl::{CubeCount, CubeDim, calculate_cube_count_elemwise};
use cubecl_environment::stream::StreamId;
use cubecl_server::runtime::Runtime;

use crate::replay::Arena;
use crate::{Dtype, Error, Result};

/// A GPU, reached through CubeCL. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    client: Client,
    /// Units of the smallest plane, 0 without plane operations.
    plane_units: usize,
    converts_f16: bool,
    /// Whether cooperative matrices that CubeCL lists can be compiled and used.
    matrix_units: bool,
    /// What was said when the device was found lost. All clones know of it.
    lost: Arc<OnceLock<String>>,
    /// Room for what a recorded step computes, where this is the device of one.
    arena: Option<Arc<Arena>>,
}

/// The devices that this process has opened, by CubeCL's names for them. CubeCL keeps one client for each, but to be asked
/// again costs instances of every graphics API and a second device, which is destroyed on a thread of its own while the
/// first one works.
static OPENED: Mutex<Vec<(WgpuDevice, Device)>> = Mutex::new(Vec::new());

/// CubeCL's name for kernels that reach Vulkan as SPIR-V.
const SPIRV: &str = "wgpu<spirv>";

/// Units of a cube in kernels without tiles.
const UNITS: u32 = 256;

impl Device {
    /// The default GPU of this machine, over Vulkan, Metal, DX12 or OpenGL.
    /// `CUBECL_WGPU_DEFAULT_DEVICE` chooses another one, such as `DiscreteGpu(1)`.
    ///
    /// With the feature `vulkan`, kernels are SPIR-V where the device takes it; `MOA_WGPU_SHADERS=wgsl` keeps
    /// them WGSL, as software drivers always have them. `MOA_WGPU_PLANES=0` does without what only some
    /// devices offer: plane operations, conversions of f16, matrix units. With 1, planes are used where
    /// CubeCL does not trust the driver with them; that the device has subgroups is not checked.
    ///
    /// # Errors
    /// [`Error::NoDevice`].
    pub fn open() -> Result<Self> {
        Self::init(&WgpuDevice::default())
    }

    /// One of the machine's GPUs, counted from 0 as their driver lists them.
    ///
    /// # Errors
    /// [`Error::NoDevice`], which says how many there are.
    pub fn open_nth(index: usize) -> Result<Self> {
        let devices =
            cubecl::Device::enumerate_all().into_iter().filter_map(|device| match device {
                cubecl::Device::Wgpu(device) => Some(device),
                _ => None,
            });
        let devices: Vec<WgpuDevice> = devices.collect();
        match devices.get(index) {
            Some(device) => Self::init(device),
            None => {
                let message = match devices.len() {
                    0 => "wgpu finds no adapter".to_string(),
                    count => {
                        format_args!("{index} is none of the {count} adapters, counted from 0")
                            .to_string()
                    }
                };
                Err(Error::NoDevice { message })
            }
        }
    }

    fn init(device: &WgpuDevice) -> Result<Self> {
        // Nothing is in it before it is whole.
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = opened.iter().find(|(name, _)| name == device) {
            return Ok(known.clone());
        }
        let refused = |error: WgpuInitError| Error::NoDevice { message: error.to_string() };
        let options = RuntimeOptions::try_default().map_err(refused)?;
        match try_init_setup::<AutoGraphicsApi>(device, options) {
            // Another library of the process may have registered it.
            Ok(_) | Err(WgpuInitError::Registration { .. }) => {}
            Err(error) => return Err(refused(error)),
        }
        let new = Self::of(device).checked(device);
        opened.push((device.clone(), new.clone()));
        Ok(new)
    }

    /// With kernels in WGSL where SPIR-V is not wanted, or is more than the driver is known to compile:
    /// Mesa's software driver crashes on some kernels.
    fn checked(self, device: &WgpuDevice) -> Self {
        let software = self.client.properties().identity.physical.is_none();
        let unwanted = std::env::var_os("MOA_WGPU_SHADERS").is_some_and(|name| name == "wgsl");
        if cfg!(feature = "vulkan") && (software || unwanted) {
            let client = WgpuRuntime::<WgslCompiler>::client(device);
            let own = Self::from_client(client);
            return Self { converts_f16: false, matrix_units: false, ..own };
        }
        self
    }

    /// The GPU that the application already uses, with its wgpu device and queue. Plane operations are
    /// used if the device was asked for subgroups; matrix units are not. Register a setup
    /// once and clone the result: CubeCL does not notice repetitions.
    ///
    /// In builds with the feature `vulkan` kernels are SPIR-V where the adapter takes it, and the device must have
    /// been asked for [`Features::PASSTHROUGH_SHADERS`], which is experimental.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if CubeCL refuses the setup, or the device cannot take its kernels.
    pub fn from_setup(setup: WgpuSetup) -> Result<Self> {
        let refused = |error: WgpuInitError| Error::NoDevice { message: error.to_string() };
        let options = RuntimeOptions::try_default().map_err(refused)?;
        // CubeCL lists what the adapter offers; the application may have asked for less.
        let features = setup.device.features();
        let device = try_init_device(setup, options).map_err(refused)?;
        let own = Self::of(&device);
        if own.client.name() == SPIRV && !features.contains(Features::PASSTHROUGH_SHADERS) {
            let message = "kernels are SPIR-V with the feature `vulkan`, for which the wgpu device must be asked for \
                           Features::PASSTHROUGH_SHADERS";
            return Err(Error::NoDevice { message: message.to_string() });
        }
        let subgroups = features.contains(Features::SUBGROUP);
        let plane_units = if subgroups { own.plane_units } else { 0 };
        Ok(Self { plane_units, converts_f16: false, matrix_units: false, ..own })
    }

    /// A device of any CubeCL runtime, such as the one of another library's tensors. In builds with the
    /// feature `vulkan` it must not compile to WGSL on a device with matrix units, which it lists all the
    /// same.
    ///
    /// All devices of a process work on one stream of CubeCL's, whichever thread calls.
    pub fn from_client(client: Client) -> Self {
        let client = on_one_stream(client);
        let (features, wanted) = (client.features(), std::env::var_os("MOA_WGPU_PLANES"));
        let refused = wanted.as_ref().is_some_and(|value| value == "0");
        let planes =
            features.plane.contains(Plane::Ops) || wanted.is_some_and(|value| value == "1");
        let plane_units = match planes && !refused {
            true => client.properties().hardware.plane_size_min as usize,
            false => 0,
        };
        // WGSL has no way from a word to two halves; what CubeCL's LLVM makes of kernels has not been seen.
        let compiles =
            client.name() == SPIRV || cfg!(feature = "cuda-cpp") && client.name() == "cuda";
        let matrix_units = compiles && !refused;
        let f16 = ElemType::Float(FloatKind::F16);
        let converts_f16 = matrix_units && features.supports_type(f16);
        let lost = Arc::default();
        Self { client, plane_units, converts_f16, matrix_units, lost, arena: None }
    }

    /// An NVIDIA GPU, counted from 0, over CUDA in place of wgpu: for GPUs that `moa-backend-cuda` does not know.
    ///
    /// # Panics
    /// If there is no such GPU, as CubeCL does.
    #[cfg(feature = "cuda")]
    pub fn open_cuda(index: usize) -> Self {
        let device = cubecl::cuda::CudaDevice::new(index);
        Self::from_client(cubecl::cuda::CudaRuntime::client(&device))
    }

    fn of(device: &WgpuDevice) -> Self {
        Self::from_client(cubecl::Device::Wgpu(device.clone()).client())
    }

    /// CubeCL's client, which launches kernels and owns memory.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The adapter's name.
    pub fn name(&self) -> &str {
        &self.client.properties().identity.name
    }

    /// Most units of a plane that can be relied on: 0 without plane operations.
    pub(crate) fn plane_units(&self) -> usize {
        self.plane_units
    }

    /// Whether kernels may convert f16 in place of taking it apart.
    pub(crate) fn converts_f16(&self) -> bool {
        self.converts_f16
    }

    /// Whether [`crate::ops::linears`] multiplies many rows on matrix units if asked to round to this type.
    pub fn multiplies(&self, inner: Dtype) -> bool {
        cfg!(feature = "vulkan")
            && inner == Dtype::F16
            && self.loads_matrices_from_words()
            && crate::attention::matrix_units::offered(self)
    }

    /// Whether cooperative matrices that CubeCL lists may be used.
    pub(crate) fn has_matrix_units(&self) -> bool {
        self.matrix_units
    }

    /// Whether matrices of any type can be loaded from words of 32 bits, as in SPIR-V.
    pub(crate) fn loads_matrices_from_words(&self) -> bool {
        self.client.name() == SPIRV
    }

    /// Whether both are one device.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.client.service_id() == other.client.service_id()
    }

    /// Most bytes of one buffer; kernels count elements in 32 bits.
    pub fn max_buffer_bytes(&self) -> u64 {
        self.client.properties().memory.max_page_size.min(u64::from(u32::MAX))
    }

    /// Room for `elements`, of unspecified content, on a device that is not known to be lost. Memory that cannot be
    /// had is reported by [`Device::check`] or when something is read.
    pub(crate) fn alloc(
        &self,
        what: &'static str,
        elements: usize,
        element_bytes: usize,
    ) -> Result<Handle> {
        let limit = self.max_buffer_bytes();
        let bytes = (elements as u64).saturating_mul(element_bytes as u64);
        if bytes > limit {
            return Err(Error::TooLarge { what, bytes, limit });
        }
        self.alive(what)?;
        let part = self.arena.as_ref().and_then(|arena| arena.take(bytes, self.alignment()));
        Ok(part.unwrap_or_else(|| self.client.empty(bytes as usize)))
    }

    /// What starts of buffers are multiples of.
    fn alignment(&self) -> u64 {
        self.client.properties().memory.alignment
    }

    /// The same device on another stream of CubeCL's, with room for what is computed there.
    pub(crate) fn aside(&self, stream: StreamId, arena: Arc<Arena>) -> Self {
        let mut aside = Self { arena: Some(arena), ..self.clone() };
        // SAFETY: whoever asks for it has what either stream writes submitted before the other one reads it.
        unsafe { aside.client.set_stream(stream) };
        aside
    }

    /// Fails once the device is known to be lost. All that brings something to the device, or makes room on it, asks
    /// first: what is queued on a lost device comes to nothing, and CubeCL does not say so.
    pub(crate) fn alive(&self, op: &'static str) -> Result<()> {
        match self.lost.get() {
            Some(message) => Err(Error::Lost { op, message: message.clone() }),
            None => Ok(()),
        }
    }

    /// What a buffer holds, once the device has computed it.
    pub(crate) fn read(
        &self,
        op: &'static str,
        handle: &Handle,
    ) -> Result<impl Deref<Target = [u8]>> {
        self.ask(op, |client| client.read_one(handle.clone()))
    }

    /// Waits for all that was queued. A process should end only after that: some drivers crash when theirs ends while a
    /// device works.
    ///
    /// # Errors
    /// [`Error::Device`] and [`Error::Lost`].
    pub fn synchronize(&self) -> Result<()> {
        self.ask("synchronize", |client| block_on(client.sync()))
    }

    /// Has the device begin what was queued on this stream.
    pub(crate) fn flush(&self, op: &'static str) -> Result<()> {
        self.ask(op, |client| client.flush())
    }

    /// [`Device::asked`], of a device that is not known to be lost.
    pub(crate) fn ask<T>(
        &self,
        op: &'static str,
        call: impl FnOnce(&Client) -> Result<T, ServerError>,
    ) -> Result<T> {
        self.alive(op)?;
        self.asked(call).map_err(|message| self.failed(op, message))
    }

    /// A failure may be of one buffer. A device that does not give back what it was just given is lost, of which CubeCL
    /// knows only after wgpu has found the time to tell it.
    fn failed(&self, op: &'static str, message: String) -> Error {
        let given = self.client.create_from_slice(&[0; 4]);
        if let Err(message) = self.asked(|client| client.read_one(given)) {
            let _ = self.lost.set(message);
        }
        self.alive(op).err().unwrap_or(Error::Device { op, message })
    }

    /// Asks CubeCL for what it waits for. Its own thread panics where wgpu refuses something, which a device that is
    /// lost does with all, and the panic comes out of the call that waits.
    pub(crate) fn asked<T>(
        &self,
        call: impl FnOnce(&Client) -> Result<T, ServerError>,
    ) -> Result<T, String> {
        match catch_unwind(AssertUnwindSafe(|| call(&self.client))) {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(panic) => Err(match panic.downcast::<String>() {
                Ok(message) => *message,
                Err(_) => "wgpu failed".to_string(),
            }),
        }
    }

    /// Allocates outside of CubeCL's pools, which look through all they hold for each later allocation.
    pub(crate) fn long_lived<T: Send>(&self, alloc: impl FnOnce(&Client) -> T + Send) -> T {
        self.client.memory_dedicated_allocation((), |()| alloc(&self.client))
    }

    /// A buffer for each of these counts of numbers, all in one allocation where a buffer may be as large: one
    /// costs the host as much as a kernel.
    pub(crate) fn alloc_each(&self, what: &'static str, counts: &[usize]) -> Result<Vec<Handle>> {
        let alignment = self.alignment();
        let bytes = |count: usize| (count as u64).saturating_mul(4).max(4);
        let mut starts = Vec::with_capacity(counts.len());
        let mut total = 0u64;
        for &count in counts {
            let start = total.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
            starts.push(start);
            total = start.saturating_add(bytes(count));
        }
        if total > self.max_buffer_bytes() {
            return counts.iter().map(|&count| self.alloc(what, count.max(1), 4)).collect();
        }
        let all = self.alloc(what, total as usize, 1)?;
        let part = |(start, &count): (u64, &usize)| {
            all.clone().offset_start(start).offset_end(total - start - bytes(count))
        };
        Ok(starts.into_iter().zip(counts).map(part).collect())
    }

    /// [`Device::alloc_each`] of two.
    pub(crate) fn alloc_two(
        &self,
        what: &'static str,
        first: usize,
        second: usize,
    ) -> Result<[Handle; 2]> {
        let mut both = self.alloc_each(what, &[first, second])?;
        let second = both.swap_remove(1);
        Ok([both.swap_remove(0), second])
    }

    /// Whether buffers were allocated and what should have written them was launched.
    pub(crate) fn check(&self, op: &'static str, handles: &[&Handle]) -> Result<()> {
        self.alive(op)?;
        self.asked(|client| client.check(handles.iter().copied())).map_err(Error::device(op))
    }

    /// Cubes for a kernel of one unit per element.
    pub(crate) fn cubes(&self, elements: usize) -> (CubeCount, CubeDim) {
        let dim = CubeDim::new_1d(UNITS.min(self.client.properties().hardware.max_units_per_cube));
        (calculate_cube_count_elemwise(&self.client, elements, dim), dim)
    }
}

/// CubeCL has a stream for each thread, and makes one wait for another by the stream that allocated a buffer. Caches are
/// written long after that: written by one thread and read by the next, they would be read too early.
fn on_one_stream(mut client: Client) -> Client {
    // SAFETY: the stream is one of the process, and only this clone of the client is told to use it. Buffers of other
    // streams are waited for as in any call.
    unsafe { client.set_stream(the_stream()) };
    client
}

/// The stream that all devices of the process work on.
pub(crate) fn the_stream() -> StreamId {
    static STREAM: OnceLock<StreamId> = OnceLock::new();
    *STREAM.get_or_init(StreamId::current)
}

/// Clones are equal, and what is opened twice.
impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.lost, &other.lost)
    }
}

impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.name()).finish()
    }
}
