use crate::{Error, Result};

/// Row-major f32 activations with one to three axes, the first of which packs the tokens of all
/// sequences of a batch.
///
/// The length of the data always equals the product of the shape.
#[derive(Debug)]
pub struct Tensor {
    data: Vec<f32>,
    shape: [usize; 3],
    axes: usize,
    /// Whether the thread keeps the memory for its next tensors. What came from elsewhere goes back to the system:
    /// what is kept would grow by it with every step.
    recycles: bool,
}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        Self { data: self.data.clone(), shape: self.shape, axes: self.axes, recycles: false }
    }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.shape() == other.shape() && self.data == other.data
    }
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
        Ok(Self { data, shape: padded, axes, recycles: false })
    }

    /// All zeros.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes, [`Error::OutOfMemory`].
    pub fn zeros(shape: &[usize]) -> Result<Self> {
        let (padded, axes, len) = check("Tensor::zeros", shape)?;
        let data = match recycled::take(len) {
            Some(mut data) => {
                data.fill(0.0);
                data
            }
            None => crate::zeroed::zeroed(len, "tensor")?,
        };
        Ok(Self { data, shape: padded, axes, recycles: true })
    }

    /// Any numbers, to be written over.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    pub(crate) fn scratch(shape: &[usize]) -> Result<Self> {
        let (padded, axes, len) = check("Tensor::scratch", shape)?;
        match recycled::take(len) {
            Some(data) => Ok(Self { data, shape: padded, axes, recycles: true }),
            None => Self::zeros(shape),
        }
    }

    /// The same data under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of elements differs.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        let recycles = self.recycles;
        let mut tensor = Self::new(self.into_data(), shape)?;
        tensor.recycles = recycles;
        Ok(tensor)
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
    pub fn into_data(mut self) -> Vec<f32> {
        std::mem::take(&mut self.data)
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if self.recycles {
            recycled::give(std::mem::take(&mut self.data));
        }
    }
}

/// Memory of tensors that a thread has dropped, for those that it makes next. A layer makes the same tensors as
/// the one before it, and pages fresh from the system cost more than what a small model computes in them.
mod recycled {
    use std::cell::RefCell;

    /// Elements from which it is worth it: the system gives fewer without new pages.
    const LEAST: usize = 1 << 13;
    /// Elements that a thread keeps: 64 MiB.
    const MOST: usize = 1 << 24;

    thread_local! {
        static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    }

    /// `len` elements of any value.
    pub(super) fn take(len: usize) -> Option<Vec<f32>> {
        if len < LEAST {
            return None;
        }
        KEPT.with_borrow_mut(|kept| {
            let fits = |data: &Vec<f32>| (len..=2 * len).contains(&data.capacity());
            let mut data = kept.swap_remove(kept.iter().rposition(fits)?);
            data.resize(len, 0.0);
            Some(data)
        })
    }

    pub(super) fn give(data: Vec<f32>) {
        if !(LEAST..=MOST).contains(&data.capacity()) {
            return;
        }
        // A thread that ends has nothing to keep it in.
        let _ = KEPT.try_with(|kept| {
            let Ok(mut kept) = kept.try_borrow_mut() else { return };
            let mut total: usize = data.capacity() + kept.iter().map(Vec::capacity).sum::<usize>();
            kept.push(data);
            // What has lain there longest fits nothing.
            while total > MOST {
                total -= kept.remove(0).capacity();
            }
        });
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
