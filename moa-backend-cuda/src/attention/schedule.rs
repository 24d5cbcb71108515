use std::ops::Range;

use moa_core::HeadLayout;

use crate::kernels::tables::Geometry;

/// Fewest keys per partial result of the split kernel, counted over the keys that the new tokens see.
pub(crate) const MIN_SPLIT_KEYS: usize = 512;

/// Most partial results of a head: longer heads have larger splits.
pub(crate) const MAX_SPLITS: usize = 32;

/// Keys per partial result of a head that sees `keys`. Depends on nothing else, so that the rounding
/// of a sequence's result never depends on the batch.
fn split_keys(keys: usize) -> usize {
    keys.div_ceil(MAX_SPLITS * 64).saturating_mul(64).max(MIN_SPLIT_KEYS)
}

/// Most rows (new tokens x query heads per KV head) that the split kernel takes: one matrix fragment.
pub(crate) const SPLIT_ROWS: usize = 16;

/// Most rows that are left to the smaller tile where the larger one would be half empty.
const TILE_ROWS_MAX: usize = 64;

/// Most blocks that share the keys of a warp-group tile, and fewest steps of [`STEP_KEYS`] keys that are
/// worth one.
const MAX_PARTS: usize = 16;
const MIN_PART_STEPS: usize = 8;
const STEP_KEYS: usize = 128;

/// Which kernel computes a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// All rows of a KV head over one split of its keys, merged by the last block of the head.
    Split,
    /// A tile of a KV head's rows over all their keys.
    Tile,
    /// The same with warp-group matrix instructions.
    Wgmma,
}

impl Path {
    /// Depends on the sequence alone.
    pub(crate) fn of(tokens: usize, dims: &Dims) -> Self {
        let rows = dims.rows(tokens);
        if rows <= SPLIT_ROWS {
            Self::Split
        } else if dims.wgmma && rows > TILE_ROWS_MAX {
            Self::Wgmma
        } else {
            Self::Tile
        }
    }

    /// Rows per block.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            Self::Split => SPLIT_ROWS,
            Self::Tile => 64,
            Self::Wgmma => 128,
        }
    }
}

/// What all sequences of a batch share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    /// Whether the device and the head dimension have the warp-group kernel.
    pub(crate) wgmma: bool,
    pub(crate) multiprocessors: usize,
}

impl Dims {
    /// Rows of a KV head: (token, query head of its group) pairs.
    fn rows(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.query_heads / self.kv_heads)
    }
}

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) geometry: &'a Geometry,
    pub(crate) len: usize,
    pub(crate) tokens: usize,
    /// Whether the schedule is replayed while the sequence grows: then it must cover every length.
    pub(crate) grows: bool,
}

impl Entry<'_> {
    /// Whether the new tokens may be written before they are attended to: if none of them takes the
    /// slot of a key that another one still sees.
    pub(crate) fn commits_first(&self) -> bool {
        let layout = &self.geometry.layout;
        layout.heads().iter().all(|head| {
            head.slots() == layout.capacity()
                || self.tokens - 1 + head.span().window() <= head.ring_slots()
        })
    }

    /// Keys of one head that some new token sees.
    pub(crate) fn keys(&self, head: &HeadLayout) -> usize {
        let span = head.span();
        if self.grows {
            let most = span.total().saturating_add(self.tokens - 1);
            return most.min(self.geometry.layout.capacity());
        }
        let new = self.len..self.len + self.tokens;
        span.visible_to(new).iter().map(Range::len).sum()
    }

    fn splits(&self, head: &HeadLayout) -> usize {
        let keys = self.keys(head);
        match self.grows {
            // A shorter head may have more, smaller splits than the longest one.
            true => keys.div_ceil(MIN_SPLIT_KEYS).min(MAX_SPLITS),
            false => keys.div_ceil(split_keys(keys)),
        }
    }
}

/// How the tiles of one sequence are cut.
struct Tiles {
    /// Of each KV head.
    tiles: usize,
    /// Steps that one block may take; a tile that takes more is shared. `None`: none is.
    limit: Option<usize>,
}

impl Tiles {
    fn new(entry: &Entry<'_>, path: Path, dims: &Dims) -> Self {
        let tiles = dims.rows(entry.tokens).div_ceil(path.tile_rows());
        if path != Path::Wgmma {
            return Self { tiles, limit: None };
        }
        let steps = |head| Self::steps(entry, head, dims);
        let heads = entry.geometry.layout.heads();
        let all: usize = heads.iter().map(|head| tiles * steps(head)).sum();
        let longest = heads.iter().map(steps).max().unwrap_or(0);
        // Sharing costs partial results and a merge, and needs idle multiprocessors to pay: with one
        // tile for each at most, the longest decides how long all take.
        let idle = tiles * heads.len() <= dims.multiprocessors
            && 4 * longest * dims.multiprocessors > 5 * all;
        if !idle {
            return Self { tiles, limit: None };
        }
        // Two thirds of an even share: parts of unequal length still pack well.
        let limit = (2 * all).div_ceil(3 * dims.multiprocessors).max(MIN_PART_STEPS);
        let shared = longest > limit;
        Self { tiles, limit: shared.then_some(limit) }
    }

    /// Steps of the head's longest tile.
    fn steps(entry: &Entry<'_>, head: &HeadLayout, dims: &Dims) -> usize {
        let tokens = Path::Wgmma.tile_rows().div_ceil(dims.query_heads / dims.kv_heads) + 1;
        let last = Entry {
            len: entry.len + entry.tokens.saturating_sub(tokens),
            tokens: tokens.min(entry.tokens),
            ..*entry
        };
        last.keys(head).div_ceil(STEP_KEYS)
    }

    /// Blocks that share each tile of a head.
    fn parts(&self, entry: &Entry<'_>, head: &HeadLayout, dims: &Dims) -> usize {
        let parts = |limit| Self::steps(entry, head, dims).div_ceil(limit).clamp(1, MAX_PARTS);
        self.limit.map_or(1, parts)
    }
}

/// Consecutive sequences that take the same way, one launch of an attention kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) path: Path,
    pub(crate) committed: bool,
    /// Whether tiles are shared between blocks, which leave partial results then.
    pub(crate) shared: bool,
    /// Places in [`Schedule::order`].
    pub(crate) places: Range<usize>,
    /// Of the split kernel, in [`Schedule::items`].
    pub(crate) items: Range<usize>,
    /// Items of the split kernel, tiles of the others.
    pub(crate) blocks: usize,
}

/// How a batch is cut. Buffers are kept from one call to the next.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// The caller's sequence at each place of the tables.
    pub(crate) order: Vec<usize>,
    pub(crate) launches: Vec<Launch>,
    /// Of the tile kernels: work items of the sequences before it in its launch, by place.
    pub(crate) first_items: Vec<usize>,
    /// (place in its launch * kv_heads + KV head, split)
    pub(crate) items: Vec<[i32; 2]>,
    /// (first item in its launch, number of splits), `[places, kv_heads]`.
    pub(crate) splits: Vec<[i32; 2]>,
    /// Of the tile kernels: (KV head, blocks that share each of its tiles) in the order in which to
    /// start them, `[places, kv_heads]`.
    pub(crate) heads: Vec<[i32; 2]>,
}

impl Schedule {
    /// Sequences whose new tokens are written before attention; they come first.
    pub(crate) fn committed(&self) -> usize {
        self.launches.iter().filter(|l| l.committed).map(|l| l.places.end).max().unwrap_or(0)
    }

    /// Cuts a batch. What a sequence's result is summed from, and in which order, depends on
    /// nothing but that sequence.
    pub(crate) fn fill(&mut self, dims: &Dims, entries: &[Entry<'_>]) {
        let Self { order, launches, first_items, items, splits, heads } = self;
        items.clear();
        launches.clear();
        first_items.clear();
        first_items.resize(entries.len(), 0);
        splits.clear();
        splits.resize(entries.len() * dims.kv_heads, [0; 2]);
        heads.clear();
        heads.resize(entries.len() * dims.kv_heads, [0, 1]);
        order.clear();
        order.extend(0..entries.len());
        let way = |&index: &usize| {
            let entry = &entries[index];
            let path = Path::of(entry.tokens, dims);
            let shared = Tiles::new(entry, path, dims).limit.is_some();
            (!entry.commits_first(), path as usize, shared)
        };
        order.sort_by_cached_key(way);

        let mut end = 0;
        while let Some(&first) = order.get(end) {
            let start = end;
            let (written_after, _, shared) = way(&first);
            let path = Path::of(entries[first].tokens, dims);
            let same = order[start..].iter().take_while(|index| way(index) == way(&first));
            end += same.count();
            let mut launch = Launch {
                path,
                committed: !written_after,
                shared,
                places: start..end,
                items: items.len()..items.len(),
                blocks: 0,
            };
            if path == Path::Split {
                // Widest heads of all sequences first.
                for rank in 0..dims.kv_heads {
                    for place in start..end {
                        let entry = &entries[order[place]];
                        let head = entry.geometry.widest_first[rank] as usize;
                        let count = entry.splits(entry.geometry.layout.head(head));
                        let owner = (place - start) * dims.kv_heads + head;
                        splits[place * dims.kv_heads + head] =
                            [(items.len() - launch.items.start) as i32, count as i32];
                        items.extend((0..count as i32).map(|split| [owner as i32, split]));
                    }
                }
                launch.items.end = items.len();
                launch.blocks = launch.items.len();
            } else {
                for place in start..end {
                    first_items[place] = launch.blocks;
                    let entry = &entries[order[place]];
                    let tiles = Tiles::new(entry, path, dims);
                    for (rank, &head) in entry.geometry.widest_first.iter().enumerate() {
                        let layout = entry.geometry.layout.head(head as usize);
                        let parts = tiles.parts(entry, layout, dims);
                        heads[place * dims.kv_heads + rank] = [head, parts as i32];
                        launch.blocks += tiles.tiles * parts;
                    }
                }
            }
            launches.push(launch);
        }
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
