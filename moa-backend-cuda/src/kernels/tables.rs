//! What the kernels are given, field by field as in `kernels/tables.cuh`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use moa_core::{CacheType, HeadRow, LayerLayout, RowType};

use crate::{Error, Result};

/// Address of device memory, 0 for none.
pub type DevicePointer = u64;

/// A packed tensor `[tokens, heads, head_dim]` in device memory; strides in elements, the innermost
/// is 1. Rows of `head_dim` elements begin at multiples of 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// First element.
    pub data: DevicePointer,
    /// Elements between tokens.
    pub token: i64,
    /// Elements between heads.
    pub head: i64,
}

impl Packed {
    /// No tensor.
    pub const NONE: Self = Self { data: 0, token: 0, head: 0 };

    /// A tensor without gaps.
    pub const fn contiguous(data: DevicePointer, heads: usize, head_dim: usize) -> Self {
        Self { data, token: (heads * head_dim) as i64, head: head_dim as i64 }
    }
}

/// One sequence of the batch. Positions of its new tokens begin at its entry of `lens`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Zeroable, Pod)]
pub struct SequenceRow {
    /// Cached keys, `[slots, head_dim]`.
    pub k: DevicePointer,
    /// Cached values, the same.
    pub v: DevicePointer,
    /// Packed row of its first new token in q, k, v and out.
    pub first: i64,
    /// New tokens, at least 1.
    pub tokens: i32,
    /// Tile kernels: tiles of the sequences before it in this launch.
    pub first_item: i32,
    /// 1: `append` has already put the new tokens into the cache.
    pub committed: i32,
    /// Unused.
    pub padding: i32,
}

/// What a gang of blocks does next of tiles that gangs share: the same steps of 128 keys of neighbouring tiles, one for
/// each block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Zeroable, Pod)]
pub struct Piece {
    /// Sequence.
    pub sequence: i32,
    /// KV head.
    pub kv_head: u16,
    /// Tile of the gang's first block; blocks after the last tile do nothing.
    pub first_tile: u16,
    /// First step, counted from the last keys that a tile sees.
    pub first_step: u16,
    /// Step before which it ends; [`u16::MAX`]: all the rest.
    pub end_step: u16,
    /// Partial result of the first block, which those of the others follow, or -1: the piece is all of its tiles.
    pub partial: i32,
}

impl Piece {
    /// Nothing to do.
    pub const NONE: Self =
        Self { sequence: 0, kv_head: 0, first_tile: 0, first_step: 0, end_step: 0, partial: -1 };
}

/// Tiles that gangs share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Zeroable, Pod)]
pub struct Merge {
    /// Sequence.
    pub sequence: i32,
    /// KV head.
    pub kv_head: u16,
    /// The first of the tiles, as many as blocks of a gang.
    pub first_tile: u16,
    /// The first of the partial results, `[parts, blocks of a gang]`.
    pub partial: i32,
    /// At most 32.
    pub parts: i32,
}

/// Where one KV head of one sequence keeps codes and scales, in bytes from [`SequenceRow::k`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Zeroable, Pod)]
pub struct NarrowRow {
    /// Codes of keys, a row for each slot.
    pub k: u64,
    /// Codes of values.
    pub v: u64,
    /// bf16 pairs `[slots, 2]`: scales of a slot's key and value.
    pub scales: u64,
    /// 1: int8, 2: fp8, 3: k8v4, 4: int4, 0: a head of 16-bit rows.
    pub kind: i32,
    /// Unused.
    pub padding: i32,
}

/// Arguments of the attention kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ExtendArgs {
    /// Queries.
    pub q: Packed,
    /// New keys; not read where committed.
    pub k: Packed,
    /// New values; not read where committed.
    pub v: Packed,
    /// Output.
    pub out: Packed,
    /// f32 `[tokens, query_heads]`, or 0.
    pub lse: DevicePointer,
    /// [`SequenceRow`]s.
    pub sequences: DevicePointer,
    /// [`HeadRow`]s, `[sequences, kv_heads]`.
    pub heads: DevicePointer,
    /// i32 `[sequences]`: tokens cached before this call.
    pub lens: DevicePointer,
    /// Sequences.
    pub num_sequences: i32,
    /// Query heads.
    pub query_heads: i32,
    /// KV heads.
    pub kv_heads: i32,
    /// Factor of the scores.
    pub scale: f32,
    /// Tile kernels: i32 KV heads `[sequences, kv_heads]`, in the order in which to start them.
    pub order: DevicePointer,
    /// Split kernel: i32 pairs (sequence * kv_heads + KV head, split), one block each. Where gangs share tiles: [`Piece`]s
    /// `[rounds, gangs]`.
    pub items: DevicePointer,
    /// Partial results, f32: `[items, 16, head_dim]` then `[items, 16, 2]` of the split kernel,
    /// `[items, 128, head_dim]` then `[items, 128, 2]` where gangs share tiles.
    pub partial: DevicePointer,
    /// i32 `[sequences, kv_heads]`: splits finished, 0 between launches.
    pub finished: DevicePointer,
    /// i32 pairs `[sequences, kv_heads]`: first item, number of splits. Where gangs share tiles: [`Merge`]s.
    pub splits: DevicePointer,
    /// Warp-group kernel: i32 `[2]`, next tile and blocks that are done, 0 between launches.
    pub tickets: DevicePointer,
    /// f32 `[query_heads]`: logits that are in the denominators alone, or 0.
    pub sinks: DevicePointer,
    /// Items of the split kernel; partial results where gangs share tiles.
    pub num_items: i32,
    /// Tiles of the launch, which the warp-group kernel's blocks take in turn; pieces where gangs share them.
    pub num_tiles: i32,
    /// Bound of the scores; read by kernels that were compiled for one.
    pub softcap: f32,
    /// Split kernel, 1: no kernel that may still run writes tables, lengths, or keys and values before the new tokens'.
    pub settled: i32,
    /// Added to the addresses of cached keys and values: where copies of narrow heads lie, or 0.
    pub base: DevicePointer,
    /// Kernels of narrow heads: [`NarrowRow`]s, `[sequences, kv_heads]`.
    pub narrow: DevicePointer,
    /// Split kernel, of one token a sequence, 1: queries and keys come as they are before `append`, which is not
    /// launched.
    pub appends: i32,
    /// Unused.
    pub padding: i32,
    /// With it, as [`AppendArgs::rope`]; pairs are (i, i + head_dim / 2).
    pub rope: DevicePointer,
}

/// Arguments of `append`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AppendArgs {
    /// Queries, or none: then only keys and values are handled.
    pub q: Packed,
    /// New keys.
    pub k: Packed,
    /// New values.
    pub v: Packed,
    /// Rotated queries: not written if none; may be `q`.
    pub q_out: Packed,
    /// Rotated keys: not written if none; may be `k`.
    pub k_out: Packed,
    /// f32 pairs (cos, sin) `[positions, head_dim / 2]` by absolute position, or 0.
    pub rope: DevicePointer,
    /// [`SequenceRow`]s.
    pub sequences: DevicePointer,
    /// [`HeadRow`]s, `[sequences, kv_heads]`.
    pub heads: DevicePointer,
    /// i32 `[sequences]`: tokens cached before this call.
    pub lens: DevicePointer,
    /// Sequences.
    pub num_sequences: i32,
    /// Query heads; 0 if there is no `q`.
    pub query_heads: i32,
    /// KV heads.
    pub kv_heads: i32,
    /// 1: rotate pairs (2i, 2i + 1) instead of (i, i + head_dim / 2).
    pub interleaved: i32,
    /// Write keys and values into the caches: 1 of plain heads, 2 of narrow ones.
    pub commit: i32,
    /// Unused.
    pub padding: i32,
    /// `append_narrow`: [`NarrowRow`]s, `[sequences, kv_heads]`.
    pub narrow: DevicePointer,
    /// [`HeadRow`]s of copies in 16 bits, `[sequences, kv_heads]`.
    pub wide_heads: DevicePointer,
    /// Where copies of new keys of narrow heads go, `[slots, head_dim]`, or 0.
    pub wide_k: DevicePointer,
    /// Where copies of new values go.
    pub wide_v: DevicePointer,
    /// f32 `[kv_heads, head_dim]` that is added to rotated keys, or 0.
    pub key_shift: DevicePointer,
    /// `append_narrow_fed`: f32 `[kv_heads, head_dim, head_dim]` of [`moa_core::key_feedback`], or 0.
    pub key_feedback: DevicePointer,
}

/// Arguments of `widen`: copies of what new tokens see of narrow heads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WidenArgs {
    /// [`SequenceRow`]s.
    pub sequences: DevicePointer,
    /// [`HeadRow`]s, `[sequences, kv_heads]`.
    pub heads: DevicePointer,
    /// [`NarrowRow`]s, `[sequences, kv_heads]`.
    pub narrow: DevicePointer,
    /// [`HeadRow`]s of the copies, `[sequences, kv_heads]`.
    pub wide_heads: DevicePointer,
    /// i32 `[sequences]`: tokens cached before this call.
    pub lens: DevicePointer,
    /// Copies of keys, `[slots, head_dim]`.
    pub wide_k: DevicePointer,
    /// Copies of values.
    pub wide_v: DevicePointer,
    /// Sequences.
    pub num_sequences: i32,
    /// KV heads.
    pub kv_heads: i32,
}

/// Arguments of `put`, which hold what it writes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct PutArgs {
    to: DevicePointer,
    words: i32,
    padding: i32,
    data: [u32; 1020],
}

impl PutArgs {
    /// Whether so many bytes for this address are few enough, and both multiples of 4.
    pub(crate) fn fit(to: DevicePointer, bytes: usize) -> bool {
        to.is_multiple_of(4) && bytes.is_multiple_of(4) && bytes <= 1020 * 4
    }

    /// Arguments with bytes that [fit](Self::fit), which `fill` writes.
    pub(crate) fn new(to: DevicePointer, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Self {
        let mut args = Self { to, words: (bytes / 4) as i32, padding: 0, data: [0; 1020] };
        fill(&mut bytemuck::cast_slice_mut(&mut args.data)[..bytes]);
        args
    }
}

/// Arguments of `influence`: one sequence under causal attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct InfluenceArgs {
    /// Queries.
    pub q: Packed,
    /// Keys.
    pub k: Packed,
    /// Values.
    pub v: Packed,
    /// Attention output.
    pub out: Packed,
    /// Gradient of the objective by the output.
    pub d_out: Packed,
    /// f32 `[tokens, query_heads]`.
    pub lse: DevicePointer,
    /// f32 `[kv_heads, n, n]`, `n = ceil(tokens / 64)`: written up to the diagonal.
    pub blocks: DevicePointer,
    /// Tokens.
    pub tokens: i32,
    /// Query heads.
    pub query_heads: i32,
    /// KV heads.
    pub kv_heads: i32,
    /// 1: sums of absolute values.
    pub absolute: i32,
    /// Factor of the scores.
    pub scale: f32,
    /// Most recent keys that a query sees; at most the tokens.
    pub window: i32,
}

const _: () = {
    assert!(size_of::<InfluenceArgs>() == 160);
    assert!(size_of::<Packed>() == 24);
    assert!(size_of::<SequenceRow>() == 40);
    assert!(size_of::<Piece>() == 16);
    assert!(size_of::<Merge>() == 16);
    assert!(size_of::<HeadRow>() == 20);
    assert!(size_of::<NarrowRow>() == 32);
    assert!(size_of::<ExtendArgs>() == 248);
    assert!(size_of::<AppendArgs>() == 224);
    assert!(size_of::<WidenArgs>() == 64);
    assert!(size_of::<PutArgs>() == 4096);
};

/// A layout as the kernels read it, made once per cache; forks share it.
///
/// Memory holds keys of all plain heads, their values, then codes of keys of all narrow heads, of values, and their
/// scales. Rows of codes are multiples of 16 bytes in all head dimensions that there are kernels for.
#[derive(Debug)]
pub(crate) struct Geometry {
    pub(crate) layout: Arc<LayerLayout>,
    pub(crate) head_dim: usize,
    /// Offsets of plain heads count slots of plain heads.
    pub(crate) rows: Vec<[u32; HeadRow::WORDS]>,
    /// Of each head, if one of them is narrow.
    pub(crate) narrow_rows: Vec<NarrowRow>,
    /// Heads of 16-bit rows, those with the most slots first: they take longest.
    pub(crate) plain: Vec<i32>,
    /// The other heads, in the same order.
    pub(crate) narrow: Vec<i32>,
    /// Bytes of plain heads' keys.
    pub(crate) plain_key_bytes: u64,
    /// Bytes of the whole.
    pub(crate) bytes: u64,
    /// Bytes of each head's slot: of keys, of values, and of scales.
    pub(crate) slot_bytes: Vec<[u64; 3]>,
}

impl Geometry {
    /// Heads whose type the layout does not say have `own`.
    pub(crate) fn new(layout: LayerLayout, own: CacheType, head_dim: usize) -> Result<Self> {
        let kinds: Vec<i32> = layout
            .heads()
            .iter()
            .map(|head| kind_of(head.cache_type().unwrap_or(own)))
            .collect::<Result<_>>()?;
        let slot_bytes: Vec<[u64; 3]> = layout
            .heads()
            .iter()
            .map(|head| {
                let own = head.cache_type().unwrap_or(own);
                let codes = |row: RowType| row.code_bytes(head_dim) as u64;
                let scales =
                    if own.keys().is_narrow() { 2 * RowType::SCALE_BYTES as u64 } else { 0 };
                [codes(own.keys()), codes(own.values()), scales]
            })
            .collect();
        let mut rows: Vec<[u32; HeadRow::WORDS]> =
            layout.head_rows()?.iter().map(HeadRow::words).collect();
        let slots = |head: i32| layout.head(head as usize).slots() as u64;
        let mut widest_first: Vec<i32> = (0..kinds.len() as i32).collect();
        let (plain, narrow): (Vec<_>, Vec<_>) =
            widest_first.iter().copied().partition(|&head| kinds[head as usize] == 0);
        let mut next = 0;
        for &head in &plain {
            // No more slots than the layout has, which fit.
            rows[head as usize][0] = next as u32;
            next += slots(head);
        }
        let bytes =
            |head: i32, part: usize| slots(head).saturating_mul(slot_bytes[head as usize][part]);
        let sum = |heads: &[i32], part| {
            heads.iter().fold(0u64, |n, &head| n.saturating_add(bytes(head, part)))
        };
        let plain_key_bytes = sum(&plain, 0);
        let mut at = plain_key_bytes.saturating_mul(2);
        let mut narrow_rows = match narrow.is_empty() {
            true => Vec::new(),
            false => vec![NarrowRow::default(); kinds.len()],
        };
        for part in 0..3 {
            for &head in &narrow {
                let row = &mut narrow_rows[head as usize];
                row.kind = kinds[head as usize];
                *[&mut row.k, &mut row.v, &mut row.scales][part] = at;
                at = at.saturating_add(bytes(head, part));
            }
        }
        let order =
            |heads: &mut Vec<i32>| heads.sort_by_key(|&head| std::cmp::Reverse(slots(head)));
        order(&mut widest_first);
        let (plain, narrow) = widest_first.iter().partition(|&&head| kinds[head as usize] == 0);
        Ok(Self {
            head_dim,
            rows,
            narrow_rows,
            plain,
            narrow,
            plain_key_bytes,
            bytes: at,
            slot_bytes,
            layout: Arc::new(layout),
        })
    }

    /// Bytes that hold the first `written` slots of each head, neighbours joined.
    pub(crate) fn written(&self, written: usize) -> Vec<std::ops::Range<u64>> {
        let mut ranges = Vec::new();
        for (head, layout) in self.layout.heads().iter().enumerate() {
            let slots = layout.slots().min(written) as u64;
            let [keys, values, scales] = self.slot_bytes[head].map(|bytes| slots * bytes);
            match self.narrow_rows.get(head).filter(|row| row.kind != 0) {
                Some(row) => {
                    ranges.extend([
                        row.k..row.k + keys,
                        row.v..row.v + values,
                        row.scales..row.scales + scales,
                    ]);
                }
                None => {
                    let at = u64::from(self.rows[head][0]) * self.slot_bytes[head][0];
                    let values_at = self.plain_key_bytes + at;
                    ranges.extend([at..at + keys, values_at..values_at + values]);
                }
            }
        }
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let joins = last.end == next.start;
            if joins {
                last.end = next.end;
            }
            joins
        });
        ranges
    }
}

/// The kernels' number of a type.
fn kind_of(own: CacheType) -> Result<i32> {
    match own {
        CacheType::F16 | CacheType::Bf16 => Ok(0),
        CacheType::Int8 => Ok(1),
        CacheType::Fp8 => Ok(2),
        CacheType::K8V4 => Ok(3),
        CacheType::Int4 => Ok(4),
        cache_type => {
            let error = moa_core::Error::CacheType { backend: "cuda", cache_type, head: None };
            Err(Error::from(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use moa_core::Span;

    use super::*;

    /// Every byte belongs to one part of one head, and codes begin at multiples of 16.
    #[test]
    fn heads_of_all_types_fill_their_memory_without_gaps() {
        let spans = [(0, 40), (3, 9), (4, 90), (0, 1), (0, 17), (64, 900)];
        let spans = spans.map(|(sink, window)| Span::new(sink, window).unwrap());
        let types = [
            None,
            Some(CacheType::Int8),
            Some(CacheType::K8V4),
            Some(CacheType::Bf16),
            Some(CacheType::Int4),
            Some(CacheType::Fp8),
        ];
        for own in [CacheType::Bf16, CacheType::Int4] {
            for dim in crate::HEAD_DIMS {
                let layout = LayerLayout::new(&spans, 100, 2).unwrap();
                let layout = layout.with_cache_types(&types).unwrap();
                let geometry = Geometry::new(layout.clone(), own, dim).unwrap();
                assert_eq!(geometry.bytes, layout.bytes(dim, own.slot_bytes(dim)));
                let all = 0..geometry.bytes;
                assert_eq!(geometry.written(100), std::slice::from_ref(&all));
                let parts = geometry.written(1);
                let bytes = |own: CacheType| own.slot_bytes(dim);
                let all = types.iter().map(|head| bytes(head.unwrap_or(own))).sum::<u64>();
                assert_eq!(parts.iter().map(|part| part.end - part.start).sum::<u64>(), all);
                for row in &geometry.narrow_rows {
                    assert_eq!((row.k % 16, row.v % 16, row.scales % 4), (0, 0, 0));
                }
            }
        }
    }

    #[test]
    fn a_cache_of_one_type_is_keys_and_then_values() {
        let spans = [Span::full(10), Span::new(0, 4).unwrap()];
        let layout = LayerLayout::new(&spans, 10, 0).unwrap();
        let geometry = Geometry::new(layout, CacheType::F16, 64).unwrap();
        assert!(geometry.narrow_rows.is_empty() && geometry.narrow.is_empty());
        assert_eq!((geometry.plain_key_bytes, geometry.bytes), (14 * 128, 14 * 256));
        assert_eq!(geometry.rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [0, 10]);
        // Four slots of 128 bytes of each; the second head's keys are followed by the first one's values.
        assert_eq!(geometry.written(4), [0..512, 1280..2304, 3072..3584]);
    }
}
