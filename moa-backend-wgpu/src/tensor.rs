use cubecl::server::Handle;

use crate::{Device, Error, Result};

/// Row-major f32 activations on the device with one to three axes, the first of which packs the
/// tokens of all sequences of a batch.
#[derive(Clone, Debug)]
pub struct Tensor {
    device: Device,
    handle: Handle,
    shape: [usize; 3],
    axes: usize,
}

impl Tensor {
    /// Copies numbers to the device.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes whose product is `data.len()`;
    /// [`Error::TooLarge`], [`Error::Lost`].
    pub fn new(device: &Device, data: &[f32], shape: &[usize]) -> Result<Self> {
        const OP: &str = "Tensor::new";
        let (padded, len) = check(OP, shape)?;
        if len != data.len() {
            let expected = format_args!("{len} elements for shape {shape:?}").to_string();
            return Err(Error::shape(OP, "data", expected, &[data.len()]));
        }
        let (bytes, limit) = (size_of_val(data) as u64, device.max_buffer_bytes());
        if bytes > limit {
            return Err(Error::TooLarge { what: "tensor", bytes, limit });
        }
        // An empty buffer is none: one element stands for it.
        let data = if data.is_empty() { &[0.0] } else { data };
        device.alive(OP)?;
        let handle = device.client().create_from_slice(bytemuck::cast_slice(data));
        Ok(Self { device: device.clone(), handle, shape: padded, axes: shape.len() })
    }

    /// A buffer of f32 that CubeCL already holds, row-major without gaps.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes that the buffer has room for.
    pub fn from_handle(device: &Device, handle: Handle, shape: &[usize]) -> Result<Self> {
        const OP: &str = "Tensor::from_handle";
        let (padded, len) = check(OP, shape)?;
        let has = handle.size_in_used() / 4;
        if has < len as u64 {
            let expected = format_args!("{len} elements for shape {shape:?}").to_string();
            return Err(Error::shape(OP, "handle", expected, &[has as usize]));
        }
        Ok(Self { device: device.clone(), handle, shape: padded, axes: shape.len() })
    }

    /// To be written by a kernel that writes every element.
    pub(crate) fn uninitialised(
        device: &Device,
        op: &'static str,
        shape: &[usize],
    ) -> Result<Self> {
        let (padded, len) = check(op, shape)?;
        let handle = device.alloc("tensor", len.max(1), 4)?;
        Ok(Self { device: device.clone(), handle, shape: padded, axes: shape.len() })
    }

    /// All elements, copied to the host once the device has computed them.
    ///
    /// # Errors
    /// [`Error::Device`], also for what went wrong in an earlier kernel; [`Error::Lost`]; [`Error::OutOfMemory`].
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let bytes = self.device.read("Tensor::to_vec", &self.handle)?;
        let (mut values, size) = (Vec::new(), 4 * self.len() as u64);
        let shortage = |_| Error::OutOfMemory { what: "a copy of a tensor", bytes: size };
        values.try_reserve_exact(self.len()).map_err(shortage)?;
        let elements = bytes.chunks_exact(4).take(self.len());
        values.extend(elements.map(bytemuck::pod_read_unaligned::<f32>));
        Ok(values)
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes of as many elements.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        const OP: &str = "Tensor::reshape";
        let (padded, len) = check(OP, shape)?;
        if len != self.len() {
            let expected = format_args!("{} elements", self.len()).to_string();
            return Err(Error::shape(OP, "shape", expected, shape));
        }
        Ok(Self { shape: padded, axes: shape.len(), ..self })
    }

    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.axes]
    }

    /// CubeCL's buffer.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Length of the first axis.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Elements per row.
    pub fn row_len(&self) -> usize {
        self.shape[1] * self.shape[2]
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

fn check(op: &'static str, shape: &[usize]) -> Result<([usize; 3], usize)> {
    let mut padded = [1; 3];
    if shape.is_empty() || shape.len() > 3 {
        return Err(Error::shape(op, "shape", "1 to 3 axes", shape));
    }
    padded[..shape.len()].copy_from_slice(shape);
    match shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis)) {
        Some(len) => Ok((padded, len)),
        None => Err(Error::shape(op, "shape", "fewer than 2^64 elements", shape)),
    }
}
