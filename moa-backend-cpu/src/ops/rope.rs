use super::by_rows;
use crate::{Error, Result, Tensor};

/// Rotary position embedding in place on `[tokens, heads, head_dim]`, half-split layout: element `i`
/// of a head is rotated with element `i + head_dim / 2`.
///
/// `cos` and `sin` are tables `[positions, head_dim / 2]`; `positions` has one absolute position per
/// token. `inverse` rotates backwards, which is also the gradient.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit or a position lies outside the
/// tables; `x` is unchanged then.
pub fn rope(
    x: &mut Tensor,
    cos: &[f32],
    sin: &[f32],
    positions: &[usize],
    inverse: bool,
) -> Result<()> {
    const OP: &str = "rope";
    let &[tokens, heads, dim] = x.shape() else {
        return Err(Error::shape(OP, "x", "[tokens, heads, head dim]", x.shape()));
    };
    if dim == 0 || !dim.is_multiple_of(2) {
        return Err(Error::shape(OP, "x", "an even head dim", x.shape()));
    }
    if positions.len() != tokens {
        return Err(Error::shape(OP, "positions", format_args!("[{tokens}]"), &[positions.len()]));
    }
    let half = dim / 2;
    if cos.len() != sin.len() || !cos.len().is_multiple_of(half) {
        return Err(Error::shape(
            OP,
            "cos, sin",
            format_args!("[positions, {half}] both"),
            &[cos.len(), sin.len()],
        ));
    }
    let known = cos.len() / half;
    if let Some(position) = positions.iter().find(|&&p| p >= known) {
        return Err(Error::argument(OP, "positions", format_args!("below {known}"), position));
    }
    let row_len = heads * dim;
    by_rows(x.data_mut(), row_len, 2, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(row_len).enumerate() {
            let at = positions[first + i] * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for head in row.chunks_exact_mut(dim) {
                let (low, high) = head.split_at_mut(half);
                for ((a, b), (c, s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
                    let s = if inverse { -s } else { *s };
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    });
    Ok(())
}
