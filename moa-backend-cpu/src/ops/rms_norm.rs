use pulp::{Simd, WithSimd};

use super::by_rows;
use crate::simd::dispatch;
use crate::{Error, Result, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over each row of the first axis.
///
/// # Errors
/// [`Error::Argument`] unless `weight` is as long as a row.
pub fn rms_norm(x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor> {
    check("rms_norm", x, weight)?;
    let mut y = Tensor::scratch(x.shape())?;
    let row_len = x.row_len();
    by_rows(y.data_mut(), row_len, 2, |first, y| {
        let x = &x.data()[first * row_len..][..y.len()];
        for (y, x) in y.chunks_exact_mut(row_len).zip(x.chunks_exact(row_len)) {
            let inverse = inverse_rms(x, eps);
            y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * inverse * w);
        }
    });
    Ok(y)
}

/// Gradient by `x`, given the gradient `dy` by the result: with `r = 1 / sqrt(mean(x^2) + eps)` and
/// `g = dy * weight`, `dx = r * (g - x * r^2 * mean(g * x))`.
///
/// # Errors
/// [`Error::Argument`] unless `dy` has the shape of `x` and `weight` is as long as a row.
pub fn rms_norm_backward(x: &Tensor, weight: &[f32], eps: f32, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "rms_norm_backward";
    check(OP, x, weight)?;
    if dy.shape() != x.shape() {
        return Err(Error::shape(OP, "dy", format_args!("{:?}", x.shape()), dy.shape()));
    }
    let mut dx = Tensor::scratch(x.shape())?;
    let row_len = x.row_len();
    by_rows(dx.data_mut(), row_len, 4, |first, dx| {
        let range = first * row_len..first * row_len + dx.len();
        let rows = x.data()[range.clone()]
            .chunks_exact(row_len)
            .zip(dy.data()[range].chunks_exact(row_len));
        for (dx, (x, dy)) in dx.chunks_exact_mut(row_len).zip(rows) {
            let inverse = inverse_rms(x, eps);
            dx.iter_mut().zip(dy).zip(weight).for_each(|((g, dy), w)| *g = dy * w);
            let mean = dispatch(Dot(dx, x)) / row_len as f32;
            let back = inverse * inverse * mean;
            dx.iter_mut().zip(x).for_each(|(g, x)| *g = inverse * (*g - x * back));
        }
    });
    Ok(dx)
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dispatch(Dot(x, x)) / x.len() as f32 + eps).sqrt()
}

fn check(op: &'static str, x: &Tensor, weight: &[f32]) -> Result<()> {
    if weight.len() == x.row_len() && !weight.is_empty() {
        return Ok(());
    }
    Err(Error::shape(op, "weight", format_args!("[{}], at least 1", x.row_len()), &[weight.len()]))
}

struct Dot<'a>(&'a [f32], &'a [f32]);

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let ((a, a_tail), (b, b_tail)) = (S::as_simd_f32s(self.0), S::as_simd_f32s(self.1));
        let mut sums = [simd.splat_f32s(0.0); 4];
        for (a, b) in a.chunks(4).zip(b.chunks(4)) {
            for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                *sum = simd.mul_add_e_f32s(a, b, *sum);
            }
        }
        sums[0] = simd.mul_add_e_f32s(
            simd.partial_load_f32s(a_tail),
            simd.partial_load_f32s(b_tail),
            sums[0],
        );
        simd.reduce_sum_f32s(
            simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])),
        )
    }
}
