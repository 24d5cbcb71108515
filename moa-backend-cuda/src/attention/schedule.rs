use std::ops::Range;

use moa_core::HeadLayout;

use crate::kernels::tables::Geometry;

/// Fewest keys per partial result of the split kernel, counted over the keys that the new tokens see.
pub(crate) const MIN_SPLIT_KEYS: usize = 512;

/// The same of narrow heads.
pub(crate) const MIN_NARROW_SPLIT_KEYS: usize = 1024;

/// Most partial results of a head: longer heads have larger splits.
pub(crate) const MAX_SPLITS: usize = 32;

/// Keys per partial result of a head that sees `keys`. Depends on nothing else, so that the rounding
/// of a sequence's result never depends on the batch.
fn split_keys(keys: usize, least: usize) -> usize {
    keys.div_ceil(MAX_SPLITS * 64).saturating_mul(64).max(least)
}

/// Most rows (new tokens x query heads per KV head) that the split kernel takes: one matrix fragment.
pub(crate) const SPLIT_ROWS: usize = 16;

/// Most rows of the kernel of narrow heads for few rows.
const NARROW_ROWS: usize = 8;

/// Most rows that are left to the smaller tile where the larger one would be half empty.
const TILE_ROWS_MAX: usize = 64;

/// Most blocks that share the keys of a warp-group tile, and fewest steps of [`STEP_KEYS`] keys that are
/// worth one.
const MAX_PARTS: usize = 16;
const MIN_PART_STEPS: usize = 8;
const STEP_KEYS: usize = 128;

/// Which kernel computes a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Path {
    /// All rows of a KV head over one split of its keys, merged by the last block of the head.
    Split,
    /// A tile of a KV head's rows over all their keys.
    Tile,
    /// The same with warp-group matrix instructions.
    Wgmma,
    /// As `Split`, over narrow heads, of at most 8 rows.
    Narrow8,
    /// Of more rows.
    Narrow16,
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

    /// Of narrow heads whose codes are read as they are.
    fn of_codes(tokens: usize, dims: &Dims) -> Self {
        match dims.rows(tokens) <= NARROW_ROWS {
            true => Self::Narrow8,
            false => Self::Narrow16,
        }
    }

    /// Whether heads are cut into splits of their keys.
    fn splits(self) -> bool {
        matches!(self, Self::Split | Self::Narrow8 | Self::Narrow16)
    }

    fn least_keys(self) -> usize {
        match self {
            Self::Narrow8 | Self::Narrow16 => MIN_NARROW_SPLIT_KEYS,
            _ => MIN_SPLIT_KEYS,
        }
    }

    /// Rows per block.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            Self::Split | Self::Narrow8 | Self::Narrow16 => SPLIT_ROWS,
            Self::Tile => 64,
            Self::Wgmma => 128,
        }
    }
}

/// What all sequences of a batch share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// What becomes of a sequence's narrow heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Narrow {
    /// There are none.
    None,
    /// Attention reads their codes, which hold the new tokens already.
    Codes,
    /// Attention reads copies in 16 bits of what the new tokens see.
    Copies,
}

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) geometry: &'a Geometry,
    pub(crate) len: usize,
    pub(crate) tokens: usize,
    /// Whether the schedule is replayed while the sequence grows: then it must cover every length.
    pub(crate) grows: bool,
    /// Whether it only keeps a place for a sequence, and has no work.
    pub(crate) is_vacant: bool,
}

impl Entry<'_> {
    pub(crate) fn narrow(&self, dims: &Dims) -> Narrow {
        if self.geometry.narrow.is_empty() {
            Narrow::None
        } else if Path::of(self.tokens, dims) == Path::Split && self.commits_first() {
            Narrow::Codes
        } else {
            Narrow::Copies
        }
    }

    /// Slots of a head's copy: its sink, and a ring for all keys that new tokens see.
    pub(crate) fn copy_slots(&self, head: &HeadLayout) -> [usize; 2] {
        let end = match self.grows {
            true => self.geometry.layout.capacity(),
            false => self.len + self.tokens,
        };
        let sink = head.sink_slots().min(end);
        [sink, head.span().window().saturating_add(self.tokens - 1).min(end - sink)]
    }

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

    fn splits(&self, head: &HeadLayout, path: Path) -> usize {
        let (keys, least) = (self.keys(head), path.least_keys());
        match self.grows {
            // A shorter head may have more, smaller splits than the longest one.
            true => keys.div_ceil(least).min(MAX_SPLITS),
            false => keys.div_ceil(split_keys(keys, least)),
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
    /// Of these heads of the sequence.
    fn new(entry: &Entry<'_>, heads: &[i32], path: Path, dims: &Dims) -> Self {
        let tiles = dims.rows(entry.tokens).div_ceil(path.tile_rows());
        if path != Path::Wgmma {
            return Self { tiles, limit: None };
        }
        let layout = &entry.geometry.layout;
        let steps = |&head: &i32| Self::steps(entry, layout.head(head as usize), dims);
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
    /// Whether tiles are shared between blocks, which leave partial results then.
    pub(crate) shared: bool,
    /// Places in [`Schedule::order`].
    pub(crate) places: Range<usize>,
    /// Of the split kernels, in [`Cut::items`].
    pub(crate) items: Range<usize>,
    /// Items of the split kernels, tiles of the others.
    pub(crate) blocks: usize,
}

/// How some heads of sequences are cut.
#[derive(Debug, Default)]
pub(crate) struct Cut {
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

/// Neighbouring sequences whose narrow heads are copied together, so that their copies do not take too much memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) places: Range<usize>,
    /// In [`Cut::launches`] of the copies.
    pub(crate) launches: Range<usize>,
    /// Slots of the copies.
    pub(crate) slots: usize,
    /// Most cached keys of a head that are copied.
    pub(crate) max_keys: usize,
}

/// Most slots of copies of several sequences: 256 MiB of heads of 128 elements.
const GROUP_SLOTS: usize = 1 << 19;

/// Most owners (sequence and KV head) of a group: rows of a grid.
const GROUP_OWNERS: usize = u16::MAX as usize;

/// How a batch is cut. Buffers are kept from one call to the next.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// The caller's sequence at each place of the tables.
    pub(crate) order: Vec<usize>,
    /// What becomes of the narrow heads of the sequence at each place.
    pub(crate) narrow: Vec<Narrow>,
    /// Sequences whose new tokens are written before attention; they come first.
    pub(crate) committed: usize,
    /// Of heads as they lie in the caches.
    pub(crate) cut: Cut,
    /// Of copies of narrow heads.
    pub(crate) copies: Cut,
    pub(crate) groups: Vec<Group>,
}

/// Runs of equal keys among some places.
fn runs<'k, K: PartialEq>(
    places: Range<usize>,
    key: impl Fn(usize) -> K + 'k,
) -> impl Iterator<Item = Range<usize>> + 'k {
    let mut next = places.start;
    std::iter::from_fn(move || {
        let first = next;
        if first >= places.end {
            return None;
        }
        let own = key(first);
        next = (first..places.end).find(|&place| key(place) != own).unwrap_or(places.end);
        Some(first..next)
    })
}

impl Schedule {
    /// Launches of attention.
    pub(crate) fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.cut.launches.iter().chain(&self.copies.launches)
    }

    /// Places of sequences with narrow heads of a kind, among some places: they are neighbours.
    pub(crate) fn places(&self, of: Narrow, among: Range<usize>) -> Range<usize> {
        let first = self.narrow[among.clone()].partition_point(|own| *own < of);
        let end = self.narrow[among.clone()].partition_point(|own| *own <= of);
        among.start + first..among.start + end
    }

    /// Cuts a batch. What a sequence's result is summed from, and in which order, depends on
    /// nothing but that sequence.
    pub(crate) fn fill(&mut self, dims: &Dims, entries: &[Entry<'_>]) {
        let path = |index: usize| Path::of(entries[index].tokens, dims);
        let shared = |index: usize, heads: &[i32]| {
            Tiles::new(&entries[index], heads, path(index), dims).limit.is_some()
        };
        let of_plain = |index: usize| (path(index), shared(index, &entries[index].geometry.plain));
        let of_copies =
            |index: usize| (path(index), shared(index, &entries[index].geometry.narrow));
        self.order.clear();
        self.order.extend(0..entries.len());
        self.order.sort_by_cached_key(|&index| {
            let entry = &entries[index];
            let narrow = entry.narrow(dims);
            let codes = Path::of_codes(entry.tokens, dims);
            let own = (!entry.commits_first(), narrow, of_plain(index));
            (own, narrow == Narrow::Codes && codes == Path::Narrow16, of_copies(index))
        });
        let Self { order, narrow, committed, cut, copies, groups } = self;
        narrow.clear();
        narrow.extend(order.iter().map(|&index| entries[index].narrow(dims)));
        *committed = order.iter().take_while(|&&index| entries[index].commits_first()).count();

        let ordered: Vec<Entry<'_>> = order.iter().map(|&index| entries[index]).collect();
        for cut in [&mut *cut, &mut *copies] {
            cut.reset(ordered.len(), dims.kv_heads);
        }
        for part in [0..*committed, *committed..ordered.len()] {
            let way = |place: usize| of_plain(order[place]);
            for places in runs(part.clone(), way) {
                let (path, shared) = way(places.start);
                cut.push(path, shared, places, &ordered, |own| &own.plain, dims);
            }
            let codes = |place: usize| {
                let own = Path::of_codes(ordered[place].tokens, dims);
                (narrow[place] == Narrow::Codes).then_some(own)
            };
            for places in runs(part, codes) {
                if let Some(path) = codes(places.start) {
                    cut.push(path, false, places, &ordered, |own| &own.narrow, dims);
                }
            }
        }

        groups.clear();
        let slots = |place: usize| -> usize {
            let entry = &ordered[place];
            if entry.is_vacant {
                return 0;
            }
            let heads = entry.geometry.narrow.iter();
            let slots =
                heads.map(|&head| entry.copy_slots(entry.geometry.layout.head(head as usize)));
            slots.map(|[sink, ring]| sink + ring).sum()
        };
        for part in [0..*committed, *committed..ordered.len()] {
            for places in runs(part, |place| narrow[place] == Narrow::Copies) {
                if narrow[places.start] != Narrow::Copies {
                    continue;
                }
                let mut next = places.start;
                while next < places.end {
                    let (first, mut all) = (next, slots(next));
                    next += 1;
                    let owners = |end: usize| (end - first) * dims.kv_heads;
                    while next < places.end
                        && all.saturating_add(slots(next)) <= GROUP_SLOTS
                        && owners(next + 1) <= GROUP_OWNERS
                    {
                        all += slots(next);
                        next += 1;
                    }
                    let start = copies.launches.len();
                    let way = |place: usize| of_copies(order[place]);
                    for places in runs(first..next, way) {
                        let (path, shared) = way(places.start);
                        copies.push(path, shared, places, &ordered, |own| &own.narrow, dims);
                    }
                    let cached = |entry: &Entry<'_>| {
                        let heads = entry.geometry.narrow.iter();
                        let keys = heads.map(|&head| entry.geometry.layout.head(head as usize));
                        keys.map(|head| entry.keys(head).saturating_sub(entry.tokens)).max()
                    };
                    groups.push(Group {
                        places: first..next,
                        launches: start..copies.launches.len(),
                        slots: all,
                        max_keys: ordered[first..next].iter().filter_map(cached).max().unwrap_or(0),
                    });
                }
            }
        }
    }
}

impl Cut {
    /// Adds items without work to the launches of split kernels, each of which then has as many as `room` says for
    /// so many of the launch of this number; `false` where that is fewer.
    pub(crate) fn fill_up(&mut self, room: impl Fn(usize, usize) -> usize) -> bool {
        let mut items = Vec::new();
        for (number, launch) in self.launches.iter_mut().enumerate() {
            if !launch.path.splits() {
                continue;
            }
            let (first, own) = (items.len(), &self.items[launch.items.clone()]);
            let room = room(number, own.len());
            if room < own.len() {
                return false;
            }
            items.extend_from_slice(own);
            // No head has a split after the last one that there may be: its block leaves at once.
            items.resize(first + room, [0, MAX_SPLITS as i32]);
            launch.items = first..items.len();
            launch.blocks = room;
        }
        self.items = items;
        true
    }

    fn reset(&mut self, places: usize, kv_heads: usize) {
        let Self { launches, first_items, items, splits, heads } = self;
        items.clear();
        launches.clear();
        first_items.clear();
        first_items.resize(places, 0);
        splits.clear();
        splits.resize(places * kv_heads, [0; 2]);
        heads.clear();
        heads.resize(places * kv_heads, [0, 1]);
    }

    /// One more launch, for these heads of the sequences at `places`; none if there are no such heads.
    fn push(
        &mut self,
        path: Path,
        shared: bool,
        places: Range<usize>,
        ordered: &[Entry<'_>],
        heads_of: fn(&Geometry) -> &[i32],
        dims: &Dims,
    ) {
        let start = places.start;
        let items = self.items.len()..self.items.len();
        let mut launch = Launch { path, shared, places, items, blocks: 0 };
        if path.splits() {
            // Widest heads of all sequences first.
            for rank in 0..dims.kv_heads {
                for place in launch.places.clone() {
                    let entry = &ordered[place];
                    let Some(&head) = heads_of(entry.geometry).get(rank) else { continue };
                    if entry.is_vacant {
                        continue;
                    }
                    let head = head as usize;
                    let count = entry.splits(entry.geometry.layout.head(head), path);
                    let owner = (place - start) * dims.kv_heads + head;
                    self.splits[place * dims.kv_heads + head] =
                        [(self.items.len() - launch.items.start) as i32, count as i32];
                    self.items.extend((0..count as i32).map(|split| [owner as i32, split]));
                }
            }
            launch.items.end = self.items.len();
            launch.blocks = launch.items.len();
        } else {
            for place in launch.places.clone() {
                self.first_items[place] = launch.blocks;
                let entry = &ordered[place];
                if entry.is_vacant {
                    continue;
                }
                let own = heads_of(entry.geometry);
                let tiles = Tiles::new(entry, own, path, dims);
                for (rank, &head) in own.iter().enumerate() {
                    let layout = entry.geometry.layout.head(head as usize);
                    let parts = tiles.parts(entry, layout, dims);
                    self.heads[place * dims.kv_heads + rank] = [head, parts as i32];
                    launch.blocks += tiles.tiles * parts;
                }
            }
        }
        if launch.blocks > 0 {
            self.launches.push(launch);
        }
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
