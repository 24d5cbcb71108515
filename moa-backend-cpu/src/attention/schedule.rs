use std::cmp::Reverse;
use std::ops::Range;

use moa_core::{CacheState, HeadLayout};

use crate::simd::outer::PANEL;
use crate::{Error, Result};

/// Tokens per task of the tile kernel, given the chunk's: as many as fill up to four register panels
/// with the rows of the group's query heads. More panels read the same keys more often from near
/// memory; short chunks are cut finer so that every thread gets some.
fn tile_tokens(tokens: usize, group: usize) -> usize {
    let panels = match tokens {
        0..256 => 1,
        256..1024 => 2,
        _ => 4,
    };
    (panels * PANEL / group).max(1)
}

/// Keys per partial result of the row kernel.
pub(crate) const SPLIT_KEYS: usize = 512;

/// Rows (new tokens x query heads per KV head) up to which the row kernel is the faster one: measured
/// after 4096 tokens for groups of 1, 2 and 4.
const ROW_KERNEL_ROWS: usize = 12;

/// New tokens that always go through the row kernel, so that drafts are checked by the kernel that decodes.
const ROW_KERNEL_TOKENS: usize = crate::FEW_ROWS;

// Prompts go through the tile kernel.
const _: () = assert!(ROW_KERNEL_ROWS < crate::MANY_ROWS && ROW_KERNEL_TOKENS < crate::MANY_ROWS);

/// One independent piece of attention: one KV head of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) kind: Kind,
    /// Pairs of tokens and keys.
    cost: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A tile of the sequence's new tokens over all their keys.
    Tile { tokens: Range<usize> },
    /// All new tokens, each over one split of its own keys, counted in ascending order of position.
    Row { keys: Range<usize> },
}

impl Kind {
    /// The first token or key.
    fn start(&self) -> usize {
        match self {
            Self::Tile { tokens: range } | Self::Row { keys: range } => range.start,
        }
    }
}

/// How a batch is cut, and its work in multiply-adds.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) tasks: Vec<Task>,
    pub(crate) work: u64,
}

/// Cuts a batch into tasks, longest first.
///
/// The cut of a sequence depends on nothing but that sequence, which is what makes results bitwise
/// independent of the batch and of the number of threads.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn schedule<'a>(
    batch: impl Iterator<Item = (&'a CacheState, usize)>,
    group: usize,
    head_dim: usize,
) -> Result<Schedule> {
    let mut tasks: Vec<Task> = Vec::new();
    for (sequence, (state, new)) in batch.enumerate() {
        let len = state.len();
        for (kv_head, head) in state.layout().heads().iter().enumerate() {
            let pieces = match uses_rows(new, group) {
                true => count(head, len, new - 1..new).div_ceil(SPLIT_KEYS),
                false => new.div_ceil(tile_tokens(new, group)),
            };
            let bytes = (size_of::<Task>() * pieces) as u64;
            let shortage = |_| Error::OutOfMemory { what: "tasks of attention", bytes };
            tasks.try_reserve(pieces).map_err(shortage)?;
            let mut push = |cost: usize, kind| {
                tasks.push(Task { sequence, kv_head, kind, cost: cost as u64 });
            };
            if uses_rows(new, group) {
                let keys = count(head, len, new - 1..new);
                for start in (0..keys).step_by(SPLIT_KEYS) {
                    let split = start..keys.min(start + SPLIT_KEYS);
                    push(split.len() * new, Kind::Row { keys: split });
                }
            } else {
                let step = tile_tokens(new, group);
                for start in (0..new).step_by(step) {
                    let tile = start..new.min(start + step);
                    let keys = count(head, len, tile.clone());
                    push(keys * tile.len(), Kind::Tile { tokens: tile });
                }
            }
        }
    }
    let pairs: u64 = tasks.iter().map(|task| task.cost).sum();
    // Rows of one head stay in the order in which their results are merged. A stable sort would need memory.
    tasks.sort_unstable_by_key(|task| {
        (Reverse(task.cost), task.sequence, task.kv_head, task.kind.start())
    });
    Ok(Schedule { tasks, work: pairs * (2 * group * head_dim) as u64 })
}

/// Whether a sequence with `tokens` new tokens goes through the row kernel.
pub(crate) fn uses_rows(tokens: usize, group: usize) -> bool {
    tokens <= ROW_KERNEL_TOKENS || tokens.saturating_mul(group) <= ROW_KERNEL_ROWS
}

/// Splits of the row kernel for one head: those of the last token, which sees most keys.
pub(crate) fn splits(head: &HeadLayout, len: usize, tokens: usize) -> usize {
    count(head, len, tokens - 1..tokens).div_ceil(SPLIT_KEYS)
}

fn count(head: &HeadLayout, len: usize, tokens: Range<usize>) -> usize {
    let queries = len + tokens.start..len + tokens.end;
    head.span().visible_to(queries).iter().map(Range::len).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use moa_core::{LayerLayout, Span};

    fn filled(layout: &LayerLayout, len: usize) -> CacheState {
        let mut state = CacheState::new(Arc::new(layout.clone()), 64);
        state.append(len).unwrap();
        state
    }

    #[test]
    fn tasks_cover_every_head_and_token_or_key_once() {
        let spans = [Span::full(5000), Span::new(4, 60).unwrap(), Span::new(0, 1).unwrap()];
        let layout = LayerLayout::new(&spans, 5000, 0).unwrap();
        let shapes = [(0, 1), (4000, 1), (0, 200), (700, 3), (700, 5), (10, 64), (4999, 1)];
        let states = shapes.map(|(len, tokens)| (filled(&layout, len), tokens));
        let states = states.iter().map(|(state, tokens)| (state, *tokens));
        let schedule = schedule(states, 2, 64).unwrap();
        for (s, &(len, tokens)) in shapes.iter().enumerate() {
            for h in 0..spans.len() {
                let mine = schedule.tasks.iter().filter(|t| t.sequence == s && t.kv_head == h);
                let (mut covered, mut rows): (Vec<usize>, bool) = (Vec::new(), false);
                for task in mine {
                    match &task.kind {
                        Kind::Tile { tokens } => covered.extend(tokens.clone()),
                        Kind::Row { keys } => {
                            covered.extend(keys.clone());
                            rows = true;
                        }
                    }
                }
                covered.sort_unstable();
                assert_eq!(rows, uses_rows(tokens, 2));
                let last = tokens - 1..tokens;
                let expected = if rows { count(layout.head(h), len, last) } else { tokens };
                assert_eq!(covered, (0..expected).collect::<Vec<_>>(), "sequence {s} head {h}");
            }
        }
        assert!(schedule.work > 0);
    }

    #[test]
    fn the_cut_of_a_sequence_does_not_depend_on_the_batch() {
        let layout =
            LayerLayout::new(&[Span::full(3000), Span::new(4, 60).unwrap()], 3000, 0).unwrap();
        let (alone, other) = (filled(&layout, 900), filled(&layout, 2000));
        let (alone, other) = ((&alone, 130), (&other, 1));
        let own = |tasks: Vec<Task>, index| -> Vec<_> {
            let mine = tasks.into_iter().filter(|t| t.sequence == index);
            mine.map(|t| (t.kv_head, t.kind)).collect()
        };
        let first = own(schedule([alone].into_iter(), 2, 64).unwrap().tasks, 0);
        let batch = schedule([other, alone, other].into_iter(), 2, 64).unwrap();
        assert_eq!(first, own(batch.tasks, 1));
    }
}
