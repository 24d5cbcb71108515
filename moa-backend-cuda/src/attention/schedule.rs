use std::ops::Range;

use moa_core::HeadLayout;

use crate::kernels::tables::{Geometry, Merge, Piece};

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

/// Most blocks of a gang, which take neighbouring tiles of a head at a time.
const MAX_GANG: usize = 4;

/// Most tiles for each multiprocessor that are divided among gangs beforehand.
const MAX_WAVES: usize = 4;

/// Keys of a step of the warp-group kernel.
const STEP_KEYS: usize = 128;

/// Fewest steps of a tile that are worth a gang's while: more than the tiles of a gang differ by.
const MIN_PIECE_STEPS: usize = 4;

/// Most pieces of a tile: lanes that merge them.
const MAX_PIECES: usize = 32;

/// What a piece takes beside its steps, and what merging takes, in steps.
const PIECE_STEPS: usize = 4;
const MERGE_STEPS: usize = 4;

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
    /// Whether its tiles may be divided among gangs of blocks.
    pub(crate) gangs: bool,
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

/// How the tiles of some heads of a sequence are divided among gangs of blocks.
#[derive(Debug)]
struct Shares {
    /// Blocks of a gang.
    gang: usize,
    /// What each gang that has something to do does, one piece after the other.
    lists: Vec<List>,
    merges: Vec<Merge>,
    /// Partial results.
    partials: usize,
}

#[derive(Clone, Debug, Default)]
struct List {
    pieces: Vec<Piece>,
    /// In steps.
    cost: usize,
}

/// Tiles that a gang takes at a time.
#[derive(Clone, Copy)]
struct Work {
    head: u16,
    first_tile: u16,
    /// Of the longest tile.
    steps: usize,
}

impl Work {
    /// These steps of it.
    fn piece(&self, steps: Range<usize>, partial: i32) -> Piece {
        Piece {
            sequence: 0,
            kv_head: self.head,
            first_tile: self.first_tile,
            first_step: steps.start as u16,
            // Other tiles of the gang may have a few steps less.
            end_step: if steps.end == self.steps { u16::MAX } else { steps.end as u16 },
            partial,
        }
    }
}

impl List {
    fn push(&mut self, piece: Piece, steps: usize) {
        self.pieces.push(piece);
        self.cost += steps + PIECE_STEPS;
    }
}

/// The list with the least to do.
fn shortest(lists: &mut [List]) -> Option<&mut List> {
    lists.iter_mut().min_by_key(|list| list.cost)
}

impl Shares {
    /// Where it is likely to take less time than blocks that take tiles in turn: where there are few tiles.
    fn new(entry: &Entry<'_>, heads: &[i32], dims: &Dims) -> Option<Self> {
        if Path::of(entry.tokens, dims) != Path::Wgmma || entry.grows || !dims.gangs {
            return None;
        }
        let tiles = dims.rows(entry.tokens).div_ceil(Path::Wgmma.tile_rows());
        if tiles * heads.len() > MAX_WAVES * dims.multiprocessors {
            return None;
        }
        let gang = tiles.div_ceil(tiles.div_ceil(MAX_GANG)).min(dims.multiprocessors);
        let mut works: Vec<Work> = heads
            .iter()
            .flat_map(|&head| (0..tiles).step_by(gang).map(move |first| (head, first)))
            .map(|(head, first)| Work {
                head: head as u16,
                first_tile: first as u16,
                steps: steps(entry, head as usize, first..tiles.min(first + gang), dims),
            })
            .collect();
        works.sort_by_key(|work| std::cmp::Reverse(work.steps));
        let longest = works.first()?.steps;
        if longest >= usize::from(u16::MAX) {
            return None;
        }
        let gangs = dims.multiprocessors / gang;
        let whole = Self::whole(&works, gang, gangs);
        let all: usize = works.iter().map(|work| work.steps + PIECE_STEPS).sum();
        let limits = all.div_ceil(gangs)..whole.cost().saturating_sub(MERGE_STEPS);
        let cut = limits.into_iter().find_map(|limit| Self::cut(limit, &works, gang, gangs));
        // Uncut tiles that leave multiprocessors to other sequences are in a launch with theirs, whatever their number.
        let is_full = gang == MAX_GANG && 2 * tiles * heads.len() >= dims.multiprocessors;
        let own = cut.or_else(|| is_full.then_some(whole))?;
        // Where the last gang of each head has few tiles, blocks without one would wait.
        let tiles_all = all * tiles / tiles.div_ceil(gang);
        let least = (longest + PIECE_STEPS).max(tiles_all / dims.multiprocessors);
        (own.cost() * 8 <= least * 9).then_some(own)
    }

    /// What the gang with the most to do does, in steps.
    fn cost(&self) -> usize {
        self.lists.iter().map(|list| list.cost).max().unwrap_or(0)
    }

    /// No tile is cut: the longest ones go first, each to the gang with the least to do.
    fn whole(works: &[Work], gang: usize, gangs: usize) -> Self {
        let mut lists = vec![List::default(); gangs.min(works.len())];
        for work in works {
            if let Some(list) = shortest(&mut lists) {
                list.push(work.piece(0..work.steps, -1), work.steps);
            }
        }
        Self { gang, lists, merges: Vec::new(), partials: 0 }
    }

    /// Each gang takes as much as it may, and the next one the rest of a tile; `None` where there are too few gangs for that.
    fn cut(limit: usize, works: &[Work], gang: usize, gangs: usize) -> Option<Self> {
        let (mut lists, mut list) = (Vec::new(), List::default());
        let (mut merges, mut partials) = (Vec::new(), 0);
        for work in works {
            let (first_partial, mut done) = (partials, 0);
            while done < work.steps {
                let rest = work.steps - done;
                let room = limit.saturating_sub(list.cost + PIECE_STEPS);
                // What is left is to be worth its while too.
                let most = if rest <= room { rest } else { rest.saturating_sub(MIN_PIECE_STEPS) };
                let taken = most.min(room);
                if taken < rest.min(MIN_PIECE_STEPS) {
                    lists.push(std::mem::take(&mut list));
                    if lists.len() == gangs {
                        return None;
                    }
                    continue;
                }
                let is_whole = taken == work.steps;
                let partial = if is_whole { -1 } else { partials as i32 };
                list.push(work.piece(done..done + taken, partial), taken);
                partials += if is_whole { 0 } else { gang };
                done += taken;
            }
            let parts = (partials - first_partial) / gang;
            if parts > MAX_PIECES {
                return None;
            }
            if parts > 0 {
                merges.push(Merge {
                    sequence: 0,
                    kv_head: work.head,
                    first_tile: work.first_tile,
                    partial: first_partial as i32,
                    parts: parts as i32,
                });
            }
        }
        lists.push(list);
        Some(Self { gang, lists, merges, partials })
    }
}

/// Steps of the longest of some tiles of a head.
fn steps(entry: &Entry<'_>, head: usize, tiles: Range<usize>, dims: &Dims) -> usize {
    let (group, rows) = (dims.query_heads / dims.kv_heads, Path::Wgmma.tile_rows());
    let steps = |tile: usize| {
        let first = tile * rows / group;
        let end = ((tile + 1) * rows).div_ceil(group).min(entry.tokens);
        let own = Entry { len: entry.len + first, tokens: end - first, ..*entry };
        own.keys(entry.geometry.layout.head(head)).div_ceil(STEP_KEYS)
    };
    tiles.map(steps).max().unwrap_or(0)
}

/// Consecutive sequences that take the same way, one launch of an attention kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) path: Path,
    /// Blocks of a gang, where gangs share tiles and leave partial results; else 0.
    pub(crate) gang: usize,
    /// Places in [`Schedule::order`].
    pub(crate) places: Range<usize>,
    /// Of the split kernels, in [`Cut::items`].
    pub(crate) items: Range<usize>,
    /// Items of the split kernels, tiles of the others.
    pub(crate) blocks: usize,
    /// Of gangs, in [`Cut::pieces`]; what they leave to be merged, in [`Cut::merges`]; and partial results.
    pub(crate) pieces: Range<usize>,
    pub(crate) merges: Range<usize>,
    pub(crate) partials: usize,
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
    /// Of the tile kernels: KV heads in the order in which to start them, `[places, kv_heads]`.
    pub(crate) heads: Vec<i32>,
    /// Of launches of gangs, `[rounds, gangs]` each.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) merges: Vec<Merge>,
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
        let shares = |heads_of: fn(&Geometry) -> &[i32]| -> Vec<Option<Shares>> {
            let own = |entry: &Entry<'_>| Shares::new(entry, heads_of(entry.geometry), dims);
            entries.iter().map(own).collect()
        };
        let (plain, narrow_shares) = (shares(|own| &own.plain), shares(|own| &own.narrow));
        let way = |index: usize, shares: &[Option<Shares>]| {
            let gang = shares[index].as_ref().map_or(0, |own| own.gang);
            (Path::of(entries[index].tokens, dims), gang)
        };
        let of_plain = |index: usize| way(index, &plain);
        let of_copies = |index: usize| way(index, &narrow_shares);
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
            let share = |place: usize| plain[order[place]].as_ref();
            for places in runs(part.clone(), way) {
                let (path, _) = way(places.start);
                cut.push(path, share, places, &ordered, |own| &own.plain, dims);
            }
            let codes = |place: usize| {
                let own = Path::of_codes(ordered[place].tokens, dims);
                (narrow[place] == Narrow::Codes).then_some(own)
            };
            for places in runs(part, codes) {
                if let Some(path) = codes(places.start) {
                    cut.push(path, |_| None, places, &ordered, |own| &own.narrow, dims);
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
                    let share = |place: usize| narrow_shares[order[place]].as_ref();
                    for places in runs(first..next, way) {
                        let (path, _) = way(places.start);
                        copies.push(path, share, places, &ordered, |own| &own.narrow, dims);
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
        let Self { launches, first_items, items, splits, heads, pieces, merges } = self;
        items.clear();
        pieces.clear();
        merges.clear();
        launches.clear();
        first_items.clear();
        first_items.resize(places, 0);
        splits.clear();
        splits.resize(places * kv_heads, [0; 2]);
        heads.clear();
        heads.resize(places * kv_heads, 0);
    }

    /// One more launch, for these heads of the sequences at `places`; none if there are no such heads.
    fn push<'s>(
        &mut self,
        path: Path,
        shares: impl Fn(usize) -> Option<&'s Shares>,
        places: Range<usize>,
        ordered: &[Entry<'_>],
        heads_of: fn(&Geometry) -> &[i32],
        dims: &Dims,
    ) {
        let start = places.start;
        let items = self.items.len()..self.items.len();
        let [pieces, merges] = [self.pieces.len(), self.merges.len()].map(|len| len..len);
        let gang = shares(start).map_or(0, |own| own.gang);
        let mut launch =
            Launch { path, gang, places, items, blocks: 0, pieces, merges, partials: 0 };
        if let Some(gangs) = dims.multiprocessors.checked_div(gang) {
            let own = launch.places.clone().filter(|place| !ordered[*place].is_vacant);
            let own =
                own.filter_map(|place| shares(place).map(|own| ((place - start) as i32, own)));
            self.push_gangs(own, gangs, &mut launch);
        } else if path.splits() {
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
                self.heads[place * dims.kv_heads..][..own.len()].copy_from_slice(own);
                launch.blocks += dims.rows(entry.tokens).div_ceil(path.tile_rows()) * own.len();
            }
        }
        if launch.blocks > 0 {
            self.launches.push(launch);
        }
    }

    /// What gangs do for some sequences of a launch, which come with their number: who does it depends on the others, but not
    /// what is done.
    fn push_gangs<'s>(
        &mut self,
        sequences: impl Iterator<Item = (i32, &'s Shares)>,
        gangs: usize,
        launch: &mut Launch,
    ) {
        let mut all = Vec::new();
        for (sequence, own) in sequences {
            let first = launch.partials as i32;
            let moved = |partial: i32| if partial < 0 { partial } else { first + partial };
            all.extend(own.lists.iter().map(|list| {
                let piece =
                    |piece: &Piece| Piece { sequence, partial: moved(piece.partial), ..*piece };
                List { pieces: list.pieces.iter().map(piece).collect(), cost: list.cost }
            }));
            let merge = |one: &Merge| Merge { sequence, partial: moved(one.partial), ..*one };
            self.merges.extend(own.merges.iter().map(merge));
            launch.partials += own.partials;
        }
        all.sort_by_key(|list| std::cmp::Reverse(list.cost));
        let mut lists = vec![List::default(); gangs];
        for list in all {
            if let Some(own) = shortest(&mut lists) {
                own.pieces.extend(list.pieces);
                own.cost += list.cost;
            }
        }
        let rounds = lists.iter().map(|list| list.pieces.len()).max().unwrap_or(0);
        for round in 0..rounds {
            let next = |list: &List| list.pieces.get(round).copied().unwrap_or(Piece::NONE);
            self.pieces.extend(lists.iter().map(next));
        }
        (launch.pieces.end, launch.merges.end) = (self.pieces.len(), self.merges.len());
        launch.blocks = rounds * gangs * launch.gang;
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
