//! Few rows of activations: each block of the weights is read once, in its place, for all of them.

use super::activations::Activations;
use super::formats::{Format, GROUP, MOST_GROUPS};
use super::vector::Vector;
use crate::linear::stretches::{SIDE, STRETCH};
use crate::simd::prefetch_near;

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

/// Of each group the step and the least element, or the steps of both halves, of blocks side by side.
type Table = [[f32; 2 * SIDE]; MOST_GROUPS];

#[inline(always)]
unsafe fn scales<V: Vector, F: Format>(blocks: [*const u8; SIDE]) -> Table {
    let mut table = [[0.0; 2 * SIDE]; MOST_GROUPS];
    for (i, block) in blocks.into_iter().enumerate() {
        // SAFETY: promised by the caller.
        let scales = unsafe { F::scales::<V>(block) };
        for (g, pairs) in table.iter_mut().enumerate().take(F::GROUPS) {
            pairs[2 * i] = scales.steps[g][0];
            pairs[2 * i + 1] = if F::HALVES { scales.steps[g][1] } else { scales.least[g] };
        }
    }
    table
}

/// Where the steps of each of [`SIDE`] blocks are, of all elements or of both halves.
#[inline(always)]
unsafe fn places<V: Vector, F: Format>() -> [V::Ints; SIDE] {
    // SAFETY: promised by the caller.
    let mut places = [unsafe { V::zero_ints() }; SIDE];
    for (i, to) in places.iter_mut().enumerate() {
        let mut own = [2 * i as i32; 8];
        if F::HALVES {
            own[4..].fill(2 * i as i32 + 1);
        }
        // SAFETY: 8 integers.
        *to = unsafe { V::ints(own.as_ptr()) };
    }
    places
}

/// [`few`] for `M` rows from `first` on. [`SIDE`] rows of weights go side by side, so that they share what is
/// loaded of the activations, and a vector has the scales of all.
#[inline(always)]
unsafe fn dots<V: Vector, F: Format, const M: usize>(
    x: &Activations,
    first: usize,
    w: &[u8],
    y: &mut [f32],
) {
    let blocks = x.groups / F::GROUPS;
    let row_bytes = blocks * F::BYTES;
    let (count, end) = (w.len() / row_bytes, first + M);
    assert!(x.side == 1 && end * x.groups <= x.steps.len() && F::GROUPS <= 8);
    assert!(x.codes.len() == x.rows * x.groups * 2 * GROUP);
    assert!(F::HALVES || x.sums.len() == x.steps.len());
    assert!(!F::HALVES || x.bias.len() == x.steps.len() * 8);
    let offset = !(F::LEAST || F::HALVES || F::WIDE && V::WIDE_IS_SIGNED);
    // SAFETY: promised by the caller. Where places are constants, a compiler makes two instructions of one.
    let places: [V::Ints; SIDE] = std::hint::black_box(unsafe { places::<V, F>() });
    for j in (0..count).step_by(SIDE) {
        // SAFETY: blocks of rows before `count` and a group of each of `M` rows lie inside their slices, by the
        // assertions above.
        unsafe {
            // What is missing beside the last row is that row again.
            let mut own = [w.as_ptr(); SIDE];
            for (i, own) in own.iter_mut().enumerate() {
                *own = own.add((j + i).min(count - 1) * row_bytes);
            }
            let mut ahead = own[SIDE - 1];
            let mut sums = [[V::pairs(0.0, 0.0); SIDE]; M];
            let mut least = [V::pairs(0.0, 0.0); M];
            for b in 0..blocks {
                prefetch_near(ahead, SIDE * F::BYTES);
                ahead = ahead.wrapping_add(SIDE * F::BYTES);
                let table = scales::<V, F>(own);
                for g in 0..F::GROUPS {
                    let mut codes = [F::codes::<V>(own[0], g); SIDE];
                    for i in 1..SIDE {
                        codes[i] = F::codes::<V>(own[i], g);
                    }
                    let pairs = match F::GROUPS {
                        1 => V::halves(own),
                        _ => V::floats(table.as_ptr().add(g).cast()),
                    };
                    for m in 0..M {
                        let at = (first + m) * x.groups + b * F::GROUPS + g;
                        let bias = match F::HALVES {
                            true => V::ints(x.bias.as_ptr().add(8 * at)),
                            false => V::zero_ints(),
                        };
                        let from = x.codes.as_ptr().add(at * 2 * GROUP).cast::<u8>();
                        let (high, low) = (V::bytes(from), V::bytes(from.add(GROUP)));
                        let step = *x.steps.get_unchecked(at);
                        let sum = if F::HALVES { step } else { *x.sums.get_unchecked(at) };
                        if offset {
                            least[m] = V::plus(least[m], V::mul(pairs, V::pairs(sum, sum)));
                        }
                        let pairs =
                            V::mul(pairs, V::pairs(step, if F::LEAST { sum } else { step }));
                        if F::LEAST {
                            least[m] = V::plus(least[m], pairs);
                        }
                        for i in 0..SIDE {
                            let dots = match F::WIDE {
                                true => {
                                    let dots = V::dot::<true>(V::zero_ints(), codes[i], high);
                                    V::dot::<true>(V::join(dots, bias), codes[i], low)
                                }
                                false => {
                                    let dots = V::dot::<false>(V::zero_ints(), codes[i], high);
                                    V::dot::<false>(V::join(dots, bias), codes[i], low)
                                }
                            };
                            let factor = V::spread(pairs, places[i]);
                            sums[m][i] = V::add(sums[m][i], dots, factor);
                        }
                    }
                }
                for own in &mut own {
                    *own = own.add(F::BYTES);
                }
            }
            for m in 0..M {
                let least = V::lanes(least[m]);
                for i in 0..SIDE.min(count - j) {
                    let least = if F::LEAST { least[2 * i + 1] } else { least[2 * i] };
                    y[m * STRETCH + j + i] = V::total(sums[m][i]) + least;
                }
            }
        }
    }
}
