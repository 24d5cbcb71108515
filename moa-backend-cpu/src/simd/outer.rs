use pulp::{Simd, WithSimd};

/// Columns of a panel: the vectors that the micro-kernel keeps in registers (4 of AVX-512, twice 4
/// of AVX2).
pub(crate) const PANEL: usize = 64;

/// Widths are padded to this many columns.
pub(crate) const LANES: usize = 16;

/// `c[n][..width] (+)= sum over k of a[k][..width] * b[k * b_step + n * b_row]`
///
/// `a` and `c` are panels: rows of [`PANEL`] columns of which the first `width` are used. `b` is
/// read element by element and broadcast, so it can lie in memory either way. All of attention's
/// products have this form when scores are kept transposed, `[key][row]`: no operand is ever
/// transposed, any head dimension is as good as any other, and the softmax needs no sums across a
/// register.
pub(crate) struct Outer<'a> {
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) width: usize,
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) b_step: usize,
    pub(crate) b_row: usize,
    pub(crate) c: &'a mut [f32],
    pub(crate) accumulate: bool,
}

/// What a lane of 32 bits adds to its sum at a time.
pub(crate) trait Sum<S: Simd>: Copy {
    /// `sum + x * w`, lane by lane.
    fn add(self, simd: S, sum: S::f32s, x: S::f32s, w: S::f32s) -> S::f32s;
}

/// Products of f32.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl<S: Simd> Sum<S> for Plain {
    #[inline(always)]
    fn add(self, simd: S, sum: S::f32s, x: S::f32s, w: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(x, w, sum)
    }
}

impl WithSimd for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.run(simd, Plain);
    }
}

impl Outer<'_> {
    /// The product of lanes that are summed as `kind` says.
    #[inline(always)]
    pub(crate) fn run<S: Simd, K: Sum<S>>(self, simd: S, kind: K) {
        let Self { k, n, width, a, b, b_step, b_row, c, accumulate } = self;
        if n == 0 || width == 0 {
            return;
        }
        assert!(width <= PANEL && width.is_multiple_of(LANES));
        assert!(c.len() >= n * PANEL && a.len() >= k * PANEL);
        assert!(k == 0 || b.len() > (k - 1) * b_step + (n - 1) * b_row);

        let vectors = width / S::F32_LANES;
        let mut done = 0;
        macro_rules! columns {
            ($m:literal: $($rows:literal)+) => {
                while vectors - done >= $m {
                    let column = done * S::F32_LANES;
                    let mut row = 0;
                    $(while n - row >= $rows {
                        // SAFETY: k rows of `a` and n rows of `c` with `width` columns lie inside
                        // the slices, and so does every element of `b`, by the assertions.
                        unsafe {
                            micro::<S, K, $m, $rows>(
                                (simd, kind),
                                k,
                                a.as_ptr().add(column),
                                b.as_ptr().add(row * b_row),
                                b_step,
                                b_row,
                                c.as_mut_ptr().add(row * PANEL + column),
                                accumulate,
                            );
                        }
                        row += $rows;
                    })+
                    done += $m;
                }
            };
        }
        // As many accumulators as the registers hold, with one left per operand.
        if S::REGISTER_COUNT >= 32 {
            columns!(4: 6 4 2 1);
        }
        columns!(2: 6 4 2 1);
        columns!(1: 6 2 1);
    }
}

/// One block of `M` vectors x `N` rows of `c` in registers.
///
/// # Safety
/// `a` and `c` must be valid for `k` and `N` rows of `M` vectors at a stride of [`PANEL`], `b` for
/// offsets `i * b_step + j * b_row` with `i < k`, `j < N`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn micro<S: Simd, K: Sum<S>, const M: usize, const N: usize>(
    (simd, kind): (S, K),
    k: usize,
    mut a: *const f32,
    mut b: *const f32,
    b_step: usize,
    b_row: usize,
    c: *mut f32,
    accumulate: bool,
) {
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; M]; N];
    for _ in 0..k {
        let mut row = [zero; M];
        for (m, x) in row.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *x = unsafe { a.add(m * S::F32_LANES).cast::<S::f32s>().read_unaligned() };
        }
        for (j, sums) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            let factor = simd.splat_f32s(unsafe { *b.add(j * b_row) });
            // By number, as in `panels`.
            for m in 0..M {
                sums[m] = kind.add(simd, sums[m], row[m], factor);
            }
        }
        a = a.wrapping_add(PANEL);
        b = b.wrapping_add(b_step);
    }
    for (j, sums) in sums.iter().enumerate() {
        for (m, &sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe {
                let to = c.add(j * PANEL + m * S::F32_LANES).cast::<S::f32s>();
                let sum = if accumulate { simd.add_f32s(to.read_unaligned(), sum) } else { sum };
                to.write_unaligned(sum);
            }
        }
    }
}

/// Writes rows as columns of a panel: `panel[d][column(r)] = map(rows(r)[d])`.
///
/// A stretch of elements at a time, so that the places in the panel stay in near memory.
pub(crate) fn pack_columns<'a>(
    panel: &mut [f32],
    rows: impl Iterator<Item = (usize, &'a [f32])> + Clone,
    map: impl Fn(f32) -> f32,
) {
    const STRETCH: usize = 64;
    for (at, panel) in panel.chunks_mut(STRETCH * PANEL).enumerate() {
        for (column, row) in rows.clone() {
            for (to, x) in panel.chunks_exact_mut(PANEL).zip(&row[at * STRETCH..]) {
                to[column] = map(*x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 20) as f32 / 4096.0)
            .collect()
    }

    #[test]
    fn outer_equals_the_naive_product_in_both_layouts_of_b() {
        super::super::tests::on_every_arch(check);
    }

    fn check() {
        for (k, n, width) in [(1, 1, 16), (7, 13, 64), (64, 6, 48), (3, 5, 32), (0, 4, 64)] {
            for transposed in [false, true] {
                for accumulate in [false, true] {
                    let (a, b, before) =
                        (values(k * PANEL, 1), values(k * n, 2), values(n * PANEL, 3));
                    let (b_step, b_row) = if transposed { (1, k.max(1)) } else { (n, 1) };
                    let mut c = before.clone();
                    super::super::dispatch(Outer {
                        k,
                        n,
                        width,
                        a: &a,
                        b: &b,
                        b_step,
                        b_row,
                        c: &mut c,
                        accumulate,
                    });
                    for j in 0..n {
                        for w in 0..PANEL {
                            let sum: f32 =
                                (0..k).map(|i| a[i * PANEL + w] * b[i * b_step + j * b_row]).sum();
                            let old = before[j * PANEL + w];
                            let expected = match (w < width, accumulate) {
                                (false, _) => old,
                                (true, true) => old + sum,
                                (true, false) => sum,
                            };
                            assert!((c[j * PANEL + w] - expected).abs() < 1e-4);
                        }
                    }
                }
            }
        }
    }
}
