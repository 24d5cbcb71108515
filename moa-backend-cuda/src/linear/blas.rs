//! Matrix products by cuBLASLt.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulMatrixScale_t, cublasLtMatmulPreferenceAttributes_t as Attribute, cudaDataType,
};
use cudarc::driver::CudaSlice;

use super::padded_rows;
use crate::kernels::tables::DevicePointer;
use crate::memory::address;
use crate::{Device, Dtype, Error, Result, library};

/// `d[m, n] = a[m, k] . weight`, or `d +=`; row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Elements between the rows of `a` as it is stored.
    pub(crate) a_stride: usize,
    /// Whether `a` is stored `[k, m]`.
    pub(crate) a_transposed: bool,
    /// Elements between the rows of the weight as it is stored.
    pub(crate) weight_stride: usize,
    /// Elements between the rows of `d`.
    pub(crate) d_stride: usize,
    /// Whether the weight is stored `[n, k]`, as linear layers are, rather than `[k, n]`.
    pub(crate) transposed: bool,
    /// Type of `a` and the weight.
    pub(crate) input: Input,
    /// Type of `d`.
    pub(crate) output: Dtype,
    /// Whether the product is added to what `d` holds.
    pub(crate) accumulate: bool,
}

/// Type of what goes into a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Input {
    /// Elements of a tensor.
    Wide(Dtype),
    /// 8-bit floats, with f32 factors for the rows of `a` and for those of a transposed weight.
    E4m3,
}

impl From<Dtype> for Input {
    fn from(dtype: Dtype) -> Self {
        Self::Wide(dtype)
    }
}

/// Where f32 factors are: of the rows of `a`, and of those of the weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub(crate) a: DevicePointer,
    pub(crate) weight: DevicePointer,
}

/// A handle, its scratch memory and the products prepared so far. For the device's own stream alone.
#[derive(Debug)]
pub(crate) struct Blas {
    device: Device,
    handle: Arc<Handle>,
    scratch: CudaSlice<u8>,
    /// By product, and by the alignment in bytes that all its addresses have.
    prepared: Mutex<HashMap<(Product, u32), Arc<Prepared>>>,
}

/// One for all devices that were opened with the same ordinal, as making and destroying one waits for the whole GPU, which ends
/// what other threads capture there.
#[derive(Debug)]
struct Handle(sys::cublasLtHandle_t);

impl Handle {
    fn of(device: &Device) -> Result<Arc<Self>> {
        static HANDLES: Mutex<Vec<(usize, Weak<Handle>)>> = Mutex::new(Vec::new());
        let ordinal = device.context().ordinal();
        let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|(_, handle)| handle.strong_count() > 0);
        let known = handles.iter().find(|(of, _)| *of == ordinal);
        if let Some(handle) = known.and_then(|(_, handle)| handle.upgrade()) {
            return Ok(handle);
        }
        library::cublaslt()?;
        device.bind()?;
        let handle = result::create_handle().map_err(failed("cublasLtCreate", None))?;
        let handle = Arc::new(Self(handle));
        handles.push((ordinal, Arc::downgrade(&handle)));
        Ok(handle)
    }
}

// SAFETY: cuBLASLt's functions may be called with one handle from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it is not used any more. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// NVIDIA's recommendation for Hopper, which no other architecture exceeds.
const SCRATCH_BYTES: usize = 32 << 20;

/// Most rows of which those of a padded size take one algorithm; larger products are prompts'.
const MOST_PADDED: usize = 256;

impl Blas {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let handle = Handle::of(device)?;
        let scratch = device.alloc("matrix products", SCRATCH_BYTES)?;
        Ok(Self { device: device.clone(), handle, scratch, prepared: Mutex::default() })
    }

    /// # Safety
    /// The addresses are device memory of the sizes that `product` says, 16-byte aligned and in use
    /// by nothing else before the device's stream has passed this call.
    pub(crate) unsafe fn run(
        &self,
        product: Product,
        a: DevicePointer,
        weight: DevicePointer,
        d: DevicePointer,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.run_with(product, a, weight, d, None) }
    }

    /// [`run`](Self::run) with factors, of [`Input::E4m3`]; of other inputs without.
    ///
    /// # Safety
    /// As there, of the factors too.
    pub(crate) unsafe fn run_with(
        &self,
        product: Product,
        a: DevicePointer,
        weight: DevicePointer,
        d: DevicePointer,
        factors: Option<Factors>,
    ) -> Result<()> {
        self.device.bind()?;
        let alignment = 1 << (a | weight | d).trailing_zeros().min(8);
        let made = self.prepare(product, alignment, factors)?;
        let _turn = match factors {
            Some(factors) => {
                let turn = made.turn.lock().unwrap_or_else(PoisonError::into_inner);
                made.desc.set_factors(factors).map_err(failed(SET, Some(product)))?;
                Some(turn)
            }
            None => None,
        };
        let (alpha, beta) = (1f32, if product.accumulate { 1f32 } else { 0f32 });
        // SAFETY: it was prepared for this product, whose memory is as the caller promises; the scratch
        // memory is used on one stream only.
        unsafe {
            result::matmul(
                self.handle.0,
                made.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight as *const _,
                made.weight.0,
                a as *const _,
                made.a.0,
                d as *const _,
                made.d.0,
                d as *mut _,
                made.d.0,
                &raw const made.algorithm,
                address(&self.scratch) as *mut _,
                SCRATCH_BYTES,
                self.device.stream().cast(),
            )
        }
        .map_err(failed("cublasLtMatmul", Some(product)))
    }

    /// Whether cuBLASLt has an algorithm for a product whose addresses are multiples of 16.
    ///
    /// # Errors
    /// [`Error::Blas`] if not.
    pub(crate) fn check(&self, product: Product, factors: Option<Factors>) -> Result<()> {
        self.device.bind()?;
        self.prepare(product, 16, factors).map(drop)
    }

    fn prepare(
        &self,
        product: Product,
        alignment: u32,
        factors: Option<Factors>,
    ) -> Result<Arc<Prepared>> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = prepared.get(&(product, alignment)) {
            return Ok(Arc::clone(made));
        }
        let made = Prepared::new(&self.handle, product, alignment, factors);
        let made = Arc::new(made.map_err(failed("cublasLtMatmulAlgoGetHeuristic", Some(product)))?);
        prepared.insert((product, alignment), Arc::clone(&made));
        Ok(made)
    }
}

const SET: &str = "cublasLtMatmulDescSetAttribute";

fn failed(call: &'static str, product: Option<Product>) -> impl Fn(CublasError) -> Error {
    move |error| Error::Blas {
        call,
        status: format!("{:?}", error.0),
        product: product.map_or_else(String::new, |p| format!(" for {p:?}")),
    }
}

/// cuBLASLt is column-major: it computes `d^T = op(weight) . a^T`.
#[derive(Debug)]
struct Prepared {
    desc: Desc,
    weight: Layout,
    a: Layout,
    d: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Of the threads that use the descriptor, which has a call's factors.
    turn: Mutex<()>,
}

// SAFETY: descriptors are only read once they are made, but for factors, which are written in turn.
unsafe impl Send for Prepared {}
// SAFETY: as above.
unsafe impl Sync for Prepared {}

impl Prepared {
    fn new(
        handle: &Handle,
        product: Product,
        alignment: u32,
        factors: Option<Factors>,
    ) -> Result<Self, CublasError> {
        let Product { m, n, k, transposed, a_transposed, input, output, .. } = product;
        let desc = Desc(result::create_matmul_desc(
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType::CUDA_R_32F,
        )?);
        // CUBLAS_OP_T and CUBLAS_OP_N, which these bindings lack.
        let operations = [
            (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(transposed)),
            (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(a_transposed)),
        ];
        for (attribute, transpose) in operations {
            desc.set(attribute, transpose)?;
        }
        if let Some(factors) = factors {
            let by_rows =
                cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, by_rows)?;
            desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, by_rows)?;
            desc.set_factors(factors)?;
        }
        let weight = match transposed {
            true => Layout::new(input, k, n, product.weight_stride)?,
            false => Layout::new(input, n, k, product.weight_stride)?,
        };
        let preference = Preference(result::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, SCRATCH_BYTES)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, alignment)?;
        }
        let inputs = |m| match a_transposed {
            true => Layout::new(input, m, k, product.a_stride),
            false => Layout::new(input, k, m, product.a_stride),
        };
        let outputs = |m| Layout::new(output, n, m, product.d_stride);
        let choose = |a: &Layout, d: &Layout| {
            // SAFETY: all descriptors exist.
            let found = unsafe {
                result::get_matmul_algo_heuristic(
                    handle.0,
                    desc.0,
                    weight.0,
                    a.0,
                    d.0,
                    d.0,
                    preference.0,
                )
            };
            found.map(|found| found.algo)
        };
        let (a, d) = (inputs(m)?, outputs(m)?);
        let is_able = |algorithm: &sys::cublasLtMatmulAlgo_t| {
            let mut needs = std::mem::MaybeUninit::zeroed();
            // SAFETY: all descriptors exist; the result is written here alone.
            let status = unsafe {
                sys::cublasLtMatmulAlgoCheck(
                    handle.0,
                    desc.0,
                    weight.0,
                    a.0,
                    d.0,
                    d.0,
                    algorithm,
                    needs.as_mut_ptr(),
                )
            };
            // SAFETY: it holds numbers, which may be zero.
            let needs = unsafe { needs.assume_init() };
            status.result().is_ok() && needs.workspaceSize <= SCRATCH_BYTES
        };
        // Rows of a decode step give the same whichever size they were padded to.
        let padded = if m <= MOST_PADDED { padded_rows(m) } else { m };
        let algorithm = match choose(&inputs(padded)?, &outputs(padded)?) {
            Ok(algorithm) if padded == m || is_able(&algorithm) => algorithm,
            _ => choose(&a, &d)?,
        };
        Ok(Self { desc, weight, a, d, algorithm, turn: Mutex::default() })
    }
}

#[derive(Debug)]
struct Desc(sys::cublasLtMatmulDesc_t);

impl Desc {
    /// Sets an attribute, of the type that cuBLASLt has for it.
    fn set<T: Copy>(&self, attribute: DescAttribute, value: T) -> Result<(), CublasError> {
        let (value, size) = ((&raw const value).cast(), size_of::<T>());
        // SAFETY: the descriptor exists; cuBLASLt checks the size, and reads so many bytes.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, value, size) }
    }

    fn set_factors(&self, factors: Factors) -> Result<(), CublasError> {
        self.set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, factors.weight)?;
        self.set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, factors.a)
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: it is not used any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        input: impl Into<Input>,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self, CublasError> {
        let dtype = match input.into() {
            Input::E4m3 => cudaDataType::CUDA_R_8F_E4M3,
            Input::Wide(Dtype::F16) => cudaDataType::CUDA_R_16F,
            Input::Wide(Dtype::Bf16) => cudaDataType::CUDA_R_16BF,
            // Tensors are of one of three types.
            Input::Wide(_) => cudaDataType::CUDA_R_32F,
        };
        result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it is not used any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// Sets an attribute, of the type that cuBLASLt has for it.
    fn set<T: Copy>(&self, attribute: Attribute, value: T) -> Result<(), CublasError> {
        let (value, size) = ((&raw const value).cast(), size_of::<T>());
        // SAFETY: the descriptor exists; cuBLASLt checks the size, and reads so many bytes.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, value, size) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is not used any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
