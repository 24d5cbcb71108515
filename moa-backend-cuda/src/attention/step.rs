use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::CudaSlice;
use moa_core::HeadRow;

use super::check::check;
use super::schedule::{Dims, Entry, Schedule};
use crate::kernels::Kernels;
use crate::kernels::tables::{AppendArgs, DevicePointer, ExtendArgs, Packed, SequenceRow};
use crate::memory::{Staging, Workspace, address, grow};
use crate::{Cache, Device, Error, RawStream, Result};

/// Which sequences a step extends, and by how much.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// One cache per sequence, all of one layer and none twice.
    pub caches: &'a [&'a Cache],
    /// New tokens of each, at least 1; packed in this order in q, k, v and out.
    pub tokens: &'a [usize],
    /// Query heads.
    pub query_heads: usize,
    /// Whether the step will be replayed while the sequences grow, in a CUDA graph: work lists are
    /// then made for the whole capacity.
    pub grows: bool,
    /// Bounds the scores, as [`Scores::softcap`](moa_core::Scores::softcap).
    pub softcap: Option<f32>,
}

/// Where a step's tensors lie; `[tokens, heads, head_dim]` of the caches' element type.
#[derive(Clone, Copy, Debug)]
pub struct Tensors {
    /// Queries.
    pub q: Packed,
    /// New keys.
    pub k: Packed,
    /// New values.
    pub v: Packed,
    /// Output.
    pub out: Packed,
    /// f32 `[tokens, query_heads]` for the log-sum-exp of each row of scores, or 0.
    pub lse: DevicePointer,
    /// Factor of the scores.
    pub scale: f32,
    /// f32 `[query_heads]`, as [`Scores::sinks`](moa_core::Scores::sinks), or 0.
    pub sinks: DevicePointer,
    /// Rotates queries and keys first; without it they come rotated.
    pub rope: Option<Rope>,
}

/// Rotary embedding fused with the append.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// f32 pairs (cos, sin), `[positions, head_dim / 2]` by absolute position.
    pub table: DevicePointer,
    /// Whether pairs are (2i, 2i + 1) rather than (i, i + head_dim / 2).
    pub interleaved: bool,
    /// Where rotated queries go; may be the place of the queries.
    pub q: Packed,
    /// Where rotated keys go; may be the place of the keys.
    pub k: Packed,
}

/// One layer's attention of a batch, planned on the host and run as often as wanted: `prepare`
/// plans, allocates and uploads, `run` only launches.
///
/// This is what [`CudaBackend`](crate::CudaBackend) does inside; use it directly to run on tensors
/// and streams of another library, or to capture a decode step in a CUDA graph.
#[derive(Debug)]
pub struct Step {
    device: Device,
    schedule: Schedule,
    host: Vec<u8>,
    staging: Staging,
    device_tables: Option<CudaSlice<u8>>,
    prepared: Option<Prepared>,
}

#[derive(Debug)]
struct Prepared {
    kernels: Arc<Kernels>,
    dims: Dims,
    /// Largest number of new tokens among committed and other sequences.
    max_tokens: [usize; 2],
    tables: Tables,
    softcap: Option<f32>,
}

/// Addresses of the tables.
#[derive(Clone, Copy, Debug, Default)]
struct Tables {
    sequences: DevicePointer,
    heads: DevicePointer,
    items: DevicePointer,
    splits: DevicePointer,
    order: DevicePointer,
    lens: DevicePointer,
}

impl Tensors {
    /// With queries and keys where RoPE puts them.
    fn rotated(&self) -> Self {
        match self.rope {
            Some(rope) => Self { q: rope.q, k: rope.k, rope: None, ..*self },
            None => *self,
        }
    }
}

impl Step {
    /// A step with nothing prepared.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            schedule: Schedule::default(),
            host: Vec::new(),
            staging: Staging::new(device),
            device_tables: None,
            prepared: None,
        }
    }

    /// Plans a batch and uploads its tables in the order of `stream`. Nothing is launched and no
    /// cache is changed.
    ///
    /// # Errors
    /// [`Error::Argument`] if the batch does not fit together, [`Error::Core`] with
    /// [`CapacityExceeded`](moa_core::Error::CapacityExceeded) if a cache has no room,
    /// [`Error::NoNvrtc`] or [`Error::Compile`] if kernels cannot be compiled,
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    ///
    /// # Safety
    /// `stream` is a stream of the device's primary context and not being captured. What an earlier
    /// preparation of this step or workspace launched, was launched on the same stream.
    pub unsafe fn prepare(
        &mut self,
        workspace: &mut Workspace,
        batch: &Batch<'_>,
        stream: RawStream,
    ) -> Result<()> {
        self.prepared = None;
        let first = check(batch)?;
        self.device.bind()?;
        let kernels = self.device.kernels_of(first.variant(), batch.softcap.is_some())?;
        let dims = Dims {
            query_heads: batch.query_heads,
            kv_heads: first.as_ref().layout().heads().len(),
            wgmma: kernels.has_wgmma(),
            multiprocessors: self.device.multiprocessors(),
        };
        let entries: Vec<Entry<'_>> = batch
            .caches
            .iter()
            .zip(batch.tokens)
            .map(|(cache, &tokens)| Entry {
                geometry: cache.geometry(),
                len: cache.as_ref().len(),
                tokens,
                grows: batch.grows,
            })
            .collect();
        self.schedule.fill(&dims, &entries);
        let most = self.schedule.launches.iter().map(|l| l.blocks.max(l.items.len())).max();
        if most.is_some_and(|most| i32::try_from(most).is_err()) {
            return Err(Error::argument("Step::prepare", "work items", "fewer than 2^31", "more"));
        }
        let mut tables = self.fill_tables(batch, &entries);
        // SAFETY: as the caller promises; the tables have room for what is uploaded.
        unsafe {
            let len = self.host.len();
            grow(&self.device, stream, "tables", &mut self.device_tables, len)?;
            workspace.reserve(&self.schedule, first.as_ref().head_dim(), stream)?;
            let Some(base) = self.device_tables.as_ref().map(address) else { return Ok(()) };
            self.staging.upload(&self.host, base, stream)?;
            tables.rebase(base);
        }
        let longest = |places: &[usize]| places.iter().map(|&i| batch.tokens[i]).max().unwrap_or(0);
        let (committed, others) = self.schedule.order.split_at(self.schedule.committed());
        let max_tokens = [longest(committed), longest(others)];
        self.prepared =
            Some(Prepared { kernels, dims, max_tokens, tables, softcap: batch.softcap });
        Ok(())
    }

    /// Launches what was prepared: rotates and appends, computes attention. May be captured.
    ///
    /// It does not know whether it ran: afterwards, record the tokens with [`Cache::advance`].
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing is prepared or `workspace` is not the one of `prepare`,
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `stream` is the one of `prepare`. The tensors have the shapes that `prepare` was told; they,
    /// the caches, this step and the workspace stay alive and are not written by others until the
    /// stream has passed this call, and what wrote them before it is ordered before it. The caches
    /// were opened or forked before a synchronisation with the device's own stream. The lengths on the device
    /// are those of the caches, and no sequence exceeds its capacity.
    pub unsafe fn run(
        &self,
        workspace: &Workspace,
        tensors: &Tensors,
        stream: RawStream,
    ) -> Result<()> {
        let (committed, all) = (self.schedule.committed(), self.schedule.order.len());
        // SAFETY: as the caller promises.
        unsafe {
            self.append(tensors, 0..committed, true, stream)?;
            if tensors.rope.is_some() {
                self.append(tensors, committed..all, false, stream)?;
            }
            let rotated = tensors.rotated();
            self.attend(workspace, &rotated, stream)?;
            self.append(&rotated, committed..all, true, stream)
        }
    }

    /// The attention of [`run`](Self::run) alone, on queries and keys that come rotated, without
    /// writing to the caches: the output of a step once more, or of tokens that are not kept. Steps of
    /// one token and others whose new keys may go first read these from the caches, where a `run` of
    /// the same preparation has to have written them.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn attend(
        &self,
        workspace: &Workspace,
        tensors: &Tensors,
        stream: RawStream,
    ) -> Result<()> {
        let Prepared { kernels, .. } = self.prepared()?;
        let scratch = workspace.addresses(&self.schedule, kernels.variant().head_dim)?;
        for launch in &self.schedule.launches {
            let mut args = self.extend_args(tensors, launch.places.clone())?;
            args.items += launch.items.start as u64 * 8;
            args.num_items = launch.items.len() as i32;
            args.num_tiles = launch.blocks as i32;
            [args.partial, args.tickets, args.finished] = scratch;
            // SAFETY: as the caller promises.
            unsafe {
                kernels.extend(launch.path, stream, &args)?;
                if launch.shared {
                    kernels.merge_tiles(stream, &args)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the new tokens to the lengths on the device, for the next replay of a captured step.
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing is prepared, [`Error::Driver`].
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn advance(&self, stream: RawStream) -> Result<()> {
        let Prepared { kernels, tables, .. } = self.prepared()?;
        // SAFETY: the tables have an entry for each sequence.
        unsafe { kernels.advance(stream, tables.lens, tables.sequences, self.schedule.order.len()) }
    }

    /// Sequences of the batch that was planned last.
    pub(crate) fn sequences(&self) -> usize {
        self.schedule.order.len()
    }

    /// Address of the lengths on the device, one i32 per sequence.
    pub(crate) fn lens(&self) -> Result<DevicePointer> {
        Ok(self.prepared()?.tables.lens)
    }

    /// Kernels that `run` launches.
    pub fn launches(&self) -> usize {
        let committed = self.schedule.committed();
        let appends =
            usize::from(committed > 0) + usize::from(committed < self.schedule.order.len());
        let merges = self.schedule.launches.iter().filter(|launch| launch.shared).count();
        self.schedule.launches.len() + merges + appends
    }

    fn prepared(&self) -> Result<&Prepared> {
        let missing = || Error::argument("Step::run", "step", "prepared", "not prepared");
        self.prepared.as_ref().ok_or_else(missing)
    }

    fn fill_tables(&mut self, batch: &Batch<'_>, entries: &[Entry<'_>]) -> Tables {
        let firsts: Vec<usize> = batch
            .tokens
            .iter()
            .scan(0, |next, &n| Some(std::mem::replace(next, *next + n)))
            .collect();
        let (schedule, host) = (&self.schedule, &mut self.host);
        host.clear();
        let place = |(place, &index): (usize, &usize)| SequenceRow {
            k: batch.caches[index].keys(),
            v: batch.caches[index].values(),
            first: firsts[index] as i64,
            tokens: batch.tokens[index] as i32,
            first_item: schedule.first_items[place] as i32,
            committed: i32::from(place < schedule.committed()),
            split: i32::from(
                schedule.launches.iter().any(|l| l.shared && l.places.contains(&place)),
            ),
        };
        let sequences: Vec<SequenceRow> = schedule.order.iter().enumerate().map(place).collect();
        let in_order = || schedule.order.iter().map(|&index| &entries[index]);
        let heads: Vec<_> = in_order().flat_map(|entry| &entry.geometry.rows).copied().collect();
        let lens: Vec<i32> = in_order().map(|entry| entry.len as i32).collect();
        Tables {
            sequences: push(host, &sequences),
            heads: push(host, &heads),
            items: push(host, &schedule.items),
            splits: push(host, &schedule.splits),
            order: push(host, &schedule.heads),
            lens: push(host, &lens),
        }
    }

    fn extend_args(&self, tensors: &Tensors, places: Range<usize>) -> Result<ExtendArgs> {
        let Prepared { dims, tables, softcap, .. } = self.prepared()?;
        let at = tables.at(places.start as u64, dims.kv_heads as u64);
        Ok(ExtendArgs {
            q: tensors.q,
            k: tensors.k,
            v: tensors.v,
            out: tensors.out,
            lse: tensors.lse,
            sequences: at.sequences,
            heads: at.heads,
            lens: at.lens,
            num_sequences: places.len() as i32,
            query_heads: dims.query_heads as i32,
            kv_heads: dims.kv_heads as i32,
            scale: tensors.scale,
            order: at.order,
            items: at.items,
            partial: 0,
            finished: 0,
            splits: at.splits,
            tickets: 0,
            sinks: tensors.sinks,
            num_items: 0,
            num_tiles: 0,
            softcap: softcap.unwrap_or(0.0),
            padding: 0,
        })
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn append(
        &self,
        tensors: &Tensors,
        places: Range<usize>,
        commit: bool,
        stream: RawStream,
    ) -> Result<()> {
        let Prepared { kernels, dims, tables, max_tokens, .. } = self.prepared()?;
        if places.is_empty() {
            return Ok(());
        }
        let max_tokens = max_tokens[usize::from(places.start == self.schedule.committed())];
        let at = tables.at(places.start as u64, dims.kv_heads as u64);
        // Without rotation queries stay where they are.
        let (query_heads, q) = match tensors.rope {
            Some(_) => (dims.query_heads, tensors.q),
            None => (0, Packed::NONE),
        };
        let args = AppendArgs {
            q,
            k: tensors.k,
            v: tensors.v,
            q_out: tensors.rope.map_or(Packed::NONE, |rope| rope.q),
            k_out: tensors.rope.map_or(Packed::NONE, |rope| rope.k),
            rope: tensors.rope.map_or(0, |rope| rope.table),
            sequences: at.sequences,
            heads: at.heads,
            lens: at.lens,
            num_sequences: places.len() as i32,
            query_heads: query_heads as i32,
            kv_heads: dims.kv_heads as i32,
            interleaved: i32::from(tensors.rope.is_some_and(|rope| rope.interleaved)),
            commit: i32::from(commit),
            padding: 0,
        };
        // SAFETY: as the caller promises.
        unsafe { kernels.append(stream, &args, max_tokens) }
    }
}

impl Tables {
    fn rebase(&mut self, base: DevicePointer) {
        let Self { sequences, heads, items, splits, order, lens } = self;
        for offset in [sequences, heads, items, splits, order, lens] {
            *offset += base;
        }
    }

    /// The tables from a place on; items are counted apart.
    fn at(&self, place: u64, kv_heads: u64) -> Self {
        Self {
            sequences: self.sequences + place * size_of::<SequenceRow>() as u64,
            heads: self.heads + place * kv_heads * size_of::<HeadRow>() as u64,
            items: self.items,
            splits: self.splits + place * kv_heads * 8,
            order: self.order + place * kv_heads * 8,
            lens: self.lens + place * 4,
        }
    }
}

/// Adds a table, aligned for any of its elements; returns where.
fn push<T: Pod>(host: &mut Vec<u8>, table: &[T]) -> u64 {
    host.resize(host.len().next_multiple_of(16), 0);
    let at = host.len();
    host.extend_from_slice(bytemuck::cast_slice(table));
    at as u64
}
