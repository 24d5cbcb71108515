use crate::{Error, Result};

/// Row-major f32 activations with one to three axes, the first of which packs the tokens of all
/// sequences of a batch.
///
/// The length of the data always equals the product of the shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    data: Vec<f32>,
    shape: [usize; 3],
    axes: usize,
}

impl Tensor {
    /// Takes `data` as a tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes whose product is `data.len()`.
    pub fn new(data: Vec<f32>, shape: &[usize]) -> Result<Self> {
        let (padded, axes, len) = check("Tensor::new", shape)?;
        if len != data.len() {
            return Err(Error::shape(
                "Tensor::new",
                "data",
                format_args!("{len} elements for shape {shape:?}"),
                &[data.len()],
            ));
        }
        Ok(Self { data, shape: padded, axes })
    }

    /// All zeros.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes, [`Error::OutOfMemory`].
    pub fn zeros(shape: &[usize]) -> Result<Self> {
        let (padded, axes, len) = check("Tensor::zeros", shape)?;
        Ok(Self { data: crate::zeroed::zeroed(len, "tensor")?, shape: padded, axes })
    }

    /// The same data under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of elements differs.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        Self::new(self.data, shape)
    }

    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.axes]
    }

    /// Length of the first axis.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Elements per entry of the first axis.
    pub fn row_len(&self) -> usize {
        self.shape[1] * self.shape[2]
    }

    /// All elements.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements, to be changed in place.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The elements alone.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }
}

fn check(op: &'static str, shape: &[usize]) -> Result<([usize; 3], usize, usize)> {
    let mut padded = [1; 3];
    if shape.is_empty() || shape.len() > 3 {
        return Err(Error::shape(op, "shape", "1 to 3 axes", shape));
    }
    padded[..shape.len()].copy_from_slice(shape);
    let len = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    match len {
        Some(len) => Ok((padded, shape.len(), len)),
        None => Err(Error::shape(op, "shape", "fewer than 2^64 elements", shape)),
    }
}
