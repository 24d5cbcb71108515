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
        let dims = Dims {
            query_heads: kv_heads * group,
            kv_heads,
            wgmma,
            gangs: true,
            multiprocessors: 132,
        };
        proptest::collection::vec(sequence, 1..6)
            .prop_map(move |sequences| Case { dims, sequences })
    })
}

fn schedule(dims: &Dims, entries: &[Entry<'_>]) -> Schedule {
    let mut made = Schedule::default();
    made.fill(dims, entries);
    made
}

/// A launch's part: whether it is of copies, the path, splits per head or tiles, and what gangs do.
type Part = (bool, Path, Vec<usize>, (Vec<Piece>, Vec<Merge>));

/// What gangs do for the sequence at a place, with partial results counted from the sequence's first one.
fn of_gangs(cut: &Cut, launch: &Launch, place: usize) -> (Vec<Piece>, Vec<Merge>) {
    let sequence = (place - launch.places.start) as i32;
    let merges = &cut.merges[launch.merges.clone()];
    let merges: Vec<Merge> =
        merges.iter().filter(|merge| merge.sequence == sequence).copied().collect();
    let first = merges.iter().map(|merge| merge.partial).min().unwrap_or(0);
    let pieces = cut.pieces[launch.pieces.clone()].iter();
    let pieces = pieces.filter(|piece| piece.sequence == sequence && piece.end_step > 0);
    let moved = |partial: i32| if partial < 0 { -1 } else { partial - first };
    let own = |own: &Piece| Piece { sequence: 0, partial: moved(own.partial), ..*own };
    let mut pieces: Vec<Piece> = pieces.map(own).collect();
    // Which gang does what depends on the batch.
    pieces.sort_unstable();
    let own = |own: &Merge| Merge { sequence: 0, partial: moved(own.partial), ..*own };
    (pieces, merges.iter().map(own).collect())
}

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
                false if launch.gang > 0 => Vec::new(),
                false => {
                    let next = cut.first_items[place + 1..launch.places.end].first();
                    vec![next.copied().unwrap_or(launch.blocks) - cut.first_items[place]]
                }
            };
            let gangs = of_gangs(cut, launch, place);
            // A launch for its neighbours' sake has no work of it.
            if counts.iter().any(|&count| count > 0) || !gangs.0.is_empty() {
                parts.push((is_copy, launch.path, counts, gangs));
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
                    if launch.gang > 0 {
                        prop_assert_eq!(launch.path, Path::Wgmma);
                        check_gangs(&case.dims, entry, heads, launch.gang, of_gangs(cut, launch, place));
                        continue;
                    }
                    if !launch.path.splits() {
                        let tiles = rows.div_ceil(launch.path.tile_rows());
                        let next = cut.first_items[place + 1..launch.places.end].first();
                        let end = next.copied().unwrap_or(launch.blocks);
                        prop_assert_eq!(end - cut.first_items[place], tiles * heads.len());
                        prop_assert_eq!(&cut.heads[place * kv_heads..][..heads.len()], heads);
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

/// Every step of every tile is in one piece, each piece of a shared tile leaves one partial result, and the kernel that merges
/// finds them all.
fn check_gangs(
    dims: &Dims,
    entry: &Entry<'_>,
    heads: &[i32],
    gang: usize,
    (pieces, merges): (Vec<Piece>, Vec<Merge>),
) {
    let tiles = dims.rows(entry.tokens).div_ceil(Path::Wgmma.tile_rows());
    let mut results: Vec<i32> = Vec::new();
    for &head in heads {
        for tile in 0..tiles {
            let all = steps(entry, head as usize, tile..tile + 1, dims);
            let is_own = |first: u16| (first.into()..usize::from(first) + gang).contains(&tile);
            let own = |piece: &&Piece| i32::from(piece.kv_head) == head && is_own(piece.first_tile);
            let mut own: Vec<_> = pieces.iter().filter(own).collect();
            own.sort_by_key(|piece| piece.first_step);
            let mut done = 0;
            for piece in &own {
                assert_eq!(usize::from(piece.first_step), done);
                done = all.min(piece.end_step.into());
                assert!(done > usize::from(piece.first_step), "a piece without a step");
            }
            assert_eq!(done, all);
            let merge =
                merges.iter().find(|one| i32::from(one.kv_head) == head && is_own(one.first_tile));
            let found: Vec<i32> = own.iter().map(|piece| piece.partial).collect();
            let expected = match merge {
                None => vec![-1],
                Some(one) => (0..one.parts).map(|part| one.partial + part * gang as i32).collect(),
            };
            assert_eq!(found, expected);
            if tile.is_multiple_of(gang) {
                results.extend(found.into_iter().filter(|partial| *partial >= 0));
            }
        }
    }
    results.sort_unstable();
    let expected: Vec<i32> = (0..results.len() as i32).map(|at| at * gang as i32).collect();
    assert_eq!(results, expected, "each partial result has its own place");
}

#[test]
fn few_long_tiles_are_shared_and_many_are_not() {
    let spans = [Span::full(32_768), Span::new(64, 700).unwrap()];
    let dims = Dims { query_heads: 8, kv_heads: 2, wgmma: true, gangs: true, multiprocessors: 132 };
    for narrow in [0, 3] {
        let geometry = geometry(&spans, 32_768, 0, narrow);
        let shared = |len, tokens, grows| {
            let entry = Entry { geometry: &geometry, len, tokens, grows, is_vacant: false };
            let schedule = schedule(&dims, &[entry]);
            let cut = if narrow == 0 { &schedule.cut } else { &schedule.copies };
            assert_eq!(cut.launches[0].path, Path::Wgmma);
            let merges: Vec<_> =
                cut.merges.iter().map(|merge| (merge.kv_head, merge.parts)).collect();
            (cut.launches[0].gang, merges)
        };
        // A chunk of 4 tiles a head after a long history, 251 steps against 6, on 33 gangs.
        let (gang, merges) = shared(32_000, 128, false);
        assert_eq!(gang, 4);
        assert!(matches!(merges[..], [(0, 28..=32)]), "{merges:?}");
        // Nothing to gain.
        assert_eq!(shared(0, 128, false), (0, vec![]));
        // Blocks take them in turn.
        assert_eq!(shared(0, 32_768, false), (0, vec![]));
        // How long a tile will be is not known.
        assert_eq!(shared(32_000, 128, true), (0, vec![]));
    }
}

/// All gangs of a chunk of 512 tokens of a plan's layer are done at about the same time.
#[test]
fn gangs_have_much_the_same_to_do() {
    let spans = [vec![Span::new(64, 4032).unwrap(); 12], vec![Span::new(64, 960).unwrap(); 20]];
    let geometry = geometry(&spans.concat(), 16_384, 0, 0);
    let dims =
        Dims { query_heads: 32, kv_heads: 32, wgmma: true, gangs: true, multiprocessors: 132 };
    for len in [4096, 8192, 12_288] {
        let entry = Entry { geometry: &geometry, len, tokens: 512, grows: false, is_vacant: false };
        let schedule = schedule(&dims, &[entry]);
        let launch = &schedule.cut.launches[0];
        assert_eq!((launch.gang, schedule.cut.launches.len()), (4, 1));
        check_gangs(&dims, &entry, &geometry.plain, 4, of_gangs(&schedule.cut, launch, 0));
        let mut costs = vec![0; 33];
        for (at, piece) in schedule.cut.pieces.iter().enumerate() {
            let all = steps(&entry, piece.kv_head.into(), 0..4, &dims);
            let own = all.min(piece.end_step.into()) - usize::from(piece.first_step);
            costs[at % 33] += if own > 0 { own + PIECE_STEPS } else { 0 };
        }
        let (longest, all) = (costs.iter().max().unwrap(), costs.iter().sum::<usize>());
        assert!(longest * 33 * 8 <= 9 * all, "{costs:?}");
    }
}

/// Short prompts of all lengths are one launch, and so are whole chunks of several.
#[test]
fn prompts_of_a_batch_share_a_launch() {
    let geometry = geometry(&vec![Span::full(8192); 32], 8192, 0, 0);
    let dims =
        Dims { query_heads: 32, kv_heads: 32, wgmma: true, gangs: true, multiprocessors: 132 };
    let gangs = |lens: &[(usize, usize)]| {
        let entry = |&(len, tokens): &(usize, usize)| Entry {
            geometry: &geometry,
            len,
            tokens,
            grows: false,
            is_vacant: false,
        };
        let schedule = schedule(&dims, &lens.iter().map(entry).collect::<Vec<_>>());
        schedule.cut.launches.iter().map(|launch| launch.gang).collect::<Vec<_>>()
    };
    assert_eq!(gangs(&[(0, 70), (0, 200), (0, 300), (50, 128)]), [0]);
    assert_eq!(gangs(&[(0, 512), (1024, 512), (7000, 512)]), [4]);
}

#[test]
fn decode_always_writes_first_and_splits() {
    let spans = [Span::full(5000), Span::new(64, 960).unwrap(), Span::new(0, 1).unwrap()];
    let dims =
        Dims { query_heads: 12, kv_heads: 3, wgmma: true, gangs: true, multiprocessors: 132 };
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
