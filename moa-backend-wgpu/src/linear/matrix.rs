use cubecl::server::Handle;

use crate::kernels::words::check_words;
use crate::{Device, Dtype, Error, Result};

/// A weight `[rows, cols]` on the device, in the element type of its file.
#[derive(Clone, Debug)]
pub struct Matrix {
    device: Device,
    pub(crate) words: Handle,
    rows: usize,
    cols: usize,
    dtype: Dtype,
}

impl Matrix {
    /// Copies elements of `dtype`, little-endian and row-major, to the device.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `bytes` make up a matrix with elements, or if rows
    /// of 16-bit elements are of odd length, [`Error::TooLarge`].
    pub fn new(
        device: &Device,
        bytes: &[u8],
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<Self> {
        const OP: &str = "Matrix::new";
        let len = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes()));
        if len != Some(bytes.len()) || bytes.is_empty() {
            let expected = format_args!("{dtype} elements of [{rows}, {cols}]").to_string();
            return Err(Error::shape(OP, "bytes", expected, &[bytes.len()]));
        }
        check_words(OP, "cols", cols, dtype)?;
        let (bytes_len, limit) = (bytes.len() as u64, device.max_buffer_bytes());
        if bytes_len > limit {
            return Err(Error::TooLarge { what: "weight", bytes: bytes_len, limit });
        }
        let words = device.long_lived(|client| client.create_from_slice(bytes));
        Ok(Self { device: device.clone(), words, rows, cols, dtype })
    }

    /// Rows: output features of a linear layer, tokens of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
