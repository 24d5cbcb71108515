use moa_core::{LayerLayout, Position, Span};

use super::*;
use crate::kernels::keys::{MAX_SPLITS, MIN_SPLIT_KEYS, attends, position, slot};

/// WebGPU's smallest limits.
const WEB: Limits = Limits { shared_bytes: 16384, units: 256, cubes: 65535, bindings: 7 };

fn heads(layout: &LayerLayout) -> Vec<Head> {
    layout.head_rows().unwrap().iter().map(|row| Head::new(row, 0, 0)).collect()
}

#[test]
fn numbered_keys_are_those_that_the_mask_admits() {
    for (sink, window) in [(0, 1), (0, 5), (3, 4), (6, 2), (2, 100)] {
        let span = Span::new(sink, window).unwrap();
        let layout = LayerLayout::new(&[span], 30, 0).unwrap();
        let head = heads(&layout)[0];
        for first in 0..29 {
            for end in first + 1..30 {
                let keys = keys(&head, first, end);
                let listed: Vec<u32> = (0..keys.count).map(|n| position(&keys, n)).collect();
                let sees =
                    |q: u32, k: u32| span.attends(Position(q as usize), Position(k as usize));
                let seen: Vec<u32> =
                    (0..30).filter(|&k| (first..end).any(|q| sees(q, k))).collect();
                assert!(seen.iter().all(|k| listed.contains(k)), "{first}..{end}: {listed:?}");
                assert!(listed.windows(2).all(|pair| pair[0] < pair[1]) && listed.len() <= 30);
                for (q, k) in (first..end).flat_map(|q| (0..30).map(move |k| (q, k))) {
                    assert_eq!(attends(&head, q, k), sees(q, k));
                }
            }
        }
    }
}

#[test]
fn slots_are_those_of_the_layout() {
    let spans = [Span::new(3, 5).unwrap(), Span::full(40), Span::new(50, 2).unwrap()];
    let layout = LayerLayout::new(&spans, 40, 2).unwrap();
    for kv_head in 0..3 {
        for p in 0..40u32 {
            let expected = layout.head(kv_head).slot(Position(p as usize)).0;
            assert_eq!(slot(&heads(&layout)[kv_head], p) as usize, expected);
        }
    }
}

#[test]
fn splits_cover_all_keys_once() {
    for count in (1..3000).chain([100_000, 1 << 20, (1 << 30) - 1]) {
        let share = split_keys(count);
        let splits = count.div_ceil(share);
        assert!(splits <= MAX_SPLITS && u64::from(splits) * u64::from(share) >= count.into());
    }
}

#[test]
fn every_step_fits_the_smallest_device() {
    let layout = LayerLayout::new(&[Span::full(5000), Span::new(4, 60).unwrap()], 5000, 0).unwrap();
    let heads = heads(&layout);
    for head_dim in [1, 6, 64, 72, 128, 255, 256] {
        let row = Row::of(head_dim);
        assert_eq!(row.width * row.vectors, head_dim);
        for (len, tokens) in [(0, 1), (200, 1), (4990, 1), (1000, 3), (0, 700), (20, 4000)] {
            for group in [1, 3, 8, 20] {
                let cut = Cut::new(&WEB, &heads, len, tokens, 2 * group, row, None).unwrap();
                assert!(cut.tile.shared_bytes(row.width) <= WEB.shared_bytes, "{cut:?}");
                assert!(cut.tile.units() <= WEB.units);
                assert!(cut.tiles as usize * cut.tile.rows() >= tokens * group);
                let long = len + tokens > MIN_SPLIT_KEYS as usize;
                assert_eq!(cut.splits > 1, tokens * group <= 16 && long);
            }
        }
    }
    let tight = Limits { cubes: 3, ..WEB };
    let refused = Cut::new(&tight, &heads, 0, 1000, 2, Row::of(64), None);
    assert!(matches!(refused, Err(Error::Argument(error)) if error.argument == "tokens"));
}
