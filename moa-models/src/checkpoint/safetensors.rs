use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use moa_core::Dtype;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as FileDtype;

use crate::checkpoint::fingerprint::Fnv1a;
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::mapped::MappedTensor;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where a decoder's weights come from.
pub trait Tensors {
    /// The tensor `name`, which must have `shape`.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::TensorShape`] and [`Error::TensorDtype`] if there is no such
    /// tensor.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor>;

    /// The fingerprint that ties a plan to these weights.
    fn fingerprint(&self) -> String;
}

impl Tensors for Weights {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        Self::tensor(self, name, shape)
    }

    fn fingerprint(&self) -> String {
        Self::fingerprint(self)
    }
}

/// The tensors of a model folder, mapped into memory and validated, but not read.
///
/// Opening checks the whole header of every file: that names are unique, that offsets neither
/// overlap nor leave gaps, that they agree with shapes and element types and end where the file
/// ends, and that the index of a sharded checkpoint tells the truth.
#[derive(Clone, Debug)]
pub struct Weights {
    dir: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: FileDtype,
    shape: Vec<usize>,
    offset: usize,
    len: usize,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards named by `model.safetensors.index.json`, in `dir`.
    ///
    /// # Errors
    /// [`Error::NoWeights`] when neither exists, [`Error::Safetensors`] for a file that is
    /// truncated, overlapping or otherwise invalid, [`Error::ShardMissing`],
    /// [`Error::ShardName`], [`Error::TensorTwice`] and [`Error::TensorMissing`] for an index
    /// that does not fit its shards, [`Error::Io`] and [`Error::Json`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut weights = Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if dir.join(SINGLE).is_file() {
            weights.add_file(&dir.join(SINGLE))?;
        } else if dir.join(INDEX).is_file() {
            weights.add_shards(&dir.join(INDEX))?;
        } else {
            return Err(Error::NoWeights { path: dir.to_owned(), got: other_weights(dir)? });
        }
        Ok(weights)
    }

    /// The tensor `name`, which must have `shape` and plain floating-point elements.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::TensorShape`], [`Error::TensorDtype`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(Error::TensorMissing { path: self.dir.clone(), name: name.to_owned() });
        };
        let file = &self.files[entry.file];
        if entry.shape != shape {
            return Err(Error::TensorShape {
                path: file.path.clone(),
                name: name.to_owned(),
                expected: shape.to_owned(),
                got: entry.shape.clone(),
            });
        }
        let dtype = match entry.dtype {
            FileDtype::F32 => Dtype::F32,
            FileDtype::F16 => Dtype::F16,
            FileDtype::BF16 => Dtype::Bf16,
            other => {
                return Err(Error::TensorDtype {
                    path: file.path.clone(),
                    name: name.to_owned(),
                    got: format!("{other:?}"),
                });
            }
        };
        let (offset, len) = (entry.offset, entry.len);
        Ok(MappedTensor::new(file.map.clone(), offset..offset + len, dtype, shape))
    }

    /// Whether there is a tensor `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensor names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.tensors.values().map(|entry| entry.len).sum()
    }

    /// Sixteen hex digits that tie a plan to these weights, whatever their sharding.
    ///
    /// FNV-1a over the names, element types, shapes and first 4 KiB of all tensors in order of
    /// their names: cheap, stable across machines and releases, and no defence against forgery.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Fnv1a::default();
        for (name, entry) in &self.tensors {
            hash.feed(name.as_bytes());
            hash.feed(format!("\n{:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
            let head = entry.offset..entry.offset + entry.len.min(4096);
            hash.feed(&self.files[entry.file].map[head]);
        }
        hash.to_string()
    }

    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let wanted = read_index(index)?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        for shard in wanted.values() {
            if files.contains_key(shard.as_str()) {
                continue;
            }
            let path = self.dir.join(shard);
            if !path.is_file() {
                let shard = shard.clone();
                return Err(Error::ShardMissing { index: index.to_owned(), shard });
            }
            files.insert(shard, self.add_file(&path)?);
        }
        for (name, shard) in &wanted {
            let file = files[shard.as_str()];
            if self.tensors.get(name).is_none_or(|entry| entry.file != file) {
                let path = self.dir.join(shard);
                return Err(Error::TensorMissing { path, name: name.clone() });
            }
        }
        Ok(())
    }

    /// Maps and validates one file; returns its number.
    fn add_file(&mut self, path: &Path) -> Result<usize> {
        let invalid = |reason: String| Error::Safetensors { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        // SAFETY: the map is only read. Bytes that another process changes under us would give
        // other weights, never an out-of-range access; a file that it shortens raises SIGBUS,
        // which every reader of mapped model files accepts.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        let (header_len, header) =
            SafeTensors::read_metadata(&map).map_err(|e| invalid(e.to_string()))?;
        let data = 8 + header_len;
        // The safetensors parser lets the last of two equal keys win.
        let text = std::str::from_utf8(&map[8..data]).map_err(|e| invalid(e.to_string()))?;
        JsonObject::parse(path, text).map_err(|e| invalid(e.to_string()))?;
        let number = self.files.len();
        for (name, info) in header.tensors() {
            if let Some(first) = self.tensors.get(&name) {
                let first = self.files[first.file].path.clone();
                return Err(Error::TensorTwice { name, first, second: path.to_owned() });
            }
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: number,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: data + start,
                len: end - start,
            };
            self.tensors.insert(name, entry);
        }
        self.files.push(MappedFile { path: path.to_owned(), map: Arc::new(map) });
        Ok(number)
    }
}

/// The file that each tensor lies in, as the index of a sharded checkpoint says.
pub(crate) fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let object = JsonObject::read(index)?;
    let map = object.require("weight_map", object.object("weight_map")?)?;
    let mut files = BTreeMap::new();
    for (name, shard) in map.iter() {
        let Some(shard) = shard.as_str() else {
            return Err(map.invalid(name, "a file name", shard));
        };
        // A path could reach outside the model folder; backslashes are paths elsewhere.
        let plain = !matches!(shard, "" | "." | "..") && !shard.contains(['/', '\\', ':', '\0']);
        if !plain {
            let shard = shard.to_owned();
            return Err(Error::ShardName { index: index.to_owned(), shard });
        }
        files.insert(name.to_owned(), shard.to_owned());
    }
    Ok(files)
}

/// What else in `dir` looks like weights, for the error that says that ours are missing.
fn other_weights(dir: &Path) -> Result<String> {
    let entries = std::fs::read_dir(dir).map_err(|source| Error::io(dir, source))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| [".bin", ".pth", ".pt", ".gguf"].iter().any(|end| name.ends_with(end)))
        .collect();
    names.sort();
    names.truncate(4);
    Ok(if names.is_empty() { "no weights at all".into() } else { names.join(", ") })
}
