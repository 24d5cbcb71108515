use pulp::Simd;

use super::outer::LANES;

/// `to[j * to_stride + i] = from[i * stride + j]` for 16 rows of 16 lanes, whose bits stay what they are.
#[inline(always)]
pub(crate) fn transpose<S: Simd>(
    _simd: S,
    from: &[f32],
    stride: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    assert!(from.len() >= (LANES - 1) * stride + LANES);
    assert!(to.len() >= (LANES - 1) * to_stride + LANES);
    #[cfg(target_arch = "x86_64")]
    if super::is_avx512::<S>() {
        // SAFETY: the machine has AVX-512F, or there would be no value of that type; 16 rows lie in the slices.
        return unsafe { by_shuffles(from.as_ptr(), stride, to.as_mut_ptr(), to_stride) };
    }
    for (j, to) in to.chunks_mut(to_stride).take(LANES).enumerate() {
        for (i, to) in to[..LANES].iter_mut().enumerate() {
            *to = from[i * stride + j];
        }
    }
}

/// # Safety
/// Needs AVX-512F and 16 rows of 16 elements on both sides.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn by_shuffles(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
    use std::arch::x86_64::*;
    // By number, as in `panels`, here and below.
    let mut rows = [_mm512_setzero_ps(); 16];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *row = unsafe { _mm512_loadu_ps(from.add(i * stride)) };
    }
    // Of each four rows, in each quarter of a vector: column 0, 1, 2 and 3 of that quarter.
    let mut fours = [_mm512_setzero_ps(); 16];
    for four in 0..4 {
        let at = 4 * four;
        let (a, b, c, d) = (rows[at], rows[at + 1], rows[at + 2], rows[at + 3]);
        let (ab, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (cd, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        fours[4 * four] = _mm512_shuffle_ps::<0x44>(ab, cd);
        fours[4 * four + 1] = _mm512_shuffle_ps::<0xee>(ab, cd);
        fours[4 * four + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
        fours[4 * four + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
    }
    for column in 0..4 {
        let (a, b) = (fours[column], fours[4 + column]);
        let (c, d) = (fours[8 + column], fours[12 + column]);
        let (ab, ab_high) =
            (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (cd, cd_high) =
            (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        // SAFETY: promised by the caller.
        unsafe {
            let (to, step) = (to.add(column * to_stride), 4 * to_stride);
            _mm512_storeu_ps(to, _mm512_shuffle_f32x4::<0x88>(ab, cd));
            _mm512_storeu_ps(to.add(step), _mm512_shuffle_f32x4::<0x88>(ab_high, cd_high));
            _mm512_storeu_ps(to.add(2 * step), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            _mm512_storeu_ps(to.add(3 * step), _mm512_shuffle_f32x4::<0xdd>(ab_high, cd_high));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose<'a>(&'a [f32], &'a mut [f32]);

    impl pulp::WithSimd for Transpose<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            transpose(simd, self.0, 20, self.1, 18);
        }
    }

    #[test]
    fn rows_become_columns() {
        let from: Vec<f32> = (0..316).map(|i| i as f32).collect();
        let mut expected = [-1.0; 286];
        for at in 0..LANES * LANES {
            expected[at / LANES * 18 + at % LANES] = (20 * (at % LANES) + at / LANES) as f32;
        }
        for found in super::super::tests::on_every_arch(|| {
            let mut to = [-1.0; 286];
            super::super::dispatch(Transpose(&from, &mut to));
            to
        }) {
            assert_eq!(found, expected);
        }
    }
}
