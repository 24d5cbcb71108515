//! Products of activations and weights that are both 8-bit floats.

use super::E4m3Weight;
use super::blas::{Factors, Input, Product};
use super::e4m3_weight::{Layout, MANY};
use crate::arena::Memory;
use crate::kernels::source::Source;
use crate::ops::launch::{E4M3_ROWS, OpArgs};
use crate::{Dtype, Error, Operations, Result, Tensor};

/// cuBLASLt wants rows of outputs, of 2 bytes at least, that are whole 16 bytes.
const ALIGNED: usize = 8;

impl Operations {
    /// Rounds activations too where 129 rows and more meet an [`E4m3Weight`] of a multiple of 8 outputs: each row to
    /// e4m3 with one f32 factor, as [`e4m3::encode_row`](super::e4m3::encode_row) does, for cuBLASLt's 8-bit product.
    /// A row of which an element is not finite gives NaN. Weights that these operations make lie as cuBLASLt reads them, so
    /// that their products of few rows are those of [`without_wgmma`](Self::without_wgmma).
    ///
    /// # Errors
    /// [`Error::NoE4m3Products`] if the device, or cuBLASLt, has no such product, [`Error::OutOfMemory`],
    /// [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`].
    pub fn with_e4m3_activations(self) -> Result<Self> {
        let architecture = self.device.architecture();
        let lacking = |reason| Error::NoE4m3Products {
            name: self.device.name().to_string(),
            major: architecture.major,
            minor: architecture.minor,
            reason,
        };
        if !architecture.has_e4m3() {
            return Err(lacking("expected at least 8.9".into()));
        }
        let some = Memory::new(&self.device, "factors", size_of::<f32>())?;
        let factors = Factors { a: some.address(), weight: some.address() };
        for output in [self.dtype, Dtype::F32] {
            let product = product([MANY, 256, 256], [256; 2], output, output == Dtype::F32);
            let checked = self.blas.check(product, Some(factors));
            checked.map_err(|error| lacking(error.to_string()))?;
        }
        self.lazily(&self.e4m3_rows, Source::E4m3Rows, &E4M3_ROWS)?;
        Ok(Self { rounds_activations: true, ..self })
    }

    /// Whether a product takes activations in e4m3.
    pub(super) fn takes_e4m3(&self, x: &Tensor, weight: &E4m3Weight, d: &Tensor) -> bool {
        let [n, _] = weight.shape();
        self.rounds_activations
            && weight.layout == Layout::Rows
            && x.shape()[0] >= MANY
            && n.is_multiple_of(ALIGNED)
            && d.stride().is_multiple_of(ALIGNED)
            && x.stride().is_multiple_of(8)
    }

    /// `d (+)= x . weight^T` of rounded `x`; shapes, types and places were checked.
    pub(super) fn product_of_e4m3(
        &self,
        x: &Tensor,
        weight: &E4m3Weight,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let ([n, k], m) = (weight.shape(), x.shape()[0]);
        let (scale_bytes, name) = (m * size_of::<f32>(), E4M3_ROWS[0]);
        let scales = Memory::new(&self.device, "factors of activations", scale_bytes)?;
        let codes = Memory::new(&self.device, "activations", m * k)?;
        let args = OpArgs {
            y: scales.address(),
            out: codes.address(),
            out_stride: k as i64,
            rows: m as i32,
            cols: k as i32,
            ..OpArgs::default()
        };
        let kernels = self.lazily(&self.e4m3_rows, Source::E4m3Rows, &E4M3_ROWS)?;
        let product = product([m, n, k], [k, d.stride()], d.dtype(), accumulate);
        let factors = Factors { a: scales.address(), weight: weight.scales.pointer() };
        let weight = weight.bytes.address();
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe {
            kernels.launch(name, [m, 1, 1], threads(k), &args.with_x(x))?;
            self.blas.run_with(product, codes.address(), weight, d.pointer(), Some(factors))
        }
    }
}

/// Threads for a row of `k` elements: 32 elements each, which is fastest.
fn threads(k: usize) -> usize {
    let threads = (k / 32).max(1).next_multiple_of(32);
    threads.min(1024)
}

/// `d[m, n]`, `a` and a weight of `stride` bytes a row.
fn product(
    [m, n, k]: [usize; 3],
    [stride, d_stride]: [usize; 2],
    output: Dtype,
    accumulate: bool,
) -> Product {
    Product {
        m,
        n,
        k,
        a_stride: stride,
        a_transposed: false,
        weight_stride: stride,
        d_stride,
        transposed: true,
        input: Input::E4m3,
        output,
        accumulate,
    }
}
