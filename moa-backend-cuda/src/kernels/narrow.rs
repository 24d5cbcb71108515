//! Launching the kernels of heads of 8 and 4 bits.

use std::sync::Arc;

use cudarc::driver::CudaContext;

use super::{Kernel, Modules};
use crate::kernels::compile::Variant;
use crate::kernels::source::Source;
use crate::kernels::tables::{AppendArgs, ExtendArgs, WidenArgs};
use crate::{Device, RawStream, Result};

/// The kernels of one variant, loaded on a device. They are apart from [`Kernels`](crate::Kernels) as only caches
/// with narrow heads need them.
#[derive(Debug)]
pub(crate) struct NarrowKernels {
    context: Arc<CudaContext>,
    head_dim: usize,
    /// Without feedback, and with it.
    append: [Kernel; 2],
    widen: Kernel,
    /// For at most 8 and at most 16 rows.
    split: [Kernel; 2],
}

impl NarrowKernels {
    /// Of scores with a softcap or without.
    pub(crate) fn load(device: &Device, variant: Variant, has_softcap: bool) -> Result<Self> {
        let decode = match has_softcap {
            true => Source::NarrowDecode.with_softcap(),
            false => Source::NarrowDecode,
        };
        let wants = |source| source == Source::Narrow || source == decode;
        let modules = Modules::load(device, variant, wants)?;
        let dim = variant.head_dim;
        let shared = (1..=4).map(|kind| split_shared_bytes(kind, dim)).max().unwrap_or(0);
        let append = |symbol| modules.kernel(Source::Narrow, symbol, 256, 0);
        let split = |symbol| modules.kernel(decode, symbol, 128, shared);
        Ok(Self {
            context: Arc::clone(device.context()),
            head_dim: dim,
            append: [append("append_narrow")?, append("append_narrow_fed")?],
            widen: modules.kernel(Source::Narrow, "widen", 256, 0)?,
            split: [split("extend_narrow_8")?, split("extend_narrow_16")?],
        })
    }

    /// Rows of a block of `append` and `widen`.
    fn rows(&self) -> usize {
        256 / (self.head_dim / 8).next_power_of_two()
    }

    /// Rotates queries and keys (RoPE), rounds keys and values of narrow heads, and writes them into the caches
    /// and into copies.
    ///
    /// # Safety
    /// As [`Kernels::append`](crate::Kernels::append); where copies are asked for, they have slots for all new tokens.
    pub(crate) unsafe fn append(
        &self,
        stream: RawStream,
        args: &AppendArgs,
        max_tokens: usize,
    ) -> Result<()> {
        let heads = (args.query_heads + 2 * args.kv_heads) as usize;
        let grid = [(max_tokens * heads).div_ceil(self.rows()), args.num_sequences as usize];
        let append = &self.append[usize::from(args.key_feedback != 0)];
        // SAFETY: as the caller promises.
        unsafe { append.launch(&self.context, stream, grid, args) }
    }

    /// Copies what narrow heads hold for the new tokens' queries, at most `max_keys` keys of a head, as 16-bit rows.
    ///
    /// # Safety
    /// As [`append`](Self::append).
    pub(crate) unsafe fn widen(
        &self,
        stream: RawStream,
        args: &WidenArgs,
        max_keys: usize,
    ) -> Result<()> {
        let owners = args.num_sequences as usize * args.kv_heads as usize;
        let grid = [max_keys.div_ceil(self.rows()), owners];
        // SAFETY: as the caller promises.
        unsafe { self.widen.launch(&self.context, stream, grid, args) }
    }

    /// Attention of sequences with at most 8 rows, or 16, over narrow heads of these kinds.
    ///
    /// # Safety
    /// As [`Kernels::extend_split`](crate::Kernels::extend_split).
    pub(crate) unsafe fn extend_split(
        &self,
        is_wide: bool,
        kinds: impl Iterator<Item = i32>,
        stream: RawStream,
        args: &ExtendArgs,
    ) -> Result<()> {
        let shared = kinds.map(|kind| split_shared_bytes(kind, self.head_dim)).max().unwrap_or(0);
        let grid = [args.num_items as usize, 1];
        let arguments = &mut [std::ptr::from_ref(args).cast_mut().cast()];
        let kernel = &self.split[usize::from(is_wide)];
        // SAFETY: as the caller promises; the kernel takes one argument, by value.
        unsafe { kernel.launch_raw(&self.context, shared, stream, grid, arguments) }
    }
}

/// As `kernels/narrow_decode.cu` says, for a kind of [`NarrowRow`](crate::tables::NarrowRow).
fn split_shared_bytes(kind: i32, head_dim: usize) -> usize {
    const STAGES: usize = 3;
    let (k_bytes, v_bytes, keys) = match kind {
        1 | 2 => (head_dim, head_dim, 16),
        3 => (head_dim, head_dim / 2, 16),
        _ => (head_dim / 2, head_dim / 2, 32),
    };
    4 * STAGES * keys * (k_bytes + v_bytes + 4)
}
