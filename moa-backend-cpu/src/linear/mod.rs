//! Products with weights that stay in their storage type.

mod blocks;
mod numbers;
mod panels;
mod stretches;
#[cfg(target_arch = "x86_64")]
mod tiles;

use half::{bf16, f16};

use self::blocks::{Blocks, Level};
use self::numbers::Numbers;
use self::panels::Side;
use crate::pool::SharedMut;
use crate::{Error, Result, Tensor};
pub use moa_core::BlockType;

/// Rows of `x` from which converting weights to f32 is faster than dot products with the weights as
/// they lie in memory.
const PANEL_ROWS: usize = 16;

const _: () = assert!(crate::FEW_ROWS < PANEL_ROWS && PANEL_ROWS <= crate::MANY_ROWS);

/// Elements of a weight matrix.
#[derive(Clone, Copy, Debug)]
pub enum WeightData<'a> {
    /// 4 bytes each.
    F32(&'a [f32]),
    /// 2 bytes each.
    F16(&'a [f16]),
    /// 2 bytes each.
    Bf16(&'a [bf16]),
    /// Quantised blocks, whole ones in each row. [`linear`] rounds activations to 15 bits for them, or as
    /// [`WeightRef::narrow_activations`] says.
    Blocks(BlockType, &'a [u8]),
}

/// A weight matrix `[rows, cols]` = `[out, in]`, row-major, borrowed in its storage type.
#[derive(Clone, Copy, Debug)]
pub struct WeightRef<'a> {
    data: WeightData<'a>,
    rows: usize,
    cols: usize,
    narrow: bool,
}

impl<'a> WeightRef<'a> {
    /// Takes `data` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless the data has `rows * cols` elements, in whole blocks where it is in blocks.
    pub fn new(data: WeightData<'a>, rows: usize, cols: usize) -> Result<Self> {
        let len = match data {
            WeightData::Blocks(blocks, bytes) => {
                let (len, size) = (blocks.block_len(), blocks.block_bytes());
                if !cols.is_multiple_of(len) || !bytes.len().is_multiple_of(size) {
                    let expected = format!("whole blocks of {len} elements in {size} bytes");
                    let got = format!("{cols} elements a row in {} bytes", bytes.len());
                    return Err(Error::argument("WeightRef::new", "data", expected, got));
                }
                bytes.len() / size * len
            }
            WeightData::F32(x) => x.len(),
            WeightData::F16(x) => x.len(),
            WeightData::Bf16(x) => x.len(),
        };
        if rows.checked_mul(cols) != Some(len) {
            return Err(Error::shape(
                "WeightRef::new",
                "data",
                format_args!("[{rows}, {cols}]"),
                &[len],
            ));
        }
        Ok(Self { data, rows, cols, narrow: false })
    }

    /// Whether [`linear`] may round activations, and [`linear_backward_input`] gradients, to bf16 where the weights
    /// are bf16. Machines that multiply pairs of bf16 (AVX-512 BF16) do so, at twice the speed for many rows and by
    /// one instruction for 32 weights for few.
    ///
    /// On machines that multiply tiles of bf16 (AMX, on Linux) it also lets `linear`, of [`MANY_ROWS`](crate::MANY_ROWS)
    /// and more, round both activations and elements of quantised blocks to bf16, each by up to 2^-9 of itself, so that
    /// products are off by up to 2^-8 of all terms; and activations to 16 bits, two numbers of bf16, where the weights are
    /// f16. Nothing changes elsewhere, nor for weights in f32.
    #[must_use]
    pub fn narrow_activations(self, narrow: bool) -> Self {
        Self { narrow, ..self }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// `x . weight^T + bias`: `[tokens, in]` to `[tokens, out]`. Axes of `x` after the first count as one.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit, [`Error::OutOfMemory`].
pub fn linear(x: &Tensor, weight: WeightRef<'_>, bias: Option<&[f32]>) -> Result<Tensor> {
    Ok(products("linear", x, &[(weight, bias)])?.swap_remove(0))
}

/// A tensor whose every element is going to be a sum of `k` products.
fn output(m: usize, n: usize, k: usize) -> Result<Tensor> {
    if k == 0 { Tensor::zeros(&[m, n]) } else { Tensor::scratch(&[m, n]) }
}

/// [`linear`] of several layers of one input, as one call where that is faster.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit, [`Error::OutOfMemory`].
pub fn linears(x: &Tensor, layers: &[(WeightRef<'_>, Option<&[f32]>)]) -> Result<Vec<Tensor>> {
    products("linears", x, layers)
}

fn products(
    op: &'static str,
    x: &Tensor,
    layers: &[(WeightRef<'_>, Option<&[f32]>)],
) -> Result<Vec<Tensor>> {
    layers.iter().try_for_each(|(weight, bias)| check(op, x, *weight, *bias))?;
    let (m, k) = (x.rows(), x.row_len());
    let outputs = layers.iter().map(|(weight, _)| output(m, weight.rows, k));
    let mut all = outputs.collect::<Result<Vec<_>>>()?;
    {
        let outs: Vec<_> = all.iter_mut().map(|y| SharedMut::new(y.data_mut())).collect();
        let (mut blocks, mut numbers) = (Vec::new(), Vec::new());
        #[cfg(target_arch = "x86_64")]
        let (machine, mut tiled) = (tiles::Amx::here().filter(|_| m >= PANEL_ROWS), Vec::new());
        for ((weight, _), out) in layers.iter().zip(&outs) {
            #[cfg(target_arch = "x86_64")]
            if let Some(own) = machine.and_then(|_| tiles::Weights::new(weight)) {
                tiled.push((own, weight.rows, out));
                continue;
            }
            match Numbers::new(weight) {
                Ok(own) => numbers.push((own, weight.rows, out)),
                Err(own) => blocks.push((own, weight.rows, out)),
            }
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(machine) = machine {
            tiles::forward_all(machine, x, &tiled)?;
        }
        numbers::forward_all(x, &numbers)?;
        blocks::forward_all(Level::best(), x.data(), (m, k), &blocks)?;
    }
    for (y, (_, bias)) in all.iter_mut().zip(layers) {
        add_bias(y, *bias);
    }
    Ok(all)
}

fn check(op: &'static str, x: &Tensor, weight: WeightRef<'_>, bias: Option<&[f32]>) -> Result<()> {
    let (n, k) = (weight.rows, weight.cols);
    if x.row_len() != k {
        return Err(Error::shape(op, "x", format_args!("[tokens, {k}]"), x.shape()));
    }
    match bias.filter(|bias| bias.len() != n) {
        Some(bias) => Err(Error::shape(op, "bias", format_args!("[{n}]"), &[bias.len()])),
        None => Ok(()),
    }
}

fn add_bias(y: &mut Tensor, bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    crate::ops::by_rows(y.data_mut(), bias.len(), 1, |_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    });
}

/// `dy . weight`: the gradient of [`linear`] by its input, `[tokens, out]` to `[tokens, in]`.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit, [`Error::OutOfMemory`].
pub fn linear_backward_input(dy: &Tensor, weight: WeightRef<'_>) -> Result<Tensor> {
    let (m, n, k) = (dy.rows(), weight.cols, weight.rows);
    if dy.row_len() != k {
        return Err(Error::shape(
            "linear_backward_input",
            "dy",
            format_args!("[tokens, {k}]"),
            dy.shape(),
        ));
    }
    let mut dx = output(m, n, k)?;
    let out = SharedMut::new(dx.data_mut());
    #[cfg(target_arch = "x86_64")]
    if let WeightData::Bf16(w) = weight.data
        && !w.is_empty()
        && let Some(machine) = panels::pairs::Machine::here().filter(|_| weight.narrow)
    {
        panels::pairs::Activations::new(machine, dy)?.product_back(w, n, &out)?;
        return Ok(dx);
    }
    let (dy, sizes) = (dy.data(), (m, n, k));
    match weight.data {
        WeightData::F32(w) => panels::product(dy, w, Side::Backward, sizes, &out)?,
        WeightData::F16(w) => panels::product(dy, w, Side::Backward, sizes, &out)?,
        WeightData::Bf16(w) => panels::product(dy, w, Side::Backward, sizes, &out)?,
        WeightData::Blocks(kind, bytes) => {
            panels::product(dy, Blocks { kind, bytes }, Side::Backward, sizes, &out)?;
        }
    }
    Ok(dx)
}

fn range(index: usize, step: usize, end: usize) -> std::ops::Range<usize> {
    index * step..end.min((index + 1) * step)
}

#[cfg(test)]
mod tests;
