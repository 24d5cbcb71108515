//! The cache geometry against the mask: a simulated cache that remembers which position each slot
//! holds, driven through every chunking of a small world and through random operations.

use std::collections::BTreeSet;
use std::sync::Arc;

use moa_core::{CacheState, Dtype, Error, LayerLayout, Position, Span};
use proptest::prelude::*;

/// Positions held, by slot; `None` is a slot that nobody wrote.
#[derive(Clone)]
struct Simulated {
    state: CacheState,
    slots: Vec<Option<usize>>,
}

impl Simulated {
    fn new(spans: &[Span], capacity: usize, slack: usize) -> Self {
        let layout = LayerLayout::new(spans, capacity, slack).unwrap();
        let slots = vec![None; layout.slots()];
        Self { state: CacheState::new(Arc::new(layout), 1), slots }
    }

    /// Checks what every query of a chunk sees, then commits the chunk.
    fn extend(&mut self, tokens: usize) {
        self.state.check_append(tokens).unwrap();
        let len = self.state.len();
        let layout = Arc::clone(self.state.layout());
        for head in layout.heads() {
            for query in len..len + tokens {
                let mut seen = BTreeSet::new();
                let ranges = head.cached_keys(len, query..query + 1);
                for run in ranges.into_iter().flat_map(|r| head.runs(r)) {
                    for i in 0..run.len {
                        let position = self.slots[run.slot.0 + i];
                        assert_eq!(
                            position,
                            Some(run.position.0 + i),
                            "slot holds another position"
                        );
                        seen.insert(run.position.0 + i);
                    }
                }
                seen.extend(
                    (len..=query).filter(|k| head.span().attends(Position(query), Position(*k))),
                );
                let expected: BTreeSet<_> = (0..=query)
                    .filter(|k| head.span().attends(Position(query), Position(*k)))
                    .collect();
                assert_eq!(seen, expected, "query {query} of a chunk of {tokens} at {len}");
            }
            // The keys of a whole chunk are those of its first query.
            let whole = head.cached_keys(len, len..len + tokens);
            assert_eq!(whole, head.cached_keys(len, len..len + 1));
        }
        for head in layout.heads() {
            let mut last = None;
            for run in head.append(len, tokens) {
                assert!(run.position.0 >= len && run.position.0 + run.len <= len + tokens);
                assert!(last.is_none_or(|l| run.position.0 >= l), "runs are in order and disjoint");
                last = Some(run.position.0 + run.len);
                for i in 0..run.len {
                    let slot = run.slot.0 + i;
                    assert!(slot >= head.offset().0 && slot < head.offset().0 + head.slots());
                    assert_eq!(head.slot(Position(run.position.0 + i)).0, slot);
                    self.slots[slot] = Some(run.position.0 + i);
                }
            }
        }
        self.state.append(tokens).unwrap();
    }
}

/// All ways to cut `n` tokens into chunks.
fn chunkings(n: usize) -> impl Iterator<Item = Vec<usize>> {
    (0u32..1 << (n - 1)).map(move |cuts| {
        let mut chunks = vec![1];
        for i in 0..n - 1 {
            if cuts >> i & 1 == 1 {
                chunks.push(1);
            } else if let Some(last) = chunks.last_mut() {
                *last += 1;
            }
        }
        chunks
    })
}

#[test]
fn every_chunking_of_a_small_world_shows_what_the_mask_admits() {
    const N: usize = 12;
    for sink in 0..=4 {
        for window in 1..=9 {
            for slack in [0, 2] {
                let spans = [Span::new(sink, window).unwrap(), Span::full(N)];
                let empty = Simulated::new(&spans, N, slack);
                for chunks in chunkings(N) {
                    let mut cache = empty.clone();
                    chunks.into_iter().for_each(|n| cache.extend(n));
                }
            }
        }
    }
}

#[test]
fn truncate_allows_exactly_what_the_next_query_can_still_see() {
    const N: usize = 14;
    for (sink, window, slack) in [(0, 1, 0), (0, 4, 0), (2, 3, 0), (2, 3, 2), (3, 1, 1), (4, 20, 0)]
    {
        for len in 1..=N {
            for to in 0..=len {
                let mut cache = Simulated::new(&[Span::new(sink, window).unwrap()], N, slack);
                (0..len).for_each(|_| cache.extend(1));
                let held: BTreeSet<_> = cache.slots.iter().flatten().copied().collect();
                let span = cache.state.layout().head(0).span();
                let needed = (0..to).filter(|k| span.attends(Position(to), Position(*k)));
                let possible = needed.clone().all(|k| held.contains(&k)) || to == 0;
                let before = cache.state.clone();
                match cache.state.truncate(to) {
                    Ok(()) => {
                        assert!(
                            possible,
                            "sink {sink} window {window} slack {slack}: {len} -> {to}"
                        );
                        (to..N).for_each(|_| cache.extend(1));
                    }
                    Err(Error::Evicted { to: t, .. }) => {
                        assert!(
                            !possible,
                            "sink {sink} window {window} slack {slack}: {len} -> {to}"
                        );
                        assert_eq!(t, to);
                        assert_eq!(cache.state, before, "a failed call leaves the state unchanged");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }
}

#[test]
fn appending_too_much_says_what_fits() {
    let mut cache = Simulated::new(&[Span::new(1, 2).unwrap()], 5, 0);
    cache.extend(3);
    let error = cache.state.check_append(3).unwrap_err();
    assert!(matches!(error, Error::CapacityExceeded { len: 3, more: 3, capacity: 5 }));
    assert!(matches!(cache.state.truncate(4), Err(Error::Invalid { .. })));
    assert!(LayerLayout::new(&[], 5, 0).is_err());
    assert!(LayerLayout::new(&[Span::full(5)], 0, 0).is_err());
}

// Offsets past 2^31 elements must not wrap.
#[cfg(target_pointer_width = "64")]
#[test]
fn offsets_are_64_bit_safe() {
    let n = 1usize << 31;
    let layout =
        LayerLayout::new(&[Span::full(n), Span::full(n), Span::new(4, 4).unwrap()], n, 0).unwrap();
    assert_eq!(layout.head(2).offset().0, 2 * n);
    assert_eq!(layout.bytes(128, Dtype::Bf16.slot_bytes(128)), 2 * (2 * n as u64 + 8) * 128 * 2);
    assert_eq!(layout.head(2).slot(Position(n - 1)).0, 2 * n + 4 + (n - 5) % 4);
    let absurd = usize::MAX / 2 + 1;
    assert!(LayerLayout::new(&[Span::full(absurd), Span::full(absurd)], absurd, 0).is_err());
}

// An update whose length equals the window is off by one in others (transformers #37574).
#[test]
fn chunk_as_long_as_the_window_is_no_special_case() {
    for tokens in [4, 5, 6, 7] {
        let mut cache = Simulated::new(&[Span::new(2, 4).unwrap()], 40, 0);
        (0..5).for_each(|_| cache.extend(tokens));
    }
}

proptest! {
    #[test]
    fn random_chunks_truncations_and_forks_keep_slots_and_mask_together(
        heads in prop::collection::vec((0usize..6, 1usize..12), 1..4),
        slack in 0usize..6,
        steps in prop::collection::vec((0u8..4, 1usize..15), 1..12),
    ) {
        let capacity = 60;
        let spans: Vec<_> = heads.iter().map(|(s, w)| Span::new(*s, *w).unwrap()).collect();
        let mut cache = Simulated::new(&spans, capacity, slack);
        for (what, n) in steps {
            match what {
                0 => {
                    let to = cache.state.len().saturating_sub(n);
                    let _ = cache.state.truncate(to);
                }
                1 => {
                    // The copy runs ahead; the original must not notice.
                    let mut copy = cache.clone();
                    let room = copy.state.room();
                    copy.extend(n.min(room).max(1).min(room + 1));
                }
                _ if n <= cache.state.room() => cache.extend(n),
                _ => cache.state.reset(),
            }
            if cache.state.room() == 0 { cache.state.reset() }
        }
    }

    #[test]
    fn capacity_and_slack_change_no_visible_key(
        sink in 0usize..5, window in 1usize..9, slack in 0usize..9, extra in 0usize..30, n in 1usize..40,
    ) {
        let span = Span::new(sink, window).unwrap();
        let tight = LayerLayout::new(&[span], n + 1, 0).unwrap();
        let roomy = LayerLayout::new(&[span], n + 1 + extra, slack).unwrap();
        prop_assert_eq!(tight.head(0).cached_keys(n, n..n + 1), roomy.head(0).cached_keys(n, n..n + 1));
        prop_assert!(tight.slots() <= roomy.slots());
        prop_assert!(tight.slots() <= span.total());
    }
}

/// The slots of a paged engine's memory that hold keys, with their positions.
fn write_paged(memory: &mut [Option<usize>], mapping: &[i64], len: usize) {
    for (i, slot) in mapping.iter().enumerate() {
        if let Ok(slot) = usize::try_from(*slot) {
            memory[slot] = Some(len + i);
        }
    }
}

proptest! {
    // An engine that reads the first `held` slots through its block table sees the mask's keys.
    #[test]
    fn a_paged_head_holds_what_its_last_query_sees(
        sink in 0usize..6,
        window in 1usize..12,
        capacity in 1usize..60,
        block_size in 1usize..9,
        chunks in prop::collection::vec(1usize..14, 1..8),
        seed in any::<u64>(),
    ) {
        let span = Span::new(sink, window).unwrap();
        let layout = LayerLayout::new(&[Span::full(capacity), span], capacity, 0).unwrap();
        // Blocks anywhere in the engine's memory.
        let mut free: Vec<u32> = (0..40).flat_map(|b| [b * 2, b * 2 + 1]).collect();
        let mut random = moa_core::SplitMix64::new(seed);
        for i in (1..free.len()).rev() {
            free.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
        }
        for head in layout.heads() {
            let mut memory = vec![None; 80 * block_size];
            let (mut len, mut table) = (0, Vec::new());
            for &tokens in &chunks {
                let tokens = tokens.min(capacity - len);
                while table.len() < head.blocks(len + tokens, block_size).unwrap() {
                    table.push(free[table.len()]);
                }
                let mapping = head.slot_mapping(len, tokens, &table, block_size).unwrap();
                write_paged(&mut memory, &mapping, len);
                len += tokens;
            }
            let slots = (0..head.held(len))
                .map(|i| table[i / block_size] as usize * block_size + i % block_size);
            let seen: BTreeSet<_> = slots.map(|slot| memory[slot].unwrap()).collect();
            let expected: BTreeSet<_> = (0..len)
                .filter(|key| head.span().attends(Position(len - 1), Position(*key)))
                .collect();
            prop_assert_eq!(seen, expected);
            let short = head.slot_mapping(0, len, &table[1..], block_size);
            prop_assert!(short.is_err());
        }
    }

    // Whatever is asked for, no slot of another head comes back.
    #[test]
    fn runs_stay_within_their_head(
        spans in prop::collection::vec((0usize..9, 1usize..9), 1..4),
        capacity in 1usize..30,
        slack in 0usize..4,
        from in 0usize..90,
        count in 0usize..90,
    ) {
        let spans: Vec<_> = spans.into_iter().map(|(s, w)| Span::new(s, w).unwrap()).collect();
        let layout = LayerLayout::new(&spans, capacity, slack).unwrap();
        for head in layout.heads() {
            let mut seen = BTreeSet::new();
            for run in head.runs(from..from + count).chain(head.append(from, count)) {
                let own = head.offset().0..head.offset().0 + head.slots();
                prop_assert!(own.contains(&run.slot.0) && run.slot.0 + run.len <= own.end);
                prop_assert!(run.position.0 >= from && run.position.0 + run.len <= from + count);
            }
            for run in head.runs(from..from + count) {
                for i in 0..run.len {
                    prop_assert!(seen.insert(run.slot.0 + i), "one slot for two positions");
                }
            }
        }
    }

    #[test]
    fn layouts_and_states_read_what_they_wrote(
        spans in prop::collection::vec((0usize..9, 1usize..9), 1..4),
        capacity in 1usize..30,
        slack in 0usize..4,
        steps in prop::collection::vec(0usize..12, 0..8),
    ) {
        let spans: Vec<_> = spans.into_iter().map(|(s, w)| Span::new(s, w).unwrap()).collect();
        let layout = LayerLayout::new(&spans, capacity, slack).unwrap();
        let mut state = CacheState::new(Arc::new(layout), 8);
        for step in steps {
            // A refused step leaves the state as it was.
            let _ = match step % 2 {
                0 => state.append(step),
                _ => state.truncate(state.len().saturating_sub(step / 3)),
            };
        }
        let text = serde_json::to_string(&state).unwrap();
        prop_assert_eq!(serde_json::from_str::<CacheState>(&text).unwrap(), state, "{}", text);
    }
}

#[test]
fn what_cannot_be_is_not_read() {
    let state = |ring: usize, extent: &str| {
        let layout =
            format!(r#"{{"capacity":100,"heads":[{{"sink":2,"window":6,"ring":{ring}}}]}}"#);
        let text = format!(r#"{{"layout":{layout},"head_dim":8,"extent":{extent}}}"#);
        serde_json::from_str::<CacheState>(&text).map_err(|e| e.to_string())
    };
    let at = |len: usize, high: usize| format!(r#"{{"len":{len},"high_water":{high}}}"#);
    assert_eq!(state(6, &at(40, 41)).unwrap().len(), 40);
    assert!(state(5, &at(0, 0)).unwrap_err().contains("ring: expected 6 to 98 slots, got 5"));
    assert!(state(99, &at(0, 0)).unwrap_err().contains("ring"));
    assert!(state(6, &at(101, 101)).unwrap_err().contains("do not fit"));
    assert!(state(6, &at(41, 40)).unwrap_err().contains("at most 40"));
    assert!(state(6, &at(30, 40)).unwrap_err().contains("evicted"));
    assert!(state(6, &at(0, 40)).unwrap_err().contains("extent"));
    assert!(state(6, "{}").unwrap_err().contains("len"));
    let span = |text: &str| serde_json::from_str::<Span>(text).map_err(|e| e.to_string());
    assert!(span(r#"{"sink":2,"window":0}"#).unwrap_err().contains("window"));
    assert!(span(r#"{"sink":2,"window":3,"more":1}"#).is_err());
    assert_eq!(span(r#"{"sink":2,"window":3}"#).unwrap(), Span::new(2, 3).unwrap());
}
