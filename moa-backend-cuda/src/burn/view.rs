use burn_backend::DType;
use burn_cubecl::tensor::CubeTensor;

use super::server::Server;
use crate::kernels::tables::{DevicePointer, Packed};
use crate::tensor::Form;
use crate::{Dtype, Error, Result};

/// A burn tensor as kernels read it, but for its address, which only burn's server knows.
#[derive(Debug)]
pub(super) struct View {
    op: &'static str,
    what: &'static str,
    shape: Vec<usize>,
    /// Elements between tokens and between heads.
    strides: [usize; 2],
    dtype: Dtype,
}

/// Bytes at whose multiples rows begin.
const ALIGNMENT: usize = 16;

impl View {
    /// # Errors
    /// [`Error::Argument`] if it is on another device, of another type or has scattered rows.
    pub(super) fn new(
        op: &'static str,
        what: &'static str,
        tensor: &CubeTensor,
        server: &Server,
    ) -> Result<Self> {
        if !server.owns(&tensor.handle) {
            return Err(Error::argument(op, what, "on the backend's device", "on another"));
        }
        let dtype = match tensor.dtype {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            DType::F32 => Dtype::F32,
            other => return Err(Error::argument(op, what, "f16, bf16 or f32", other.name())),
        };
        if tensor.meta.is_tiled() {
            return Err(Error::argument(op, what, "rows in memory", "storage tiles"));
        }
        let mut view =
            Self { op, what, shape: tensor.meta.shape().to_vec(), strides: [0; 2], dtype };
        let (&[tokens, heads, row], &[token, head, innermost]) =
            (&view.shape[..], &tensor.meta.strides()[..])
        else {
            return Ok(view);
        };
        // The stride of an axis of length 1 says nothing.
        let head = if heads == 1 { row } else { head };
        let token = if tokens == 1 { heads * head } else { token };
        view.strides = [token, head];
        let aligned = |stride: usize| (stride * dtype.bytes()).is_multiple_of(ALIGNMENT);
        if (row > 1 && innermost != 1) || !aligned(token) || !aligned(head) {
            let expected = "[_, _, 1], rows at multiples of 16 bytes";
            let got = format!("{:?}", tensor.meta.strides());
            return Err(Error::argument(op, "strides", format!("{expected}, for {what}"), got));
        }
        Ok(view)
    }

    /// Elements of a row.
    pub(super) fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// With its address.
    ///
    /// # Errors
    /// [`Error::Argument`] unless that is a multiple of 16 bytes.
    pub(super) fn packed(&self, data: DevicePointer) -> Result<Packed> {
        if !data.is_multiple_of(ALIGNMENT as u64) {
            let got = format!("{data:#x}");
            return Err(Error::argument(self.op, self.what, "at a multiple of 16 bytes", got));
        }
        let [token, head] = self.strides.map(|stride| stride as i64);
        Ok(Packed { data, token, head })
    }
}

impl Form for View {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}
