use std::ops::Range;

use moa_core::HeadLayout;

use crate::element::Element;

/// Where a stretch of visible keys lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the cache, from this slot.
    Cached(usize),
    /// Among the new tokens, from this one of its sequence.
    New(usize),
}

/// Consecutive positions in consecutive places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) position: usize,
    pub(crate) len: usize,
    pub(crate) place: Place,
}

impl Segment {
    /// The part that lies in `positions`, if any.
    pub(crate) fn clip(&self, positions: Range<usize>) -> Option<Self> {
        let start = self.position.max(positions.start);
        let end = (self.position + self.len).min(positions.end);
        if start >= end {
            return None;
        }
        let skip = start - self.position;
        let place = match self.place {
            Place::Cached(slot) => Place::Cached(slot + skip),
            Place::New(token) => Place::New(token + skip),
        };
        Some(Self { position: start, len: end - start, place })
    }
}

/// The keys that some query of `queries` sees, in ascending order of position, when `len` tokens
/// are cached and the rest is new. At most six segments.
pub(crate) fn segments(head: &HeadLayout, len: usize, queries: Range<usize>) -> Vec<Segment> {
    debug_assert!(queries.start >= len);
    let mut segments = Vec::with_capacity(6);
    for range in head.span().visible_to(queries) {
        let cached = range.start.min(len)..range.end.min(len);
        segments.extend(head.runs(cached).map(|run| Segment {
            position: run.position.0,
            len: run.len,
            place: Place::Cached(run.slot.0),
        }));
        let new = range.start.max(len)..range.end.max(len);
        if !new.is_empty() {
            let place = Place::New(new.start - len);
            segments.push(Segment { position: new.start, len: new.len(), place });
        }
    }
    segments
}

/// The keys (or values) of one sequence and KV head: the cache's buffer and the head's staged rows,
/// in the same element type, so that a key is the same number wherever it is read.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, E> {
    pub(crate) cached: &'a [E],
    pub(crate) new: &'a [E],
    pub(crate) dim: usize,
}

impl<'a, E: Element> Source<'a, E> {
    /// A segment's rows, `[len, dim]`.
    #[inline(always)]
    pub(crate) fn rows(&self, segment: Segment) -> &'a [E] {
        let (from, row) = match segment.place {
            Place::Cached(slot) => (self.cached, slot),
            Place::New(token) => (self.new, token),
        };
        &from[row * self.dim..][..segment.len * self.dim]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_core::{LayerLayout, Position, Span};

    #[test]
    fn segments_hold_exactly_what_some_query_sees() {
        for (sink, window) in [(0, 1), (0, 4), (2, 3), (5, 2), (3, 40)] {
            let span = Span::new(sink, window).unwrap();
            let layout = LayerLayout::new(&[span], 24, 0).unwrap();
            let head = layout.head(0);
            for len in 0..20 {
                for start in len..22 {
                    for end in start + 1..=24 {
                        let listed: Vec<usize> = segments(head, len, start..end)
                            .iter()
                            .inspect(|s| match s.place {
                                Place::Cached(slot) => (0..s.len).for_each(|i| {
                                    assert_eq!(head.slot(Position(s.position + i)).0, slot + i);
                                }),
                                Place::New(token) => assert_eq!(s.position, len + token),
                            })
                            .flat_map(|s| s.position..s.position + s.len)
                            .collect();
                        let seen: Vec<usize> = (0..end)
                            .filter(|&k| {
                                (start..end).any(|q| span.attends(Position(q), Position(k)))
                            })
                            .collect();
                        assert_eq!(listed, seen, "{sink}+{window}, {len} cached, {start}..{end}");
                    }
                }
            }
        }
    }
}
