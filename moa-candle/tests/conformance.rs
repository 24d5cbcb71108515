//! The conformance suite through candle's tensors, on the CPU and, in builds with the feature `cuda`, on the first GPU.
//!
//! candle's errors do not show what they wrap: the kind of an error is told here by the checks of the core, and
//! that the adapter refuses the same calls is checked beside it.

use std::fmt;
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use moa_candle::{LayerCache, SparseAttention};
use moa_conformance::{Stop, Subject, run, suite};
use moa_core::{
    Append, CacheState, CacheType, Dtype, ExtendInputs, Extended, LayerLayout,
    SparseAttentionBackend, check_extend,
};

fn main() -> ExitCode {
    let on_cpu = suite("cpu", || Ok(Candle::new(Device::Cpu, DType::F32)));
    let on_cuda = [("f16", DType::F16), ("bf16", DType::BF16)].map(|(name, dtype)| {
        let open = move || Ok(Candle::new(gpu()?, dtype));
        suite(&format!("cuda::{name}"), open)
    });
    run(on_cpu.into_iter().chain(on_cuda.into_iter().flatten()))
}

fn gpu() -> Result<Device, Stop> {
    // A stream of its own, as the kernels of a process's first stream wait for those of all others.
    let opened = std::panic::catch_unwind(|| Device::new_cuda_with_stream(0));
    let error = match opened {
        Ok(Ok(device)) => return Ok(device),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no CUDA here".to_string(),
    };
    Err(Stop::unless_required("MOA_REQUIRE_GPU", error))
}

#[derive(Debug)]
enum Error {
    Core(moa_core::Error),
    Candle(candle_core::Error),
}

impl From<moa_core::Error> for Error {
    fn from(error: moa_core::Error) -> Self {
        Self::Core(error)
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core(error) => error.fmt(f),
            Self::Candle(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// The adapter, whose functions are called as they are.
struct Backend {
    attention: SparseAttention,
    cache_dtype: Dtype,
    on_cpu: bool,
}

/// What the core says of a call, and what the adapter did: both or neither refuse.
fn both<T>(core: moa_core::Result<()>, adapter: candle_core::Result<T>) -> Result<T, Error> {
    match (core, adapter) {
        (Ok(()), adapter) => Ok(adapter?),
        (Err(error), Err(_)) => Err(error.into()),
        (Err(error), Ok(_)) => panic!("accepted: {error}"),
    }
}

impl SparseAttentionBackend for Backend {
    type Tensor = Tensor;
    type Cache = LayerCache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "candle"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        self.cache_dtype.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        self.on_cpu || cache_type == self.cache_dtype.into() || cache_type.dtype().is_none()
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<LayerCache, Error> {
        let core = layout.check_cache_types(self.name(), |own| self.has_cache_type(own));
        both(core, self.attention.open_layer(layout, head_dim))
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>, Error> {
        let core = check_extend(batch, inputs, |x| x.dims()).map(|_| ());
        both(core, self.attention.extend(batch, inputs))
    }

    fn fork(&self, cache: &LayerCache) -> Result<LayerCache, Error> {
        Ok(self.attention.fork(cache)?)
    }

    fn truncate(&self, cache: &mut LayerCache, len: usize) -> Result<(), Error> {
        let state: &CacheState = cache.as_ref();
        let core = state.clone().truncate(len);
        both(core, self.attention.truncate(cache, len))
    }

    fn bytes(&self, cache: &LayerCache) -> u64 {
        let state = cache.state();
        state.layout().bytes(state.head_dim(), self.slot_bytes(state.head_dim()))
    }
}

struct Candle {
    backend: Backend,
    device: Device,
    dtype: DType,
}

impl Candle {
    fn new(device: Device, dtype: DType) -> Self {
        let cache_dtype = match dtype {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            _ => Dtype::F32,
        };
        let attention = SparseAttention::new(&device, dtype).unwrap();
        Self { backend: Backend { attention, cache_dtype, on_cpu: device.is_cpu() }, device, dtype }
    }

    /// The number for this type of tensors and caches.
    fn of_type(&self, f32s: f64, f16s: f64, bf16s: f64) -> f64 {
        match self.dtype {
            DType::F16 => f16s,
            DType::BF16 => bf16s,
            _ => f32s,
        }
    }

    fn of(&self, data: &[f32], shape: &[usize], dtype: DType) -> Tensor {
        let tensor = Tensor::from_slice(data, shape, &self.device).unwrap();
        tensor.to_dtype(dtype).unwrap()
    }
}

impl Subject for Candle {
    type Backend = Backend;
    type Tensor = Tensor;

    fn backend(&self) -> &Backend {
        &self.backend
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        self.of(data, shape, self.dtype)
    }

    fn lse(&self, data: &[f32], shape: &[usize]) -> Tensor {
        self.of(data, shape, DType::F32)
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn round(&self, x: f32) -> f32 {
        self.round_tensor(x)
    }

    fn cache_types(&self) -> &'static [CacheType] {
        match self.device {
            Device::Cpu => &CacheType::ALL,
            _ => &[CacheType::Int8, CacheType::Fp8, CacheType::K8V4, CacheType::Int4],
        }
    }

    fn round_tensor(&self, x: f32) -> f32 {
        match self.dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    fn output_rounding(&self) -> f64 {
        self.of_type(0.0, 1.0 / 1024.0, 1.0 / 128.0)
    }

    fn dims(&self) -> &'static [usize] {
        match self.device {
            Device::Cpu => &[1, 7, 8, 20, 64, 72],
            _ => &[64, 128],
        }
    }

    fn dim(&self, wanted: usize) -> usize {
        if self.device.is_cpu() { wanted } else { 64 }
    }

    fn tolerance(&self) -> f64 {
        self.of_type(1e-5, 1e-3, 1e-2)
    }

    fn typed_tolerance(&self) -> Option<f64> {
        Some(self.of_type(2.5e-4, 2e-3, 2e-2))
    }

    fn same(&self) -> f64 {
        self.of_type(1e-5, 2e-3, 2e-2)
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            Error::Candle(_) => None,
        }
    }
}
