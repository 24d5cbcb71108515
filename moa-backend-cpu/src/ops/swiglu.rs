use pulp::{Simd, WithSimd};

use super::{ROWS, by_rows};
use crate::pool::{self, SharedMut};
use crate::simd::dispatch;
use crate::simd::exp2::exp2;
use crate::{Error, Result, Tensor};

/// `silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`.
///
/// # Errors
/// [`Error::Argument`] if the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check("swiglu", "up", gate, up)?;
    let mut out = Tensor::scratch(gate.shape())?;
    let row_len = gate.row_len();
    by_rows(out.data_mut(), row_len, 8, |first, out| {
        let at = first * row_len;
        dispatch(Forward {
            gate: &gate.data()[at..at + out.len()],
            up: &up.data()[at..at + out.len()],
            out,
        });
    });
    Ok(out)
}

/// Gradients by `gate` and `up`, given the gradient `dy` by the result.
///
/// # Errors
/// [`Error::Argument`] if the shapes differ.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    check("swiglu_backward", "up", gate, up)?;
    check("swiglu_backward", "dy", gate, dy)?;
    let (mut d_gate, mut d_up) = (Tensor::scratch(gate.shape())?, Tensor::scratch(gate.shape())?);
    let (len, step) = (gate.data().len(), ROWS * gate.row_len());
    if len > 0 {
        let (d_gate, d_up) = (SharedMut::new(d_gate.data_mut()), SharedMut::new(d_up.data_mut()));
        pool::for_each(len.div_ceil(step), len as u64 * 12, |task| {
            let at = task * step..len.min((task + 1) * step);
            let (gate, up, dy) =
                (&gate.data()[at.clone()], &up.data()[at.clone()], &dy.data()[at.clone()]);
            // SAFETY: each task has elements of its own.
            let (d_gate, d_up) =
                unsafe { (d_gate.slice(at.start, at.len()), d_up.slice(at.start, at.len())) };
            dispatch(Backward { gate, up, dy, d_gate, d_up });
        });
    }
    Ok((d_gate, d_up))
}

fn check(op: &'static str, what: &'static str, gate: &Tensor, other: &Tensor) -> Result<()> {
    if gate.shape() == other.shape() {
        return Ok(());
    }
    Err(Error::shape(op, what, format_args!("{:?}", gate.shape()), other.shape()))
}

/// `1 / (1 + exp(-x))`
#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let exponent = simd.mul_f32s(x, simd.splat_f32s(-std::f32::consts::LOG2_E));
    let exponent = simd.min_f32s(simd.splat_f32s(126.0), exponent);
    simd.div_f32s(one, simd.add_f32s(one, exp2(simd, exponent)))
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = S::F32_LANES;
        let inputs = self.gate.chunks(lanes).zip(self.up.chunks(lanes));
        for (out, (gate, up)) in self.out.chunks_mut(lanes).zip(inputs) {
            let (gate, up) = (simd.partial_load_f32s(gate), simd.partial_load_f32s(up));
            let silu = simd.mul_f32s(gate, sigmoid(simd, gate));
            simd.partial_store_f32s(out, simd.mul_f32s(silu, up));
        }
    }
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = S::F32_LANES;
        let one = simd.splat_f32s(1.0);
        let inputs = self.gate.chunks(lanes).zip(self.up.chunks(lanes)).zip(self.dy.chunks(lanes));
        let outputs = self.d_gate.chunks_mut(lanes).zip(self.d_up.chunks_mut(lanes));
        for ((d_gate, d_up), ((gate, up), dy)) in outputs.zip(inputs) {
            let (gate, up) = (simd.partial_load_f32s(gate), simd.partial_load_f32s(up));
            let dy = simd.partial_load_f32s(dy);
            let sigmoid = sigmoid(simd, gate);
            let silu = simd.mul_f32s(gate, sigmoid);
            // silu'(x) = s * (1 + x * (1 - s))
            let rest = simd.mul_add_e_f32s(gate, simd.sub_f32s(one, sigmoid), one);
            let slope = simd.mul_f32s(sigmoid, rest);
            simd.partial_store_f32s(d_up, simd.mul_f32s(dy, silu));
            simd.partial_store_f32s(d_gate, simd.mul_f32s(simd.mul_f32s(dy, up), slope));
        }
    }
}
