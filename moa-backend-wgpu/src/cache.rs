use std::sync::Arc;

use cubecl::server::Handle;
use moa_core::{CacheState, Dtype, HeadRow, LayerLayout};

use crate::attention::arg;
use crate::kernels::copy::copy;
use crate::kernels::keys::Head;
use crate::kernels::words::{check_words, per_word};
use crate::{Device, Error, Result};

const OP: &str = "open";

/// Largest head dimension: a unit holds its share of an output row in registers.
pub const MAX_HEAD_DIM: usize = 256;

/// Keys and values of one sequence in one layer, each in a buffer `[slots, head_dim]` as its
/// [`LayerLayout`] says.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    dtype: Dtype,
    state: CacheState,
    pub(crate) keys: Handle,
    pub(crate) values: Handle,
}

/// A layout as the kernels read it; forks share it.
#[derive(Debug)]
pub(crate) struct Geometry {
    /// The heads, for the host's part of the arithmetic.
    pub(crate) heads: Vec<Head>,
    /// The same on the device.
    pub(crate) table: Handle,
}

impl Geometry {
    fn new(device: &Device, layout: &LayerLayout) -> Result<Self> {
        if layout.slots() >= 1 << 31 {
            return Err(Error::argument(OP, "slots", "fewer than 2^31", layout.slots()));
        }
        let rows = layout.head_rows()?;
        let words: Vec<u32> = rows.iter().flat_map(HeadRow::words).collect();
        let table = device.client().create_from_slice(bytemuck::cast_slice(&words));
        Ok(Self { heads: rows.iter().map(Head::from).collect(), table })
    }
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
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
        check_words(OP, "head_dim", head_dim, dtype)?;
        let geometry = Arc::new(Geometry::new(device, layout)?);
        let state = CacheState::new(Arc::new(layout.clone()), head_dim);
        Self::new(device, geometry, dtype, state)
    }

    fn new(
        device: &Device,
        geometry: Arc<Geometry>,
        dtype: Dtype,
        state: CacheState,
    ) -> Result<Self> {
        let elements = state.layout().slots().saturating_mul(state.head_dim());
        let keys = device.alloc("cached keys", elements, dtype.bytes())?;
        let values = device.alloc("cached values", elements, dtype.bytes())?;
        device.check(OP, &[&keys, &values])?;
        Ok(Self { device: device.clone(), geometry, dtype, state, keys, values })
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of the two buffers, as asked of CubeCL; its pools may round them up.
    pub(crate) fn bytes(&self) -> u64 {
        self.keys.size() + self.values.size()
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) fn state_mut(&mut self) -> &mut CacheState {
        &mut self.state
    }

    /// An independent copy, made on the device.
    pub(crate) fn fork(&self) -> Result<Self> {
        let geometry = Arc::clone(&self.geometry);
        let fork = Self::new(&self.device, geometry, self.dtype, self.state.clone())?;
        let elements = self.state.layout().slots() * self.state.head_dim();
        let words = elements / per_word(self.dtype);
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
        Ok(fork)
    }
}
