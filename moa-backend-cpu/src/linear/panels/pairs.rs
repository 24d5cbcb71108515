//! Products of bf16 with bf16, two in one lane, on machines with AVX-512 BF16.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;
use pulp::x86::V4;

use super::{Block, Lanes, Multiply, Product, Side};
use crate::linear::stretches::STRETCH;
use crate::pool::SharedMut;
use crate::simd::outer::LANES;
use crate::simd::{has_bf16_pairs, prefetch};
use crate::workspace::Workspace;
use crate::{Result, Tensor};

/// A machine that multiplies pairs of bf16.
#[derive(Clone, Copy)]
pub(in crate::linear) struct Machine(pub(in crate::linear) V4);

impl Machine {
    /// This one, if it does.
    pub(in crate::linear) fn here() -> Option<Self> {
        if !has_bf16_pairs() {
            return None;
        }
        V4::try_new().map(Self)
    }
}

/// Weights as they are, two summands a step.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    w: &'a [bf16],
    side: Side,
    /// Length of a row of `w`.
    row: usize,
}

impl Lanes for Pairs<'_> {
    #[inline(always)]
    fn steps(&self, col: usize, first: usize, to: &mut [f32]) {
        let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
        let from = &self.w[col * self.row + 2 * first..(col + 1) * self.row];
        let count = to.len().min(from.len());
        to[..count].copy_from_slice(&from[..count]);
        to[count..].fill(bf16::ZERO);
    }

    #[inline(always)]
    fn across(&self, step: usize, cols: Range<usize>, to: &mut [f32]) -> bool {
        if self.side == Side::Forward {
            return false;
        }
        let from = 2 * step * self.row + cols.start;
        let first = &self.w[from..from + cols.len()];
        let to: &mut [u32] = bytemuck::cast_slice_mut(&mut to[..cols.len()]);
        match self.w.get(from + self.row..from + self.row + cols.len()) {
            Some(second) => {
                for ((to, a), b) in to.iter_mut().zip(first).zip(second) {
                    *to = u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16;
                }
            }
            None => to.iter_mut().zip(first).for_each(|(to, a)| *to = a.to_bits().into()),
        }
        true
    }
}

impl Multiply<V4> for Pairs<'_> {
    type Vector = __m512;

    #[inline(always)]
    unsafe fn zero(_simd: V4) -> __m512 {
        // SAFETY: promised by the caller, here and below.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(_simd: V4, from: *const f32) -> __m512 {
        unsafe { _mm512_set1_ps(*from) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn add(_simd: V4, sum: __m512, x: __m512, w: __m512) -> __m512 {
        unsafe {
            let pairs = |x| std::mem::transmute::<__m512, __m512bh>(x);
            _mm512_dpbf16_ps(sum, pairs(x), pairs(w))
        }
    }
}

/// Rows of activations in bf16, each padded with zeros to whole vectors.
pub(in crate::linear) struct Activations {
    data: Tensor,
    machine: Machine,
}

impl Activations {
    /// Rounds `x` `[m, k]`.
    pub(in crate::linear) fn new(machine: Machine, x: &Tensor) -> Result<Self> {
        let k = x.row_len();
        let mut data = Tensor::scratch(&[x.rows(), k.div_ceil(2 * LANES) * LANES])?;
        crate::ops::by_rows(data.data_mut(), k.div_ceil(2 * LANES) * LANES, 2, |first, to| {
            let x = &x.data()[first * k..];
            // SAFETY: the machine is here.
            unsafe { narrow(x, k, bytemuck::cast_slice_mut(to)) };
        });
        Ok(Self { data, machine })
    }

    /// Products with `w` `[k, n]`: rows of gradients.
    pub(in crate::linear) fn product_back(
        &self,
        w: &[bf16],
        n: usize,
        out: &SharedMut<'_, f32>,
    ) -> Result<()> {
        let k = w.len() / n.max(1);
        self.panels(Pairs { w, side: Side::Backward, row: n }, (n, k), out)
    }

    fn panels(
        &self,
        lanes: Pairs<'_>,
        (n, k): (usize, usize),
        out: &SharedMut<'_, f32>,
    ) -> Result<()> {
        let (m, stride, steps) = (self.data.rows(), self.data.row_len(), k.div_ceil(2));
        let product = Product { x: self.data.data(), stride, lanes, n, steps, out };
        product.run(m, m * n * steps, |block| {
            // SAFETY: the machine is here.
            Workspace::with(|workspace| unsafe { run(self.machine.0, block, workspace) })
        })
    }

    /// Products of many rows with `w` `[n, k]`.
    pub(in crate::linear) fn product(
        &self,
        w: &[bf16],
        k: usize,
        out: &SharedMut<'_, f32>,
    ) -> Result<()> {
        let n = w.len() / k.max(1);
        self.panels(Pairs { w, side: Side::Forward, row: k }, (n, k), out)
    }

    /// Products of few rows with `w` `[outputs, k]`, at a stride of [`STRETCH`].
    pub(in crate::linear) fn few(&self, w: &[bf16], k: usize, y: &mut [f32]) {
        // SAFETY: the machine is here.
        unsafe { few(self.data.data(), self.data.rows(), w, k, y) };
    }
}

/// Rounds rows of `k` elements to bf16.
///
/// # Safety
/// Needs AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn narrow(x: &[f32], k: usize, to: &mut [bf16]) {
    let wide = k.div_ceil(2 * LANES) * 2 * LANES;
    for (to, row) in to.chunks_exact_mut(wide).zip(x.chunks_exact(k)) {
        for (i, to) in to.chunks_exact_mut(LANES).enumerate() {
            let rest = k.saturating_sub(i * LANES).min(LANES);
            // SAFETY: masked lanes are not read, and 16 elements are written.
            unsafe {
                let mask = ((1u32 << rest) - 1) as u16;
                let wide = _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(i * LANES));
                let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(wide));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), narrow);
            }
        }
    }
}

/// `y[i][j] = x[i] . w[j]` of `m` rows, `y` at a stride of [`STRETCH`]. Weights are read once for up to 4 rows.
///
/// # Safety
/// Needs AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn few(x: &[f32], m: usize, w: &[bf16], k: usize, y: &mut [f32]) {
    let stride = x.len() / m;
    let mut first = 0;
    macro_rules! rows {
        ($m:literal) => {
            while m - first >= $m {
                let (x, y) = (&x[first * stride..], &mut y[first * STRETCH..]);
                // SAFETY: promised by the caller.
                unsafe { dots::<$m>(x, stride, w, k, y) };
                first += $m;
            }
        };
    }
    rows!(4);
    rows!(2);
    rows!(1);
}

/// Vectors of a row of weights taken together, so that their sums do not wait for each other.
const TOGETHER: usize = 4;

/// [`few`] of `M` rows.
///
/// # Safety
/// Needs AVX-512 BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dots<const M: usize>(x: &[f32], stride: usize, w: &[bf16], k: usize, y: &mut [f32]) {
    assert!(x.len() >= M * stride && stride >= k.div_ceil(2 * LANES) * LANES);
    for (j, w) in w.chunks_exact(k).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); M]; TOGETHER];
        let mut at = 0;
        // SAFETY: whole vectors of both inside their slices, by the assertion and the loops' conditions, and
        // less than one at the end of `w`, whose other lanes are not read.
        unsafe {
            let own = |i: usize, at: usize| {
                let x = x.as_ptr().add(i * stride + at / 2);
                std::mem::transmute::<__m512, __m512bh>(_mm512_loadu_ps(x))
            };
            while k - at >= TOGETHER * 2 * LANES {
                prefetch(w.as_ptr().wrapping_add(at), TOGETHER * 4 * LANES);
                for (u, sums) in sums.iter_mut().enumerate() {
                    let at = at + u * 2 * LANES;
                    let w = _mm512_loadu_si512(w.as_ptr().add(at).cast());
                    let w = std::mem::transmute::<__m512i, __m512bh>(w);
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_dpbf16_ps(*sum, w, own(i, at));
                    }
                }
                at += TOGETHER * 2 * LANES;
            }
            while at < k {
                prefetch(w.as_ptr().wrapping_add(at), 4 * LANES);
                let mask = u32::MAX >> (2 * LANES).saturating_sub(k - at);
                let w = _mm512_maskz_loadu_epi16(mask, w.as_ptr().add(at).cast());
                let w = std::mem::transmute::<__m512i, __m512bh>(w);
                let sums = &mut sums[at / (2 * LANES) % TOGETHER];
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_dpbf16_ps(*sum, w, own(i, at));
                }
                at += 2 * LANES;
            }
        }
        let [a, b, c, d] = sums;
        for i in 0..M {
            let sum = _mm512_add_ps(_mm512_add_ps(a[i], b[i]), _mm512_add_ps(c[i], d[i]));
            y[i * STRETCH + j] = _mm512_reduce_add_ps(sum);
        }
    }
}

/// # Safety
/// Needs AVX-512 BF16.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
unsafe fn run(simd: V4, block: Block<'_, Pairs<'_>>, workspace: &mut Workspace) -> Result<()> {
    // SAFETY: promised by the caller.
    unsafe { block.compute(simd, workspace) }
}
