use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moa_core::{BlockType, Dtype};
use safetensors::tensor::Dtype as FileDtype;
use safetensors::{SafeTensorError, SafeTensors};

use crate::checkpoint::fingerprint::Fnv1a;
use crate::checkpoint::found;
use crate::checkpoint::fp8::{self, Scales};
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::mapped::{MappedTensor, Memory};
use crate::checkpoint::packed::{Packing, Parts};
use crate::checkpoint::text::{LFS, is_file};
use crate::error::{Error, Result};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where a decoder's weights come from.
pub trait Tensors {
    /// The tensor `name`, which must have `shape`.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::TensorShape`] and [`Error::TensorDtype`] if there is no such
    /// tensor.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor>;

    /// The blocks that the tensor `name` is in, if it is; nothing but its name is looked at.
    fn blocks(&self, name: &str) -> Option<BlockType> {
        let _ = name;
        None
    }

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
/// ends, and that no shard is missing.
///
/// Names that lack the usual `model.`, or that stand behind the prefix of a wrapper, are found by their
/// usual names too.
#[derive(Clone, Debug)]
pub struct Weights {
    dir: PathBuf,
    /// Whether files are mapped, or else read.
    mmap: bool,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
    /// Usual names of tensors that the file calls otherwise.
    aliases: BTreeMap<String, String>,
    /// How matrices are packed that are in parts.
    packing: Option<Packing>,
    /// Rows and columns of the blocks that matrices of 8 bits have a scale for each of, where there are more than one of a row.
    fp8_block: Option<[usize; 2]>,
}

#[derive(Clone, Debug)]
struct MappedFile {
    path: PathBuf,
    map: Memory,
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
    /// Opens `model.safetensors`, the shards named by `model.safetensors.index.json`, or shards
    /// without an index (`NAME-00001-of-00002.safetensors`), in `dir`.
    ///
    /// # Errors
    /// [`Error::NoWeights`] when none exists, [`Error::Safetensors`] for a file that is
    /// truncated, overlapping or otherwise invalid, [`Error::ShardMissing`],
    /// [`Error::ShardName`] and [`Error::TensorTwice`] for shards that do not fit each other,
    /// [`Error::DanglingLink`] and [`Error::LfsPointer`] for a file that was not fetched,
    /// [`Error::Io`] and [`Error::Json`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(dir.as_ref(), true)
    }

    /// [`open`](Self::open), with files that are mapped or else read.
    pub(crate) fn open_with(dir: &Path, mmap: bool) -> Result<Self> {
        let mut weights = Self {
            dir: dir.to_owned(),
            mmap,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            aliases: BTreeMap::new(),
            packing: None,
            fp8_block: None,
        };
        if is_file(&dir.join(SINGLE))? {
            weights.add_file(&dir.join(SINGLE))?;
        } else if is_file(&dir.join(INDEX))? {
            let index = dir.join(INDEX);
            // Tensors are looked up in the shards themselves: the index may name some that no model needs.
            let shards: BTreeSet<String> = read_index(&index)?.into_values().collect();
            weights.add_shards(&index, shards)?;
        } else if let Some(shards) = shards_without_index(dir)? {
            weights.add_shards(dir, shards)?;
        } else {
            return Err(Error::NoWeights { path: dir.to_owned(), got: other_weights(dir)? });
        }
        weights.aliases = usual_names(weights.names());
        Ok(weights)
    }

    /// The tensor `name`, which must have `shape` and plain floating-point elements.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::TensorShape`], [`Error::TensorDtype`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        if let (None, Some(packing), &[rows, cols]) = (self.actual_name(name), self.packing, shape)
            && let Some(stem) = name.strip_suffix(".weight")
            && self.contains(&format!("{stem}.qweight"))
        {
            return self.packed(packing, stem, rows, cols);
        }
        let entry = self.entry(name, shape)?;
        let file = &self.files[entry.file];
        if let (Some(block), FileDtype::F8_E4M3, &[rows, cols]) =
            (self.fp8_block, entry.dtype, shape)
        {
            let codes = &file.map[entry.offset..entry.offset + entry.len];
            return self.scales(name, [rows, cols], block)?.matrix(codes, [rows, cols]);
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

    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let Some(entry) = self.actual_name(name).and_then(|name| self.tensors.get(name)) else {
            return Err(Error::TensorMissing { path: self.dir.clone(), name: name.to_owned() });
        };
        if entry.shape != shape {
            return Err(Error::TensorShape {
                path: self.files[entry.file].path.clone(),
                name: name.to_owned(),
                expected: shape.to_owned(),
                got: entry.shape.clone(),
            });
        }
        Ok(entry)
    }

    /// Matrices that are there in parts are packed in this way.
    pub(crate) fn set_packing(&mut self, packing: Option<Packing>) {
        self.packing = packing;
    }

    /// Matrices of 8 bits have scales of this block, or of a row or all of it.
    pub(crate) fn set_fp8_block(&mut self, block: [usize; 2]) {
        self.fp8_block = Some(block);
    }

    /// Whether every tensor with scales of such a name is of 8 bits.
    pub(crate) fn is_fp8(&self, end: &str) -> bool {
        let mut stems = self.names().filter_map(|name| name.strip_suffix(end));
        stems.all(|stem| {
            let weight = self.tensors.get(&format!("{stem}.weight"));
            weight.is_some_and(|entry| entry.dtype == FileDtype::F8_E4M3)
        })
    }

    /// The scales of the matrix `name` of 8 bits.
    fn scales(&self, name: &str, shape: [usize; 2], block: [usize; 2]) -> Result<Scales> {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let names = fp8::SCALES.map(|end| format!("{stem}{end}"));
        let name = names.iter().find(|name| self.contains(name)).unwrap_or(&names[0]);
        let actual = self.actual_name(name).and_then(|name| self.tensors.get(name));
        let own = actual.map_or(&[][..], |entry| &entry.shape);
        let values = self.tensor(name, own)?.to_f32()?;
        let counts = match *own {
            [] => Some([1, 1]),
            [down] => Some([down, 1]),
            [down, across] => Some([down, across]),
            _ => None,
        };
        match counts.and_then(|counts| Scales::block(counts, shape, block)) {
            Some(block) => Ok(Scales { values, block }),
            None => {
                let [rows, cols] = [0, 1].map(|axis| shape[axis].div_ceil(block[axis]));
                let (expected, path) = (vec![rows, cols], self.dir.clone());
                Err(Error::TensorShape { path, name: name.clone(), expected, got: own.to_owned() })
            }
        }
    }

    /// The matrix of the parts `stem.qweight` and others.
    fn packed(
        &self,
        packing: Packing,
        stem: &str,
        rows: usize,
        cols: usize,
    ) -> Result<MappedTensor> {
        let part = |end: &str, shape: &[usize], dtype: FileDtype| {
            let name = format!("{stem}.{end}");
            let entry = self.entry(&name, shape)?;
            let file = &self.files[entry.file];
            if entry.dtype != dtype {
                let got = entry.dtype;
                let reason = format!("tensor `{name}` must have elements {dtype:?}, got {got:?}");
                return Err(Error::Safetensors { path: file.path.clone(), reason });
            }
            Ok(&file.map[entry.offset..entry.offset + entry.len])
        };
        let scales = format!("{stem}.scales");
        let shape = self.actual_name(&scales).and_then(|name| self.tensors.get(name));
        let groups = shape.and_then(|entry| entry.shape.first()).copied().unwrap_or(1).max(1);
        let codes = match packing {
            Packing::Gptq { .. } => [cols.div_ceil(8), rows],
            Packing::Awq => [cols, rows.div_ceil(8)],
        };
        let parts = Parts {
            codes: part("qweight", &codes, FileDtype::I32)?,
            zeros: part("qzeros", &[groups, rows.div_ceil(8)], FileDtype::I32)?,
            scales: part("scales", &[groups, rows], FileDtype::F16)?,
            groups: match self.contains(&format!("{stem}.g_idx")) {
                true => Some(part("g_idx", &[cols], FileDtype::I32)?),
                false => None,
            },
        };
        let invalid = |reason| Err(Error::Safetensors { path: self.dir.clone(), reason });
        if !rows.is_multiple_of(8) || !cols.is_multiple_of(8) {
            return invalid(format!(
                "`{stem}` of [{rows}, {cols}] must be whole words of 8 elements"
            ));
        }
        let named = parts.groups.map(|all| all.as_chunks::<4>().0);
        let mut named = named.into_iter().flatten().map(|group| i32::from_le_bytes(*group));
        if let Some(group) = named.find(|n| !usize::try_from(*n).is_ok_and(|n| n < groups)) {
            return invalid(format!(
                "`{stem}.g_idx` must name one of {groups} groups, got {group}"
            ));
        }
        // Whether the last group is shorter, or all are, nobody says.
        if parts.groups.is_none() && !cols.is_multiple_of(groups) {
            return invalid(format!(
                "{cols} inputs of `{stem}` must be {groups} groups of one size"
            ));
        }
        packing.matrix(&parts, rows, cols)
    }

    /// Whether all elements of a tensor are zeros.
    pub(crate) fn is_zero(&self, name: &str) -> bool {
        let bytes = |e: &Entry| &self.files[e.file].map[e.offset..e.offset + e.len];
        self.tensors.get(name).is_some_and(|entry| bytes(entry).iter().all(|byte| *byte == 0))
    }

    /// Whether there is a tensor `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.actual_name(name).is_some()
    }

    /// What the file calls the tensor `name`.
    pub(crate) fn actual_name(&self, name: &str) -> Option<&str> {
        let actual = || self.aliases.get(name).map(String::as_str);
        self.tensors.get_key_value(name).map(|(name, _)| name.as_str()).or_else(actual)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensor names in order, as the files have them.
    pub fn names(&self) -> impl Iterator<Item = &str> + Clone {
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

    fn add_shards(&mut self, index: &Path, shards: BTreeSet<String>) -> Result<()> {
        for shard in shards {
            let path = self.dir.join(&shard);
            if !is_file(&path)? {
                return Err(Error::ShardMissing { index: index.to_owned(), shard });
            }
            self.add_file(&path)?;
        }
        Ok(())
    }

    /// Maps and validates one file.
    fn add_file(&mut self, path: &Path) -> Result<()> {
        let invalid = |reason: String| Error::Safetensors { path: path.to_owned(), reason };
        let map = Memory::of_file(path, self.mmap)?;
        if map.starts_with(LFS) {
            return Err(Error::LfsPointer { path: path.to_owned() });
        }
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|e| match e {
            // What begins with text is another kind of file, such as a page that says why there is none.
            SafeTensorError::HeaderTooLarge => {
                let begin = map[..map.len().min(16)].escape_ascii();
                invalid(format!("{e}: the file begins with `{begin}`"))
            }
            _ => invalid(e.to_string()),
        })?;
        let data = 8 + header_len;
        // The safetensors parser lets the last of two equal keys win.
        let text = std::str::from_utf8(&map[8..data]).map_err(|e| invalid(e.to_string()))?;
        JsonObject::parse(path, text).map_err(|e| invalid(e.to_string()))?;
        self.files.push(MappedFile { path: path.to_owned(), map });
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: self.files.len() - 1,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: data + start,
                len: end - start,
            };
            match self.tensors.get(&name) {
                None => drop(self.tensors.insert(name, entry)),
                // Tied weights, written by a tool that did not know of it.
                Some(first) if self.is_same(first, &entry) => {}
                Some(first) => {
                    let first = self.files[first.file].path.clone();
                    return Err(Error::TensorTwice { name, first, second: path.to_owned() });
                }
            }
        }
        Ok(())
    }

    fn is_same(&self, a: &Entry, b: &Entry) -> bool {
        let bytes = |e: &Entry| &self.files[e.file].map[e.offset..e.offset + e.len];
        (a.dtype, &a.shape) == (b.dtype, &b.shape) && bytes(a) == bytes(b)
    }
}

/// The shards of a folder whose index was lost: all of one set, by the number that their names give.
fn shards_without_index(dir: &Path) -> Result<Option<BTreeSet<String>>> {
    let mut sets = BTreeSet::new();
    for name in file_names(dir)? {
        let parts = name.strip_suffix(".safetensors").and_then(|stem| stem.rsplit_once("-of-"));
        if let Some((before, total)) = parts
            && let Some((stem, number)) = before.rsplit_once('-')
            && number.len() == 5
            && number.parse::<u32>().is_ok()
            && let Ok(count) = total.parse::<u32>()
            && (1..=10_000).contains(&count)
        {
            sets.insert((stem.to_owned(), total.to_owned(), count));
        }
    }
    // Of two sets, nobody can tell which is meant.
    let (Some((stem, total, count)), 1) = (sets.first(), sets.len()) else { return Ok(None) };
    tracing::warn!("{}: no {INDEX}; reading all {count} shards", dir.display());
    let shard = |number| format!("{stem}-{number:05}-of-{total}.safetensors");
    Ok(Some((1..=*count).map(shard).collect()))
}

/// The last part of the name of every model's embedding.
const EMBEDDING: &str = "embed_tokens.weight";

/// Usual names, `model.` and `lm_head.weight`, of tensors that a file calls otherwise: those of a bare
/// model without `model.`, and those behind a wrapper's prefix, such as `language_model.`.
fn usual_names<'n>(names: impl Iterator<Item = &'n str> + Clone) -> BTreeMap<String, String> {
    let ends = |name: &'n str| name.strip_suffix(EMBEDDING);
    let mut prefixes = names.clone().filter_map(ends).filter(|p| p.is_empty() || p.ends_with('.'));
    let (Some(prefix), None) = (prefixes.next(), prefixes.next()) else { return BTreeMap::new() };
    if prefix == "model." {
        return BTreeMap::new();
    }
    let wrapper = prefix.strip_suffix("model.").unwrap_or(prefix);
    let usual = |name: &'n str| match name.strip_prefix(prefix) {
        Some(rest) => Some(format!("model.{rest}")),
        None => name.strip_prefix(wrapper).map(str::to_owned),
    };
    let pairs = names.filter_map(|name| Some((usual(name)?, name.to_owned())));
    let pairs: BTreeMap<String, String> = pairs.collect();
    tracing::info!("names of tensors begin with `{prefix}` where others have `model.`");
    pairs
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
        if !is_name(shard) {
            let shard = shard.to_owned();
            return Err(Error::ShardName { index: index.to_owned(), shard });
        }
        files.insert(name.to_owned(), shard.to_owned());
    }
    Ok(files)
}

/// Whether a name is that of a file and no path, which could reach outside the model folder; backslashes are paths
/// elsewhere.
pub(crate) fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

/// What else in `dir` looks like weights, for the error that says that ours are missing.
fn other_weights(dir: &Path) -> Result<String> {
    if let Some(adapter) = found::adapter(dir) {
        return Ok(adapter);
    }
    let ends = [".bin", ".pth", ".pt", ".gguf", ".safetensors"];
    let mut names = file_names(dir)?;
    names.retain(|name| ends.iter().any(|end| name.ends_with(end)));
    names.sort();
    names.truncate(4);
    Ok(if names.is_empty() { "no weights at all".into() } else { names.join(", ") })
}

pub(crate) fn file_names(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(|source| Error::io(dir, source))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}
