//! Compiled kernels on disk. Never fatal: what cannot be read is compiled again, what cannot be
//! written is compiled next time.
//!
//! A file is a checksum, the compiler's version and the code.

use std::path::{Path, PathBuf};

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
        let path = self.path.as_ref()?;
        if !is_own(path) {
            return None;
        }
        let bytes = moa_core::read_file(path).ok()?;
        let (checksum, rest) = bytes.split_first_chunk::<16>()?;
        let (version, cubin) = rest.split_first_chunk::<8>()?;
        let right = compiler.is_none_or(|compiler| encode(compiler) == *version);
        (right && fnv1a(rest).to_le_bytes() == *checksum).then(|| cubin.to_vec())
    }

    /// Takes away what was stored: the driver does not take it.
    pub(crate) fn forget(&self) {
        if let Some(path) = &self.path {
            // It may be gone already, or not ours to take away: then the next compilation replaces it.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Keeps the code, if the folder can be written.
    pub(crate) fn store(&self, compiler: Version, cubin: &[u8]) {
        let Some(path) = &self.path else { return };
        let rest = [&encode(compiler), cubin].concat();
        let bytes = [&fnv1a(&rest).to_le_bytes(), &rest[..]].concat();
        if let Some(folder) = path.parent()
            && create_folder(folder).is_ok()
        {
            // The cache is a convenience; a full disk must not stop a program that can do without.
            let _ = moa_core::write_atomic(path, &bytes);
        }
    }
}

/// Whether nobody else can have chosen the code: file and folder are of this process's user, or of the system's, and
/// no other user may write there. A folder may be shared to read.
#[cfg(unix)]
fn is_own(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    // Files that this process makes are its user's; `/proc` says so without making one.
    let user = std::fs::metadata("/proc/self").map(|own| own.uid());
    let is_own = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|found| {
            let of_user = found.uid() == 0 || user.as_ref().is_ok_and(|user| *user == found.uid());
            of_user && found.mode() & 0o022 == 0
        })
    };
    is_own(path) && path.parent().is_some_and(is_own)
}

#[cfg(not(unix))]
fn is_own(_: &Path) -> bool {
    true
}

/// A folder that others may not write into.
fn create_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o755);
    builder.create(folder)
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

    /// Code that another user could have written is compiled again.
    #[cfg(unix)]
    #[test]
    fn what_others_may_write_is_not_loaded() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let key = key(folder.path(), &["a"]);
        key.store((13, 0), b"code");
        let path = key.path.clone().unwrap();
        let allow = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        for (of_file, of_folder, is_loaded) in [
            (0o644, 0o755, true),
            (0o664, 0o755, false),
            (0o644, 0o777, false),
            (0o666, 0o700, false),
        ] {
            allow(&path, of_file);
            allow(folder.path(), of_folder);
            assert_eq!(key.load(None).is_some(), is_loaded, "{of_file:o} {of_folder:o}");
        }
    }

    #[test]
    fn what_was_forgotten_is_compiled_again() {
        let folder = tempfile::tempdir().unwrap();
        let key = key(folder.path(), &["a"]);
        key.store((13, 0), b"code");
        key.forget();
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
