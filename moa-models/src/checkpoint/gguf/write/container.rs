//! The container: keys, the table of tensors, and their data one after the other.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::gguf::tensor_type::TensorType;
use crate::{Error, Result};

/// Where tensors may begin, if no key says otherwise.
const ALIGNMENT: usize = 32;

/// Metadata as it is written.
#[derive(Debug, Default)]
pub(super) struct Keys {
    bytes: Vec<u8>,
    count: u64,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) {
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.count += 1;
    }

    fn array(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    pub(super) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn f32(&mut self, key: &str, value: f64) {
        self.key(key, 6);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    pub(super) fn flag(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    pub(super) fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        text(&mut self.bytes, value);
    }

    pub(super) fn texts<'t>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'t str>) {
        self.array(key, 8, values.len());
        values.for_each(|value| text(&mut self.bytes, value));
    }

    pub(super) fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        self.array(key, 5, values.len());
        values.for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    pub(super) fn f32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = f32>) {
        self.array(key, 6, values.len());
        values.for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    /// A key with its value as another file has both.
    pub(super) fn copied(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.count += 1;
    }
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// A tensor as the table names it.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) name: &'a str,
    /// The last axis contiguous.
    pub(super) shape: &'a [usize],
    pub(super) kind: TensorType,
}

impl Row<'_> {
    /// Bytes of the tensor.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block_len() * self.kind.block_bytes()
    }
}

/// A file that is there under its name when it is whole, and not before.
#[derive(Debug)]
pub(super) struct Container {
    path: PathBuf,
    /// No file was there; one that comes to be there is not written over.
    is_new: bool,
    temporary: PathBuf,
    file: BufWriter<File>,
    written: usize,
    done: bool,
}

impl Container {
    /// Writes all that stands before the tensors. A file that is new takes no other's place.
    pub(super) fn create(
        (path, is_new): (&Path, bool),
        keys: &Keys,
        rows: &[Row<'_>],
    ) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        if name.is_empty() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a file name");
            return Err(Error::io(path, source));
        }
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(|source| Error::io(path, source))?;
        let (path, file) = (path.to_owned(), BufWriter::with_capacity(1 << 20, file));
        let mut container = Self { path, is_new, temporary, file, written: 0, done: false };
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((rows.len() as u64).to_le_bytes());
        head.extend(keys.count.to_le_bytes());
        head.extend(&keys.bytes);
        let mut offset = 0;
        for row in rows {
            text(&mut head, row.name);
            head.extend((row.shape.len() as u32).to_le_bytes());
            row.shape.iter().rev().for_each(|axis| head.extend((*axis as u64).to_le_bytes()));
            head.extend(row.kind.number().to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += row.len().next_multiple_of(ALIGNMENT);
        }
        container.write(&head)?;
        container.align()?;
        Ok(container)
    }

    /// Appends a part of a tensor.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len();
        self.file.write_all(bytes).map_err(|source| Error::io(&self.path, source))
    }

    /// Ends a tensor.
    pub(super) fn align(&mut self) -> Result<()> {
        let missing = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.write(&[0; ALIGNMENT][..missing])
    }

    /// Gives the file its name, if `check` finds what it should find in it. Returns its size.
    pub(super) fn finish(mut self, check: impl FnOnce(&Path) -> Result<()>) -> Result<usize> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.map_err(|source| Error::io(&self.path, source))?;
        check(&self.temporary)?;
        // Whoever takes the name first has it.
        let taken = if self.is_new { File::create_new(&self.path).map(drop) } else { Ok(()) };
        taken
            .and_then(|()| {
                let renamed = std::fs::rename(&self.temporary, &self.path);
                if renamed.is_err() && self.is_new {
                    let _ = std::fs::remove_file(&self.path);
                }
                renamed
            })
            .map_err(|source| Error::io(&self.path, source))?;
        self.done = true;
        Ok(self.written)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.done {
            // Best effort after an error that is being reported.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
