//! Numbers of rows and tokens on the device.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::launch::OpArgs;
use super::{Operations, check_dtype, shaped};
use crate::kernels::tables::DevicePointer;
use crate::memory::address;
use crate::{Device, Dtype, Error, Result, Tensor};

/// Elements of a row that a block looks at, as `PART` in `kernels/ops.cu`.
const ARGMAX_PART: usize = 4096;

/// Indices of rows, i32, in device memory, or a part of some.
#[derive(Debug)]
pub struct Indices {
    device: Device,
    data: Arc<CudaSlice<i32>>,
    start: usize,
    len: usize,
}

impl Indices {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first one.
    pub fn pointer(&self) -> DevicePointer {
        address(&*self.data) + (self.start * size_of::<i32>()) as DevicePointer
    }

    /// Some of them, in the same memory.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not as many.
    pub fn part(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.len {
            let expected = format_args!("within {}", self.len).to_string();
            return Err(Error::argument("indices", "part", expected, format!("{range:?}")));
        }
        let (device, data) = (self.device.clone(), Arc::clone(&self.data));
        Ok(Self { device, data, start: self.start + range.start, len: range.len() })
    }

    /// All of them, once the device has computed them; negative for none.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    pub fn to_host(&self) -> Result<Vec<i32>> {
        if self.len == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: these are its numbers.
        unsafe { self.device.read(self.pointer(), self.len) }
    }
}

impl Operations {
    /// Brings indices below `limit` to the device.
    ///
    /// # Errors
    /// [`Error::Argument`] if one is not below `limit` or 2^31, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn indices(
        &self,
        indices: impl ExactSizeIterator<Item = usize>,
        limit: usize,
    ) -> Result<Indices> {
        let len = indices.len();
        let data = self.device.alloc::<i32>("indices", len)?;
        let into = Indices { device: self.device.clone(), data: Arc::new(data), start: 0, len };
        self.set_indices(&into, indices, limit)?;
        Ok(into)
    }

    /// Overwrites indices, in place and in the order of the stream.
    ///
    /// # Errors
    /// [`Error::Argument`] as [`indices`](Self::indices), or if there are not as many;
    /// [`Error::Driver`].
    pub fn set_indices(
        &self,
        into: &Indices,
        indices: impl ExactSizeIterator<Item = usize>,
        limit: usize,
    ) -> Result<()> {
        const OP: &str = "indices";
        if indices.len() != into.len {
            return Err(Error::argument(OP, "indices", into.len, indices.len()));
        }
        let mut host = Vec::with_capacity(into.len);
        for index in indices {
            match i32::try_from(index) {
                Ok(place) if index < limit => host.push(place),
                _ => {
                    let expected = format_args!("below {limit}").to_string();
                    return Err(Error::argument(OP, "index", expected, index));
                }
            }
        }
        let bytes: &[u8] = bytemuck::cast_slice(&host);
        self.stage(bytes.len(), into.pointer(), |staged| staged.copy_from_slice(bytes))
    }

    /// The place of the largest of each row of an f32 `[rows, cols]`, the lowest of equals; -1 where
    /// a value is infinite or not a number.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `x` is f32 and `into` has an entry for each row,
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn argmax(&self, x: &Tensor, into: &Indices) -> Result<()> {
        const OP: &str = "argmax";
        self.check_place(OP, "x", x)?;
        self.check_indices(OP, into)?;
        check_dtype(OP, "x", x, Dtype::F32)?;
        if x.shape()[0] != into.len || i32::try_from(x.row_len()).is_err() {
            let expected = format_args!("{} rows", into.len).to_string();
            return Err(Error::shape(OP, "x", expected, x.shape()));
        }
        let [rows, parts] = [into.len, x.row_len().div_ceil(ARGMAX_PART)];
        let largest = Tensor::uninitialised(&self.device, OP, &[rows, 2 * parts], Dtype::F32)?;
        let args = OpArgs { out: largest.pointer(), ..shaped(x).with_x(x) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.launch("argmax_parts", [rows, parts, 1], 256, &args) }?;
        let args = OpArgs {
            x: largest.pointer(),
            out: into.pointer(),
            cols: parts as i32,
            ..OpArgs::default()
        };
        // SAFETY: as above.
        unsafe { self.kernels.launch("argmax", [rows, 1, 1], 32, &args) }
    }

    /// That they lie on this device.
    pub(crate) fn check_indices(&self, op: &'static str, into: &Indices) -> Result<()> {
        match into.device.is_same(&self.device) {
            true => Ok(()),
            false => {
                Err(Error::argument(op, "into", "on the device of the operations", "on another"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ARGMAX_PART;

    #[test]
    fn parts_of_rows_are_those_of_the_kernel() {
        let kernels = include_str!("../../kernels/ops.cu");
        assert!(kernels.contains(&format!("#define PART {ARGMAX_PART}\n")));
    }
}
