//! How a cube of [`super::prefill`] is cut into planes, and what their units tell each other: by the device's
//! plane operations, or by shared memory where matrix units are emulated.

use cubecl::prelude::*;
use half::f16;

use super::words::narrow_f16;

/// Units of a plane.
pub(crate) const PLANE: usize = 32;

/// Rows of a plane, and the side of a matrix that is multiplied at once.
pub(crate) const SIDE: usize = 16;

/// Columns of a row that are moved through a plane's scratch at once.
pub(crate) const CHUNK: usize = 32;

/// Four words of 32 bits: eight halves, or four floats.
pub(crate) type Words = Vector<u32, Const<4>>;

/// What a kernel of fragments is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blocks {
    /// Planes of a cube, each with 16 rows.
    pub(crate) planes: usize,
    /// Keys of a tile.
    pub(crate) keys: usize,
    /// Elements of a key.
    pub(crate) dim: usize,
    /// Whether the device multiplies matrices, or its units do.
    pub(crate) matrix_units: bool,
    /// Whether the device loads matrices from words of 32 bits, or from elements of their own type alone.
    pub(crate) words: bool,
}

impl Blocks {
    pub(crate) const fn rows(&self) -> usize {
        self.planes * SIDE
    }

    pub(crate) const fn units(&self) -> usize {
        self.planes * PLANE
    }

    /// Words of a staged key's row; 16 bytes more than needed spread rows over the banks.
    pub(crate) const fn key_stride(&self) -> usize {
        self.dim / 8 + 1
    }

    /// The same for rows of a plane's scratch.
    pub(crate) const fn scratch_stride(&self) -> usize {
        let columns = if self.keys > CHUNK { self.keys } else { CHUNK };
        columns / 4 + 1
    }

    /// Of all planes' scratch.
    pub(crate) const fn scratch(&self) -> usize {
        self.rows() * self.scratch_stride()
    }

    /// Bytes of shared memory.
    pub(crate) const fn shared_bytes(&self) -> usize {
        16 * (2 * self.keys * self.key_stride() + self.scratch()) + 4 * self.units()
    }
}

/// The number of a unit's plane.
#[cube]
pub(crate) fn plane(#[comptime] blocks: Blocks) -> usize {
    if comptime!(blocks.matrix_units) { PLANE_POS as usize } else { UNIT_POS as usize / PLANE }
}

/// The number of a unit in its plane. Units `2 r` and `2 r + 1` share row `r`.
#[cube]
pub(crate) fn lane(#[comptime] blocks: Blocks) -> usize {
    if comptime!(blocks.matrix_units) { UNIT_POS_PLANE as usize } else { UNIT_POS as usize % PLANE }
}

/// What a plane's units wrote is visible to all of them.
#[cube]
pub(crate) fn sync(#[comptime] blocks: Blocks) {
    if comptime!(blocks.matrix_units) {
        sync_plane();
    } else {
        sync_cube();
    }
}

/// The value of the unit with the same row.
#[cube]
pub(crate) fn partner(value: f32, exchange: &mut Shared<[f32]>, #[comptime] blocks: Blocks) -> f32 {
    if comptime!(blocks.matrix_units) {
        plane_shuffle_xor(value, 1u32)
    } else {
        sync_cube();
        exchange[UNIT_POS as usize] = value;
        sync_cube();
        exchange[(UNIT_POS ^ 1) as usize]
    }
}

/// Whether something holds for a unit of the plane. Emulated planes take every branch, as their cube
/// waits in them.
#[cube]
pub(crate) fn any(holds: bool, #[comptime] blocks: Blocks) -> bool {
    if comptime!(blocks.matrix_units) { plane_any(holds) } else { true.runtime() }
}

/// Two numbers as the halves of a word.
#[cube]
pub(crate) fn pack(low: f32, high: f32, #[comptime] blocks: Blocks) -> u32 {
    if comptime!(blocks.matrix_units) {
        let mut pair = Vector::<f16, Const<2>>::new(f16::cast_from(low));
        pair.insert(1usize, f16::cast_from(high));
        u32::reinterpret(pair)
    } else {
        narrow_f16(low) | (narrow_f16(high) << 16)
    }
}
