use moa_core::{LayerLayout, Position, Span};
use proptest::prelude::*;

use super::*;

/// (spans, capacity, slack, len, tokens)
type OneSequence = (Vec<(usize, usize)>, usize, usize, usize, usize);

#[derive(Clone, Debug)]
struct Case {
    dims: Dims,
    sequences: Vec<OneSequence>,
}

impl Case {
    fn geometries(&self) -> Vec<Geometry> {
        let geometry =
            |(spans, capacity, slack, ..): &(Vec<(usize, usize)>, usize, usize, _, _)| {
                let spans: Vec<Span> =
                    spans.iter().map(|&(sink, window)| Span::new(sink, window).unwrap()).collect();
                Geometry::new(LayerLayout::new(&spans, *capacity, *slack).unwrap()).unwrap()
            };
        self.sequences.iter().map(geometry).collect()
    }

    fn entries<'a>(&self, geometries: &'a [Geometry]) -> Vec<Entry<'a>> {
        self.sequences
            .iter()
            .zip(geometries)
            .map(|(&(_, _, _, len, tokens), geometry)| Entry {
                geometry,
                len,
                tokens,
                grows: false,
            })
            .collect()
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let heads = (1usize..4, prop_oneof![Just(1usize), Just(2), Just(4), Just(7), Just(16)]);
    (heads, any::<bool>()).prop_flat_map(|((kv_heads, group), wgmma)| {
        let spans = proptest::collection::vec((0usize..70, 1usize..3000), kv_heads);
        let tokens = prop_oneof![3 => 1usize..5, 1 => 5usize..300];
        let sequence = (spans, 0usize..4000, 0usize..20, 0usize..3000, tokens).prop_map(
            |(spans, spare, slack, len, tokens)| (spans, len + tokens + spare, slack, len, tokens),
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

/// What a schedule says about one sequence, free of its place: path, committed, splits per head or tiles.
fn own(schedule: &Schedule, dims: &Dims, index: usize) -> (Path, bool, Vec<usize>) {
    let place = schedule.order.iter().position(|&i| i == index).unwrap();
    let launch = schedule.launches.iter().find(|l| l.places.contains(&place)).unwrap();
    let parts = match launch.path {
        Path::Split => {
            let splits = &schedule.splits[place * dims.kv_heads..][..dims.kv_heads];
            splits.iter().map(|split| split[1] as usize).collect()
        }
        _ => {
            let next = schedule.first_items[place + 1..launch.places.end].first();
            let heads = &schedule.heads[place * dims.kv_heads..][..dims.kv_heads];
            let items = next.copied().unwrap_or(launch.blocks) - schedule.first_items[place];
            std::iter::once(items).chain(heads.iter().map(|head| head[1] as usize)).collect()
        }
    };
    (launch.path, launch.committed, parts)
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
        let mut next = 0;
        for launch in &schedule.launches {
            prop_assert_eq!(launch.places.start, next);
            next = launch.places.end;
            let mut items = schedule.items[launch.items.clone()].to_vec();
            items.sort_unstable();
            let mut expected = Vec::new();
            for (local, place) in launch.places.clone().enumerate() {
                let entry = &entries[schedule.order[place]];
                prop_assert_eq!(entry.commits_first(), launch.committed);
                prop_assert_eq!(Path::of(entry.tokens, &case.dims), launch.path);
                if launch.path != Path::Split {
                    let (.., items) = own(&schedule, &case.dims, schedule.order[place]);
                    let heads = &schedule.heads[place * case.dims.kv_heads..][..case.dims.kv_heads];
                    let rows = case.dims.rows(entry.tokens);
                    let tiles = rows.div_ceil(launch.path.tile_rows());
                    let parts: usize = heads.iter().map(|head| head[1] as usize).sum();
                    prop_assert_eq!(items[0], tiles * parts);
                    prop_assert_eq!(launch.shared, heads.iter().any(|head| head[1] > 1));
                    prop_assert!(launch.path == Path::Wgmma || !launch.shared);
                    let mut heads: Vec<_> = heads.iter().map(|head| head[0]).collect();
                    heads.sort_unstable();
                    prop_assert_eq!(heads, (0..case.dims.kv_heads as i32).collect::<Vec<_>>());
                    continue;
                }
                prop_assert!(case.dims.rows(entry.tokens) <= SPLIT_ROWS);
                for (head, layout) in entry.geometry.layout.heads().iter().enumerate() {
                    let owner = (local * case.dims.kv_heads + head) as i32;
                    let [first, count] = schedule.splits[place * case.dims.kv_heads + head];
                    for split in 0..count {
                        let at = launch.items.start + (first + split) as usize;
                        prop_assert_eq!(schedule.items[at], [owner, split]);
                        expected.push([owner, split]);
                    }
                    let keys = entry.keys(layout);
                    let covered = count as usize * split_keys(keys);
                    prop_assert!(covered >= keys && covered - keys < split_keys(keys));
                    let grows = Entry { grows: true, ..*entry };
                    prop_assert!((count as usize) <= grows.splits(layout));
                }
            }
            expected.sort_unstable();
            prop_assert_eq!(items, expected);
        }
        prop_assert_eq!(next, entries.len());
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
    for most in [1, 511, 512, 513, 5000, 16_384, 16_385, 20_000, 100_000] {
        let geometry =
            Geometry::new(LayerLayout::new(&[Span::full(most)], most, 0).unwrap()).unwrap();
        let head = geometry.layout.head(0);
        let entry = |len, grows| Entry { geometry: &geometry, len, tokens: 1, grows };
        let planned = entry(0, true).splits(head);
        assert!((0..most).all(|len| entry(len, false).splits(head) <= planned));
        assert!(planned <= MAX_SPLITS);
    }
}

#[test]
fn few_long_tiles_are_shared_and_many_are_not() {
    let spans = [Span::full(32_768), Span::new(64, 700).unwrap()];
    let geometry = Geometry::new(LayerLayout::new(&spans, 32_768, 0).unwrap()).unwrap();
    let dims = Dims { query_heads: 8, kv_heads: 2, wgmma: true, multiprocessors: 132 };
    let shared = |len, tokens| {
        let schedule = schedule(&dims, &[Entry { geometry: &geometry, len, tokens, grows: false }]);
        assert_eq!(schedule.launches[0].path, Path::Wgmma);
        schedule.heads.iter().map(|head| head[1]).collect::<Vec<_>>()
    };
    // A chunk of 4 tiles a head after a long history: 256 steps against 8.
    assert_eq!(shared(32_000, 128), [16, 1]);
    assert_eq!(shared(0, 128), [1, 1]);
    assert_eq!(shared(0, 32_768), [1, 1]);
}

#[test]
fn decode_always_writes_first_and_splits() {
    let spans = [Span::full(5000), Span::new(64, 960).unwrap(), Span::new(0, 1).unwrap()];
    let geometry = Geometry::new(LayerLayout::new(&spans, 5000, 0).unwrap()).unwrap();
    let dims = Dims { query_heads: 12, kv_heads: 3, wgmma: true, multiprocessors: 132 };
    for len in [0, 1, 63, 64, 1023, 1024, 4999] {
        let entry = Entry { geometry: &geometry, len, tokens: 1, grows: false };
        let schedule = schedule(&dims, &[entry]);
        assert_eq!(schedule.launches.len(), 1);
        assert_eq!((schedule.launches[0].path, schedule.committed()), (Path::Split, 1));
    }
}
