//! Compiled kernels on disk. Never fatal: what cannot be read is compiled again, what cannot be
//! written is compiled next time.
//!
//! A file is a checksum, the compiler's version and the code.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Name of a compiled kernel: a hash of everything it depends on but the compiler's version, so that
/// a machine without a compiler can use what another one compiled.
///
/// 128 bits of FNV-1a: the texts are our own, and none was made to collide.
#[derive(Debug)]
pub(crate) struct Key {
    path: Option<PathBuf>,
}

/// Major and minor.
pub(crate) type Version = (u32, u32);

fn encode((major, minor): Version) -> [u8; 8] {
    (u64::from(major) << 32 | u64::from(minor)).to_le_bytes()
}

/// One writer at a time in this process, as temporary names differ by process only.
static WRITING: Mutex<()> = Mutex::new(());

impl Key {
    /// `name` is for people; `parts` are what the code depends on.
    pub(crate) fn new(name: &str, parts: &[String]) -> Self {
        Self::in_folder(folder().as_deref(), name, parts)
    }

    fn in_folder(folder: Option<&Path>, name: &str, parts: &[String]) -> Self {
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part.as_bytes());
        }
        let file = format!("{name}-{:032x}.cubin", fnv1a(&bytes));
        Self { path: folder.map(|folder| folder.join(file)) }
    }

    /// The code, if the file is whole and of this compiler, or of any if there is none.
    pub(crate) fn load(&self, compiler: Option<Version>) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.path.as_ref()?).ok()?;
        let (checksum, rest) = bytes.split_first_chunk::<16>()?;
        let (version, cubin) = rest.split_first_chunk::<8>()?;
        let right = compiler.is_none_or(|compiler| encode(compiler) == *version);
        (right && fnv1a(rest).to_le_bytes() == *checksum).then(|| cubin.to_vec())
    }

    /// Keeps the code, if the folder can be written.
    pub(crate) fn store(&self, compiler: Version, cubin: &[u8]) {
        let Some(path) = &self.path else { return };
        let rest = [&encode(compiler), cubin].concat();
        let bytes = [&fnv1a(&rest).to_le_bytes(), &rest[..]].concat();
        let _one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(folder) = path.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            // The cache is a convenience; a full disk must not stop a program that can do without.
            let _ = moa_core::write_atomic(path, &bytes);
        }
    }
}

/// Empty variables count as unset, as for everything under the XDG specification.
fn folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("MOA_CACHE_DIR") {
        return Some(folder.into());
    }
    let caches = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(caches.join("moa").join("kernels"))
}

fn fnv1a(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET, |hash, &byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(folder: &Path, parts: &[&str]) -> Key {
        let parts: Vec<String> = parts.iter().map(|&part| part.into()).collect();
        Key::in_folder(Some(folder), "test", &parts)
    }

    #[test]
    fn fnv1a_of_published_vectors() {
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn what_was_stored_is_loaded_until_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("not/yet/there");
        let key = key(&deep, &["a", "b"]);
        assert_eq!(key.load(None), None);
        key.store((13, 0), b"code");
        assert_eq!(key.load(Some((13, 0))).unwrap(), b"code");
        assert_eq!(key.load(None).unwrap(), b"code");
        assert_eq!(key.load(Some((12, 9))), None);
        let path = key.path.as_ref().unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        bytes[25] ^= 1;
        std::fs::write(path, &bytes).unwrap();
        assert_eq!(key.load(None), None);
        std::fs::write(path, b"short").unwrap();
        assert_eq!(key.load(None), None);
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let folder = Path::new("cache");
        assert_ne!(key(folder, &["ab", "c"]).path, key(folder, &["a", "bc"]).path);
        assert_ne!(key(folder, &["a"]).path, key(folder, &["a", ""]).path);
    }

    #[test]
    fn an_unwritable_cache_is_not_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let key = key(&file.path().join("folder"), &["a"]);
        key.store((13, 0), b"code");
        assert_eq!(key.load(None), None);
        Key { path: None }.store((13, 0), b"code");
    }
}
