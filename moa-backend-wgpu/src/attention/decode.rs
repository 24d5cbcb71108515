use cubecl::prelude::SequenceArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};
use moa_core::{Append, AttentionShape, CacheType};

use super::{Call, Fresh, Limits, arg};
use crate::kernels::codes::{load_parts, load_words};
use crate::kernels::decode::{DECODE_UNITS, HeldLaunch, NewLaunch, Shape, decode};
use crate::kernels::join::{JOIN_UNITS, join};
use crate::kernels::keys::{keys, split_keys};
use crate::{Cache, Device, Result, Tensor};

/// Most query heads per KV head: a unit holds a share of each one's query and output in registers.
const MAX_GROUP: usize = 8;

/// Most sequences of one dispatch: the kernel has branches for each one's buffers.
const MAX_SEQUENCES: usize = 8;

/// Most sequences whose partial results are held at once.
const MAX_RUN: usize = 4096;

/// Most bytes of their partial results.
const PARTIAL_BYTES: u64 = 256 << 20;

/// What all sequences with one new token share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decode {
    pub(super) shape: Shape,
    /// Vectors of four elements of a row.
    pub(super) vectors: usize,
}

/// Sequences next to each other that have one new token each, and room for partial results.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) sequences: usize,
    pub(super) splits: u32,
    pub(super) partial: Option<[Handle; 2]>,
}

impl Decode {
    /// `None` where [`crate::kernels::attend`] has to do: rows that are not whole loads, more query heads
    /// per KV head than registers hold.
    pub(crate) fn new(call: &Call<'_>, limits: &Limits) -> Option<Self> {
        let AttentionShape { head_dim, .. } = call.shape;
        Self::of(call.device, limits, call.own, call.shape.group(), head_dim, call.has_cap())
    }

    /// [`Decode::new`] of heads of this type.
    pub(crate) fn of(
        device: &Device,
        limits: &Limits,
        own: CacheType,
        group: usize,
        head_dim: usize,
        has_cap: bool,
    ) -> Option<Self> {
        let parts = load_parts(own.keys());
        if !head_dim.is_multiple_of(4 * parts) || group > MAX_GROUP {
            return None;
        }
        let lanes = (head_dim / (4 * parts)).next_power_of_two();
        let bindings = limits.bindings.saturating_sub(5) / 3;
        let shape = Shape {
            sequences: bindings.clamp(1, MAX_SEQUENCES),
            group,
            lanes,
            own,
            planes: lanes <= device.plane_units(),
            native: device.converts_f16() && own == CacheType::F16,
            partial: true,
            has_cap,
            recorded: false,
            turned: false,
        };
        let units = DECODE_UNITS.max(JOIN_UNITS);
        (shape.shared_bytes() <= limits.shared_bytes && units <= limits.units)
            .then_some(Self { shape, vectors: head_dim / 4 })
    }

    /// A run of the sequences at the start of these that have one new token.
    pub(crate) fn run(&self, call: &Call<'_>, batch: &[Append<'_, Cache>]) -> Result<Run> {
        let sequences = batch.iter().take(MAX_RUN).take_while(|append| append.tokens == 1).count();
        let splits = |cache: &Cache| {
            let len = cache.as_ref().len() as u32;
            let heads = &cache.groups()[call.group].heads;
            let counts = heads.iter().map(|h| keys(h, len, len + 1).count);
            counts.map(|count| count.div_ceil(split_keys(count))).max().unwrap_or(1)
        };
        let splits =
            batch[..sequences].iter().map(|append| splits(append.cache)).max().unwrap_or(1);
        // Results do not depend on where a batch is cut.
        let each = call.shape.query_heads * splits as usize * self.vectors * 16;
        let most = call.device.max_buffer_bytes().min(PARTIAL_BYTES) as usize / each.max(1);
        let sequences = if splits == 1 { sequences } else { sequences.min(most.max(1)) };
        let partial = match splits {
            1 => None,
            _ => {
                let rows = sequences.saturating_mul(call.shape.query_heads * splits as usize);
                let numbers = rows.saturating_mul(4 * self.vectors);
                Some(call.device.alloc_two("partial results", numbers, 2 * rows)?)
            }
        };
        Ok(Run { sequences, splits, partial })
    }

    /// Queues a run, whose first token is `first`.
    pub(crate) fn launch(
        &self,
        call: &Call<'_>,
        batch: &[Append<'_, Cache>],
        first: usize,
        run: &Run,
        fresh: &Fresh,
    ) {
        let group = match batch.first() {
            Some(append) => &append.cache.groups()[call.group],
            None => return,
        };
        let [key_load, value_load] = [call.own.keys(), call.own.values()].map(load_words);
        let (out, stats) = match &run.partial {
            Some([out, stats]) => (out, stats),
            None => (call.out.handle(), call.lse.handle()),
        };
        for (number, chunk) in batch.chunks(self.shape.sequences).enumerate() {
            let at = number * self.shape.sequences;
            let held = chunk.iter().map(|Append { cache, .. }| {
                let store = cache.store(call.group);
                HeldLaunch::new(
                    arg(&store.keys),
                    arg(&store.values),
                    arg(&cache.groups()[call.group].table),
                    cache.as_ref().len() as u32,
                )
            });
            let new = NewLaunch::new(
                arg(&fresh.q),
                arg(&fresh.k),
                arg(&fresh.v),
                arg(out),
                arg(stats),
                (first + at) as u32,
                at as u32,
                call.shape.query_heads as u32,
                call.shape.kv_heads as u32,
                self.vectors as u32,
                call.scale(),
                call.cap(),
                fresh.scales,
            );
            // SAFETY: shapes were checked, caches are filled up to their lengths and have room for a
            // token, and the outputs have room as planned.
            unsafe {
                decode::launch_unchecked(
                    call.device.client(),
                    CubeCount::Static(run.splits, group.heads.len() as u32, chunk.len() as u32),
                    CubeDim::new_1d(DECODE_UNITS as u32),
                    key_load,
                    value_load,
                    new,
                    held.collect::<SequenceArg<_>>(),
                    SequenceArg::new(),
                    Shape { sequences: chunk.len(), partial: run.partial.is_some(), ..self.shape },
                );
            }
        }
        let (outs, heads) = ([call.out, call.lse], [group.heads.len(), call.shape.query_heads]);
        // SAFETY: as above.
        unsafe { self.join(call.device, run, first, &group.table, outs, heads) };
    }

    /// Queues the sum of a run's partial results, if it has any: of `heads` KV heads of `table` out of so many query heads in all.
    ///
    /// # Safety
    /// The outputs have rows for the run's tokens, the first of which is `first`, and the table has these heads.
    pub(super) unsafe fn join(
        &self,
        device: &Device,
        run: &Run,
        first: usize,
        table: &Handle,
        [out, lse]: [&Tensor; 2],
        [heads, query_heads]: [usize; 2],
    ) {
        let Some([partial, partial_stats]) = &run.partial else { return };
        let group = self.shape.group;
        // SAFETY: as the caller promises; partial results are those of the run.
        unsafe {
            join::launch_unchecked(
                device.client(),
                CubeCount::Static((heads * group) as u32, run.sequences as u32, 1),
                CubeDim::new_1d(JOIN_UNITS as u32),
                arg(partial),
                arg(partial_stats),
                arg(table),
                arg(out.handle()),
                arg(lse.handle()),
                first as u32,
                query_heads as u32,
                group as u32,
                run.splits,
                self.vectors as u32,
                self.vectors.next_power_of_two(),
            );
        }
    }
}
