use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Absolute index of a token in its sequence, from 0. Not a cache slot: see [`crate::Slot`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position(pub usize);

/// Which keys one head lets a query see: the first `sink` positions and the `window` most recent
/// ones, the query's own included.
///
/// `sink + window` is the *span* of the paper, the number of keys a late query sees.
///
/// ```
/// use moa_core::{Position, Span};
/// let span = Span::new(2, 3)?;
/// let seen: Vec<usize> = (0..10).filter(|&k| span.attends(Position(7), Position(k))).collect();
/// assert_eq!(seen, [0, 1, 5, 6, 7]);
/// # Ok::<(), moa_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "SpanFile")]
pub struct Span {
    sink: usize,
    window: usize,
}

/// A [`Span`] as it is read, before the check.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpanFile {
    sink: usize,
    window: usize,
}

impl TryFrom<SpanFile> for Span {
    type Error = Error;

    fn try_from(file: SpanFile) -> Result<Self> {
        Self::new(file.sink, file.window)
    }
}

impl Span {
    /// A span of `sink + window` keys.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `window` is 0: a query always sees its own key.
    pub fn new(sink: usize, window: usize) -> Result<Self> {
        if window == 0 {
            return Err(Error::invalid("window", "at least 1 key", window));
        }
        Ok(Self { sink, window })
    }

    /// The span that hides nothing from a sequence of at most `context_length` tokens.
    pub const fn full(context_length: usize) -> Self {
        Self { sink: 0, window: if context_length == 0 { 1 } else { context_length } }
    }

    /// `total` keys, of which at most `sink` are sinks and at least one is the query's own.
    pub(crate) const fn of_total(total: usize, sink: usize) -> Self {
        let total = if total == 0 { 1 } else { total };
        let sink = if sink < total { sink } else { total - 1 };
        Self { sink, window: total - sink }
    }

    /// What is left of the span where the layer itself sees `window` recent keys and no more, in a sequence of at
    /// most `context_length` tokens: no sink and at most the window, unless the window hides nothing.
    #[must_use]
    pub const fn within(self, window: usize, context_length: usize) -> Self {
        match context_length > window {
            true if self.total() < window => Self::of_total(self.total(), 0),
            true => Self::of_total(window, 0),
            false => self,
        }
    }

    /// The mask, for every cache, kernel and backend:
    /// `key <= query && (key < sink || query - key < window)`.
    pub const fn attends(self, query: Position, key: Position) -> bool {
        key.0 <= query.0 && (key.0 < self.sink || query.0 - key.0 < self.window)
    }

    /// First positions that stay visible for ever.
    pub const fn sink(self) -> usize {
        self.sink
    }

    /// Most recent keys that are visible, the query's own included.
    pub const fn window(self) -> usize {
        self.window
    }

    /// `sink + window`: the most keys one query can see.
    pub const fn total(self) -> usize {
        self.sink.saturating_add(self.window)
    }

    /// First position of the window of `query`, clipped to the end of the sink.
    pub fn window_start(self, query: Position) -> usize {
        (query.0 + 1).saturating_sub(self.window).max(self.sink.min(query.0 + 1))
    }

    /// The keys that `query` sees, as two ranges of positions: inside the sink, and after it.
    pub fn visible(self, query: Position) -> [Range<usize>; 2] {
        self.visible_to(query.0..query.0 + 1)
    }

    /// The keys that some query of a range of positions sees, as two ranges: inside the sink, and
    /// after it.
    pub fn visible_to(self, queries: Range<usize>) -> [Range<usize>; 2] {
        let sink = 0..self.sink.min(queries.end);
        // The window of the first query is the one that reaches back furthest.
        let start = self.window_start(Position(queries.start)).max(sink.end);
        [sink, start..queries.end.max(start)]
    }

    /// The mask as numbers to add to scores, `[queries, keys]` in one row after the other: 0 where a
    /// query sees the key, else minus infinity. Both are ranges of positions.
    pub fn additive_mask(self, queries: Range<usize>, keys: Range<usize>) -> Vec<f32> {
        let of = |query, key| match self.attends(Position(query), Position(key)) {
            true => 0.0,
            false => f32::NEG_INFINITY,
        };
        queries.flat_map(|query| keys.clone().map(move |key| of(query, key))).collect()
    }

    /// Number of (query, key) pairs that the mask keeps in a prompt of `tokens` tokens.
    pub fn kept_pairs(self, tokens: usize) -> u128 {
        let ramp = self.total().min(tokens) as u128;
        let flat = (tokens as u128) - ramp;
        ramp * (ramp + 1) / 2 + flat * self.total() as u128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_ranges_and_kept_pairs_count_what_the_predicate_admits() {
        for sink in 0..6 {
            for window in 1..8 {
                let span = Span::new(sink, window).unwrap();
                let mut pairs = 0;
                for q in 0..20 {
                    let seen: Vec<_> =
                        (0..25).filter(|&k| span.attends(Position(q), Position(k))).collect();
                    let listed: Vec<_> = span.visible(Position(q)).into_iter().flatten().collect();
                    assert_eq!(seen, listed, "sink {sink} window {window} query {q}");
                    pairs += seen.len() as u128;
                    assert_eq!(span.kept_pairs(q + 1), pairs);
                }
            }
        }
    }

    // A window counts the query itself (transformers #29623, vLLM #3385, mlx-lm #390).
    #[test]
    fn window_of_one_sees_only_the_query() {
        let span = Span::new(0, 1).unwrap();
        assert_eq!((0..9).filter(|&k| span.attends(Position(5), Position(k))).count(), 1);
        assert!(span.attends(Position(5), Position(5)));
        assert!(Span::new(3, 0).is_err());
    }
}
