use pulp::Simd;

/// `2^x` with a relative error below 2e-7; exactly 1 at 0 and exactly 0 below -126.5 (`-inf` too).
/// `x` must not exceed 127.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits.
    let magic = simd.splat_f32s(12_582_912.0);
    // In this order a NaN stays a NaN on x86.
    let x = simd.max_f32s(simd.splat_f32s(-127.0), x);
    let shifted = simd.add_f32s(x, magic);
    let fraction = simd.sub_f32s(x, simd.sub_f32s(shifted, magic));

    // Minimax polynomial of degree 6 for 2^f on [-1/2, 1/2] (Remez, relative error 2e-9 before
    // rounding).
    let mut y = simd.splat_f32s(1.534_581_2e-4);
    for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_6e-2, 2.402_264_6e-1, 6.931_472e-1, 1.0] {
        y = simd.mul_add_e_f32s(y, fraction, simd.splat_f32s(c));
    }

    // The exponent field of 2^n; n = -127 gives zero.
    let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let scale = simd.add_u32s(n, simd.splat_u32s(127 << 23));
    simd.mul_f32s(y, simd.transmute_f32s_u32s(scale))
}

#[cfg(test)]
mod tests {
    use super::super::tests::on_every_arch;
    use super::*;

    struct Exp2<'a>(&'a mut [f32]);

    impl pulp::WithSimd for Exp2<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (head, tail) = S::as_mut_simd_f32s(self.0);
            head.iter_mut().for_each(|x| *x = exp2(simd, *x));
            let last = exp2(simd, simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, last);
        }
    }

    fn run(x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        super::super::dispatch(Exp2(&mut y));
        y
    }

    #[test]
    fn exp2_is_accurate_over_its_whole_range() {
        let x: Vec<f32> = (0..500_000).map(|i| -126.0 + 252.0 * i as f32 / 5e5).collect();
        for found in on_every_arch(|| run(&x)) {
            for (x, y) in x.iter().zip(found) {
                let exact = f64::from(*x).exp2();
                assert!(((f64::from(y) - exact) / exact).abs() < 2e-7, "{x}: {y} {exact}");
            }
        }
    }

    #[test]
    fn exp2_is_exact_at_the_ends() {
        let x = [0.0, 1.0, -1.0, f32::NEG_INFINITY, -1e30, -127.0, -500.0, 100.0];
        let expected = [1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 100f32.exp2()];
        on_every_arch(|| assert_eq!(run(&x), expected));
    }
}
