//! Few rows: each block is read once, in its place, for all of them.

use super::activations::Activations;
use super::formats::{Format, GROUP};
use super::vector::Vector;
use crate::linear::stretches::STRETCH;
use crate::simd::prefetch;

/// `y[i][j] = x[i] . w[j]` for all rows of `x`, which stand alone; `y` at a stride of [`STRETCH`].
///
/// # Safety
/// Needs the machine of `V`; `w` must be whole rows of `x.groups` groups.
#[inline(always)]
pub(super) unsafe fn few<V: Vector, F: Format>(x: &Activations, w: &[u8], y: &mut [f32]) {
    let mut first = 0;
    macro_rules! rows {
        ($m:literal) => {
            while x.rows - first >= $m {
                // SAFETY: promised by the caller.
                unsafe { dots::<V, F, $m>(x, first, w, &mut y[first * STRETCH..]) };
                first += $m;
            }
        };
    }
    rows!(4);
    rows!(2);
    rows!(1);
}

/// [`few`] for `M` rows from `first` on.
#[inline(always)]
unsafe fn dots<V: Vector, F: Format, const M: usize>(
    x: &Activations,
    first: usize,
    w: &[u8],
    y: &mut [f32],
) {
    let blocks = x.groups / F::GROUPS;
    let end = first + M;
    assert!(x.side == 1 && end * x.groups <= x.steps.len() && F::GROUPS <= 8);
    assert!(x.codes.len() == x.rows * x.groups * 2 * GROUP);
    assert!(!F::LEAST || x.sums.len() == x.steps.len());
    assert!(F::LEAST || x.bias.len() == x.steps.len() * 8);
    let biased = !(F::LEAST || F::WIDE && V::WIDE_IS_SIGNED);
    for (j, row) in w.chunks_exact(blocks * F::BYTES).enumerate() {
        // SAFETY: a block of each row and a group of each of `M` rows lie inside their slices, by the
        // assertions above.
        unsafe {
            let mut sums = [V::pair(0.0, 0.0); M];
            let mut least = [0.0f32; M];
            for b in 0..blocks {
                let block = row.as_ptr().add(b * F::BYTES);
                prefetch(block, F::BYTES);
                let scales = F::scales::<V>(block);
                for g in 0..F::GROUPS {
                    let codes = F::codes::<V>(block, g);
                    let [first_half, second_half] = scales.steps[g];
                    for m in 0..M {
                        let at = (first + m) * x.groups + b * F::GROUPS + g;
                        let bias = match biased {
                            true => V::ints(x.bias.as_ptr().add(8 * at)),
                            false => V::zero_ints(),
                        };
                        let own = x.codes.as_ptr().add(at * 2 * GROUP).cast::<u8>();
                        let (high, low) = (V::bytes(own), V::bytes(own.add(GROUP)));
                        let dots = match F::WIDE {
                            true => V::join(
                                V::dot::<true>(V::zero_ints(), codes, high),
                                V::dot::<true>(bias, codes, low),
                            ),
                            false => V::join(
                                V::dot::<false>(V::zero_ints(), codes, high),
                                V::dot::<false>(bias, codes, low),
                            ),
                        };
                        let step = *x.steps.get_unchecked(at);
                        let second_half = if F::HALVES { second_half } else { first_half };
                        let steps = V::pair(first_half * step, second_half * step);
                        sums[m] = V::add(sums[m], dots, steps);
                        if F::LEAST {
                            least[m] += scales.least[g] * *x.sums.get_unchecked(at);
                        }
                    }
                }
            }
            for m in 0..M {
                y[m * STRETCH + j] = V::total(sums[m]) + least[m];
            }
        }
    }
}
