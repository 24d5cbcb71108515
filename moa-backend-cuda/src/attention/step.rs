use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::CudaSlice;
use moa_core::HeadRow;

use super::check::check;
use super::schedule::{Dims, Entry, Group, Launch, Narrow, Path, Schedule};
use crate::graph::is_capturing;
use crate::kernels::Kernels;
use crate::kernels::narrow::NarrowKernels;
use crate::kernels::tables::{
    AppendArgs, DevicePointer, ExtendArgs, Merge, NarrowRow, Packed, Piece, PutArgs, SequenceRow,
    WidenArgs,
};
use crate::memory::{Scratch, Staging, Workspace, address, grow};
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
    /// f32 `[kv_heads, head_dim, head_dim]`, as [`ExtendInputs::key_feedback`](moa_core::ExtendInputs::key_feedback), or 0.
    pub key_feedback: DevicePointer,
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
    /// Whether nobody reads these two places afterwards: steps of one token a sequence then rotate in registers, and
    /// may leave the places as they are.
    pub scratch: bool,
    /// f32 `[kv_heads, head_dim]` that is added to rotated keys, as softmax does not see a vector that all keys of a
    /// head have in common; or 0.
    pub key_shift: DevicePointer,
}

/// One layer's attention of a batch, planned on the host and run as often as wanted: `prepare`
/// plans, allocates and uploads, `run` only launches.
///
/// This is what [`CudaBackend`](crate::CudaBackend) does inside; use it directly to run on tensors
/// and streams of another library, or to capture a decode step in a CUDA graph.
#[derive(Debug)]
pub struct Step {
    device: Device,
    /// Shared with steps of other layers that are cut alike.
    schedule: Arc<Schedule>,
    host: Vec<u8>,
    staging: Staging,
    device_tables: Option<CudaSlice<u8>>,
    prepared: Option<Prepared>,
}

#[derive(Clone, Debug)]
pub(super) struct Prepared {
    kernels: Arc<Kernels>,
    /// Where a sequence has narrow heads.
    narrow: Option<Arc<NarrowKernels>>,
    dims: Dims,
    /// New tokens of the sequence at each place.
    tokens: Vec<usize>,
    /// Kinds of narrow heads, and whether sequences that have some have plain ones too.
    kinds: Vec<i32>,
    is_mixed: bool,
    tables: Tables,
    softcap: Option<f32>,
    /// Of copies of narrow heads; the lengths are those of the others.
    copies: Tables,
}

/// Addresses of the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tables {
    sequences: DevicePointer,
    heads: DevicePointer,
    items: DevicePointer,
    splits: DevicePointer,
    order: DevicePointer,
    pieces: DevicePointer,
    merges: DevicePointer,
    lens: DevicePointer,
    /// 0: no sequence has narrow heads.
    narrow: DevicePointer,
}

/// What a launch of `append` does besides rotating.
#[derive(Clone, Copy, Debug, Default)]
struct Commit {
    /// Writes plain heads into the caches.
    plain: bool,
    /// Writes narrow heads into the caches.
    narrow: bool,
    /// Table of copies' heads, and where copies of keys and values go, or 0.
    wide: [DevicePointer; 3],
}

/// Which new tokens attention writes into the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeps {
    /// None.
    None,
    /// Those of heads that it copies.
    Copied,
    /// All, of which each sequence has one; they come before rotation.
    All,
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
            schedule: Arc::default(),
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
        let mut host = std::mem::take(&mut self.host);
        host.clear();
        let planned = self.plan(batch, 0, None, &mut host);
        self.host = host;
        let Some(mut prepared) = planned? else { return Ok(()) };
        // SAFETY: as the caller promises; the tables have room for what is uploaded.
        unsafe {
            let len = self.host.len();
            grow(&self.device, stream, "tables", &mut self.device_tables, len)?;
            workspace.reserve(&self.schedule, prepared.head_dim(), stream)?;
            let Some(base) = self.device_tables.as_ref().map(address) else { return Ok(()) };
            match PutArgs::fit(base, len) {
                true => {
                    let args = PutArgs::new(base, len, |bytes| bytes.copy_from_slice(&self.host));
                    prepared.kernels.put(stream, &args)?;
                }
                false => self.staging.upload(&self.host, base, stream)?,
            }
            prepared.rebase(base);
        }
        self.prepared = Some(prepared);
        Ok(())
    }

    /// Plans a batch and `vacant` places more, and adds its tables to `host`, from whose start their addresses count. A
    /// launch over splits gets as many items as `room` says for its number and theirs; `None` where these are more, or
    /// places would be vacant among copies of narrow heads.
    pub(super) fn plan(
        &mut self,
        batch: &Batch<'_>,
        vacant: usize,
        room: Option<&dyn Fn(usize, usize) -> usize>,
        host: &mut Vec<u8>,
    ) -> Result<Option<Prepared>> {
        let first = check(batch)?;
        self.device.bind()?;
        let kernels = self.device.kernels_of(first.variant(), batch.softcap.is_some())?;
        let dims = Dims {
            query_heads: batch.query_heads,
            kv_heads: first.as_ref().layout().heads().len(),
            wgmma: kernels.has_wgmma(),
            // With a softcap they were not measured.
            gangs: batch.softcap.is_none(),
            multiprocessors: self.device.multiprocessors(),
        };
        let mut entries: Vec<Entry<'_>> = batch
            .caches
            .iter()
            .zip(batch.tokens)
            .map(|(cache, &tokens)| Entry {
                geometry: cache.geometry(),
                len: cache.as_ref().len(),
                tokens,
                grows: batch.grows,
                is_vacant: false,
            })
            .collect();
        let like = Entry { is_vacant: true, ..entries[0] };
        entries.extend(std::iter::repeat_n(like, vacant));
        if Arc::get_mut(&mut self.schedule).is_none() {
            self.schedule = Arc::default();
        }
        if let Some(schedule) = Arc::get_mut(&mut self.schedule) {
            schedule.fill(&dims, &entries);
            let fits = room.is_none_or(|room| schedule.cut.fill_up(room));
            if !fits || (vacant > 0 && !schedule.groups.is_empty()) {
                return Ok(None);
            }
        }
        let geometries = || batch.caches.iter().map(|cache| cache.geometry());
        let narrow = match geometries().any(|geometry| !geometry.narrow.is_empty()) {
            true => Some(self.device.narrow_kernels(first.variant(), batch.softcap.is_some())?),
            false => None,
        };
        let mut kinds: Vec<i32> =
            geometries().flat_map(|own| &own.narrow_rows).map(|row| row.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let is_mixed = geometries().any(|own| !own.narrow.is_empty() && !own.plain.is_empty());
        let most = self.schedule.launches().map(|l| l.blocks.max(l.items.len())).max();
        if most.is_some_and(|most| i32::try_from(most).is_err()) {
            return Err(Error::argument("Step::prepare", "work items", "fewer than 2^31", "more"));
        }
        let slots = self.schedule.groups.iter().map(|group| group.slots).max().unwrap_or(0);
        if u32::try_from(slots).is_err() {
            return Err(Error::argument(
                "Step::prepare",
                "visible slots",
                "fewer than 2^32",
                slots,
            ));
        }
        let (tables, copies) = self.fill_tables(batch, &entries, host);
        let tokens = self.schedule.order.iter().map(|&index| entries[index].tokens).collect();
        let softcap = batch.softcap;
        Ok(Some(Prepared {
            kernels,
            narrow,
            dims,
            tokens,
            kinds,
            is_mixed,
            tables,
            softcap,
            copies,
        }))
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
        let (committed, all) = (self.schedule.committed, self.schedule.order.len());
        let (before, after) = (0..committed, committed..all);
        let rotates = tensors.rope.is_some();
        if self.appends_in_attention(tensors)? {
            // SAFETY: as the caller promises.
            return unsafe { self.attend_and_commit(workspace, tensors, Keeps::All, stream) };
        }
        let is_mixed = self.prepared()?.is_mixed;
        let places = |of, among: &Range<usize>| self.schedule.places(of, among.clone());
        let plain = Commit { plain: true, ..Commit::default() };
        let both = Commit { narrow: true, ..plain };
        // SAFETY: as the caller promises.
        unsafe {
            self.append(tensors, places(Narrow::None, &before), plain, stream)?;
            self.append(tensors, places(Narrow::Codes, &before), both, stream)?;
            if rotates || is_mixed {
                self.append(tensors, places(Narrow::Copies, &before), plain, stream)?;
            }
            if rotates {
                for of in [Narrow::None, Narrow::Copies] {
                    self.append(tensors, places(of, &after), Commit::default(), stream)?;
                }
            }
            let rotated = tensors.rotated();
            self.attend_and_commit(workspace, &rotated, Keeps::Copied, stream)?;
            self.append(&rotated, places(Narrow::None, &after), plain, stream)?;
            if is_mixed {
                self.append(&rotated, places(Narrow::Copies, &after), plain, stream)?;
            }
        }
        Ok(())
    }

    /// Whether the kernels of attention write the new tokens into the caches, and rotate: where each sequence has one,
    /// all heads are plain, and nobody wants what is rotated.
    fn appends_in_attention(&self, tensors: &Tensors) -> Result<bool> {
        let rotates = tensors
            .rope
            .is_none_or(|rope| rope.scratch && !rope.interleaved && rope.key_shift == 0);
        Ok(rotates && self.are_plain_tokens()? && tensors.k.data != 0 && tensors.v.data != 0)
    }

    /// Whether each sequence has one new token and all heads are plain.
    fn are_plain_tokens(&self) -> Result<bool> {
        let Schedule { committed, order, narrow, cut, .. } = &*self.schedule;
        let tokens = &self.prepared()?.tokens;
        Ok(*committed == order.len()
            && tokens.iter().all(|&tokens| tokens == 1)
            && narrow.iter().all(|own| *own == Narrow::None)
            && cut.launches.iter().all(|launch| launch.path == Path::Split))
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
        // SAFETY: as the caller promises.
        unsafe { self.attend_and_commit(workspace, tensors, Keeps::None, stream) }
    }

    /// Attention, and the append of the new tokens that it is to keep.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn attend_and_commit(
        &self,
        workspace: &Workspace,
        tensors: &Tensors,
        keeps: Keeps,
        stream: RawStream,
    ) -> Result<()> {
        let Prepared { kernels, tables, copies, .. } = self.prepared()?;
        let head_dim = kernels.variant().head_dim;
        let scratch = workspace.addresses(&self.schedule, head_dim)?;
        let Schedule { cut, copies: copied, groups, .. } = &*self.schedule;
        for launch in &cut.launches {
            let args = self.extend_args(tensors, launch, tables, &scratch, 0)?;
            let args = ExtendArgs {
                appends: i32::from(keeps == Keeps::All),
                rope: tensors.rope.map_or(0, |rope| rope.table),
                ..args
            };
            // SAFETY: as the caller promises.
            unsafe { self.launch(launch, stream, &args) }?;
        }
        for group in groups {
            // SAFETY: as the caller promises; the scratch has room for each group.
            unsafe { self.copy(group, tensors, &scratch, keeps != Keeps::None, stream) }?;
            for launch in &copied.launches[group.launches.clone()] {
                let args = self.extend_args(tensors, launch, copies, &scratch, scratch.copies)?;
                // SAFETY: as the caller promises.
                unsafe { self.launch(launch, stream, &args) }?;
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn launch(&self, launch: &Launch, stream: RawStream, args: &ExtendArgs) -> Result<()> {
        let Prepared { kernels, narrow, kinds, .. } = self.prepared()?;
        // SAFETY: as the caller promises.
        unsafe {
            match (launch.path, narrow) {
                (path @ (Path::Narrow8 | Path::Narrow16), Some(narrow)) => {
                    let is_wide = path == Path::Narrow16;
                    narrow.extend_split(is_wide, kinds.iter().copied(), stream, args)?;
                }
                (_, _) if launch.gang > 0 => {
                    kernels.extend_gangs(stream, args, launch.gang)?;
                    kernels.merge_tiles(stream, args, launch.merges.len(), launch.gang)?;
                }
                (path, _) => kernels.extend(path, stream, args)?,
            }
        }
        Ok(())
    }

    /// Copies what a group's narrow heads hold, and the new tokens, rounded.
    ///
    /// # Safety
    /// As [`run`](Self::run); the scratch has room for the group.
    unsafe fn copy(
        &self,
        group: &Group,
        tensors: &Tensors,
        scratch: &Scratch,
        keeps: bool,
        stream: RawStream,
    ) -> Result<()> {
        let Prepared { kernels, narrow, dims, tables, copies, .. } = self.prepared()?;
        let Some(narrow) = narrow else { return Ok(()) };
        let (first, kv_heads) = (group.places.start as u64, dims.kv_heads as u64);
        let (at, wide) = (tables.at(first, kv_heads), copies.at(first, kv_heads));
        let wide_v = scratch.copies + (group.slots * kernels.variant().head_dim * 2) as u64;
        let args = WidenArgs {
            sequences: at.sequences,
            heads: at.heads,
            narrow: at.narrow,
            wide_heads: wide.heads,
            lens: at.lens,
            wide_k: scratch.copies,
            wide_v,
            num_sequences: group.places.len() as i32,
            kv_heads: dims.kv_heads as i32,
        };
        let commit =
            Commit { plain: false, narrow: keeps, wide: [wide.heads, scratch.copies, wide_v] };
        // SAFETY: as the caller promises.
        unsafe {
            narrow.widen(stream, &args, group.max_keys)?;
            self.append(tensors, group.places.clone(), commit, stream)
        }
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

    /// The caller's sequences in the order in which the step's tables have them.
    pub fn order(&self) -> &[usize] {
        &self.schedule.order
    }

    /// Reads the lengths that sequences have before a step at this address from now on, one i32 for each in
    /// [`order`](Self::order), in place of a table of its own: for steps that are replayed by somebody who brings
    /// the lengths of all layers at once. Until it is prepared again.
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing is prepared.
    ///
    /// # Safety
    /// As [`run`](Self::run) for what lies there.
    pub unsafe fn read_lengths_at(&mut self, lengths: DevicePointer) -> Result<()> {
        self.prepared()?;
        if let Some(prepared) = &mut self.prepared {
            prepared.tables.lens = lengths;
            prepared.copies.lens = lengths;
        }
        Ok(())
    }

    /// Takes what was planned, with tables that begin at `base`.
    pub(super) fn accept(&mut self, mut prepared: Prepared, base: DevicePointer) {
        prepared.rebase(base);
        self.prepared = Some(prepared);
    }

    /// Takes over what another step was given, but reads the lengths where it did before.
    pub(super) fn take_over(&mut self, other: Self) {
        let Some(mut prepared) = other.prepared else { return };
        if let Some(own) = &self.prepared {
            (prepared.tables.lens, prepared.copies.lens) = (own.tables.lens, own.copies.lens);
        }
        (self.prepared, self.schedule) = (Some(prepared), other.schedule);
    }

    /// Items of the launch of this number, which are those of a split kernel, or none.
    pub(super) fn items_of(&self, launch: usize) -> usize {
        self.schedule.cut.launches.get(launch).map_or(0, |launch| launch.items.len())
    }

    pub(super) fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Whether a step launches the same as this one by other tables at the same places, once its own begin where this one's do.
    pub(super) fn launches_like(&self, other: &Self) -> bool {
        let (Some(own), Some(others)) = (&self.prepared, &other.prepared) else { return false };
        let tables = |of: &Prepared| {
            // Lengths may lie elsewhere.
            [of.tables, of.copies].map(|tables| Tables { lens: 0, ..tables })
        };
        let (schedule, others_schedule) = (&self.schedule, &other.schedule);
        Arc::ptr_eq(&own.kernels, &others.kernels)
            && own.dims == others.dims
            && own.tokens == others.tokens
            && own.kinds == others.kinds
            && own.is_mixed == others.is_mixed
            && own.softcap == others.softcap
            && tables(own) == tables(others)
            && schedule.narrow == others_schedule.narrow
            && schedule.committed == others_schedule.committed
            && schedule.groups == others_schedule.groups
            && schedule.launches().eq(others_schedule.launches())
    }

    /// Kernels that `run` launches on queries and keys that come rotated.
    pub fn launches(&self) -> usize {
        let Schedule { committed, order, groups, .. } = &*self.schedule;
        let (before, after) = (0..*committed, *committed..order.len());
        let any = |of, among: &Range<usize>| !self.schedule.places(of, among.clone()).is_empty();
        let is_mixed = self.prepared.as_ref().is_some_and(|prepared| prepared.is_mixed);
        let appends = [
            any(Narrow::None, &before) && !self.are_plain_tokens().unwrap_or(false),
            any(Narrow::Codes, &before),
            is_mixed && any(Narrow::Copies, &before),
            any(Narrow::None, &after),
            is_mixed && any(Narrow::Copies, &after),
        ];
        let appends = appends.into_iter().filter(|&launched| launched).count();
        let copies = groups.iter().map(|group| 1 + usize::from(group.max_keys > 0)).sum::<usize>();
        let attention =
            self.schedule.launches().map(|launch| 1 + usize::from(!launch.merges.is_empty()));
        attention.sum::<usize>() + appends + copies
    }

    fn prepared(&self) -> Result<&Prepared> {
        let missing = || Error::argument("Step::run", "step", "prepared", "not prepared");
        self.prepared.as_ref().ok_or_else(missing)
    }

    /// Plans for the caches of another layer what was planned for those of one that are laid out alike: all tables but one are
    /// the same.
    pub(super) fn plan_like(
        &mut self,
        other: &Self,
        prepared: &Prepared,
        batch: &Batch<'_>,
        host: &mut Vec<u8>,
    ) -> Prepared {
        self.schedule = Arc::clone(&other.schedule);
        let sequences = push(host, &self.sequence_rows(batch));
        Prepared { tables: Tables { sequences, ..prepared.tables }, ..prepared.clone() }
    }

    /// A row for each place.
    fn sequence_rows(&self, batch: &Batch<'_>) -> Vec<SequenceRow> {
        let schedule = &self.schedule;
        let firsts: Vec<usize> = batch
            .tokens
            .iter()
            .scan(0, |next, &n| Some(std::mem::replace(next, *next + n)))
            .collect();
        let place = |(place, &index): (usize, &usize)| {
            let Some(cache) = batch.caches.get(index) else { return SequenceRow::default() };
            SequenceRow {
                k: cache.keys(),
                v: cache.values(),
                first: firsts[index] as i64,
                tokens: batch.tokens[index] as i32,
                first_item: schedule.cut.first_items[place] as i32,
                committed: i32::from(place < schedule.committed),
                padding: 0,
            }
        };
        schedule.order.iter().enumerate().map(place).collect()
    }

    fn fill_tables(
        &self,
        batch: &Batch<'_>,
        entries: &[Entry<'_>],
        host: &mut Vec<u8>,
    ) -> (Tables, Tables) {
        let schedule = &self.schedule;
        let sequences = self.sequence_rows(batch);
        let in_order = || schedule.order.iter().map(|&index| &entries[index]);
        let heads: Vec<_> = in_order().flat_map(|entry| &entry.geometry.rows).copied().collect();
        let lens: Vec<i32> = in_order().map(|entry| entry.len as i32).collect();
        let tables = Tables {
            sequences: push(host, &sequences),
            heads: push(host, &heads),
            items: push(host, &schedule.cut.items),
            splits: push(host, &schedule.cut.splits),
            order: push(host, &schedule.cut.heads),
            pieces: push(host, &schedule.cut.pieces),
            merges: push(host, &schedule.cut.merges),
            lens: push(host, &lens),
            narrow: 0,
        };
        if schedule.narrow.iter().all(|own| *own == Narrow::None) {
            return (tables, Tables::default());
        }
        let narrow_rows = in_order().flat_map(|entry| {
            let none = entry.geometry.rows.len() - entry.geometry.narrow_rows.len();
            let rows = entry.geometry.narrow_rows.iter().copied();
            rows.chain(std::iter::repeat_n(NarrowRow::default(), none))
        });
        let narrow_rows: Vec<NarrowRow> = narrow_rows.collect();
        let tables = Tables { narrow: push(host, &narrow_rows), ..tables };
        if schedule.groups.is_empty() {
            return (tables, Tables::default());
        }
        let mut heads = vec![[0; HeadRow::WORDS]; heads.len()];
        let mut copied = sequences;
        for group in &schedule.groups {
            let mut offset = 0;
            for place in group.places.clone() {
                let entry = &entries[schedule.order[place]];
                let geometry = entry.geometry;
                let row = &mut copied[place];
                // From where the copies of the running group begin.
                row.k = 0;
                row.v = (group.slots * geometry.head_dim * 2) as u64;
                row.first_item = schedule.copies.first_items[place] as i32;
                row.committed = 1;
                for &head in &geometry.narrow {
                    let head = head as usize;
                    let [sink, ring] = entry.copy_slots(geometry.layout.head(head));
                    let [.., mask_sink, window] = geometry.rows[head];
                    heads[place * geometry.rows.len() + head] =
                        [offset, sink as u32, ring as u32, mask_sink, window];
                    offset += (sink + ring) as u32;
                }
            }
        }
        let copies = Tables {
            sequences: push(host, &copied),
            heads: push(host, &heads),
            items: push(host, &schedule.copies.items),
            splits: push(host, &schedule.copies.splits),
            order: push(host, &schedule.copies.heads),
            pieces: push(host, &schedule.copies.pieces),
            merges: push(host, &schedule.copies.merges),
            ..tables
        };
        (tables, copies)
    }

    fn extend_args(
        &self,
        tensors: &Tensors,
        launch: &Launch,
        tables: &Tables,
        scratch: &Scratch,
        base: DevicePointer,
    ) -> Result<ExtendArgs> {
        let Prepared { dims, softcap, .. } = self.prepared()?;
        let at = tables.at(launch.places.start as u64, dims.kv_heads as u64);
        let from = |table: DevicePointer, first: usize, bytes: usize| {
            table + (first * bytes) as DevicePointer
        };
        let (items, splits, counts) = match launch.gang {
            0 => {
                let items = from(at.items, launch.items.start, size_of::<[i32; 2]>());
                (items, at.splits, [launch.items.len(), launch.blocks])
            }
            _ => {
                let pieces = from(at.pieces, launch.pieces.start, size_of::<Piece>());
                let merges = from(at.merges, launch.merges.start, size_of::<Merge>());
                (pieces, merges, [launch.partials, launch.pieces.len()])
            }
        };
        let [num_items, num_tiles] = counts.map(|count| count as i32);
        Ok(ExtendArgs {
            q: tensors.q,
            k: tensors.k,
            v: tensors.v,
            out: tensors.out,
            lse: tensors.lse,
            sequences: at.sequences,
            heads: at.heads,
            lens: at.lens,
            num_sequences: launch.places.len() as i32,
            query_heads: dims.query_heads as i32,
            kv_heads: dims.kv_heads as i32,
            scale: tensors.scale,
            order: at.order,
            items,
            partial: scratch.partial,
            finished: scratch.finished,
            splits,
            tickets: scratch.tickets,
            sinks: tensors.sinks,
            num_items,
            num_tiles,
            softcap: softcap.unwrap_or(0.0),
            // Copies of narrow heads are made in the step itself.
            settled: i32::from(base == 0 && is_capturing()),
            base,
            narrow: at.narrow,
            appends: 0,
            padding: 0,
            rope: 0,
        })
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn append(
        &self,
        tensors: &Tensors,
        places: Range<usize>,
        commit: Commit,
        stream: RawStream,
    ) -> Result<()> {
        let Prepared { kernels, narrow, dims, tables, tokens, .. } = self.prepared()?;
        let Some(max_tokens) = tokens[places.clone()].iter().copied().max() else { return Ok(()) };
        let at = tables.at(places.start as u64, dims.kv_heads as u64);
        // Without rotation queries stay where they are.
        let (query_heads, q) = match tensors.rope {
            Some(_) => (dims.query_heads, tensors.q),
            None => (0, Packed::NONE),
        };
        let [wide_heads, wide_k, wide_v] = commit.wide;
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
            commit: i32::from(commit.plain) + 2 * i32::from(commit.narrow),
            padding: 0,
            narrow: at.narrow,
            wide_heads,
            wide_k,
            wide_v,
            key_shift: tensors.rope.map_or(0, |rope| rope.key_shift),
            key_feedback: tensors.key_feedback,
        };
        // Sequences with narrow heads are no neighbours of others here.
        let is_narrow = self.schedule.narrow[places.start] != Narrow::None;
        // SAFETY: as the caller promises.
        unsafe {
            match narrow.as_ref().filter(|_| is_narrow) {
                Some(narrow) => narrow.append(stream, &args, max_tokens),
                None => kernels.append(stream, &args, max_tokens),
            }
        }
    }
}

impl Prepared {
    pub(super) fn head_dim(&self) -> usize {
        self.kernels.variant().head_dim
    }

    fn rebase(&mut self, base: DevicePointer) {
        let has_narrow = self.narrow.is_some();
        self.tables.rebase(base, has_narrow);
        self.copies.rebase(base, has_narrow);
    }
}

impl Tables {
    fn rebase(&mut self, base: DevicePointer, has_narrow: bool) {
        let Self { sequences, heads, items, splits, order, pieces, merges, lens, narrow } = self;
        for offset in [sequences, heads, items, splits, order, pieces, merges, lens] {
            *offset += base;
        }
        if has_narrow {
            *narrow += base;
        }
    }

    /// The tables from a place on; items, pieces and merges are counted apart.
    fn at(&self, place: u64, kv_heads: u64) -> Self {
        Self {
            sequences: self.sequences + place * size_of::<SequenceRow>() as u64,
            heads: self.heads + place * kv_heads * size_of::<HeadRow>() as u64,
            items: self.items,
            splits: self.splits + place * kv_heads * 8,
            order: self.order + place * kv_heads * 4,
            pieces: self.pieces,
            merges: self.merges,
            lens: self.lens + place * 4,
            narrow: match self.narrow {
                0 => 0,
                narrow => narrow + place * kv_heads * size_of::<NarrowRow>() as u64,
            },
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
