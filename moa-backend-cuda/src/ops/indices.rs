//! Numbers of rows and tokens on the device.

use cudarc::driver::CudaSlice;

use super::launch::OpArgs;
use super::{Operations, check_dtype, shaped};
use crate::kernels::tables::DevicePointer;
use crate::memory::address;
use crate::{Device, Dtype, Error, Result, Step, Tensor};

/// Indices of rows, i32, in device memory.
#[derive(Debug)]
pub struct Indices {
    device: Device,
    data: CudaSlice<i32>,
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
        address(&self.data)
    }

    /// All of them, once the device has computed them; negative for none.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    pub fn to_host(&self) -> Result<Vec<i32>> {
        self.device.settle()?;
        let mut host = self
            .device
            .cuda_stream()
            .clone_dtoh(&self.data)
            .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
        self.device.synchronize()?;
        host.truncate(self.len);
        Ok(host)
    }
}

/// Where the lengths of a batch's sequences lie, layer by layer.
#[derive(Debug)]
pub struct Lengths {
    data: CudaSlice<u64>,
    layers: usize,
    sequences: usize,
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
        let into = Indices { device: self.device.clone(), data, len };
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
    /// [`Error::Driver`].
    pub fn argmax(&self, x: &Tensor, into: &Indices) -> Result<()> {
        const OP: &str = "argmax";
        self.check_place(OP, "x", x)?;
        self.check_indices(OP, into)?;
        check_dtype(OP, "x", x, Dtype::F32)?;
        if x.shape()[0] != into.len || i32::try_from(x.row_len()).is_err() {
            let expected = format_args!("{} rows", into.len).to_string();
            return Err(Error::shape(OP, "x", expected, x.shape()));
        }
        let args = OpArgs { out: into.pointer(), ..shaped(x).with_x(x) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_rows("argmax", &args) }
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

    /// The lengths of a batch in every layer, for [`grow`](Self::grow).
    ///
    /// # Errors
    /// [`Error::Argument`] if a step is not prepared, or steps differ in their sequences;
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn lengths(&self, steps: &[Step]) -> Result<Lengths> {
        let sequences = steps.first().map_or(0, Step::sequences);
        if let Some(other) = steps.iter().find(|step| step.sequences() != sequences) {
            let (expected, got) = (sequences, other.sequences());
            return Err(Error::argument("lengths", "sequences of a step", expected, got));
        }
        let addresses = steps.iter().map(Step::lens).collect::<Result<Vec<_>>>()?;
        let data = self.device.alloc::<u64>("addresses", addresses.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(&addresses);
        self.stage(bytes.len(), address(&data), |staged| staged.copy_from_slice(bytes))?;
        Ok(Lengths { data, layers: steps.len(), sequences })
    }

    /// Records one new token of each sequence in every layer: for a batch that is replayed, in place
    /// of a [`Step::advance`](crate::Step::advance) per layer.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// The steps of `lengths` are alive, and prepared as they were then.
    pub unsafe fn grow(&self, lengths: &Lengths) -> Result<()> {
        let args = OpArgs {
            x: address(&lengths.data),
            rows: lengths.layers as i32,
            cols: lengths.sequences as i32,
            ..OpArgs::default()
        };
        // SAFETY: as the caller promises; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("grow", 1, &args) }
    }
}
