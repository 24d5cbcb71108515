//! The driver's pool of device memory, from which stream-ordered allocations come.

use std::ffi::c_void;

use cudarc::driver::{CudaContext, sys};

use crate::{Error, Result};

/// The default pool of a device; `None` where it has none, and nothing is kept or counted.
#[derive(Debug)]
pub(crate) struct Pool {
    pool: Option<sys::CUmemoryPool>,
    device: sys::CUdevice,
}

type Attribute = sys::CUmemPool_attribute;
type GraphAttribute = sys::CUgraphMem_attribute;

impl Pool {
    pub(crate) fn of(context: &CudaContext) -> Result<Self> {
        let device = context.cu_device();
        if !context.has_async_alloc() {
            return Ok(Self { pool: None, device });
        }
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device exists.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device).result() }
            .map_err(Error::driver("cuDeviceGetDefaultMemPool"))?;
        Ok(Self { pool: Some(pool), device })
    }

    /// Keeps at least so many bytes of freed memory. Without it, every synchronisation returns freed
    /// memory to the system, and the next step's output is allocated anew.
    pub(crate) fn keep(&self, bytes: u64) -> Result<()> {
        let threshold = Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        match self.get(threshold)? >= bytes {
            true => Ok(()),
            false => self.set(threshold, bytes),
        }
    }

    /// Bytes that are kept and not in use.
    pub(crate) fn unused(&self) -> Result<u64> {
        let reserved = self.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        Ok(reserved.saturating_sub(self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?))
    }

    /// Most bytes in use since the last reset, those of graphs included.
    pub(crate) fn peak(&self) -> Result<u64> {
        let mut graphs = 0u64;
        let high = GraphAttribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
        let value: *mut c_void = (&raw mut graphs).cast();
        // SAFETY: the device exists; the attribute is a 64-bit integer.
        unsafe { sys::cuDeviceGetGraphMemAttribute(self.device, high, value).result() }
            .map_err(Error::driver("cuDeviceGetGraphMemAttribute"))?;
        Ok(self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)? + graphs)
    }

    pub(crate) fn reset_peak(&self) -> Result<()> {
        let mut zero = 0u64;
        let high = GraphAttribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
        let value: *mut c_void = (&raw mut zero).cast();
        // SAFETY: the device exists; the attribute is a 64-bit integer.
        unsafe { sys::cuDeviceSetGraphMemAttribute(self.device, high, value).result() }
            .map_err(Error::driver("cuDeviceSetGraphMemAttribute"))?;
        self.set(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    fn get(&self, attribute: Attribute) -> Result<u64> {
        let mut value = 0u64;
        let Some(pool) = self.pool else { return Ok(value) };
        // SAFETY: the pool exists; each of these attributes is a 64-bit integer.
        unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()).result() }
            .map_err(Error::driver("cuMemPoolGetAttribute"))?;
        Ok(value)
    }

    fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
        let Some(pool) = self.pool else { return Ok(()) };
        // SAFETY: as in `get`.
        unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut value).cast()).result() }
            .map_err(Error::driver("cuMemPoolSetAttribute"))
    }
}
