use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::far_losses::FarLosses;
use crate::file::{read, write_atomic};
use crate::plan::check_length;
use crate::{Error, ModelShape, Result, Span};

/// Influence of one length: block sums per layer and KV head, summed over samples.
///
/// Entry `(I, J)` of a head is the sum of `E_ij` over queries `i` of block `I`, keys `j` of block
/// `J` and the query heads of the KV head's group. Sums are over samples, so that shards merge by
/// addition; [`Influence::loss`] divides by the number of samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Influence {
    shape: ModelShape,
    length: usize,
    block: usize,
    samples: u64,
    /// `[layers, kv_heads, blocks, blocks]`.
    sums: Vec<f64>,
    far_losses: FarLosses,
}

impl Influence {
    /// No samples yet, for inputs of at most `length` tokens in blocks of `block` x `block`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shape, the length or the block is not valid.
    pub fn new(shape: ModelShape, length: usize, block: usize) -> Result<Self> {
        shape.validate()?;
        let blocks = blocks(length, block)?;
        let shortage = || Error::invalid("blocks", "as many block sums as memory holds", blocks);
        let size = shape
            .total_kv_heads()
            .checked_mul(blocks)
            .and_then(|n| n.checked_mul(blocks))
            .ok_or_else(shortage)?;
        let mut sums = Vec::new();
        sums.try_reserve_exact(size).map_err(|_| shortage())?;
        sums.resize(size, 0.0);
        Ok(Self { shape, length, block, samples: 0, sums, far_losses: FarLosses::default() })
    }

    /// Checks that a file can hold all sums.
    fn check_finite(&self) -> Result<()> {
        if let Some(index) = self.sums.iter().position(|sum| !sum.is_finite()) {
            let of_head = self.blocks() * self.blocks();
            let (head, block) = (index / of_head, index % of_head);
            let (layer, head) = (head / self.shape.kv_heads, head % self.shape.kv_heads);
            let place = self.place(layer, head, block / self.blocks(), block % self.blocks());
            return Err(Error::invalid(place, "a finite number", self.sums[index]));
        }
        self.far_losses.check_finite()
    }

    /// Where a block is, for messages.
    fn place(&self, layer: usize, kv_head: usize, row: usize, column: usize) -> String {
        let (query, key) = (row * self.block, column * self.block);
        let length = self.length;
        format!(
            "influence of layer {layer}, KV head {kv_head}, queries from {query}, keys from {key} of {length} tokens"
        )
    }

    /// Dimensions of the model.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Longest input, in tokens.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens per side of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Blocks per side.
    pub fn blocks(&self) -> usize {
        self.length.div_ceil(self.block)
    }

    /// Samples that were added.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    fn head_range(&self, layer: usize, kv_head: usize) -> std::ops::Range<usize> {
        let size = self.blocks() * self.blocks();
        let head = layer * self.shape.kv_heads + kv_head;
        head * size..(head + 1) * size
    }

    /// Block sums of one head, `[blocks, blocks]`.
    ///
    /// # Panics
    /// If the head does not exist.
    pub fn head(&self, layer: usize, kv_head: usize) -> &[f64] {
        &self.sums[self.head_range(layer, kv_head)]
    }

    /// Adds one layer of one sample: `blocks` is `[kv_heads, n, n]` with `n` from 1 to
    /// [`Influence::blocks`] (a sample may be shorter than the length it stands for), multiplied by
    /// `weight`. Call [`Influence::count_sample`] once per sample.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the number of entries is not that, or one is infinite or no number; the sums are
    /// then as they were.
    pub fn add_layer(&mut self, layer: usize, n: usize, blocks: &[f64], weight: f64) -> Result<()> {
        let side = self.blocks();
        if layer >= self.shape.layers
            || n == 0
            || n > side
            || blocks.len() != self.shape.kv_heads * n * n
        {
            return Err(Error::invalid(
                "blocks",
                format!(
                    "layer < {} and {} x n x n entries, 1 <= n <= {side}",
                    self.shape.layers, self.shape.kv_heads
                ),
                format!("layer {layer}, n = {n}, {} entries", blocks.len()),
            ));
        }
        if let Some(index) = blocks.iter().position(|x| !(weight * x).is_finite()) {
            let (head, block) = (index / (n * n), index % (n * n));
            return Err(Error::invalid(
                self.place(layer, head, block / n, block % n),
                "a finite number",
                weight * blocks[index],
            ));
        }
        for kv_head in 0..self.shape.kv_heads {
            let range = self.head_range(layer, kv_head);
            let own = &mut self.sums[range];
            for (row, new) in blocks[kv_head * n * n..][..n * n].chunks(n).enumerate() {
                for (sum, x) in own[row * side..].iter_mut().zip(new) {
                    *sum += weight * x;
                }
            }
        }
        Ok(())
    }

    /// Counts one sample more in the mean.
    pub fn count_sample(&mut self) {
        self.samples = self.samples.saturating_add(1);
    }

    /// What the far context is worth to the samples; empty where that was not measured.
    pub fn far_losses(&self) -> &FarLosses {
        &self.far_losses
    }

    /// Adds what the far context is worth to a sample, in nats per token.
    pub fn add_far_loss(&mut self, growth: f64) {
        self.far_losses.push(growth);
    }

    /// Adds the samples of another shard.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::Invalid`] if it is of another model, length or block.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.shape != other.shape {
            return Err(Error::ShapeMismatch {
                what: "profile",
                expected: self.shape,
                got: other.shape,
            });
        }
        if (self.length, self.block) != (other.length, other.block) {
            return Err(Error::invalid(
                "profile shard",
                format!("length {} in blocks of {}", self.length, self.block),
                format!("length {} in blocks of {}", other.length, other.block),
            ));
        }
        self.sums.iter_mut().zip(&other.sums).for_each(|(a, b)| *a += b);
        self.samples = self.samples.saturating_add(other.samples);
        self.far_losses.merge(&other.far_losses);
        Ok(())
    }

    /// Predicted increase of the objective when one head gets `span`: the mean over samples of the
    /// sum of `E` over the pairs that the mask hides. Block sums are spread evenly over the pairs of
    /// a block, so spans need not be multiples of the block.
    ///
    /// # Panics
    /// If the head does not exist.
    pub fn loss(&self, layer: usize, kv_head: usize, span: Span) -> f64 {
        self.by_distance(layer, kv_head, span.sink()).loss(span.window())
    }

    /// One head's influence by distance, for many windows of the same sink.
    ///
    /// # Panics
    /// If the head does not exist.
    pub fn by_distance(&self, layer: usize, kv_head: usize, sink: usize) -> ByDistance {
        let (side, block) = (self.blocks(), self.block);
        let mut sums = vec![0.0; side];
        for (row, entries) in self.head(layer, kv_head).chunks(side).enumerate() {
            for (column, sum) in entries[..=row].iter().enumerate() {
                let in_sink = sink.saturating_sub(column * block).min(block);
                sums[row - column] += sum * (block - in_sink) as f64 / block as f64;
            }
        }
        let samples = self.samples.max(1) as f64;
        sums.iter_mut().for_each(|s| *s /= samples);
        ByDistance { block, sums }
    }
}

/// Influence of one head's keys outside the sink, summed over blocks of equal distance.
#[derive(Clone, Debug, PartialEq)]
pub struct ByDistance {
    block: usize,
    sums: Vec<f64>,
}

impl ByDistance {
    /// Predicted increase of the objective when keys at a distance of `window` or more are hidden.
    pub fn loss(&self, window: usize) -> f64 {
        let b = self.block;
        let mut loss = 0.0;
        for (delta, sum) in self.sums.iter().enumerate() {
            // Distances of a block pair run from delta*b - (b-1) to delta*b + (b-1); on the diagonal
            // block the negative ones do not exist.
            let base = delta * b;
            if base + b <= window {
                continue;
            }
            let lowest = if delta == 0 { 0 } else { 1 - b as i64 };
            let first = (window as i64).saturating_sub(base as i64).max(lowest);
            loss += sum * pairs_from(b, first) as f64 / pairs_from(b, lowest) as f64;
        }
        loss
    }
}

/// Blocks per side.
fn blocks(length: usize, block: usize) -> Result<usize> {
    if length == 0 {
        return Err(Error::invalid("length", "at least 1 token", 0));
    }
    check_length("length", length)?;
    if block == 0 || block > length {
        return Err(Error::invalid("block", format!("1 to {length} tokens"), block));
    }
    Ok(length.div_ceil(block))
}

/// Pairs of a query and a key of two blocks of `block` tokens that are `distance` or more tokens further apart than
/// the blocks: the sum of `block - |d|` over `d` from `distance` to `block - 1`.
fn pairs_from(block: usize, distance: i64) -> u64 {
    let block = block as u64;
    let triangle = |side: u64| side * (side + 1) / 2;
    match u64::try_from(distance) {
        Ok(distance) => triangle(block.saturating_sub(distance)),
        Err(_) => block * block - triangle(block.saturating_sub(distance.unsigned_abs() + 1)),
    }
}

/// Influence of one model at one or more lengths, with what it was measured on.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    shape: ModelShape,
    /// What was measured.
    pub info: ProfileInfo,
    influences: BTreeMap<usize, Influence>,
}

/// Where a profile came from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProfileInfo {
    /// Fingerprint of the weights.
    pub fingerprint: Option<String>,
    /// Name of the objective.
    pub objective: String,
    /// Calibration data and seed.
    pub data: String,
}

#[derive(Serialize, Deserialize)]
struct LengthInfo {
    block: usize,
    samples: u64,
    /// Missing in older files.
    #[serde(default)]
    far_losses: FarLosses,
}

const FORMAT: &str = "moa-profile-1";

impl Profile {
    /// An empty profile.
    pub fn new(shape: ModelShape, info: ProfileInfo) -> Self {
        Self { shape, info, influences: BTreeMap::new() }
    }

    /// Adds influence, merging with what is there at the same length.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the influence is of a model of other dimensions; those of
    /// [`Influence::merge`].
    pub fn add(&mut self, influence: Influence) -> Result<()> {
        if influence.shape != self.shape {
            return Err(Error::ShapeMismatch {
                what: "profile",
                expected: self.shape,
                got: influence.shape,
            });
        }
        match self.influences.get_mut(&influence.length) {
            Some(own) => own.merge(&influence),
            None => {
                self.influences.insert(influence.length, influence);
                Ok(())
            }
        }
    }

    /// Dimensions of the model.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Lengths that were profiled, ascending.
    pub fn lengths(&self) -> Vec<usize> {
        self.influences.keys().copied().collect()
    }

    /// Influence at a length.
    ///
    /// # Errors
    /// [`Error::UnknownLength`] with the lengths that exist.
    pub fn at(&self, length: usize) -> Result<&Influence> {
        self.influences
            .get(&length)
            .ok_or_else(|| Error::UnknownLength { length, available: self.lengths() })
    }

    /// Writes a safetensors file; see [`Profile::to_bytes`].
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`]; an older file of that name is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_atomic(path.as_ref(), &self.to_bytes()?)
    }

    /// The profile as a safetensors file: per length a tensor `influence.<length>` of F64
    /// `[layers, kv_heads, blocks, blocks]`, and metadata.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a number of it is infinite or none, with its layer and head: such a file could not
    /// be read back.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let format = |reason: String| Error::invalid("profile", "one that can be written", reason);
        let mut tensors = Vec::new();
        let mut lengths = BTreeMap::new();
        for (length, influence) in &self.influences {
            influence.check_finite()?;
            let bytes: Vec<u8> = influence.sums.iter().flat_map(|x| x.to_le_bytes()).collect();
            let side = influence.blocks();
            tensors.push((
                format!("influence.{length}"),
                vec![self.shape.layers, self.shape.kv_heads, side, side],
                bytes,
            ));
            let Influence { block, samples, far_losses, .. } = influence;
            let info =
                LengthInfo { block: *block, samples: *samples, far_losses: far_losses.clone() };
            lengths.insert(length, info);
        }
        let json = |x: serde_json::Result<String>| x.map_err(|e| format(e.to_string()));
        let metadata = [
            ("format".to_string(), FORMAT.to_string()),
            ("model".to_string(), json(serde_json::to_string(&self.shape))?),
            ("info".to_string(), json(serde_json::to_string(&self.info))?),
            ("lengths".to_string(), json(serde_json::to_string(&lengths))?),
        ];
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name.clone(), TensorView::new(Dtype::F64, shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| format(e.to_string()))?;
        // The map's type is another one where some crate of the program wants `safetensors/std`.
        let metadata = Some(metadata.into_iter().collect());
        safetensors::serialize(views, metadata).map_err(|e| format(e.to_string()))
    }

    /// Reads what [`Profile::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] with the path.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        Self::from_bytes(&bytes).map_err(|e| match e {
            Error::Invalid { .. } => {
                Error::Format { path: path.to_path_buf(), reason: e.to_string() }
            }
            other => other,
        })
    }

    /// Reads what [`Profile::to_bytes`] made.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying what is wrong with the file or with a number.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bad = |what: &str, e: &dyn std::fmt::Display| Error::invalid(what, "a moa profile", e);
        let file = SafeTensors::deserialize(bytes).map_err(|e| bad("safetensors", &e))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| bad("header", &e))?;
        let metadata = header.metadata().as_ref();
        let field = |name: &str| {
            let text = metadata.and_then(|fields| fields.get(name));
            text.map(String::as_str).ok_or_else(|| bad(name, &"no such metadata"))
        };
        if field("format")? != FORMAT {
            return Err(Error::invalid("format", FORMAT, field("format")?));
        }
        let shape: ModelShape =
            serde_json::from_str(field("model")?).map_err(|e| bad("model", &e))?;
        shape.validate()?;
        let info = serde_json::from_str(field("info")?).map_err(|e| bad("info", &e))?;
        let lengths: BTreeMap<usize, LengthInfo> =
            serde_json::from_str(field("lengths")?).map_err(|e| bad("lengths", &e))?;
        let mut profile = Self::new(shape, info);
        for (length, LengthInfo { block, samples, far_losses }) in lengths {
            let name = format!("influence.{length}");
            let tensor = file.tensor(&name).map_err(|e| bad(&name, &e))?;
            // Before anything is allocated: the file has as many numbers as it says.
            let side = blocks(length, block)?;
            let expected = [shape.layers, shape.kv_heads, side, side];
            if tensor.shape() != expected || tensor.dtype() != Dtype::F64 {
                return Err(Error::invalid(
                    name,
                    format!("F64 {expected:?}"),
                    format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
                ));
            }
            let mut influence = Influence::new(shape, length, block)?;
            for (sum, raw) in influence.sums.iter_mut().zip(tensor.data().as_chunks::<8>().0) {
                *sum = f64::from_le_bytes(*raw);
            }
            influence.samples = samples;
            influence.far_losses = far_losses;
            influence.check_finite()?;
            profile.add(influence)?;
        }
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 2, kv_heads: 1, head_dim: 4 };

    #[test]
    fn pairs_are_counted_as_a_sum_counts_them() {
        for block in 1..7 {
            for distance in 1 - block..block + 2 {
                let sum: i64 = (distance..block).map(|d: i64| block - d.abs()).sum();
                assert_eq!(pairs_from(block as usize, distance), sum as u64, "{block} {distance}");
            }
        }
    }

    /// A file of some hundred bytes that says it has one block of 2^62 tokens, or as many blocks.
    #[test]
    fn small_files_of_large_numbers_are_errors_at_once() {
        for (length, block, side) in
            [(1u64 << 62, 1u64 << 62, 1), (1 << 30, 1, 1), (1 << 31, 1 << 31, 1)]
        {
            let zero = vec![0; 16];
            let view = TensorView::new(Dtype::F64, vec![2, 1, side, side], &zero).unwrap();
            let lengths = format!("{{\"{length}\":{{\"block\":{block},\"samples\":1}}}}");
            let metadata = [
                ("format".to_string(), FORMAT.to_string()),
                ("model".to_string(), serde_json::to_string(&SHAPE).unwrap()),
                ("info".to_string(), "{\"objective\":\"\",\"data\":\"\"}".to_string()),
                ("lengths".to_string(), lengths),
            ];
            let metadata = Some(metadata.into_iter().collect());
            let name = format!("influence.{length}");
            let bytes = safetensors::serialize([(name, view)], metadata).unwrap();
            assert!(bytes.len() < 500);
            let read = Profile::from_bytes(&bytes);
            if block != 1 << 31 {
                assert!(matches!(read, Err(Error::Invalid { .. })), "{length} {block}");
                continue;
            }
            // The largest that there may be is as fast as the smallest.
            let loss = read.unwrap().at(1 << 31).unwrap().loss(1, 0, Span::new(4, 100).unwrap());
            assert_eq!(loss, 0.0);
        }
        assert!(Influence::new(SHAPE, 1 << 31, 1).is_err());
    }

    #[test]
    fn a_sum_that_is_no_number_is_not_saved() {
        let mut influence = Influence::new(SHAPE, 8, 4).unwrap();
        assert!(influence.add_layer(0, 0, &[], 1.0).is_err());
        let added = influence.add_layer(1, 2, &[0.0, 0.0, f64::NAN, 0.0], 1.0);
        let message = added.unwrap_err().to_string();
        assert!(message.contains("layer 1, KV head 0, queries from 4, keys from 0"), "{message}");
        // Two numbers may be finite and their sum not.
        for _ in 0..2 {
            influence.add_layer(1, 2, &[0.0, f64::MAX, 0.0, 0.0], 1.0).unwrap();
        }
        let mut profile = Profile::new(SHAPE, ProfileInfo::default());
        profile.add(influence).unwrap();
        let message = profile.to_bytes().unwrap_err().to_string();
        assert!(message.contains("layer 1, KV head 0, queries from 0, keys from 4"), "{message}");
        let mut influence = Influence::new(SHAPE, 8, 4).unwrap();
        influence.add_far_loss(f64::INFINITY);
        let mut profile = Profile::new(SHAPE, ProfileInfo::default());
        profile.add(influence).unwrap();
        assert!(profile.to_bytes().is_err());
    }
}
