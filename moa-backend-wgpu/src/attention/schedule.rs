use crate::kernels::blocks::Blocks;
use crate::kernels::keys::{Head, keys, split_keys};
use crate::kernels::tile::Tile;
use crate::{Device, Error, Result};

/// Most rows (new tokens x query heads per KV head) whose keys are split over cubes.
const SPLIT_ROWS: usize = 16;

/// How a head's row is read: in vectors of `width` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) width: usize,
    pub(crate) vectors: usize,
}

impl Row {
    pub(crate) fn of(head_dim: usize) -> Self {
        let width = [4, 2].into_iter().find(|&w| head_dim.is_multiple_of(w)).unwrap_or(1);
        Self { width, vectors: head_dim / width }
    }
}

/// What the device allows a cube.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) shared_bytes: usize,
    pub(crate) units: usize,
    /// Cubes along one axis.
    pub(crate) cubes: u32,
    /// Buffers of a kernel.
    pub(crate) bindings: usize,
}

impl Limits {
    pub(crate) fn of(device: &Device) -> Self {
        let hardware = &device.client().properties().hardware;
        let (x, y, z) = hardware.max_cube_count;
        Self {
            shared_bytes: hardware.max_shared_memory_size,
            units: hardware.max_units_per_cube as usize,
            cubes: x.min(y).min(z),
            bindings: hardware.max_bindings as usize,
        }
    }
}

/// How one sequence's attention is cut. Depends on the sequence and the device alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) tile: Tile,
    /// Where matrix units multiply, in place of the tile.
    pub(crate) blocks: Option<Blocks>,
    /// Tiles of rows of a KV head.
    pub(crate) tiles: u32,
    /// Most splits of a head.
    pub(crate) splits: u32,
}

impl Cut {
    /// # Errors
    /// [`Error::Argument`] if there are too many tokens for one call.
    pub(crate) fn new(
        limits: &Limits,
        heads: &[Head],
        len: usize,
        tokens: usize,
        query_heads: usize,
        row: Row,
        blocks: Option<Blocks>,
    ) -> Result<Self> {
        let rows = tokens * (query_heads / heads.len());
        let tile = tile(limits, rows, row.width);
        let blocks = blocks.filter(|_| rows > SPLIT_ROWS);
        let cube_rows = blocks.map_or(tile.rows(), |blocks| blocks.rows());
        let tiles = rows.div_ceil(cube_rows);
        let (from, to) = (len as u32, (len + tokens) as u32);
        let splits = |head: &Head| {
            let count = keys(head, from, to).count;
            count.div_ceil(split_keys(count))
        };
        let splits = match rows <= SPLIT_ROWS {
            true => heads.iter().map(splits).max().unwrap_or(1),
            false => 1,
        };
        match u32::try_from(tiles) {
            Ok(tiles) if tiles <= limits.cubes => Ok(Self { tile, blocks, tiles, splits }),
            _ => {
                let expected = limits.cubes as usize * cube_rows * heads.len() / query_heads;
                let expected = format_args!("at most {expected} at once").to_string();
                Err(Error::argument("extend", "tokens", expected, tokens))
            }
        }
    }
}

const SMALL: Tile = Tile { unit_rows: 4, units_y: 8, unit_keys: 4, units_x: 8, depth: 4 };
const LARGE: Tile = Tile { unit_rows: 4, units_y: 16, unit_keys: 4, units_x: 16, depth: 4 };

/// Few rows share their keys' way through the cube; many rows reuse them.
fn tile(limits: &Limits, rows: usize, width: usize) -> Tile {
    if rows <= SPLIT_ROWS {
        // Few sizes, as each is a kernel to compile, and few rows a unit, as those are unrolled.
        let (unit_rows, units_y) = match rows {
            1 => (1, 1),
            2..=4 => (4, 1),
            5..=8 => (4, 2),
            _ => (4, 4),
        };
        return Tile { unit_rows, units_y, unit_keys: 2, units_x: 32, depth: 8 };
    }
    square(limits, rows, width)
}

/// A square tile for `rows` rows and as many keys.
pub(crate) fn square(limits: &Limits, rows: usize, width: usize) -> Tile {
    let fits = LARGE.shared_bytes(width) <= limits.shared_bytes && LARGE.units() <= limits.units;
    if fits && rows > SMALL.rows() { LARGE } else { SMALL }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
