use cubecl::prelude::*;

/// Copies `len` words.
#[cube(launch_unchecked)]
pub(crate) fn copy(from: &[u32], to: &mut [u32], len: u32) {
    if ABSOLUTE_POS < len as usize {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}
