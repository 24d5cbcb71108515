use moa_core::{CacheType, LayerLayout, Position, Span};
use proptest::prelude::*;

use super::*;

/// (spans, capacity, slack, len, tokens, which heads are narrow as bits)
type OneSequence = (Vec<(usize, usize)>, usize, usize, usize, usize, usize);

/// Heads of 16 bits, or of 4 where a bit is set.
fn geometry(spans: &[Span], capacity: usize, slack: usize, narrow: usize) -> Geometry {
    let layout = LayerLayout::new(spans, capacity, slack).unwrap();
    let own = |head| (narrow >> head & 1 == 1).then_some(CacheType::Int4);
    let types: Vec<_> = (0..spans.len()).map(own).collect();
    Geometry::new(layout.with_cache_types(&types).unwrap(), CacheType::F16, 64).unwrap()
}

#[derive(Clone, Debug)]
struct Case {
    dims: Dims,
    sequences: Vec<OneSequence>,
}

impl Case {
    fn geometries(&self) -> Vec<Geometry> {
        let geometry = |(spans, capacity, slack, _, _, narrow): &OneSequence| {
            let spans: Vec<Span> =
                spans.iter().map(|&(sink, window)| Span::new(sink, window).unwrap()).collect();
            geometry(&spans, *capacity, *slack, *narrow)
        };
        self.sequences.iter().map(geometry).collect()
    }

    fn entries<'a>(&self, geometries: &'a [Geometry]) -> Vec<Entry<'a>> {
        self.sequences
            .iter()
            .zip(geometries)
            .map(|(&(_, _, _, len, tokens, _), geometry)| Entry {
                geometry,
                len,
                tokens,
                grows: false,
                is_vacant: false,
            })
            .collect()
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let heads = (1usize..4, prop_oneof![Just(1usize), Just(2), Just(4), Just(7), Just(16)]);
    (heads, any::<bool>()).prop_flat_map(|((kv_heads, group), wgmma)| {
        let spans = proptest::collection::vec((0usize..70, 1usize..3000), kv_heads);
        let tokens = prop_oneof![3 => 1usize..5, 1 => 5usize..300];
        let narrow = prop_oneof![Just(0usize), 0usize..8];
        let sequence = (spans, 0usize..4000, 0usize..20, 0usize..3000, tokens, narrow).prop_map(
            |(spans, spare, slack, len, tokens, narrow)| {
                (spans, len + tokens + spare, slack, len, tokens, narrow)
            },
        );
        let dims = Dims { query_heads: kv_heads * group, kv_heads, wgmma, multiprocessors: 132 };
        proptest::collection::vec(sequence, 1..6)
            .prop_map(move |sequences| Case { dims, sequences })
    })
}

fn schedule(dims: &Dims, entries: &[Entry<'_>]) -> Schedule {
    let mut made = Schedule::default();
    made.fill(dims, entries);
    made
}

/// A launch's part: whether it is of copies, the path, whether tiles are shared, and splits per head or tiles.
type Part = (bool, Path, bool, Vec<usize>);

/// What a schedule says about one sequence, free of its place: whether it is written first, and its part of each launch.
fn own(schedule: &Schedule, dims: &Dims, index: usize) -> (bool, Vec<Part>) {
    let place = schedule.order.iter().position(|&i| i == index).unwrap();
    let mut parts = Vec::new();
    for (is_copy, cut) in [(false, &schedule.cut), (true, &schedule.copies)] {
        for launch in cut.launches.iter().filter(|launch| launch.places.contains(&place)) {
            let counts: Vec<usize> = match launch.path.splits() {
                true => {
                    let items = &cut.items[launch.items.clone()];
                    let owner = (place - launch.places.start) * dims.kv_heads;
                    let of = |head| {
                        move |item: &&[i32; 2]| {
                            item[0] == (owner + head) as i32 && item[1] < MAX_SPLITS as i32
                        }
                    };
                    (0..dims.kv_heads).map(|head| items.iter().filter(of(head)).count()).collect()
                }
                false => {
                    let next = cut.first_items[place + 1..launch.places.end].first();
                    let heads = &cut.heads[place * dims.kv_heads..][..dims.kv_heads];
                    let items = next.copied().unwrap_or(launch.blocks) - cut.first_items[place];
                    std::iter::once(items)
                        .chain(heads.iter().map(|head| head[1] as usize))
                        .collect()
                }
            };
            // A launch for its neighbours' sake has no work of it.
            let has_work = match launch.path.splits() {
                true => counts.iter().any(|&count| count > 0),
                false => counts[0] > 0,
            };
            if has_work {
                parts.push((is_copy, launch.path, launch.shared, counts));
            }
        }
    }
    (place < schedule.committed, parts)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn keys_are_what_the_mask_admits_to_some_new_token(case in cases()) {
        let geometries = case.geometries();
        for entry in case.entries(&geometries) {
            for head in entry.geometry.layout.heads() {
                let end = entry.len + entry.tokens;
                let seen = (0..end).filter(|&key| {
                    // Of the queries after a key, the first is the nearest.
                    let query = Position(key.max(entry.len));
                    head.span().attends(query, Position(key))
                });
                prop_assert_eq!(entry.keys(head), seen.count());
                let grows = Entry { grows: true, ..entry };
                prop_assert!(grows.keys(head) >= entry.keys(head));
            }
        }
    }

    #[test]
    fn every_key_is_in_one_split_and_every_row_in_one_tile(case in cases()) {
        let geometries = case.geometries();
        let entries = case.entries(&geometries);
        let schedule = schedule(&case.dims, &entries);
        let mut order = schedule.order.clone();
        order.sort_unstable();
        prop_assert_eq!(order, (0..entries.len()).collect::<Vec<_>>());
        let kv_heads = case.dims.kv_heads;
        // How often each head of each place is attended to.
        let mut met = vec![0; entries.len() * kv_heads];
        for (is_copy, cut) in [(false, &schedule.cut), (true, &schedule.copies)] {
            for launch in &cut.launches {
                let mut items = cut.items[launch.items.clone()].to_vec();
                items.sort_unstable();
                let mut expected = Vec::new();
                for (local, place) in launch.places.clone().enumerate() {
                    let entry = &entries[schedule.order[place]];
                    prop_assert_eq!(entry.commits_first(), place < schedule.committed);
                    let narrow = entry.narrow(&case.dims);
                    prop_assert_eq!(narrow, schedule.narrow[place]);
                    let of_codes = matches!(launch.path, Path::Narrow8 | Path::Narrow16);
                    let heads = match is_copy || of_codes {
                        true => &entry.geometry.narrow,
                        false => &entry.geometry.plain,
                    };
                    heads.iter().for_each(|head| met[place * kv_heads + *head as usize] += 1);
                    let rows = case.dims.rows(entry.tokens);
                    if of_codes {
                        prop_assert_eq!((narrow, is_copy), (Narrow::Codes, false));
                        prop_assert_eq!(launch.path == Path::Narrow8, rows <= 8);
                    } else {
                        prop_assert_eq!(Path::of(entry.tokens, &case.dims), launch.path);
                        prop_assert!(!is_copy || narrow == Narrow::Copies);
                    }
                    if !launch.path.splits() {
                        let tiles = rows.div_ceil(launch.path.tile_rows());
                        let own = &cut.heads[place * kv_heads..][..heads.len()];
                        let parts: usize = own.iter().map(|head| head[1] as usize).sum();
                        let next = cut.first_items[place + 1..launch.places.end].first();
                        let end = next.copied().unwrap_or(launch.blocks);
                        prop_assert_eq!(end - cut.first_items[place], tiles * parts);
                        prop_assert!(launch.path == Path::Wgmma || !launch.shared);
                        prop_assert!(launch.shared || own.iter().all(|head| head[1] == 1));
                        let own: Vec<_> = own.iter().map(|head| head[0]).collect();
                        prop_assert_eq!(&own, heads);
                        continue;
                    }
                    prop_assert!(rows <= SPLIT_ROWS);
                    for &head in heads {
                        let layout = entry.geometry.layout.head(head as usize);
                        let owner = (local * kv_heads) as i32 + head;
                        let [first, count] = cut.splits[place * kv_heads + head as usize];
                        for split in 0..count {
                            let at = launch.items.start + (first + split) as usize;
                            prop_assert_eq!(cut.items[at], [owner, split]);
                            expected.push([owner, split]);
                        }
                        let keys = entry.keys(layout);
                        let own = split_keys(keys, launch.path.least_keys());
                        let covered = count as usize * own;
                        prop_assert!(covered >= keys && covered - keys < own);
                        let grows = Entry { grows: true, ..*entry };
                        prop_assert!((count as usize) <= grows.splits(layout, launch.path));
                    }
                }
                expected.sort_unstable();
                prop_assert_eq!(items, expected);
            }
        }
        prop_assert!(met.iter().all(|&times| times == 1), "{:?}", met);
    }

    #[test]
    fn copies_have_room_for_all_that_new_tokens_see(case in cases()) {
        let geometries = case.geometries();
        let entries = case.entries(&geometries);
        let schedule = schedule(&case.dims, &entries);
        let copied = (0..entries.len()).filter(|&place| schedule.narrow[place] == Narrow::Copies);
        let grouped = schedule.groups.iter().flat_map(|group| group.places.clone());
        prop_assert_eq!(copied.collect::<Vec<_>>(), grouped.collect::<Vec<_>>());
        for group in &schedule.groups {
            let mut slots = 0;
            for place in group.places.clone() {
                let entry = &entries[schedule.order[place]];
                for &head in &entry.geometry.narrow {
                    let head = entry.geometry.layout.head(head as usize);
                    let [sink, ring] = entry.copy_slots(head);
                    slots += sink + ring;
                    let end = entry.len + entry.tokens;
                    prop_assert!(entry.keys(head) - entry.tokens <= group.max_keys);
                    // No two keys that are seen share a slot.
                    let mut taken = vec![false; sink + ring];
                    for positions in head.span().visible_to(entry.len..end) {
                        for p in positions {
                            let slot = if p < sink { p } else { sink + (p - sink) % ring };
                            prop_assert!(!std::mem::replace(&mut taken[slot], true));
                        }
                    }
                    let grows = Entry { grows: true, ..*entry };
                    prop_assert!(grows.copy_slots(head).iter().sum::<usize>() >= sink + ring);
                }
            }
            prop_assert_eq!(slots, group.slots);
            prop_assert!(slots <= GROUP_SLOTS || group.places.len() == 1);
        }
    }

    #[test]
    fn the_cut_of_a_sequence_does_not_depend_on_the_batch(case in cases()) {
        let geometries = case.geometries();
        let entries = case.entries(&geometries);
        let together = schedule(&case.dims, &entries);
        for (index, &entry) in entries.iter().enumerate() {
            let alone = schedule(&case.dims, &[entry]);
            prop_assert_eq!(own(&together, &case.dims, index), own(&alone, &case.dims, 0));
        }
    }

    #[test]
    fn vacant_places_and_items_without_work_change_nothing_of_the_others(
        case in cases(), vacant in 0usize..9, more in 0usize..40,
    ) {
        let geometries = case.geometries();
        let entries = case.entries(&geometries);
        let exact = schedule(&case.dims, &entries);
        let mut padded = entries.clone();
        padded.extend(vec![Entry { is_vacant: true, ..entries[0] }; vacant]);
        let mut padded = schedule(&case.dims, &padded);
        prop_assert_eq!(padded.order.len(), entries.len() + vacant);
        prop_assert!(padded.cut.fill_up(|_, items| items + more));
        for index in 0..entries.len() {
            prop_assert_eq!(own(&padded, &case.dims, index), own(&exact, &case.dims, index));
        }
        for index in entries.len()..entries.len() + vacant {
            let (_, parts) = own(&padded, &case.dims, index);
            prop_assert!(parts.is_empty(), "{:?}", parts);
        }
        prop_assert_eq!(padded.cut.launches.len(), exact.cut.launches.len());
        for (launch, own) in padded.cut.launches.iter().zip(&exact.cut.launches) {
            let more = if launch.path.splits() { more } else { 0 };
            prop_assert_eq!(launch.blocks, own.blocks + more);
            prop_assert_eq!(launch.items.len(), own.items.len() + more);
        }
        let launched = padded.cut.launches.iter().any(|launch| launch.path.splits());
        prop_assert_eq!(padded.cut.fill_up(|_, items| items - 1), !launched);
    }

    #[test]
    fn writing_first_overwrites_no_key_that_is_still_seen(case in cases()) {
        let geometries = case.geometries();
        for entry in case.entries(&geometries) {
            if !entry.commits_first() {
                continue;
            }
            let end = entry.len + entry.tokens;
            for head in entry.geometry.layout.heads() {
                let [sink, window] = head.cached_keys(entry.len, entry.len..end);
                let seen: Vec<_> = sink.chain(window).map(|p| head.slot(Position(p))).collect();
                for position in entry.len..end {
                    prop_assert!(!seen.contains(&head.slot(Position(position))));
                }
            }
        }
    }
}

#[test]
fn a_growing_head_never_has_more_splits_than_were_planned() {
    for path in [Path::Split, Path::Narrow8] {
        for most in [1, 511, 512, 513, 5000, 16_384, 16_385, 20_000, 100_000] {
            let geometry = geometry(&[Span::full(most)], most, 0, 0);
            let head = geometry.layout.head(0);
            let entry =
                |len, grows| Entry { geometry: &geometry, len, tokens: 1, grows, is_vacant: false };
            let planned = entry(0, true).splits(head, path);
            assert!((0..most).all(|len| entry(len, false).splits(head, path) <= planned));
            assert!(planned <= MAX_SPLITS);
        }
    }
}

#[test]
fn few_long_tiles_are_shared_and_many_are_not() {
    let spans = [Span::full(32_768), Span::new(64, 700).unwrap()];
    let dims = Dims { query_heads: 8, kv_heads: 2, wgmma: true, multiprocessors: 132 };
    for narrow in [0, 3] {
        let geometry = geometry(&spans, 32_768, 0, narrow);
        let shared = |len, tokens| {
            let entry = Entry { geometry: &geometry, len, tokens, grows: false, is_vacant: false };
            let schedule = schedule(&dims, &[entry]);
            let cut = if narrow == 0 { &schedule.cut } else { &schedule.copies };
            assert_eq!(cut.launches[0].path, Path::Wgmma);
            cut.heads.iter().map(|head| head[1]).collect::<Vec<_>>()
        };
        // A chunk of 4 tiles a head after a long history: 256 steps against 8.
        assert_eq!(shared(32_000, 128), [16, 1]);
        assert_eq!(shared(0, 128), [1, 1]);
        assert_eq!(shared(0, 32_768), [1, 1]);
    }
}

#[test]
fn decode_always_writes_first_and_splits() {
    let spans = [Span::full(5000), Span::new(64, 960).unwrap(), Span::new(0, 1).unwrap()];
    let dims = Dims { query_heads: 12, kv_heads: 3, wgmma: true, multiprocessors: 132 };
    for (narrow, paths) in
        [(0, &[Path::Split][..]), (2, &[Path::Split, Path::Narrow8]), (7, &[Path::Narrow8])]
    {
        let geometry = geometry(&spans, 5000, 0, narrow);
        for len in [0, 1, 63, 64, 1023, 1024, 4999] {
            let entry =
                Entry { geometry: &geometry, len, tokens: 1, grows: false, is_vacant: false };
            let schedule = schedule(&dims, &[entry]);
            let found: Vec<Path> = schedule.launches().map(|launch| launch.path).collect();
            assert_eq!((&found[..], schedule.committed), (paths, 1));
            assert!(schedule.groups.is_empty());
        }
    }
}
