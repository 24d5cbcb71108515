use cubecl::prelude::*;

/// Copies `len` elements.
#[cube(launch_unchecked)]
pub(crate) fn copy<C: Numeric, N: Size>(from: &[Vector<C, N>], to: &mut [Vector<C, N>], len: u32) {
    if ABSOLUTE_POS < len as usize {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}
