use crate::Result;
use crate::decoder::model::Decoder;
use crate::device::Device;

impl<D: Device> Decoder<D> {
    /// Counts [`peak_memory`](Self::peak_memory) from now on, where the system allows it.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    pub fn reset_peak_memory(&self) -> Result<()> {
        // Linux forgets a process's peak on request; elsewhere it stays that of the whole run.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        self.device.reset_peak()
    }

    /// Most bytes in use at once since [`reset_peak_memory`](Self::reset_peak_memory): of the device's
    /// memory if it has its own, else of the process (its resident set, weights that were read from
    /// their file included). `None` where neither is known. A process may hold on to memory that it
    /// needed before, so that its figure is that of the largest plan it has run.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) if the device fails.
    pub fn peak_memory(&self) -> Result<Option<u64>> {
        Ok(match self.device.memory()? {
            Some(memory) => Some(memory.peak_bytes),
            None => std::fs::read_to_string("/proc/self/status").ok().and_then(|s| resident(&s)),
        })
    }
}

/// The peak of the resident set, in bytes, from Linux's status of a process.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_is_read_from_the_status() {
        assert_eq!(resident("Name:\tmoa\nVmHWM:\t   2048 kB\nVmRSS:\t 10 kB\n"), Some(2 << 20));
        assert_eq!(resident("Name:\tmoa\n"), None);
    }
}
