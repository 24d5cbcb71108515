use pulp::Simd;

/// `2^x` with a relative error below 2e-7; exactly 1 at 0, exactly 0 below -126.5 (`-inf` too), and no number of what
/// is none: the weight of a score that is no number must not hide it.
/// `x` must not exceed 127.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let Parts { slope, fraction, power } = Parts::new(simd, x);
    simd.mul_f32s(simd.mul_add_e_f32s(slope, fraction, simd.splat_f32s(1.0)), power)
}

/// The hyperbolic tangent of `x * ln(2) / 2`, with a relative error below 4e-7 for every `x`: as `2^x` is its
/// exponential squared, it is `t / (t + 2)` with `t = 2^x - 1`.
#[inline(always)]
pub(crate) fn tanh_half<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    // A minimum loses a NaN where there is no SIMD.
    let (is_number, of) = (simd.equal_f32s(x, x), x);
    // 1 from there on.
    let x = simd.min_f32s(simd.splat_f32s(64.0), x);
    let Parts { slope, fraction, power } = Parts::new(simd, x);
    // Small numbers are not lost beside a 1: where the power is 1, nothing is added to them.
    let growth = simd.mul_f32s(slope, fraction);
    let t = simd.mul_add_e_f32s(power, growth, simd.sub_f32s(power, one));
    simd.select_f32s(is_number, simd.div_f32s(t, simd.add_f32s(t, simd.splat_f32s(2.0))), of)
}

/// `2^x` as `power * (1 + slope * fraction)`.
struct Parts<S: Simd> {
    slope: S::f32s,
    fraction: S::f32s,
    power: S::f32s,
}

impl<S: Simd> Parts<S> {
    #[inline(always)]
    fn new(simd: S, x: S::f32s) -> Self {
        // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits.
        let magic = simd.splat_f32s(12_582_912.0);
        let least = simd.splat_f32s(-127.0);
        let x = match S::IS_SCALAR {
            // A maximum loses a NaN where there is no SIMD.
            true => simd.select_f32s(simd.less_than_f32s(x, least), least, x),
            // In this order a NaN stays a NaN on x86.
            false => simd.max_f32s(least, x),
        };
        let shifted = simd.add_f32s(x, magic);
        let fraction = simd.sub_f32s(x, simd.sub_f32s(shifted, magic));

        // Minimax polynomial of degree 6 for 2^f on [-1/2, 1/2] (Remez, relative error 2e-9 before
        // rounding), without its 1.
        let mut slope = simd.splat_f32s(1.534_581_2e-4);
        for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_6e-2, 2.402_264_6e-1, 6.931_472e-1] {
            slope = simd.mul_add_e_f32s(slope, fraction, simd.splat_f32s(c));
        }

        // The exponent field of 2^n; n = -127 gives zero.
        let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
        let power = simd.transmute_f32s_u32s(simd.add_u32s(n, simd.splat_u32s(127 << 23)));
        Self { slope, fraction, power }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::on_every_arch;
    use super::*;

    struct Each<'a> {
        x: &'a mut [f32],
        tanh: bool,
    }

    impl pulp::WithSimd for Each<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let of = |x| if self.tanh { tanh_half(simd, x) } else { exp2(simd, x) };
            let (head, tail) = S::as_mut_simd_f32s(self.x);
            head.iter_mut().for_each(|x| *x = of(*x));
            let last = of(simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, last);
        }
    }

    fn run(x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        super::super::dispatch(Each { x: &mut y, tanh: false });
        y
    }

    fn run_tanh(x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        super::super::dispatch(Each { x: &mut y, tanh: true });
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
        on_every_arch(|| {
            assert_eq!(run(&x), expected);
            assert!(run(&[f32::NAN])[0].is_nan());
        });
    }

    #[test]
    fn tanh_half_is_accurate_over_its_whole_range() {
        let near = (0..400_000).map(|i| -20.0 + i as f32 / 1e4);
        let small = (0..400).map(|i| 10f32.powf(-f32::from(i as u16) / 10.0));
        let x: Vec<f32> = near.chain(small.flat_map(|x| [x, -x])).collect();
        for found in on_every_arch(|| run_tanh(&x)) {
            for (x, y) in x.iter().zip(found) {
                let exact = (f64::from(*x) * std::f64::consts::LN_2 / 2.0).tanh();
                let error = (f64::from(y) - exact).abs();
                assert!(error <= 4e-7 * exact.abs() + 1e-37, "{x}: {y} {exact}");
            }
        }
    }

    #[test]
    fn tanh_half_is_exact_at_the_ends() {
        let x = [0.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, 70.0, -70.0];
        let expected = [0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0];
        on_every_arch(|| {
            assert_eq!(run_tanh(&x), expected);
            assert!(run_tanh(&[f32::NAN])[0].is_nan());
        });
    }
}
