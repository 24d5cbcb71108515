//! What the kernels are given, field by field as in `kernels/tables.cuh`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use moa_core::{HeadRow, LayerLayout};

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
    /// Tile kernels: tiles (times the blocks that share them) of the sequences before it in this
    /// launch.
    pub first_item: i32,
    /// 1: `append` has already put the new tokens into the cache.
    pub committed: i32,
    /// Warp-group kernel, 1: some tiles are shared between blocks, and `merge_tiles` follows.
    pub split: i32,
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
    /// Tile kernels: i32 pairs (KV head, blocks that share the keys of each of its tiles)
    /// `[sequences, kv_heads]`, in the order in which to start them. The second is 1 but in the
    /// warp-group kernel where [`SequenceRow::split`] is set.
    pub order: DevicePointer,
    /// Split kernel: i32 pairs (sequence * kv_heads + KV head, split), one block each.
    pub items: DevicePointer,
    /// Partial results, f32: `[items, 16, head_dim]` then `[items, 16, 2]` of the split kernel,
    /// `[num_tiles, 128, head_dim]` then `[num_tiles, 128, 2]` where tiles are shared.
    pub partial: DevicePointer,
    /// i32 `[sequences, kv_heads]`: splits finished, 0 between launches.
    pub finished: DevicePointer,
    /// i32 pairs `[sequences, kv_heads]`: first item, number of splits.
    pub splits: DevicePointer,
    /// Warp-group kernel: i32 `[2]`, next tile and blocks that are done, 0 between launches.
    pub tickets: DevicePointer,
    /// f32 `[query_heads]`: logits that are in the denominators alone, or 0.
    pub sinks: DevicePointer,
    /// Items.
    pub num_items: i32,
    /// Tiles of the launch, each times the blocks that share it; the warp-group kernel's blocks take
    /// them in turn.
    pub num_tiles: i32,
    /// Bound of the scores; read by kernels that were compiled for one.
    pub softcap: f32,
    /// Unused.
    pub padding: i32,
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
    /// 1: write keys and values into the caches.
    pub commit: i32,
    /// Unused.
    pub padding: i32,
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
    assert!(size_of::<HeadRow>() == 20);
    assert!(size_of::<ExtendArgs>() == 216);
    assert!(size_of::<AppendArgs>() == 176);
};

/// A layout as the kernels read it, made once per cache; forks share it.
#[derive(Debug)]
pub(crate) struct Geometry {
    pub(crate) layout: Arc<LayerLayout>,
    pub(crate) rows: Vec<[u32; HeadRow::WORDS]>,
    /// KV heads, those with the most slots first: they take longest.
    pub(crate) widest_first: Vec<i32>,
}

impl Geometry {
    pub(crate) fn new(layout: LayerLayout) -> moa_core::Result<Self> {
        let rows = layout.head_rows()?.iter().map(HeadRow::words).collect();
        let mut widest_first: Vec<i32> = (0..layout.heads().len() as i32).collect();
        widest_first.sort_by_key(|&head| std::cmp::Reverse(layout.head(head as usize).slots()));
        Ok(Self { layout: Arc::new(layout), rows, widest_first })
    }
}
