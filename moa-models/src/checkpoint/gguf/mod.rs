//! Models in one GGUF file, or in several that belong together: weights that stay in their blocks, and the
//! metadata as the configuration, tokenizer and chat template that a folder has in files of its own.

mod architecture;
mod config;
mod pre_tokenizer;
mod reader;
pub(crate) mod sentencepiece;
pub(crate) mod tensor_type;
mod tokenizer;
mod value;
pub(crate) mod write;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use moa_core::BlockType;

use self::reader::{Header, TensorInfo};
use self::tensor_type::TensorType;
use self::value::Value;
use crate::checkpoint::fingerprint::Fnv1a;
use crate::checkpoint::mapped::{MappedTensor, Memory};
use crate::checkpoint::open_options::OpenOptions;
use crate::checkpoint::safetensors::Tensors;
use crate::checkpoint::text::is_file;
use crate::{Error, Result};

/// A model in the format GGUF, mapped into memory and validated, but not read.
///
/// Opening checks the whole header: that keys and names are unique, that tensors have known types, lie
/// within the file and do not overlap, and that no count asks for more than the file has.
///
/// Weights stay in their blocks in the map, but for the queries and keys of the architecture `llama`, whose
/// rows GGUF orders by rotary pair: they are copied in the order of safetensors.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    /// Whether files are mapped, or else read.
    mmap: bool,
    files: Vec<MappedFile>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Memory,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    info: TensorInfo,
}

/// Whether `path` is a file in the format GGUF, by its name or its first bytes.
#[must_use]
pub fn is_gguf(path: &Path) -> bool {
    let begins = || {
        let mut magic = [0; 4];
        let read = moa_core::open_file(path).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && magic == *b"GGUF"
    };
    let named = || path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    path.is_file() && (named() || begins())
}

/// The weights of a model folder, or of a GGUF file.
///
/// # Errors
/// Those of [`Weights::open`](crate::Weights::open) or [`Gguf::open`].
pub fn open_tensors(path: impl AsRef<Path>) -> Result<Box<dyn Tensors>> {
    OpenOptions::default().open_tensors(path)
}

impl Gguf {
    /// Opens a file, with the others of the model where it is the first of several
    /// (`NAME-00001-of-00003.gguf`).
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Gguf`] with the place in the file for one that
    /// is truncated, contradicts itself or has types that are not known, [`Error::ShardMissing`] for one of several that is
    /// not there, [`Error::TensorTwice`] if two files have the same tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path.as_ref(), true)
    }

    /// [`open`](Self::open), with files that are mapped or else read.
    pub(crate) fn open_with(path: &Path, mmap: bool) -> Result<Self> {
        let mut gguf = Self {
            path: path.to_owned(),
            mmap,
            files: Vec::new(),
            metadata: BTreeMap::new(),
            tensors: BTreeMap::new(),
        };
        gguf.metadata = gguf.add_file(path)?;
        let count = gguf.unsigned("split.count")?.unwrap_or(1);
        if count > 1 {
            gguf.add_parts(count)?;
        }
        Ok(gguf)
    }

    /// The other files of a model in several.
    fn add_parts(&mut self, count: u64) -> Result<()> {
        if self.unsigned("split.no")?.unwrap_or(0) != 0 {
            let got = self.metadata["split.no"].to_string();
            return Err(self.key_fault(
                "split.no",
                "0: the first file of several is to be named",
                got,
            ));
        }
        let name = self.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let Some(stem) = name.strip_suffix(&part_name(1, count)) else {
            let expected = format!("a name that ends in `{}`", part_name(1, count));
            return Err(Error::gguf(&self.path, "file of several", &expected, name));
        };
        for number in 2..=count {
            let shard = format!("{stem}{}", part_name(number, count));
            let path = self.path.with_file_name(&shard);
            if !is_file(&path)? {
                return Err(Error::ShardMissing { index: self.path.clone(), shard });
            }
            let metadata = self.add_file(&path)?;
            let found = metadata.get("split.no").and_then(Value::as_unsigned);
            if found != Some(number - 1) {
                let got = found.map_or("none".to_owned(), |n| n.to_string());
                let expected = (number - 1).to_string();
                return Err(Error::gguf(&path, "key `split.no`", &expected, got));
            }
        }
        match self.unsigned("split.tensors.count")? {
            Some(expected) if expected != self.tensors.len() as u64 => {
                let got = format!("{} in {count} files", self.tensors.len());
                Err(Error::gguf(&self.path, "number of tensors", &expected.to_string(), got))
            }
            _ => Ok(()),
        }
    }

    /// Maps and validates one file; returns its metadata.
    fn add_file(&mut self, path: &Path) -> Result<BTreeMap<String, Value>> {
        let map = Memory::of_file(path, self.mmap)?;
        let Header { metadata, tensors, .. } = Header::parse(path, &map)?;
        for info in tensors {
            if let Some(first) = self.tensors.get(&info.name) {
                let first = self.files[first.file].path.clone();
                return Err(Error::TensorTwice { name: info.name, first, second: path.to_owned() });
            }
            self.tensors.insert(info.name.clone(), Entry { file: self.files.len(), info });
        }
        self.files.push(MappedFile { path: path.to_owned(), map });
        Ok(metadata)
    }

    /// All tensor names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.tensors.values().map(|entry| entry.info.bytes.len()).sum()
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::TensorMissing { path: self.path.clone(), name: name.to_owned() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// The tensor as it lies in the file.
    fn mapped(&self, entry: &Entry, shape: &[usize]) -> MappedTensor {
        let (map, bytes) = (self.files[entry.file].map.clone(), entry.info.bytes.clone());
        match entry.info.kind {
            TensorType::Plain(dtype) => MappedTensor::new(map, bytes, dtype, shape),
            TensorType::Blocks(blocks) => MappedTensor::in_blocks(map, bytes, blocks, shape),
        }
    }

    /// The value of a key.
    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The value of a key by one of the readers of [`Value`].
    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.key_fault(key, expected, value))
    }

    fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.read(key, "a whole number of at least 0", Value::as_unsigned)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_number)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_flag)
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a text", Value::as_text)
    }

    fn require<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.key_fault(key, expected, "none"))
    }

    fn key_fault(&self, key: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        Error::gguf(&self.path, &format!("key `{key}`"), expected, got)
    }
}

impl Tensors for Gguf {
    fn blocks(&self, name: &str) -> Option<BlockType> {
        match self.tensors.get(name)?.info.kind {
            TensorType::Blocks(blocks) => Some(blocks),
            TensorType::Plain(_) => None,
        }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let entry = self.entry(name)?;
        // A vector may be written as a matrix of one row.
        let found = &entry.info.shape;
        let ones = found.len().saturating_sub(shape.len());
        if found[ones..] != *shape || found[..ones].iter().any(|axis| *axis != 1) {
            return Err(Error::TensorShape {
                path: self.files[entry.file].path.clone(),
                name: name.to_owned(),
                expected: shape.to_owned(),
                got: found.clone(),
            });
        }
        let tensor = self.mapped(entry, shape);
        let (rows, heads) = (shape.first().copied().unwrap_or(1), self.rotary_heads(name)?);
        match heads {
            None => Ok(tensor),
            Some(heads) if rows.is_multiple_of(2 * heads) => {
                tensor.rows(&rows_by_half(rows, heads))
            }
            Some(heads) => {
                let (place, path) = (format!("tensor `{name}`"), &self.files[entry.file].path);
                let expected = format!("rotary pairs of rows in each of {heads} heads");
                Err(Error::gguf(path, &place, &expected, format!("{rows} rows")))
            }
        }
    }

    fn fingerprint(&self) -> String {
        let mut hash = Fnv1a::default();
        for (name, Entry { file, info }) in &self.tensors {
            hash.feed(name.as_bytes());
            hash.feed(format!("\n{:?} {:?}\n", info.kind, info.shape).as_bytes());
            let head = info.bytes.start..info.bytes.end.min(info.bytes.start + 4096);
            hash.feed(&self.files[*file].map[head]);
        }
        hash.to_string()
    }
}

/// How the name of a file of several ends.
pub(crate) fn part_name(number: u64, count: u64) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}

/// The rows of `heads` heads in the order of rotated halves. GGUF has the two rows of a rotary pair side by
/// side.
fn rows_by_half(rows: usize, heads: usize) -> Vec<std::ops::Range<usize>> {
    let dim = rows / heads.max(1);
    let order = (0..heads).flat_map(|head| {
        (0..2).flat_map(move |half| (0..dim / 2).map(move |pair| head * dim + 2 * pair + half))
    });
    order.map(|row| row..row + 1).collect()
}

/// What Llama 3.1 multiplies a rotary wavelength by: those longer than the original context are stretched, those
/// shorter than a quarter of it (or what `bounds` say) kept.
fn llama3_factor(
    theta: f64,
    head_dim: usize,
    index: usize,
    original: usize,
    factor: f64,
    (low, high): (f64, f64),
) -> f64 {
    let wave = std::f64::consts::TAU * theta.powf(2.0 * index as f64 / head_dim as f64);
    let smooth = ((original as f64 / wave - low) / (high - low)).clamp(0.0, 1.0);
    1.0 / ((1.0 - smooth) / factor + smooth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_come_by_halves() {
        let rows: Vec<usize> = rows_by_half(8, 2).into_iter().map(|row| row.start).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn parts_are_numbered_from_one() {
        assert_eq!(part_name(2, 13), "-00002-of-00013.gguf");
    }
}
