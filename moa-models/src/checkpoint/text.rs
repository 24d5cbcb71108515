//! Text files as people have them.

use std::fs;
use std::io;
use std::path::Path;

use crate::error::{Error, Result};

/// How every git-lfs pointer begins.
pub(crate) const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Whether there is a file at `path`.
///
/// # Errors
/// [`Error::DanglingLink`] if there is a link that leads nowhere: the file is meant to be there.
pub(crate) fn is_file(path: &Path) -> Result<bool> {
    if path.is_file() {
        return Ok(true);
    }
    match dangling(path) {
        Some(error) => Err(error),
        None => Ok(false),
    }
}

/// The bytes of a file.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let bytes = moa_core::read_file(path)
        .map_err(|source| dangling(path).unwrap_or_else(|| Error::io(path, source)))?;
    match bytes.starts_with(LFS) {
        true => Err(Error::LfsPointer { path: path.to_owned() }),
        false => Ok(bytes),
    }
}

/// The text of a file: UTF-8, or UTF-16 that begins with a byte order mark. The mark is not part of the
/// text.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read or is no text, [`Error::DanglingLink`] if it is a link that
/// leads nowhere, [`Error::LfsPointer`] if it stands for a file that was not fetched.
pub fn read_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = read_bytes(path)?;
    let no_text = |kind| {
        Error::io(path, io::Error::new(io::ErrorKind::InvalidData, format!("not valid {kind}")))
    };
    let utf16 = |unit: fn([u8; 2]) -> u16| {
        let (pairs, rest) = bytes.as_chunks::<2>();
        let units: Vec<u16> = pairs.iter().skip(1).map(|pair| unit(*pair)).collect();
        match rest {
            [] => String::from_utf16(&units).map_err(|_| no_text("UTF-16")),
            _ => Err(no_text("UTF-16")),
        }
    };
    match &bytes[..] {
        [0xff, 0xfe, ..] => utf16(u16::from_le_bytes),
        [0xfe, 0xff, ..] => utf16(u16::from_be_bytes),
        _ => {
            let text = String::from_utf8(bytes).map_err(|_| no_text("UTF-8"))?;
            Ok(text.strip_prefix("\u{feff}").map(str::to_owned).unwrap_or(text))
        }
    }
}

fn dangling(path: &Path) -> Option<Error> {
    let target = fs::read_link(path).ok()?;
    let nowhere = fs::metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    nowhere.then(|| Error::DanglingLink { path: path.to_owned(), target })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        read_text(file.path())
    }

    #[test]
    fn byte_order_marks_are_no_text() -> Result<()> {
        assert_eq!(read(b"\xef\xbb\xbfa\xef\xbb\xbf")?, "a\u{feff}");
        assert_eq!(read(b"\xff\xfea\0\xfc\0")?, "aü");
        assert_eq!(read(b"\xfe\xff\0a")?, "a");
        assert_eq!(read(b"")?, "");
        for bytes in [&b"\xff\xfea"[..], b"\xfe\xff\xd8\0", b"\xffa"] {
            assert!(matches!(read(bytes), Err(Error::Io { .. })), "{bytes:?}");
        }
        Ok(())
    }

    #[test]
    fn pointers_and_links_to_nothing_say_what_they_are() {
        let error =
            read(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap_err();
        assert!(matches!(&error, Error::LfsPointer { .. }), "{error}");
        assert!(error.to_string().contains("git lfs pull"), "{error}");
        #[cfg(unix)]
        {
            let dir = tempfile::tempdir().unwrap();
            let link = dir.path().join("config.json");
            std::os::unix::fs::symlink("../blobs/none", &link).unwrap();
            for error in [is_file(&link).unwrap_err(), read_text(&link).unwrap_err()] {
                assert!(matches!(&error, Error::DanglingLink { .. }), "{error}");
                assert!(error.to_string().contains("../blobs/none"), "{error}");
            }
        }
        assert!(matches!(is_file(Path::new("no such file")), Ok(false)));
    }
}
