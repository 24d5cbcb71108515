use std::sync::Arc;

use cubecl::server::Handle;
use moa_core::{Extent, LayerLayout};

use crate::attention::arg;
use crate::kernels::copy::copy;
use crate::kernels::keys::{HEAD_FIELDS, Head};
use crate::{Device, Dtype, Error, Result};

const OP: &str = "open";

/// Largest head dimension: a unit holds its share of an output row in registers.
pub const MAX_HEAD_DIM: usize = 256;

/// Keys and values of one sequence in one layer, each in a buffer `[slots, head_dim]` as its
/// [`LayerLayout`] says.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    head_dim: usize,
    dtype: Dtype,
    extent: Extent,
    pub(crate) keys: Handle,
    pub(crate) values: Handle,
}

/// A layout as the kernels read it; forks share it.
#[derive(Debug)]
pub(crate) struct Geometry {
    pub(crate) layout: LayerLayout,
    /// The heads, for the host's part of the arithmetic.
    pub(crate) heads: Vec<Head>,
    /// The same on the device.
    pub(crate) table: Handle,
}

impl Geometry {
    fn new(device: &Device, layout: LayerLayout) -> Result<Self> {
        let capacity = layout.capacity();
        let Some(limit) = u32::try_from(capacity).ok().filter(|&n| n < 1 << 30) else {
            return Err(Error::argument(OP, "capacity", "fewer than 2^30 tokens", capacity));
        };
        if layout.slots() >= 1 << 31 {
            return Err(Error::argument(OP, "slots", "fewer than 2^31", layout.slots()));
        }
        // Where a count is clipped, the mask hides as much as before: no position is larger.
        let int = |n: usize| u32::try_from(n).map_or(limit, |n| n.min(limit));
        let head = |head: &moa_core::HeadLayout| Head {
            offset: head.offset().0 as u32,
            sink_slots: int(head.sink_slots()),
            ring: int(head.ring_slots()),
            sink: int(head.span().sink()),
            window: int(head.span().window()),
        };
        let heads: Vec<Head> = layout.heads().iter().map(head).collect();
        let rows = heads.iter().flat_map(|h| -> [u32; HEAD_FIELDS] {
            [h.offset, h.sink_slots, h.ring, h.sink, h.window]
        });
        let rows: Vec<u32> = rows.collect();
        let table = device.client().create_from_slice(bytemuck::cast_slice(&rows));
        Ok(Self { layout, heads, table })
    }
}

impl Cache {
    pub(crate) fn open(
        device: &Device,
        layout: &LayerLayout,
        head_dim: usize,
        dtype: Dtype,
    ) -> Result<Self> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            let expected = format_args!("1 to {MAX_HEAD_DIM}").to_string();
            return Err(Error::argument(OP, "head_dim", expected, head_dim));
        }
        if !head_dim.is_multiple_of(dtype.per_word()) {
            let expected = format_args!("even for {dtype} caches").to_string();
            return Err(Error::argument(OP, "head_dim", expected, head_dim));
        }
        Self::new(device, Arc::new(Geometry::new(device, layout.clone())?), head_dim, dtype)
    }

    fn new(
        device: &Device,
        geometry: Arc<Geometry>,
        head_dim: usize,
        dtype: Dtype,
    ) -> Result<Self> {
        let elements = geometry.layout.slots().saturating_mul(head_dim);
        let keys = device.alloc("cached keys", elements, dtype.bytes())?;
        let values = device.alloc("cached values", elements, dtype.bytes())?;
        device.check(OP, &[&keys, &values])?;
        let (device, extent) = (device.clone(), Extent::default());
        Ok(Self { device, geometry, head_dim, dtype, extent, keys, values })
    }

    /// Where each head keeps which position.
    pub fn layout(&self) -> &LayerLayout {
        &self.geometry.layout
    }

    /// Elements per key.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.extent.len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.extent.is_empty()
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.extent.reset();
    }

    /// Bytes of the two buffers, as asked of CubeCL; its pools may round them up.
    pub fn bytes(&self) -> u64 {
        self.keys.size() + self.values.size()
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) fn extent_mut(&mut self) -> &mut Extent {
        &mut self.extent
    }

    pub(crate) fn check_append(&self, tokens: usize) -> Result<()> {
        Ok(self.extent.check_append(&self.geometry.layout, tokens)?)
    }

    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.extent.truncate(&self.geometry.layout, len)?)
    }

    /// An independent copy, made on the device.
    pub(crate) fn fork(&self) -> Result<Self> {
        let geometry = Arc::clone(&self.geometry);
        let mut fork = Self::new(&self.device, geometry, self.head_dim, self.dtype)?;
        let words = self.layout().slots() * self.head_dim / self.dtype.per_word();
        let (cubes, dim) = self.device.cubes(words);
        for (from, to) in [(&self.keys, &fork.keys), (&self.values, &fork.values)] {
            let client = self.device.client();
            // SAFETY: both buffers hold `words` words, and the kernel goes no further.
            unsafe {
                copy::launch_unchecked(
                    client,
                    cubes.clone(),
                    dim,
                    arg(from),
                    arg(to),
                    words as u32,
                );
            }
        }
        fork.extent = self.extent;
        Ok(fork)
    }
}
