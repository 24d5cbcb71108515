use std::ops::Range;

use half::bf16;
use moa_core::{HeadLayout, RowType, rotation};

use crate::cache::Rows;
use crate::element::RowElement;
use crate::simd::dispatch;
use crate::simd::dot::{Dots, Queries, WeightedSums, Widen};

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

/// What attention does with one head's keys or values, whatever they are made of: what is compiled for each type
/// and instruction set is here.
pub(crate) trait HeadRows: Sync {
    fn row_type(&self) -> RowType;

    /// Products of queries with these rows: `scores[query * stride + row]`.
    fn dots(&self, part: Part, queries: Queries<'_>, scores: &mut [f32], stride: usize);

    /// Adds these rows, each times its weight, which is spoilt, to `count` rows of `out`.
    fn add_weighted(
        &self,
        part: Part,
        count: usize,
        weights: (&mut [f32], usize),
        out: (&mut [f32], usize),
    );

    /// The rows themselves, if they are f32 in one piece.
    fn plain(&self, part: Part) -> Option<&[f32]>;

    /// The rows themselves, if they are bf16.
    fn bf16s(&self, part: Part) -> Option<&[bf16]>;

    /// The rows as f32.
    fn widen(&self, part: Part, to: &mut [f32]);
}

/// Some of a head's rows.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// The first of them, counted from the head's first slot or from its sequence's first new token.
    first: usize,
    is_new: bool,
    len: usize,
    dim: usize,
}

impl<E: RowElement> Rows<E> {
    /// Rows, and their scales if they have any.
    fn part(&self, part: Part) -> (&[E], &[u16]) {
        let Part { first, is_new, len, dim } = part;
        let (from, units) = (if is_new { &self.staged } else { &self.cached }, E::units(dim));
        let scales = match E::TYPE.is_narrow() {
            true => &from.scales[first..][..len],
            false => &[],
        };
        (&from.codes[first * units..][..len * units], scales)
    }
}

impl<E: RowElement> HeadRows for Rows<E> {
    fn row_type(&self) -> RowType {
        E::TYPE
    }

    fn dots(&self, part: Part, queries: Queries<'_>, scores: &mut [f32], score_stride: usize) {
        let (keys, scales) = self.part(part);
        E::dots(Dots { dim: part.dim, queries, keys, scales, scores, score_stride });
    }

    fn add_weighted(
        &self,
        part: Part,
        count: usize,
        (weights, weight_stride): (&mut [f32], usize),
        (out, out_stride): (&mut [f32], usize),
    ) {
        let ((values, scales), dim) = (self.part(part), part.dim);
        dispatch(WeightedSums {
            dim,
            count,
            weights,
            weight_stride,
            values,
            scales,
            out,
            out_stride,
        });
    }

    fn plain(&self, part: Part) -> Option<&[f32]> {
        E::plain(self.part(part).0)
    }

    fn bf16s(&self, part: Part) -> Option<&[bf16]> {
        E::bf16s(self.part(part).0)
    }

    fn widen(&self, part: Part, to: &mut [f32]) {
        let (rows, scales) = self.part(part);
        dispatch(Widen { dim: part.dim, rows, scales, to });
    }
}

/// The keys (or values) of one sequence and KV head: the cache's rows and the head's staged ones, in the same
/// type, so that a key is the same number wherever it is read.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) rows: &'a dyn HeadRows,
    /// The head's first slot.
    pub(crate) first: usize,
    pub(crate) dim: usize,
}

impl Source<'_> {
    /// Where a segment's rows are.
    pub(crate) fn part(&self, segment: Segment) -> Part {
        let (is_new, first) = match segment.place {
            Place::Cached(slot) => (false, slot - self.first),
            Place::New(token) => (true, token),
        };
        Part { first, is_new, len: segment.len, dim: self.dim }
    }

    /// Whether rows are rotated.
    pub(crate) fn rotates(&self) -> bool {
        self.rows.row_type().rotates()
    }

    /// What scores or outputs are to be multiplied by, as rows are rotated: 1 where they are not.
    pub(crate) fn unrotated(&self) -> f32 {
        if self.rotates() { 1.0 / rotation(self.dim) as f32 } else { 1.0 }
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
