use std::fmt;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use moa_core::{BlockType, Dtype};

use crate::{Error, Result, memory};

/// A tensor that lies in a mapped file (or one that was read), row-major and little-endian, or a part of one.
///
/// Its elements are numbers of a [`dtype`](Self::dtype), or quantised [`blocks`](Self::blocks) of rows. A
/// clone shares the map, which lives as long as any tensor of the file does. The bytes need
/// not be aligned to their elements: safetensors does not promise it.
#[derive(Clone)]
pub struct MappedTensor {
    memory: Memory,
    bytes: Range<usize>,
    elements: Elements,
    shape: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elements {
    Plain(Dtype),
    /// Each row is a whole number of blocks.
    Blocks(BlockType),
}

impl Elements {
    /// Elements that are stored together, and their bytes.
    fn unit(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.bytes()),
            Self::Blocks(blocks) => (blocks.block_len(), blocks.block_bytes()),
        }
    }
}

/// Bytes that tensors share; a clone is the same bytes.
#[derive(Clone)]
pub(crate) enum Memory {
    Map(Arc<Mmap>),
    /// Memory of its own, such as a part that does not lie in one piece; words, so that elements are
    /// aligned.
    Words(Arc<Vec<u64>>),
    /// A file that was read, and its bytes: the last word may be filled up.
    Read(Arc<Vec<u64>>, usize),
}

impl Memory {
    /// The bytes of a file, mapped or read.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn of_file(path: &Path, mmap: bool) -> Result<Self> {
        let read = || {
            let mut file = moa_core::open_file(path)?;
            if mmap {
                // SAFETY: the map is only read. Bytes that another process changes under us would give
                // other weights, never an out-of-range access; a file that it shortens raises SIGBUS,
                // which every reader of mapped model files accepts.
                return Ok(Self::Map(Arc::new(unsafe { Mmap::map(&file) }?)));
            }
            let no_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
            let len = usize::try_from(file.metadata()?.len()).map_err(|_| no_memory())?;
            let mut words = Vec::new();
            words.try_reserve_exact(len.div_ceil(8)).map_err(|_| no_memory())?;
            words.resize(len.div_ceil(8), 0u64);
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
            // A file that is shortened meanwhile is an error here.
            file.read_exact(&mut bytes[..len])?;
            Ok(Self::Read(Arc::new(words), len))
        };
        read().map_err(|source| Error::io(path, source))
    }
}

impl std::ops::Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Words(words) => bytemuck::cast_slice(words.as_slice()),
            Self::Read(words, len) => &bytemuck::cast_slice(words.as_slice())[..*len],
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes)", self.len())
    }
}

impl MappedTensor {
    /// The caller has checked that the bytes are those of the shape.
    pub(crate) fn new(memory: Memory, bytes: Range<usize>, dtype: Dtype, shape: &[usize]) -> Self {
        let elements = Elements::Plain(dtype);
        Self { memory, bytes, elements, shape: shape.to_owned() }
    }

    /// The caller has checked that the bytes are those of the shape, whose rows are whole blocks.
    pub(crate) fn in_blocks(
        memory: Memory,
        bytes: Range<usize>,
        blocks: BlockType,
        shape: &[usize],
    ) -> Self {
        let elements = Elements::Blocks(blocks);
        Self { memory, bytes, elements, shape: shape.to_owned() }
    }

    /// bf16 elements that lie at a byte of `words`.
    pub(crate) fn made(words: Arc<Vec<u64>>, first_byte: usize, shape: &[usize]) -> Self {
        let bytes = first_byte..first_byte + 2 * shape.iter().product::<usize>();
        let elements = Elements::Plain(Dtype::Bf16);
        Self { memory: Memory::Words(words), bytes, elements, shape: shape.to_owned() }
    }

    /// Blocks that lie at a byte of `words`; rows are whole ones.
    pub(crate) fn made_blocks(
        words: Arc<Vec<u64>>,
        first_byte: usize,
        blocks: BlockType,
        shape: &[usize],
    ) -> Self {
        let len = shape.iter().product::<usize>() / blocks.block_len() * blocks.block_bytes();
        let (bytes, elements) = (first_byte..first_byte + len, Elements::Blocks(blocks));
        Self { memory: Memory::Words(words), bytes, elements, shape: shape.to_owned() }
    }

    /// Elements of a type from the beginning of `words`. The caller has checked that there are so many.
    pub(crate) fn of_words(words: Arc<Vec<u64>>, dtype: Dtype, shape: &[usize]) -> Self {
        Self::whole(words, Elements::Plain(dtype), shape)
    }

    /// The same of blocks.
    pub(crate) fn blocks_of_words(words: Arc<Vec<u64>>, kind: BlockType, shape: &[usize]) -> Self {
        Self::made_blocks(words, 0, kind, shape)
    }

    fn whole(words: Arc<Vec<u64>>, elements: Elements, shape: &[usize]) -> Self {
        let (unit, size) = elements.unit();
        let bytes = 0..shape.iter().product::<usize>() / unit * size;
        Self { memory: Memory::Words(words), bytes, elements, shape: shape.to_owned() }
    }

    /// The elements' bytes, or those of the blocks.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.bytes.clone()]
    }

    /// The element type, unless the elements are in blocks.
    #[must_use]
    pub fn dtype(&self) -> Option<Dtype> {
        match self.elements {
            Elements::Plain(dtype) => Some(dtype),
            Elements::Blocks(_) => None,
        }
    }

    /// The kind of blocks that the elements are in, if they are.
    #[must_use]
    pub fn blocks(&self) -> Option<BlockType> {
        match self.elements {
            Elements::Plain(_) => None,
            Elements::Blocks(blocks) => Some(blocks),
        }
    }

    /// Elements along each dimension, the last one contiguous.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as f32, copied.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let len = self.shape.iter().product();
        let mut values = memory::room(len, "a weight as f32")?;
        self.extend_f32(0..len, &mut values);
        Ok(values)
    }

    /// Appends some of the elements, counted through all rows, as f32.
    pub(crate) fn extend_f32(&self, elements: Range<usize>, to: &mut Vec<f32>) {
        match self.elements {
            Elements::Plain(dtype) => {
                let size = dtype.bytes();
                let bytes = &self.bytes()[elements.start * size..elements.end * size];
                extend_f32(dtype, bytes, to);
            }
            Elements::Blocks(blocks) => {
                let start = to.len();
                to.resize(start + elements.len(), 0.0);
                blocks.widen(self.bytes(), elements.start, &mut to[start..]);
            }
        }
    }

    /// The tensor with elements of this type, in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn widened(&self, dtype: Dtype) -> Result<Self> {
        let len: usize = self.shape.iter().product();
        let mut words =
            memory::filled((len * dtype.bytes()).div_ceil(8), 0u64, "a widened weight")?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        let mut values = Vec::new();
        for (start, to) in (0..len).step_by(PIECE).zip(bytes.chunks_mut(PIECE * dtype.bytes())) {
            values.clear();
            self.extend_f32(start..len.min(start + PIECE), &mut values);
            narrow(&values, dtype, to);
        }
        let (memory, bytes) = (Memory::Words(Arc::new(words)), 0..len * dtype.bytes());
        Ok(Self { memory, bytes, elements: Elements::Plain(dtype), shape: self.shape.clone() })
    }

    /// These entries of the first axis, in the order given: in the map where they are one piece, else
    /// copied, and nothing else is read.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tensor has no axis, or a range ends beyond its rows.
    pub fn rows(&self, rows: &[Range<usize>]) -> Result<Self> {
        let Some(&count) = self.shape.first() else {
            return Err(Error::invalid("weight", "at least 1 axis", 0));
        };
        let pieces = pieces(rows, count, "rows of a weight")?;
        if self.shape.len() == 1 && self.blocks().is_some() {
            if matches!(&pieces[..], [all] if *all == (0..count)) {
                return Ok(self.clone());
            }
            // The rows of a vector are elements, which are no whole blocks.
            return self.widened(Dtype::F32)?.rows(rows);
        }
        let row_bytes = self.bytes.len() / count.max(1);
        let mut shape = self.shape.clone();
        shape[0] = pieces.iter().map(Range::len).sum();
        if let [piece] = &pieces[..] {
            let start = self.bytes.start + piece.start * row_bytes;
            let bytes = start..start + piece.len() * row_bytes;
            return Ok(Self { bytes, shape, ..self.clone() });
        }
        let runs = pieces.iter().map(|piece| piece.start * row_bytes..piece.end * row_bytes);
        self.gather(runs, shape)
    }

    /// These columns of `[rows, columns]`, in the order given; copied, unless they are all.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tensor has not two axes, or a range ends beyond its columns.
    pub fn columns(&self, columns: &[Range<usize>]) -> Result<Self> {
        let &[rows, count] = self.shape() else {
            return Err(Error::invalid("weight", "2 axes", self.shape.len()));
        };
        let pieces = pieces(columns, count, "columns of a weight")?;
        if matches!(&pieces[..], [all] if *all == (0..count)) {
            return Ok(self.clone());
        }
        let (unit, size) = self.elements.unit();
        if pieces.iter().any(|piece| piece.start % unit != 0 || piece.end % unit != 0) {
            // A part of a block is no block.
            return self.widened(Dtype::F32)?.columns(columns);
        }
        let pieces = &pieces;
        let runs = (0..rows).flat_map(|row| {
            pieces.iter().map(move |piece| {
                let (start, end) = (row * count + piece.start, row * count + piece.end);
                start / unit * size..end / unit * size
            })
        });
        let width = pieces.iter().map(Range::len).sum();
        self.gather(runs, vec![rows, width])
    }

    /// The elements times `factor`, as f32.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn scaled(&self, factor: f32) -> Result<Self> {
        let values = self.to_f32()?;
        let mut words = memory::filled(values.len().div_ceil(2), 0u64, "a scaled weight")?;
        let bytes = 0..4 * values.len();
        let to: &mut [f32] = bytemuck::cast_slice_mut(&mut words);
        to.iter_mut().zip(values).for_each(|(to, x)| *to = x * factor);
        let memory = Memory::Words(Arc::new(words));
        Ok(Self { memory, bytes, elements: Elements::Plain(Dtype::F32), shape: self.shape.clone() })
    }

    /// A copy of runs of bytes.
    fn gather(&self, runs: impl Iterator<Item = Range<usize>>, shape: Vec<usize>) -> Result<Self> {
        let (unit, size) = self.elements.unit();
        let len = shape.iter().product::<usize>() / unit * size;
        let mut words = memory::filled(len.div_ceil(8), 0u64, "a part of a weight")?;
        let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        let from = self.bytes();
        for run in runs {
            let (to, others) = rest.split_at_mut(run.len());
            to.copy_from_slice(&from[run]);
            rest = others;
        }
        Ok(Self {
            memory: Memory::Words(Arc::new(words)),
            bytes: 0..len,
            elements: self.elements,
            shape,
        })
    }
}

/// Elements that are converted at a time.
const PIECE: usize = 1 << 16;

/// Writes values as little-endian elements, which need not be aligned.
fn narrow(values: &[f32], dtype: Dtype, to: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_le_bytes());
        }
        Dtype::F16 => {
            let half = |x: &f32| f16::from_f32(*x).to_le_bytes();
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = half(x));
        }
        // There is no other type.
        _ => {
            let half = |x: &f32| bf16::from_f32(*x).to_le_bytes();
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = half(x));
        }
    }
}

/// Appends little-endian elements as f32; they need not be aligned.
fn extend_f32(dtype: Dtype, bytes: &[u8], to: &mut Vec<f32>) {
    let pairs = || bytes.as_chunks::<2>().0.iter().copied();
    match dtype {
        Dtype::F32 => to.extend(bytes.as_chunks::<4>().0.iter().copied().map(f32::from_le_bytes)),
        Dtype::F16 => to.extend(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
        // Files with other types are refused when they are opened.
        _ => to.extend(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
    }
}

/// The ranges, those joined that follow on each other.
fn pieces(ranges: &[Range<usize>], count: usize, what: &'static str) -> Result<Vec<Range<usize>>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        if range.start > range.end || range.end > count {
            return Err(Error::invalid(what, format!("within 0..{count}"), format!("{range:?}")));
        }
        match pieces.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => pieces.push(range.clone()),
        }
    }
    Ok(pieces)
}

impl fmt::Debug for MappedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedTensor")
            .field("elements", &self.elements)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a mapped file the bytes would be gone, and the process with them.
    #[test]
    fn a_file_that_is_shortened_keeps_its_bytes_once_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        for len in [0, 1, 8, 10_001] {
            let written: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &written).unwrap();
            let memory = Memory::of_file(&path, false).unwrap();
            std::fs::write(&path, []).unwrap();
            assert_eq!(*memory, *written);
        }
    }

    #[cfg(unix)]
    #[test]
    fn pipes_are_no_weights() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        for mmap in [false, true] {
            assert!(matches!(Memory::of_file(&path, mmap), Err(Error::Io { .. })));
        }
    }

    #[test]
    fn rows_of_a_vector_in_blocks_are_its_elements() -> Result<()> {
        let values: Vec<f32> = (0..64).map(|i| (i * 37 % 64) as f32 - 20.0).collect();
        let mut bytes = Vec::new();
        BlockType::Q8_0.narrow(&values, &mut bytes);
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        let vector = MappedTensor::blocks_of_words(Arc::new(words), BlockType::Q8_0, &[64]);
        let all = vector.to_f32()?;
        assert_eq!(vector.rows(&[0..30, 30..64])?.to_f32()?, all);
        let order: Vec<Range<usize>> = (0..64).rev().map(|row| row..row + 1).collect();
        let reversed: Vec<f32> = all.iter().rev().copied().collect();
        assert_eq!(vector.rows(&order)?.to_f32()?, reversed);
        assert_eq!(vector.rows(std::slice::from_ref(&(3..40)))?.to_f32()?, all[3..40]);
        Ok(())
    }
}
