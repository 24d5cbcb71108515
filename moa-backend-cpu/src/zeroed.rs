use std::alloc::{Layout, alloc_zeroed};

use bytemuck::Zeroable;

use crate::{Error, Result};

/// Makes a buffer so many zeros, in the memory that it has where that is enough.
///
/// # Errors
/// [`Error::OutOfMemory`]; the buffer is empty then.
pub(crate) fn refill<T: Zeroable + Copy>(
    to: &mut Vec<T>,
    len: usize,
    what: &'static str,
) -> Result<()> {
    to.clear();
    let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    to.try_reserve(len).map_err(|_| Error::OutOfMemory { what, bytes })?;
    to.resize(len, T::zeroed());
    Ok(())
}

/// `len` zeros, straight from the system so that pages nobody touches never become resident, and
/// with an error instead of an abort when there is no memory.
pub(crate) fn zeroed<T: Zeroable>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    let layout = Layout::array::<T>(len).map_err(|_| Error::OutOfMemory { what, bytes })?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout has a size above zero.
    let pointer = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if pointer.is_null() {
        return Err(Error::OutOfMemory { what, bytes });
    }
    // SAFETY: the global allocator gave `pointer` for exactly this layout, and all-zero bytes are
    // `len` valid values of a `Zeroable` type.
    Ok(unsafe { Vec::from_raw_parts(pointer, len, len) })
}
