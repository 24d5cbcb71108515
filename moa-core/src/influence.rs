use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::far_losses::FarLosses;
use crate::file::{read, write_atomic};
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
        if length == 0 {
            return Err(Error::invalid("length", "at least 1 token", 0));
        }
        if block == 0 || block > length {
            return Err(Error::invalid("block", format!("1 to {length} tokens"), block));
        }
        let blocks = length.div_ceil(block);
        let size = shape
            .total_kv_heads()
            .checked_mul(blocks)
            .and_then(|n| n.checked_mul(blocks))
            .filter(|n| *n < 1 << 40)
            .ok_or_else(|| Error::invalid("blocks", "fewer than 2^40 block sums", blocks))?;
        let far_losses = FarLosses::default();
        Ok(Self { shape, length, block, samples: 0, sums: vec![0.0; size], far_losses })
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

    /// Adds one layer of one sample: `blocks` is `[kv_heads, n, n]` with `n` at most
    /// [`Influence::blocks`] (a sample may be shorter than the length it stands for), multiplied by
    /// `weight`. Call [`Influence::count_sample`] once per sample.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the number of entries is not that.
    pub fn add_layer(&mut self, layer: usize, n: usize, blocks: &[f64], weight: f64) -> Result<()> {
        let side = self.blocks();
        if layer >= self.shape.layers || n > side || blocks.len() != self.shape.kv_heads * n * n {
            return Err(Error::invalid(
                "blocks",
                format!(
                    "layer < {} and {} x n x n entries, n <= {side}",
                    self.shape.layers, self.shape.kv_heads
                ),
                format!("layer {layer}, n = {n}, {} entries", blocks.len()),
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
        self.samples += 1;
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
        self.samples += other.samples;
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
#[derive(Clone, Debug)]
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
            let pairs = |d: isize| b - d.unsigned_abs();
            let lowest = if delta == 0 { 0 } else { 1 - b as isize };
            let all: usize = (lowest..b as isize).map(pairs).sum();
            let hidden: usize = (lowest..b as isize)
                .filter(|d| base as isize + d >= window as isize)
                .map(pairs)
                .sum();
            loss += sum * hidden as f64 / all as f64;
        }
        loss
    }
}

/// Influence of one model at one or more lengths, with what it was measured on.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Dimensions of the model.
    pub shape: ModelShape,
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

    /// Writes a safetensors file: per length a tensor `influence.<length>` of F64
    /// `[layers, kv_heads, blocks, blocks]`, and metadata.
    ///
    /// # Errors
    /// [`Error::Io`]; an older file of that name is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let format = |reason: String| Error::Format { path: path.to_path_buf(), reason };
        let mut tensors = Vec::new();
        let mut lengths = BTreeMap::new();
        for (length, influence) in &self.influences {
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
        let metadata = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("model".to_string(), json(serde_json::to_string(&self.shape))?),
            ("info".to_string(), json(serde_json::to_string(&self.info))?),
            ("lengths".to_string(), json(serde_json::to_string(&lengths))?),
        ]);
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name.clone(), TensorView::new(Dtype::F64, shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| format(e.to_string()))?;
        let bytes =
            safetensors::serialize(views, Some(metadata)).map_err(|e| format(e.to_string()))?;
        write_atomic(path, &bytes)
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

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bad = |what: &str, e: &dyn std::fmt::Display| Error::invalid(what, "a moa profile", e);
        let file = SafeTensors::deserialize(bytes).map_err(|e| bad("safetensors", &e))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| bad("header", &e))?;
        let empty = HashMap::new();
        let metadata = header.metadata().as_ref().unwrap_or(&empty);
        let field = |name: &str| {
            metadata.get(name).map(String::as_str).ok_or_else(|| bad(name, &"no such metadata"))
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
            let mut influence = Influence::new(shape, length, block)?;
            let side = influence.blocks();
            let expected = [shape.layers, shape.kv_heads, side, side];
            if tensor.shape() != expected || tensor.dtype() != Dtype::F64 {
                return Err(Error::invalid(
                    name,
                    format!("F64 {expected:?}"),
                    format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
                ));
            }
            for (sum, raw) in influence.sums.iter_mut().zip(tensor.data().as_chunks::<8>().0) {
                *sum = f64::from_le_bytes(*raw);
            }
            if let Some(bad_value) = influence.sums.iter().find(|x| !x.is_finite()) {
                return Err(Error::invalid(name, "finite sums", bad_value));
            }
            influence.samples = samples;
            influence.far_losses = far_losses;
            profile.add(influence)?;
        }
        Ok(profile)
    }
}
