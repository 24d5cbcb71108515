//! Matrix products with weights.

pub(crate) mod blas;
mod block_row;
mod block_weight;
pub mod e4m3;
mod e4m3_grouped;
mod e4m3_product;
mod e4m3_weight;
mod gemv;

use blas::Product;
pub use block_weight::BlockWeight;
pub(crate) use e4m3_grouped::Clusters;
pub use e4m3_weight::E4m3Weight;

use crate::Operations;
use crate::ops::launch::OpArgs;
use crate::ops::{check_dtype, check_shape, shaped};
use crate::{Dtype, Error, Result, Tensor};

/// The least number of rows that decode steps are captured for and that `rows` of them fit in: up to 2 every one, then 4, 8 and multiples of 8,
/// from 32 on two in each power of two.
///
/// Products of as many rows as fit in the same number take the algorithm of that number: rows that are added up to it
/// change no bit of the others.
#[must_use]
pub const fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=32 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(1 << ((rows - 1).ilog2() - 1)),
    }
}

/// A linear layer's weight, `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// Of the type of the operations.
    Wide(&'a Tensor),
    /// Of 8-bit floats.
    E4m3(&'a E4m3Weight),
    /// In quantised blocks.
    Blocks(&'a BlockWeight),
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(weight: &'a Tensor) -> Self {
        Self::Wide(weight)
    }
}

impl<'a> From<&'a BlockWeight> for Weight<'a> {
    fn from(weight: &'a BlockWeight) -> Self {
        Self::Blocks(weight)
    }
}

impl<'a> From<&'a E4m3Weight> for Weight<'a> {
    fn from(weight: &'a E4m3Weight) -> Self {
        Self::E4m3(weight)
    }
}

impl Operations {
    /// `x . weight^T + bias`, rounded to `output`: `x` is `[rows, in]`, `weight` `[out, in]`, `bias`
    /// f32 `[out]`. An `x` of f32 is rounded first.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn linear<'w>(
        &self,
        x: &Tensor,
        weight: impl Into<Weight<'w>>,
        bias: Option<&Tensor>,
        output: Dtype,
    ) -> Result<Tensor> {
        self.linears(x, &[weight.into()], bias, output)
    }

    /// [`linear`](Self::linear) with weights one after the other, whose kinds may differ: outputs are side by side.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn linears(
        &self,
        x: &Tensor,
        weights: &[Weight<'_>],
        bias: Option<&Tensor>,
        output: Dtype,
    ) -> Result<Tensor> {
        const OP: &str = "linear";
        let mut ends = Vec::with_capacity(weights.len());
        for weight in weights {
            let [out, _] = self.weight_shape(OP, *weight)?;
            ends.push(ends.last().unwrap_or(&0) + out);
        }
        let all = *ends.last().unwrap_or(&0);
        let y = Tensor::uninitialised(&self.device, OP, &[x.shape()[0], all], output)?;
        let mut start = 0;
        for (weight, end) in weights.iter().zip(ends) {
            let part = y.columns(std::mem::replace(&mut start, end)..end)?;
            self.multiply(OP, x, *weight, &part, false)?;
        }
        self.add_bias(&y, bias)?;
        Ok(y)
    }

    /// [`linear`](Self::linear) without bias into a tensor that exists, clones of which see it too:
    /// its memory is where a captured step leaves its result.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn linear_into<'w>(
        &self,
        x: &Tensor,
        weight: impl Into<Weight<'w>>,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "linear_into";
        let weight = weight.into();
        let [width, _] = self.weight_shape(OP, weight)?;
        check_shape(OP, "out", out, &[x.shape()[0], width])?;
        self.multiply(OP, x, weight, out, false)
    }

    /// `sum + x . weight^T + bias` with an f32 `sum`: the end of a residual branch.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn linear_add<'w>(
        &self,
        sum: Tensor,
        x: &Tensor,
        weight: impl Into<Weight<'w>>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "linear_add";
        let weight = weight.into();
        let [out, _] = self.weight_shape(OP, weight)?;
        check_dtype(OP, "sum", &sum, Dtype::F32)?;
        check_shape(OP, "sum", &sum, &[x.shape()[0], out])?;
        let sum = sum.into_unique()?;
        self.multiply(OP, x, weight, &sum, true)?;
        self.add_bias(&sum, bias)?;
        Ok(sum)
    }

    pub(crate) fn weight_shape(&self, op: &'static str, weight: Weight<'_>) -> Result<[usize; 2]> {
        const WHAT: &str = "weight";
        let (device, shape) = match weight {
            Weight::Wide(weight) => return self.matrix(op, WHAT, weight),
            Weight::E4m3(weight) => (weight.device(), weight.shape()),
            Weight::Blocks(weight) => (weight.device(), weight.shape()),
        };
        match device.is_same(&self.device) {
            true => Ok(shape),
            false => {
                Err(Error::argument(op, WHAT, "on the device of the operations", "on another"))
            }
        }
    }

    /// `d (+)= x . weight^T`.
    pub(crate) fn multiply(
        &self,
        op: &'static str,
        x: &Tensor,
        weight: Weight<'_>,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        if let Weight::Wide(weight) = weight {
            return self.product(op, x, weight, d, (true, accumulate));
        }
        let [_, input] = self.weight_shape(op, weight)?;
        let rows = x.shape()[0];
        check_shape(op, "x", x, &[rows, input])?;
        self.check_output(op, d)?;
        if rows == 0 {
            return Ok(());
        }
        let x = &self.rounded(op, x)?;
        match weight {
            Weight::Wide(_) => Ok(()),
            Weight::E4m3(weight) => self.product_e4m3(x, weight, d, accumulate),
            Weight::Blocks(weight) => self.product_blocks(x, weight, d, accumulate),
        }
    }

    /// Where a product may be written: f32, or the type of the operations.
    pub(crate) fn check_output(&self, op: &'static str, d: &Tensor) -> Result<()> {
        self.check_place(op, "out", d)?;
        match d.dtype() {
            Dtype::F32 => Ok(()),
            _ => check_dtype(op, "out", d, self.dtype),
        }
    }

    /// An input of a product in the type of the operations.
    pub(crate) fn rounded(&self, op: &'static str, x: &Tensor) -> Result<Tensor> {
        self.check_place(op, "x", x)?;
        match x.dtype() {
            Dtype::F32 => self.cast(x),
            other if other == self.dtype => Ok(x.clone()),
            other => Err(Error::argument(op, "x", self.dtype, other)),
        }
    }

    /// `d (+)= x . weight^T`, or `x . weight` unless transposed.
    pub(crate) fn product(
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
        self.check_output(op, d)?;
        if m == 0 {
            return Ok(());
        }
        let x = &self.rounded(op, x)?;
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
            input: self.dtype.into(),
            output: d.dtype(),
            accumulate,
        };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.blas.run(product, x.pointer(), weight.pointer(), d.pointer()) }
    }

    pub(crate) fn add_bias(&self, y: &Tensor, bias: Option<&Tensor>) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::padded_rows;

    #[test]
    fn rows_are_padded_by_at_most_half_and_never_beyond_what_a_kernel_takes() {
        let mut sizes: Vec<usize> = (1..=256).map(padded_rows).collect();
        for (rows, padded) in (1..).zip(&sizes) {
            assert!(rows <= *padded && padded_rows(*padded) == *padded, "{rows} {padded}");
            assert!(rows <= 16 || 2 * padded <= 3 * rows, "{rows} {padded}");
            // Products of 8 bits and of blocks have kernels of their own up to so many rows.
            assert!([64, 128].iter().all(|most| (rows <= *most) == (padded <= most)));
        }
        sizes.dedup();
        assert_eq!(sizes, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]);
        assert_eq!(padded_rows(0), 0);
    }
}
