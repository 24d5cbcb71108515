//! Random numbers, and how far some are from others.

/// Numbers of about unit normal distribution.
pub fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.732).collect()
}

/// The same numbers in f64.
pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Largest absolute difference; infinite if something is not a number.
///
/// # Panics
/// Panics if there are not as many of one as of the other.
pub fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs());
    differences.fold(0.0, |max, d| if d.is_nan() { f64::INFINITY } else { d.max(max) })
}

/// Largest difference, relative where numbers are larger than 1; infinite if something is not a
/// number.
///
/// # Panics
/// Panics if there are not as many of one as of the other.
pub fn error(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let errors = a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs() / y.abs().max(1.0));
    errors.fold(0.0, |max, d| if d.is_nan() { f64::INFINITY } else { d.max(max) })
}

/// Checks that the [`error`] of `a` against `b` is at most `tolerance`.
///
/// # Panics
/// Panics if it is not.
#[track_caller]
pub fn close(a: &[f32], b: &[f32], tolerance: f64) {
    let error = error(a, &f64s(b));
    assert!(error <= tolerance, "differs by {error:e}, more than {tolerance:e}");
}

/// Checks that `a` is no finite number where `b` is none, and elsewhere as near to it as
/// [`error`] counts.
///
/// # Panics
/// Panics if it is not.
#[track_caller]
pub(crate) fn close_where_finite(
    a: &[f32],
    b: &[f64],
    tolerance: f64,
    place: impl Fn(usize) -> String,
) {
    assert_eq!(a.len(), b.len());
    for (at, (&x, &y)) in a.iter().zip(b).enumerate() {
        let is_close = match y.is_finite() {
            true => (f64::from(x) - y).abs() <= tolerance * y.abs().max(1.0),
            false => !x.is_finite(),
        };
        assert!(is_close, "{}: {x} in place of {y}", place(at));
    }
}
