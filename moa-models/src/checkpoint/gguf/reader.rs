//! The container: header, metadata and table of tensors, every size checked against the bytes that are
//! there before anything is allocated for it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::tensor_type::TensorType;
use super::value::Value;
use crate::{Error, Result};

/// Arrays within arrays, at most.
const MOST_DEPTH: u32 = 4;
/// Axes of a tensor, at most.
const MOST_AXES: u32 = 4;

/// What stands before the data of one file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
    /// Where each key lies with its value, in the file's order.
    pub(super) places: Vec<(String, Range<usize>)>,
}

/// Where a tensor lies.
#[derive(Debug)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// The last axis contiguous.
    pub(super) shape: Vec<usize>,
    pub(super) kind: TensorType,
    /// Place in the file.
    pub(super) bytes: Range<usize>,
}

impl Header {
    /// Reads what `path` begins with, of which `bytes` is all.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { path, bytes, at: 0 };
        let magic = reader.take(4, "magic")?;
        if magic != b"GGUF" {
            return Err(reader.fault("magic", "`GGUF`", format!("`{}`", magic.escape_ascii())));
        }
        let version = reader.u32("version")?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err(reader.fault("version", "little-endian", "a big-endian file"));
        }
        if version != 2 && version != 3 {
            return Err(reader.fault("version", "2 or 3", version));
        }
        let tensors = reader.count(24, "number of tensors")?;
        let keys = reader.count(13, "number of keys")?;
        let (mut metadata, mut places) = (BTreeMap::new(), Vec::new());
        for _ in 0..keys {
            let start = reader.at;
            let key = reader.text("a key")?;
            let place = format!("key `{}`", short(&key));
            let kind = reader.u32(&place)?;
            let value = reader.value(kind, &place, 0)?;
            places.push((key.clone(), start..reader.at));
            if metadata.insert(key, value).is_some() {
                return Err(reader.fault(&place, "there once", "there twice"));
            }
        }
        let alignment = alignment(&reader, &metadata)?;
        let entries: Vec<_> = (0..tensors).map(|_| reader.entry()).collect::<Result<_>>()?;
        let data = reader.at.next_multiple_of(alignment);
        let mut tensors = Vec::new();
        for entry in entries {
            tensors.push(entry.place(&reader, data, alignment)?);
        }
        check_disjoint(&reader, &tensors)?;
        Ok(Self { metadata, tensors, places })
    }
}

/// Where tensors may begin.
fn alignment(reader: &Reader<'_>, metadata: &BTreeMap<String, Value>) -> Result<usize> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(32) };
    match value.as_unsigned() {
        Some(n) if n.is_power_of_two() && n <= 1 << 20 => Ok(n as usize),
        _ => Err(reader.fault("key `general.alignment`", "a power of 2 up to 2^20", value)),
    }
}

/// Checks that no name and no byte belongs to two tensors.
fn check_disjoint(reader: &Reader<'_>, tensors: &[TensorInfo]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
        let place = format!("tensor `{}`", short(name));
        return Err(reader.fault(&place, "there once", "there twice"));
    }
    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    for [first, second] in by_place.array_windows() {
        if second.bytes.start < first.bytes.end {
            let place = format!("tensor `{}`", short(&second.name));
            let expected = format!("behind tensor `{}`", short(&first.name));
            return Err(reader.fault(&place, &expected, "bytes of both"));
        }
    }
    Ok(())
}

/// A tensor as the table has it.
struct Entry {
    name: String,
    /// The first axis contiguous.
    axes: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Entry {
    fn place(self, reader: &Reader<'_>, data: usize, alignment: usize) -> Result<TensorInfo> {
        let place = format!("tensor `{}`", short(&self.name));
        let fault = |expected: &str, got: String| Err(reader.fault(&place, expected, got));
        let Some(kind) = TensorType::from_number(self.kind) else {
            return fault(&format!("of {}", TensorType::known()), TensorType::name_of(self.kind));
        };
        let row = self.axes.first().copied().unwrap_or(1);
        let (block, size) = (kind.block_len() as u64, kind.block_bytes() as u64);
        let elements = self.axes.iter().try_fold(1u64, |n, axis| n.checked_mul(*axis));
        if !row.is_multiple_of(block) {
            let expected = format!("of rows of a multiple of {block} elements");
            return fault(&expected, row.to_string());
        }
        if !self.offset.is_multiple_of(alignment as u64) {
            let expected = format!("at a multiple of {alignment} bytes");
            return fault(&expected, self.offset.to_string());
        }
        let len = elements.and_then(|n| (n / block).checked_mul(size));
        let start = self.offset.checked_add(data as u64);
        let end = start.zip(len).and_then(|(start, len)| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= reader.bytes.len() as u64 => Ok(TensorInfo {
                name: self.name,
                shape: self.axes.iter().rev().map(|axis| *axis as usize).collect(),
                kind,
                bytes: start as usize..end as usize,
            }),
            (_, end) => {
                let expected = format!("within the file's {} bytes", reader.bytes.len());
                let got = end.map_or("an end beyond 2^64".to_owned(), |end| format!("end {end}"));
                fault(&expected, got)
            }
        }
    }
}

/// A place in a file, which never moves beyond its end.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn fault(&self, place: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        Error::gguf(self.path, place, expected, got)
    }

    fn take(&mut self, len: usize, place: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some((taken, _)) = rest.split_at_checked(len) else {
            let expected = format!("{len} bytes at {}", self.at);
            return Err(self.fault(place, &expected, format!("the end after {}", rest.len())));
        };
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, place: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, place)?);
        Ok(array)
    }

    fn u32(&mut self, place: &str) -> Result<u32> {
        self.array(place).map(u32::from_le_bytes)
    }

    fn u64(&mut self, place: &str) -> Result<u64> {
        self.array(place).map(u64::from_le_bytes)
    }

    /// A number of things of at least `least` bytes each, for all of which there is room.
    fn count(&mut self, least: usize, place: &str) -> Result<usize> {
        let (rest, count) = (self.bytes.len() - self.at, self.u64(place)?);
        match usize::try_from(count) {
            Ok(n) if n.checked_mul(least).is_some_and(|bytes| bytes <= rest) => Ok(n),
            _ => Err(self.fault(place, &format!("at most {}", rest / least), count)),
        }
    }

    fn text(&mut self, place: &str) -> Result<String> {
        let len = self.count(1, place)?;
        let bytes = self.take(len, place)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.fault(place, "UTF-8", error)),
        }
    }

    fn value(&mut self, kind: u32, place: &str, depth: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(place)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(place)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(place)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(place)?).into()),
            4 => Value::Unsigned(self.u32(place)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(place)?).into()),
            6 => Value::from_f32(f32::from_le_bytes(self.array(place)?)),
            7 => Value::Flag(self.array::<1>(place)?[0] != 0),
            8 => Value::Text(self.text(place)?),
            9 => self.values(place, depth + 1)?,
            10 => Value::Unsigned(self.u64(place)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(place)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(place)?)),
            other => return Err(self.fault(place, "of a type from 0 to 12", other)),
        })
    }

    fn values(&mut self, place: &str, depth: u32) -> Result<Value> {
        if depth > MOST_DEPTH {
            let expected = format!("arrays of at most {MOST_DEPTH} levels");
            return Err(self.fault(place, &expected, "more"));
        }
        let kind = self.u32(place)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(self.fault(place, "of a type from 0 to 12", other)),
        };
        let len = self.count(least, place)?;
        match kind {
            8 => (0..len).map(|_| self.text(place)).collect::<Result<_>>().map(Value::Texts),
            6 | 12 => {
                let number = |value: Value| value.as_number().unwrap_or(f64::NAN) as f32;
                let values = (0..len).map(|_| Ok(number(self.value(kind, place, depth)?)));
                values.collect::<Result<_>>().map(Value::Floats)
            }
            7 | 9 => {
                for _ in 0..len {
                    self.value(kind, place, depth)?;
                }
                Ok(Value::Other(len as u64))
            }
            _ => {
                let integer = |value: Value| match value {
                    Value::Unsigned(n) => n.min(i64::MAX as u64) as i64,
                    Value::Signed(n) => n,
                    _ => 0,
                };
                let values = (0..len).map(|_| Ok(integer(self.value(kind, place, depth)?)));
                values.collect::<Result<_>>().map(Value::Integers)
            }
        }
    }

    fn entry(&mut self) -> Result<Entry> {
        let name = self.text("a tensor's name")?;
        let place = format!("tensor `{}`", short(&name));
        let axes = self.u32(&place)?;
        if axes == 0 || axes > MOST_AXES {
            return Err(self.fault(&place, &format!("of 1 to {MOST_AXES} axes"), axes));
        }
        let axes: Vec<u64> = (0..axes).map(|_| self.u64(&place)).collect::<Result<_>>()?;
        if axes.contains(&0) {
            return Err(self.fault(&place, "of axes above 0", format!("{axes:?}")));
        }
        Ok(Entry { kind: self.u32(&place)?, offset: self.u64(&place)?, name, axes })
    }
}

/// A name that fits into a message.
fn short(name: &str) -> &str {
    name.char_indices().nth(80).map_or(name, |(end, _)| &name[..end])
}
