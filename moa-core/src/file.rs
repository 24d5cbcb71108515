use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Writes `bytes` to a new file beside `path` and renames it, so that a reader never sees half a file
/// and a failed write leaves an older file as it was.
///
/// Any number of threads and processes may write one file at once: the last one wins, and each file that
/// a reader opens is a whole one. File and folder are on the disk when this returns. The permissions of an older
/// file stay; a link is replaced, what it points to is not touched.
///
/// # Errors
/// [`Error::Io`] with the path; also where `path` is there, but is a folder, a pipe or a device.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_synced(path, bytes, File::sync_all)
        .map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

fn write_synced(
    path: &Path,
    bytes: &[u8],
    sync: impl Fn(&File) -> io::Result<()>,
) -> io::Result<()> {
    if path.file_name().is_none() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a file name"));
    }
    let old = match fs::metadata(path) {
        Ok(old) if old.is_dir() => return Err(io::Error::from(ErrorKind::IsADirectory)),
        Ok(old) if !old.is_file() => {
            return Err(io::Error::new(ErrorKind::InvalidInput, "a pipe or a device, not a file"));
        }
        Ok(old) => Some(old),
        // A link to nothing is replaced too.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let (temporary, mut file) = create_beside(path, old.is_some())?;
    let written = (|| {
        file.write_all(bytes)?;
        if let Some(old) = &old {
            file.set_permissions(old.permissions())?;
        }
        sync(&file)?;
        drop(file);
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_folder(path))
}

/// A file that no other thread, process or user has, in the folder of `path`. A private one takes the
/// permissions of an older file once its bytes are written.
fn create_beside(path: &Path, is_private: bool) -> io::Result<(PathBuf, File)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut options = OpenOptions::new();
    // Never a file that is there, nor what a planted link points to.
    options.write(true).create_new(true);
    #[cfg(unix)]
    if is_private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    let _ = is_private;
    // Bare WebAssembly has no processes, and no files either: the error below is that of the file.
    let process = match cfg!(all(target_family = "wasm", target_os = "unknown")) {
        true => 0,
        false => std::process::id(),
    };
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let random = RandomState::new().build_hasher().finish();
        // Without the file's own name, which may be as long as names can be.
        let name = format!(".moa-{process}-{count}-{random:016x}.tmp");
        let path = path.with_file_name(name);
        match options.open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            opened => return Ok((path, opened?)),
        }
    }
}

/// A rename is on the disk when its folder is. Windows has no such call.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // A folder that may be written but not read, and file systems without the call.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        done => done,
    }
}

/// Opens a file to read it. A named pipe is refused before it is opened, which would wait for ever where nobody writes
/// to it; so are devices, and folders. Pipes that the process was started with are read: shells name `<(command)`
/// `/dev/fd/63`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a pipe or a device, [`ErrorKind::IsADirectory`], and those of the operating system.
pub fn open_file(path: &Path) -> io::Result<File> {
    let found = fs::metadata(path)?;
    if found.is_dir() {
        return Err(io::Error::from(ErrorKind::IsADirectory));
    }
    let own = path == Path::new("/dev/stdin") || path.parent() == Some(Path::new("/dev/fd"));
    if !found.is_file() && !own {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a pipe or a device, not a file"));
    }
    File::open(path)
}

/// Reads a whole file, as [`open_file`] opens it.
///
/// # Errors
/// Those of [`open_file`], and [`ErrorKind::OutOfMemory`].
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_file(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a whole file of UTF-8, as [`open_file`] opens it, without the byte order mark that some editors begin it with.
///
/// # Errors
/// Those of [`read_file`], and [`ErrorKind::InvalidData`] if it is no text.
pub fn read_text_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_file(path)?.read_to_string(&mut text)?;
    Ok(without_mark(text))
}

/// The text of a whole file of UTF-8, without its byte order mark.
pub(crate) fn text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read(path)?);
    text.map(without_mark)
        .map_err(|e| Error::Format { path: path.to_path_buf(), reason: format!("not UTF-8: {e}") })
}

/// A text without its byte order mark.
fn without_mark(text: String) -> String {
    text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)
}

/// Reads a whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    read_file(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn pipes_devices_and_folders_are_refused_before_they_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&pipe, Path::new("/dev/zero"), Path::new("/dev/fd/../../../dev/zero")] {
            assert_eq!(open_file(path).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(read_file(dir.path()).unwrap_err().kind(), ErrorKind::IsADirectory);
        fs::write(dir.path().join("a"), "b").unwrap();
        assert_eq!(read_text_file(&dir.path().join("a")).unwrap(), "b");
        fs::write(dir.path().join("a"), "\u{feff}b\u{feff}").unwrap();
        assert_eq!(read_text_file(&dir.path().join("a")).unwrap(), "b\u{feff}");
    }

    fn names(folder: &Path) -> Vec<String> {
        let entry = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        fs::read_dir(folder).unwrap().map(entry).collect()
    }

    #[test]
    fn threads_that_write_one_file_lose_no_save_and_show_whole_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..40 {
                        write_atomic(path, &vec![b'a' + thread; 10_000]).unwrap();
                        let seen = fs::read(path).unwrap();
                        assert!(seen.len() == 10_000 && seen.iter().all(|b| *b == seen[0]));
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), ["plan.json"]);
    }

    #[test]
    fn a_failed_write_leaves_the_older_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        write_atomic(&path, b"old").unwrap();
        let full = |_: &File| Err(io::Error::from(ErrorKind::StorageFull));
        let error = write_synced(&path, b"new", full).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["plan.json"]);
        assert!(
            write_atomic(dir.path(), b"").is_err() && write_atomic(Path::new("/"), b"").is_err()
        );
    }

    #[test]
    fn names_as_long_as_names_can_be_are_written() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("x".repeat(255)), b"1").unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn permissions_stay_and_links_are_replaced() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("plan.json"), dir.path().join("other"));
        write_atomic(&path, b"1").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write_atomic(&path, b"2").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        fs::write(&other, b"mine").unwrap();
        let link = dir.path().join("link");
        symlink(&other, &link).unwrap();
        write_atomic(&link, b"3").unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"mine");
        assert_eq!(fs::read(&link).unwrap(), b"3");
        // Pipes and devices are not replaced by files.
        assert!(write_atomic(Path::new("/dev/null"), b"4").is_err());
    }
}
