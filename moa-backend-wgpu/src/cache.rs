use std::ops::Range;
use std::sync::Arc;

use cubecl::server::Handle;
use moa_core::{CacheState, CacheType, HeadRow, LayerLayout};

use crate::attention::arg;
use crate::kernels::codes::{check_rows, load_words, row_words};
use crate::kernels::copy::copy;
use crate::kernels::keys::Head;
use crate::{Device, Error, Result};

const OP: &str = "open";

/// Largest head dimension: a unit holds its share of an output row in registers.
pub const MAX_HEAD_DIM: usize = 256;

/// Keys and values of one sequence in one layer, as its [`LayerLayout`] says: for each type that its heads have, a
/// buffer of keys and one of values.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    state: CacheState,
    /// One for each of the geometry's groups.
    stores: Vec<Store>,
}

/// The buffers of the heads of one type: `[slots, row]` in words, and after the keys a word for each slot with the
/// scales of its key and value, where the type has any.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) keys: Handle,
    pub(crate) values: Handle,
}

/// A layout as the kernels read it; forks share it.
#[derive(Debug)]
pub(crate) struct Geometry {
    groups: Vec<Group>,
    /// Bytes of a slot of a head whose type the layout does not say.
    slot_bytes: u64,
}

/// The heads of one type.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) own: CacheType,
    /// The heads, for the host's part of the arithmetic.
    pub(crate) heads: Vec<Head>,
    /// The same on the device.
    pub(crate) table: Handle,
    /// Words of the buffers.
    key_words: usize,
    value_words: usize,
}

impl Geometry {
    fn new(
        device: &Device,
        layout: &LayerLayout,
        head_dim: usize,
        cache_type: CacheType,
    ) -> Result<Self> {
        if layout.slots() >= 1 << 31 {
            return Err(Error::argument(OP, "slots", "fewer than 2^31", layout.slots()));
        }
        let rows = layout.head_rows()?;
        let types: Vec<CacheType> =
            layout.heads().iter().map(|head| head.cache_type().unwrap_or(cache_type)).collect();
        for own in &types {
            check_rows(OP, head_dim, *own)?;
        }
        let mut groups: Vec<Group> = Vec::new();
        for own in CacheType::ALL.into_iter().filter(|own| types.contains(own)) {
            let of_type = (0..rows.len()).filter(|head| types[*head] == own);
            groups.push(Group::new(device, layout, &rows, of_type.collect(), head_dim, own)?);
        }
        Ok(Self { groups, slot_bytes: cache_type.slot_bytes(head_dim) })
    }
}

impl Group {
    fn new(
        device: &Device,
        layout: &LayerLayout,
        rows: &[HeadRow],
        of_type: Vec<usize>,
        head_dim: usize,
        own: CacheType,
    ) -> Result<Self> {
        let slots = |head: &usize| layout.head(*head).slots();
        let total: usize = of_type.iter().map(slots).sum();
        let words = |row: usize| total.saturating_mul(row);
        let mut key_words = words(row_words(own.keys(), head_dim));
        let value_words = words(row_words(own.values(), head_dim));
        let (mut heads, mut offset) = (Vec::new(), 0);
        for head in &of_type {
            if own.keys().is_narrow() {
                // A load of scales is of one head alone, which then writes it without asking the others.
                key_words = key_words.next_multiple_of(load_words(own.keys()));
            }
            let Ok(scales) = u32::try_from(key_words) else {
                let limit = device.max_buffer_bytes();
                let bytes = (key_words as u64).saturating_mul(4);
                return Err(Error::TooLarge { what: "cached keys", bytes, limit });
            };
            heads.push(Head::new(&HeadRow { offset, ..rows[*head] }, *head as u32, scales));
            offset += slots(head) as u32;
            if own.keys().is_narrow() {
                key_words += slots(head);
            }
        }
        key_words = key_words.next_multiple_of(load_words(own.keys()));
        let words: Vec<u32> = heads.iter().flat_map(Head::words).collect();
        let table = device.client().create_from_slice(bytemuck::cast_slice(&words));
        Ok(Self { own, heads, table, key_words, value_words })
    }
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// Heads whose type the layout does not say have `cache_type`.
    pub(crate) fn open(
        device: &Device,
        layout: &LayerLayout,
        head_dim: usize,
        cache_type: CacheType,
    ) -> Result<Self> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            let expected = format_args!("1 to {MAX_HEAD_DIM}").to_string();
            return Err(Error::argument(OP, "head_dim", expected, head_dim));
        }
        let geometry = Arc::new(Geometry::new(device, layout, head_dim, cache_type)?);
        let state = CacheState::new(Arc::new(layout.clone()), head_dim);
        Self::new(device, geometry, state)
    }

    fn new(device: &Device, geometry: Arc<Geometry>, state: CacheState) -> Result<Self> {
        let store = |group: &Group| {
            let keys = device.alloc("cached keys", group.key_words, 4)?;
            let values = device.alloc("cached values", group.value_words, 4)?;
            device.check(OP, &[&keys, &values])?;
            Ok(Store { keys, values })
        };
        let stores = geometry.groups.iter().map(store).collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), geometry, state, stores })
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of keys, values and scales. Buffers may be longer, by a word for each head and by what CubeCL's pools
    /// round up.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.layout().bytes(self.state.head_dim(), self.geometry.slot_bytes)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The heads of each type.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.geometry.groups
    }

    /// The buffers of the heads of a group.
    pub(crate) fn store(&self, group: usize) -> &Store {
        &self.stores[group]
    }

    /// Whether both have the same heads in each group.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let same = |(a, b): (&Group, &Group)| {
            let numbers = a.heads.iter().map(|head| head.number);
            a.own == b.own && numbers.eq(b.heads.iter().map(|head| head.number))
        };
        let (own, others) = (self.groups(), other.groups());
        own.len() == others.len() && own.iter().zip(others).all(same)
    }

    /// Counts tokens that a recorded step has appended.
    ///
    /// # Errors
    /// [`Error::Core`] if there is no room for them.
    pub fn advance(&mut self, tokens: usize) -> Result<()> {
        Ok(self.state.append(tokens)?)
    }

    pub(crate) fn state_mut(&mut self) -> &mut CacheState {
        &mut self.state
    }

    /// The bytes of all slots that were written since the cache was empty, once the device has computed them: type by
    /// type the rows of keys of each head, then their scales where the type has any, then the rows of values.
    /// [`WgpuBackend::restore`](crate::WgpuBackend::restore) makes the cache of them.
    ///
    /// # Errors
    /// [`Error::Device`], also for what went wrong in an earlier kernel; [`Error::Lost`], [`Error::OutOfMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let written: Vec<_> =
            self.groups().iter().map(|group| self.written_words(group, &self.state)).collect();
        let mut bytes = room(written.iter().flatten().flatten().map(Range::len).sum())?;
        for (store, [keys, values]) in self.stores.iter().zip(written) {
            for (from, ranges) in [(&store.keys, keys), (&store.values, values)] {
                let read = self.device.read("to_bytes", from)?;
                ranges.into_iter().for_each(|range| bytes.extend_from_slice(&read[range]));
            }
        }
        Ok(bytes)
    }

    /// Takes the state and the [bytes](Self::to_bytes) of another cache of this layout.
    pub(crate) fn load(&mut self, state: CacheState, bytes: &[u8]) -> Result<()> {
        let written: Vec<_> =
            self.groups().iter().map(|group| self.written_words(group, &state)).collect();
        let expected: usize = written.iter().flatten().flatten().map(Range::len).sum();
        if bytes.len() != expected {
            let expected = format_args!("{expected} bytes").to_string();
            return Err(Error::argument("restore", "bytes", expected, bytes.len()));
        }
        let mut rest = bytes;
        for ((store, group), [keys, values]) in self.stores.iter().zip(self.groups()).zip(written) {
            let keys = (&store.keys, group.key_words, keys);
            for (to, words, ranges) in [keys, (&store.values, group.value_words, values)] {
                let mut all = room(4 * words)?;
                all.resize(4 * words, 0);
                for range in ranges {
                    let (own, others) = rest.split_at(range.len());
                    all[range].copy_from_slice(own);
                    rest = others;
                }
                let from = self.device.client().create_from_slice(&all);
                self.copy(&from, to, words);
            }
        }
        self.state = state;
        self.device.check("restore", &[])
    }

    /// Bytes of a group's keys and of its values that hold what was written since a cache of this layout in that
    /// state was empty.
    fn written_words(&self, group: &Group, state: &CacheState) -> [Vec<Range<usize>>; 2] {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in &group.heads {
            let slots = state.layout().head(head.number as usize).slots();
            let written = slots.min(state.extent().high_water);
            let rows = |own| {
                let row = 4 * row_words(own, state.head_dim());
                let first = head.offset as usize;
                first * row..(first + written) * row
            };
            keys.push(rows(group.own.keys()));
            values.push(rows(group.own.values()));
            if group.own.keys().is_narrow() {
                let first = head.scales as usize;
                keys.push(4 * first..4 * (first + written));
            }
        }
        [keys, values]
    }

    /// Copies words from one buffer to another.
    fn copy(&self, from: &Handle, to: &Handle, words: usize) {
        let (cubes, dim) = self.device.cubes(words);
        // SAFETY: both buffers hold `words` words, and the kernel goes no further.
        unsafe {
            let client = self.device.client();
            copy::launch_unchecked(client, cubes, dim, arg(from), arg(to), words as u32);
        }
    }

    /// An independent copy, made on the device.
    pub(crate) fn fork(&self) -> Result<Self> {
        let fork = Self::new(&self.device, Arc::clone(&self.geometry), self.state.clone())?;
        let stores = self.stores.iter().zip(&fork.stores).zip(self.groups());
        for ((from, to), group) in stores {
            self.copy(&from.keys, &to.keys, group.key_words);
            self.copy(&from.values, &to.values, group.value_words);
        }
        Ok(fork)
    }
}

/// Room for so many bytes of a cache on the host.
fn room(bytes: usize) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let shortage = |_| Error::OutOfMemory { what: "saved keys and values", bytes: bytes as u64 };
    all.try_reserve_exact(bytes).map_err(shortage)?;
    Ok(all)
}
