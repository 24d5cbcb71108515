//! What comes after products of whole tiles, where 0 times infinity is no number: results that are none are computed
//! anew, pair by pair as the mask keeps them. They stay so if a pair that is kept makes them so, and where a software
//! driver leaves the loop because it takes too long (Mesa's after 65,535 rounds).

use cubecl::prelude::*;

/// Whether some element is infinite or no number. Of the bits: compilers may take floats to be finite.
#[cube]
pub(crate) fn holds_none<N: Size>(x: Vector<f32, N>) -> bool {
    let mut most = 0u32;
    #[unroll]
    for i in 0..N::value() {
        most = most.max(x.extract(i).to_bits() & 0x7fff_ffff);
    }
    most >= 0x7f80_0000
}

/// Whether one of `count` vectors from `first` on does.
#[cube]
#[allow(clippy::assign_op_pattern)]
pub(crate) fn holds_none_of<N: Size>(
    all: &Array<Vector<f32, N>>,
    #[comptime] first: usize,
    #[comptime] count: usize,
) -> bool {
    let mut found = false;
    #[unroll]
    for c in 0..count {
        found = found | holds_none::<N>(all[comptime!(first + c)]);
    }
    found
}
