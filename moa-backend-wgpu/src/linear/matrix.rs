use cubecl::server::Handle;
use moa_core::BlockType;

use crate::kernels::quants::Elements;
use crate::kernels::words::check_words;
use crate::{Device, Dtype, Error, Result};

/// A weight `[rows, cols]` on the device, in the element type or the quantised blocks of its file.
#[derive(Clone, Debug)]
pub struct Matrix {
    device: Device,
    pub(crate) words: Handle,
    rows: usize,
    cols: usize,
    pub(crate) elements: Elements,
    /// Where steps of blocks begin, in loads of 16 bytes.
    pub(crate) steps: usize,
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
        device.alive("weight")?;
        let words = device.long_lived(|client| client.create_from_slice(bytes));
        Ok(Self::of(device, words, [rows, cols], Elements::Plain(dtype), 0))
    }

    pub(crate) fn of(
        device: &Device,
        words: Handle,
        [rows, cols]: [usize; 2],
        elements: Elements,
        steps: usize,
    ) -> Self {
        Self { device: device.clone(), words, rows, cols, elements, steps }
    }

    /// Rows: output features of a linear layer, tokens of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type, unless the elements are in blocks.
    pub fn dtype(&self) -> Option<Dtype> {
        match self.elements {
            Elements::Plain(dtype) => Some(dtype),
            Elements::Blocks(_) => None,
        }
    }

    /// The kind of blocks that the elements are in, if they are.
    pub fn blocks(&self) -> Option<BlockType> {
        match self.elements {
            Elements::Plain(_) => None,
            Elements::Blocks(kind) => Some(kind),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
