//! Matrix products with weights.

use super::blas::Product;
use super::launch::OpArgs;
use super::{Operations, check_dtype, check_shape, shaped};
use crate::{Dtype, Error, Result, Tensor};

impl Operations {
    /// `x . weight^T + bias`, rounded to `output`: `x` is `[rows, in]`, `weight` `[out, in]`, `bias`
    /// f32 `[out]`. An `x` of f32 is rounded first.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        output: Dtype,
    ) -> Result<Tensor> {
        const OP: &str = "linear";
        let [out, _] = self.matrix(OP, "weight", weight)?;
        let rows = x.shape()[0];
        let y = Tensor::uninitialised(&self.device, OP, &[rows, out], output)?;
        self.product(OP, x, weight, &y, (true, false))?;
        self.add_bias(&y, bias)?;
        Ok(y)
    }

    /// [`linear`](Self::linear) without bias into a tensor that exists, clones of which see it too:
    /// its memory is where a captured step leaves its result.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub fn linear_into(&self, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "linear_into";
        let [width, _] = self.matrix(OP, "weight", weight)?;
        check_shape(OP, "out", out, &[x.shape()[0], width])?;
        self.product(OP, x, weight, out, (true, false))
    }

    /// `sum + x . weight^T + bias` with an f32 `sum`: the end of a residual branch.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub fn linear_add(
        &self,
        sum: Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "linear_add";
        let [out, _] = self.matrix(OP, "weight", weight)?;
        check_dtype(OP, "sum", &sum, Dtype::F32)?;
        check_shape(OP, "sum", &sum, &[x.shape()[0], out])?;
        let sum = sum.into_unique()?;
        self.product(OP, x, weight, &sum, (true, true))?;
        self.add_bias(&sum, bias)?;
        Ok(sum)
    }

    /// `d (+)= x . weight^T`, or `x . weight` unless transposed.
    pub(super) fn product(
        &self,
        op: &'static str,
        x: &Tensor,
        weight: &Tensor,
        d: &Tensor,
        (transposed, accumulate): (bool, bool),
    ) -> Result<()> {
        let [out, input] = self.matrix(op, "weight", weight)?;
        let (n, k) = if transposed { (out, input) } else { (input, out) };
        let m = x.shape()[0];
        check_shape(op, "x", x, &[m, k])?;
        self.check_place(op, "x", x)?;
        self.check_place(op, "out", d)?;
        if m == 0 {
            return Ok(());
        }
        let rounded = match x.dtype() {
            Dtype::F32 => Some(self.cast(x)?),
            other if other == self.dtype => None,
            other => return Err(Error::argument(op, "x", self.dtype, other)),
        };
        let x = rounded.as_ref().unwrap_or(x);
        if transposed && Self::has_gemv(x) {
            return self.gemv(x, weight, d, accumulate);
        }
        let product = Product {
            m,
            n,
            k,
            a_stride: x.stride(),
            a_transposed: false,
            weight_stride: weight.stride(),
            d_stride: d.stride(),
            transposed,
            input: self.dtype,
            output: d.dtype(),
            accumulate,
        };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.blas.run(product, x.pointer(), weight.pointer(), d.pointer()) }
    }

    fn add_bias(&self, y: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        const OP: &str = "linear";
        let Some(bias) = bias else { return Ok(()) };
        self.check_rows(OP, "out", y)?;
        self.check_vector(OP, "bias", bias, y.row_len())?;
        let flag = i32::from(y.dtype() == Dtype::F32);
        let args = OpArgs { w: bias.pointer(), flag, ..shaped(y) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("add_bias", 8, &args) }
    }
}
