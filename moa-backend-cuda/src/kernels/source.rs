//! The kernels' sources, part of the library.

use super::compile::{Architecture, HEAD_DIMS};

/// A file of kernels, compiled as one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// RoPE, cache append, advance of the lengths.
    Append,
    /// Split-KV attention for few new tokens.
    Decode,
    /// Cache append of narrow heads, and their copies in 16 bits.
    Narrow,
    /// Split-KV attention for few new tokens over narrow heads.
    NarrowDecode,
    /// Tensor-core attention for chunks, sm_80 and later.
    Tile,
    /// Tensor-core attention for long chunks on sm_90.
    Wgmma,
    /// Influence of attention values.
    Influence,
    /// What a Llama layer needs besides attention and matrix products.
    Ops,
    /// Gradients of a Llama layer, between matrix products.
    Backward,
    /// Choice of tokens.
    Sample,
    /// Products of few rows.
    Gemv,
    /// Weights of 8-bit floats.
    E4m3,
    /// Activations of 8-bit floats, compute capability 8.9 and later.
    E4m3Rows,
    /// Products of few rows with weights of 8-bit floats on sm_90.
    E4m3Wgmma,
    /// Weights in quantised blocks.
    Blocks,
    /// Products of one row with weights in quantised blocks.
    BlocksRow,
    /// [`Decode`](Self::Decode) with a softcap.
    DecodeSoftcap,
    /// [`Tile`](Self::Tile) with a softcap.
    TileSoftcap,
    /// [`Wgmma`](Self::Wgmma) with a softcap.
    WgmmaSoftcap,
    /// [`NarrowDecode`](Self::NarrowDecode) with a softcap.
    NarrowDecodeSoftcap,
    /// Sums over GPUs that read each other's memory.
    AllReduce,
}

/// What `#include` may name.
pub(crate) const HEADERS: [(&str, &str); 8] = [
    ("blocks.cuh", include_str!("../../kernels/blocks.cuh")),
    ("common.cuh", include_str!("../../kernels/common.cuh")),
    ("e4m3.cuh", include_str!("../../kernels/e4m3.cuh")),
    ("narrow.cuh", include_str!("../../kernels/narrow.cuh")),
    ("rows.cuh", include_str!("../../kernels/rows.cuh")),
    ("split.cuh", include_str!("../../kernels/split.cuh")),
    ("tables.cuh", include_str!("../../kernels/tables.cuh")),
    ("wgmma.cuh", include_str!("../../kernels/wgmma.cuh")),
];

impl Source {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::Append,
        Self::Decode,
        Self::Narrow,
        Self::NarrowDecode,
        Self::Tile,
        Self::Wgmma,
        Self::Influence,
        Self::Ops,
        Self::Backward,
        Self::Sample,
        Self::Gemv,
        Self::E4m3,
        Self::E4m3Rows,
        Self::E4m3Wgmma,
        Self::Blocks,
        Self::BlocksRow,
        Self::DecodeSoftcap,
        Self::TileSoftcap,
        Self::WgmmaSoftcap,
        Self::NarrowDecodeSoftcap,
        Self::AllReduce,
    ];

    /// Name of the file, and of what it is compiled for beside.
    pub fn name(self) -> &'static str {
        match self {
            Self::Append => "append.cu",
            Self::Decode => "decode.cu",
            Self::Narrow => "narrow.cu",
            Self::NarrowDecode => "narrow_decode.cu",
            Self::Tile => "tile.cu",
            Self::Wgmma => "wgmma.cu",
            Self::Influence => "influence.cu",
            Self::Ops => "ops.cu",
            Self::Backward => "backward.cu",
            Self::Sample => "sample.cu",
            Self::Gemv => "gemv.cu",
            Self::E4m3 => "e4m3.cu",
            Self::E4m3Rows => "e4m3_rows.cu",
            Self::E4m3Wgmma => "e4m3_wgmma.cu",
            Self::Blocks => "blocks.cu",
            Self::BlocksRow => "blocks_row.cu",
            Self::DecodeSoftcap => "decode.cu-softcap",
            Self::TileSoftcap => "tile.cu-softcap",
            Self::WgmmaSoftcap => "wgmma.cu-softcap",
            Self::NarrowDecodeSoftcap => "narrow_decode.cu-softcap",
            Self::AllReduce => "all_reduce.cu",
        }
    }

    /// Whether there are kernels in it for this head dimension and architecture. Those that do not
    /// depend on the head dimension are compiled under the first one.
    pub fn exists_for(self, head_dim: usize, architecture: Architecture) -> bool {
        match self {
            Self::Wgmma | Self::WgmmaSoftcap => {
                architecture.has_wgmma() && matches!(head_dim, 64 | 128)
            }
            Self::E4m3Rows => architecture.has_e4m3() && head_dim == HEAD_DIMS[0],
            Self::E4m3Wgmma => architecture.has_wgmma() && head_dim == HEAD_DIMS[0],
            _ => self.is_attention() || self.is_narrow() || head_dim == HEAD_DIMS[0],
        }
    }

    /// Whether it is part of attention, so one of [`Kernels`](crate::Kernels).
    pub(crate) fn is_attention(self) -> bool {
        matches!(self, Self::Append | Self::Decode | Self::Tile | Self::Wgmma | Self::Influence)
            || matches!(self, Self::DecodeSoftcap | Self::TileSoftcap | Self::WgmmaSoftcap)
    }

    /// Whether it is compiled for scores with a softcap.
    pub(crate) fn has_softcap(self) -> bool {
        matches!(
            self,
            Self::DecodeSoftcap
                | Self::TileSoftcap
                | Self::WgmmaSoftcap
                | Self::NarrowDecodeSoftcap
        )
    }

    /// The same for scores with a softcap; sources that compute no scores of `extend` are the same with and without.
    pub(crate) fn with_softcap(self) -> Self {
        match self {
            Self::Decode => Self::DecodeSoftcap,
            Self::Tile => Self::TileSoftcap,
            Self::Wgmma => Self::WgmmaSoftcap,
            Self::NarrowDecode => Self::NarrowDecodeSoftcap,
            other => other,
        }
    }

    /// Whether it is part of attention over narrow heads.
    pub(crate) fn is_narrow(self) -> bool {
        matches!(self, Self::Narrow | Self::NarrowDecode | Self::NarrowDecodeSoftcap)
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Append => include_str!("../../kernels/append.cu"),
            Self::Decode | Self::DecodeSoftcap => include_str!("../../kernels/decode.cu"),
            Self::Narrow => include_str!("../../kernels/narrow.cu"),
            Self::NarrowDecode | Self::NarrowDecodeSoftcap => {
                include_str!("../../kernels/narrow_decode.cu")
            }
            Self::Tile | Self::TileSoftcap => include_str!("../../kernels/tile.cu"),
            Self::Wgmma | Self::WgmmaSoftcap => include_str!("../../kernels/wgmma.cu"),
            Self::Influence => include_str!("../../kernels/influence.cu"),
            Self::Ops => include_str!("../../kernels/ops.cu"),
            Self::Backward => include_str!("../../kernels/backward.cu"),
            Self::Sample => include_str!("../../kernels/sample.cu"),
            Self::Gemv => include_str!("../../kernels/gemv.cu"),
            Self::E4m3 => include_str!("../../kernels/e4m3.cu"),
            Self::E4m3Rows => include_str!("../../kernels/e4m3_rows.cu"),
            Self::E4m3Wgmma => include_str!("../../kernels/e4m3_wgmma.cu"),
            Self::Blocks => include_str!("../../kernels/blocks.cu"),
            Self::BlocksRow => include_str!("../../kernels/blocks_row.cu"),
            Self::AllReduce => include_str!("../../kernels/all_reduce.cu"),
        }
    }
}
