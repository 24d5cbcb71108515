//! Memory whose size comes from outside: from a file, a configuration, a length.

use crate::{Error, Result};

/// `len` values, or an error where there is no memory for them. What is small, or no larger than what a caller holds
/// already, needs no such care.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn filled<T: Clone>(len: usize, value: T, what: &'static str) -> Result<Vec<T>> {
    let mut all = room(len, what)?;
    all.resize(len, value);
    Ok(all)
}

/// Room for `len` values, or an error.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn room<T>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let mut all = Vec::new();
    let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    all.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
        what,
        bytes: Some(bytes),
        free: None,
    })?;
    Ok(all)
}
