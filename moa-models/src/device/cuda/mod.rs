//! The operations on one NVIDIA GPU, over [`moa_backend_cuda`]. Weights are rounded to the type of
//! the activations, or those of linear layers to 8 bits, on their way to the device, and are nowhere
//! else; quantised blocks stay what they are.

mod backward;
mod ranks;
mod replay;
mod weights;

use std::ops::Range;

use moa_backend_cuda::{
    BlockType, BlockWeight, Cache, CudaBackend, Device as Gpu, Dtype, Indices, Operations, Tensor,
    Turns, Weight,
};
use moa_core::{CacheState, CacheType};

use crate::checkpoint::mapped::MappedTensor;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::rope_table::RopeTable;
use crate::device::{Device, Draw, LinearWeights, Load, Math, Memory};
use crate::{Error, Result};
pub use ranks::NcclRank;
use replay::Recorded;
pub use weights::CudaMatrix;

/// Runs a model on an NVIDIA GPU.
///
/// Threads may share it: what they ask for runs in the order in which they ask.
///
/// Activations are f32 in the residual stream and of the 16-bit type elsewhere; logits are f32.
#[derive(Debug)]
pub struct Cuda {
    attention: CudaBackend,
    exact: CudaBackend,
    operations: Operations,
    fp8_weights: bool,
}

impl Cuda {
    /// On device `ordinal`, counted from 0. The attention kernels are compiled when the first
    /// sequence needs them; the others, and the device, are tried now.
    ///
    /// # Errors
    /// [`Error::Backend`] with a [`moa_backend_cuda::Error`] that names what is missing: driver,
    /// device, compute capability, NVRTC, cuBLASLt, memory.
    pub fn new(ordinal: usize, dtype: Dtype) -> Result<Self> {
        let device = Gpu::open(ordinal)?;
        // Models own their GPU: memory that a step has freed is what the next one asks for.
        device.keep_freed(u64::MAX)?;
        Ok(Self {
            attention: CudaBackend::new(&device, dtype)?,
            exact: CudaBackend::exact(&device, dtype)?,
            operations: Operations::new(&device, dtype)?,
            fp8_weights: false,
        })
    }

    /// On device `ordinal` with KV caches of this type, a [`Dtype`] or a [`CacheType`]. Activations have it too, or are
    /// bf16 where it is narrow.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn open(ordinal: usize, cache: impl Into<CacheType>) -> Result<Self> {
        let cache = cache.into();
        Self::new(ordinal, cache.dtype().unwrap_or(Dtype::Bf16))?.with_cache_type(cache)
    }

    /// With KV caches of this type where a plan does not choose one for a head.
    ///
    /// # Errors
    /// [`Error::Core`] with [`CacheType`](moa_core::Error::CacheType) if it is another wide type than that of
    /// activations.
    pub fn with_cache_type(self, cache: CacheType) -> Result<Self> {
        Ok(Self { attention: self.attention.with_cache_type(cache)?, ..self })
    }

    /// Rounds the weights of linear layers, but not the output matrix, to 8-bit floats (e4m3) with a
    /// factor for each output: half the memory. Steps of few sequences take less time, those of many may take longer: on
    /// Hopper from some 128 on, elsewhere from 32. There are no gradients then, so no profiling.
    #[must_use]
    pub fn with_fp8_weights(self) -> Self {
        Self { fp8_weights: true, ..self }
    }

    /// Rounds activations to e4m3 too, each token's with a factor of its own, where a step has 129 tokens and more:
    /// products of prompts are then of 8 bits. Tokens that share a step with as many of a prompt are rounded with them.
    /// Steps of fewer keep activations of 16 bits, and are those of [`without_wgmma`](Self::without_wgmma), as cuBLASLt reads
    /// weights row by row.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless [weights are e4m3](Self::with_fp8_weights), [`Error::Backend`] with
    /// [`NoE4m3Products`](moa_backend_cuda::Error::NoE4m3Products) if the GPU or its cuBLASLt has no such products.
    pub fn with_fp8_activations(self) -> Result<Self> {
        match self.fp8_weights {
            true => Ok(Self { operations: self.operations.with_e4m3_activations()?, ..self }),
            false => Err(Error::invalid("weights beside fp8 activations", "fp8", self.dtype())),
        }
    }

    /// [Weights of 8-bit floats](Self::with_fp8_weights) by the kernels that every GPU has
    /// ([`Operations::without_wgmma`](moa_backend_cuda::Operations::without_wgmma)).
    #[must_use]
    pub fn without_wgmma(self) -> Self {
        Self { operations: self.operations.without_wgmma(), ..self }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        self.operations.device()
    }

    fn dtype(&self) -> Dtype {
        self.operations.dtype()
    }
}

/// Linear layers of one input, computed as one product, or as several where they are in different blocks.
#[derive(Debug)]
pub struct Joined {
    /// `[sum of out, in]` of neighbours, and how many they are.
    weights: Vec<(CudaMatrix, usize)>,
    bias: Option<Tensor>,
    /// Where each layer's outputs end.
    ends: Vec<usize>,
}

impl Joined {
    fn weights(&self) -> Vec<Weight<'_>> {
        self.weights.iter().map(|(weight, _)| weight.into()).collect()
    }

    /// Outputs of all layers, apart.
    fn parts_of(&self, y: Tensor) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let part = |&end: &usize| y.columns(std::mem::replace(&mut start, end)..end);
        Ok(self.ends.iter().map(part).collect::<Result<_, _>>()?)
    }
}

impl Cuda {
    /// The same values as f32, which norms read: heads of queries and keys are of 16 bits.
    fn widened(&self, x: &Tensor) -> Result<Tensor> {
        if x.dtype() == Dtype::F32 {
            return Ok(x.clone());
        }
        let zeros = Tensor::empty(self.gpu(), x.shape(), Dtype::F32)?;
        zeros.clear()?;
        Ok(self.operations.add(zeros, x)?)
    }
}

impl Device for Cuda {
    type Tensor = Tensor;
    type Matrix = CudaMatrix;
    type Vector = Tensor;
    type Joined = Joined;
    /// Pairs (cos, sin), f32 `[tokens, head_dim]`.
    type Rotations = Tensor;
    type Attention = CudaBackend;

    fn attention(&self) -> &CudaBackend {
        &self.attention
    }

    fn check_room(&self, what: &'static str, bytes: u64) -> Result<()> {
        let free = self.gpu().available()?;
        match bytes <= free {
            true => Ok(()),
            false => Err(Error::OutOfMemory { what, bytes: Some(bytes), free: Some(free) }),
        }
    }

    fn default_cache_type(&self) -> Option<CacheType> {
        Some(self.attention.cache_type())
    }

    fn saved_cache_type(&self) -> Option<String> {
        Some(format!("cuda {}", self.attention.cache_type()))
    }

    fn save_cache(&self, cache: &Cache) -> Result<Vec<u8>> {
        Ok(cache.to_bytes()?)
    }

    fn restore_cache(&self, state: CacheState, bytes: &[u8]) -> Result<Cache> {
        Ok(self.attention.restore(state, bytes)?)
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_f32(self.gpu(), &values, shape, Dtype::F32)?)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        Ok(x.to_f32()?)
    }

    fn memory(&self) -> Result<Option<Memory>> {
        let device = self.gpu();
        Ok(Some(Memory { peak_bytes: device.peak_bytes()?, available_bytes: device.available()? }))
    }

    fn reset_peak(&self) -> Result<()> {
        Ok(self.gpu().reset_peak()?)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(self.gpu().synchronize()?)
    }

    unsafe fn replay(
        &self,
        batch: &ReplayBatch<'_, Self>,
    ) -> Result<Option<Box<dyn Replay<Self>>>> {
        // SAFETY: as the caller promises.
        Ok(Some(Box::new(unsafe { Recorded::new(self, batch) }?)))
    }

    fn replayed_tokens(&self, group: usize) -> usize {
        CudaBackend::few_tokens(group)
    }

    fn can_sample(&self) -> bool {
        true
    }

    fn sample(&self, logits: &Tensor, draws: &[Draw], units: &[f64]) -> Result<Vec<Option<u32>>> {
        let chosen = self.operations.indices(std::iter::repeat_n(0, units.len()), 1)?;
        self.sample_into(logits, draws, units, &chosen)?;
        tokens(&chosen)
    }
}

impl Load for Cuda {
    fn weight_bytes(&self, elements: u64) -> u64 {
        elements * self.dtype().bytes() as u64
    }

    fn linear_bytes(&self, elements: u64, outputs: u64) -> u64 {
        match self.fp8_weights {
            // Without what tiles are padded by.
            true => elements + outputs * Dtype::F32.bytes() as u64,
            false => self.weight_bytes(elements),
        }
    }

    fn block_bytes(&self, blocks: BlockType, shape: [usize; 2]) -> Option<u64> {
        if self.fp8_weights { None } else { Some(BlockWeight::bytes_of(blocks, shape)) }
    }

    fn matrix(&self, tensor: MappedTensor) -> Result<CudaMatrix> {
        if let (Some(kind), &[out, input]) = (self.kept_blocks(&tensor), tensor.shape()) {
            return self.upload_blocks(kind, &[&tensor], [out, input]);
        }
        Ok(CudaMatrix::Wide(self.upload(&[&tensor], tensor.shape(), self.dtype())?))
    }

    fn linear_matrix(&self, tensor: MappedTensor) -> Result<CudaMatrix> {
        let &[out, input] = tensor.shape() else {
            return Err(Error::invalid("weight", "2 axes", tensor.shape().len()));
        };
        self.upload_linear(&[&tensor], [out, input])
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Tensor> {
        self.upload(&[&tensor], tensor.shape(), Dtype::F32)
    }

    fn join(&self, parts: Vec<LinearWeights>) -> Result<Joined> {
        let mut ends = Vec::new();
        let mut input = None;
        for LinearWeights { weight, .. } in &parts {
            let &[out, width] = weight.shape() else {
                return Err(Error::invalid("weight", "2 axes", weight.shape().len()));
            };
            if *input.get_or_insert(width) != width {
                return Err(Error::invalid("joined layers", "of one input", width));
            }
            ends.push(ends.last().unwrap_or(&0) + out);
        }
        let (Some(&out), Some(input)) = (ends.last(), input) else {
            return Err(Error::invalid("joined layers", "at least 1", 0));
        };
        let all: Vec<&MappedTensor> = parts.iter().map(|part| &part.weight).collect();
        let mut weights = Vec::new();
        for like in all.chunk_by(|a, b| self.kept_blocks(a) == self.kept_blocks(b)) {
            let own = like.iter().map(|part| part.shape()[0]).sum();
            weights.push((self.upload_linear(like, [own, input])?, like.len()));
        }
        let biases: Vec<&MappedTensor> =
            parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            n if n == parts.len() => Some(self.upload(&biases, &[out], Dtype::F32)?),
            n => return Err(Error::invalid("biases", format!("0 or {}", parts.len()), n)),
        };
        Ok(Joined { weights, bias, ends })
    }
}

impl Math for Cuda {
    fn embed(&self, table: &CudaMatrix, ids: &[u32], factor: f32) -> Result<Tensor> {
        Ok(match table {
            CudaMatrix::Blocks(table) => self.operations.embed_blocks(table, ids, factor)?,
            table => self.operations.embed(&self.wide(table)?, ids, factor)?,
        })
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        Ok(self.operations.rms_norm(&self.widened(x)?, weight, eps)?)
    }

    fn linears(&self, x: &Tensor, joined: &Joined) -> Result<Vec<Tensor>> {
        let bias = joined.bias.as_ref();
        joined.parts_of(self.operations.linears(x, &joined.weights(), bias, self.dtype())?)
    }

    fn normed_linears(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        joined: &Joined,
    ) -> Result<Vec<Tensor>> {
        let (x, norm, bias) = (self.widened(x)?, (weight, eps), joined.bias.as_ref());
        let weights = joined.weights();
        let y = self.operations.normed_linears(&x, norm, &weights, bias, self.dtype())?;
        joined.parts_of(y)
    }

    fn normed_swiglu(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        gate_up: &Joined,
    ) -> Result<Tensor> {
        let (x, norm, bias) = (self.widened(x)?, (weight, eps), gate_up.bias.as_ref());
        Ok(self.operations.normed_swiglu(&x, norm, &gate_up.weights(), bias)?)
    }

    fn linear_add(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &CudaMatrix,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(self.operations.linear_add(x, y, weight, bias)?)
    }

    fn logits(&self, x: &Tensor, weight: &CudaMatrix) -> Result<Tensor> {
        Ok(self.operations.linear(x, weight, None, Dtype::F32)?)
    }

    fn logits_within(
        &self,
        x: &Tensor,
        weight: &CudaMatrix,
        columns: Range<usize>,
        total: usize,
    ) -> Result<Tensor> {
        let logits = Tensor::empty(self.gpu(), &[x.shape()[0], total], Dtype::F32)?;
        self.logits_into(x, weight, columns, &logits)?;
        Ok(logits)
    }

    fn rotations(&self, sequences: &[(&RopeTable, Range<usize>)]) -> Result<Tensor> {
        let turns: Vec<Turns<'_>> =
            sequences.iter().map(|(table, positions)| turns(table, positions.clone())).collect();
        Ok(self.operations.turns(&turns)?)
    }

    fn rope(
        &self,
        x: Tensor,
        head_dim: usize,
        rotations: &Tensor,
        inverse: bool,
    ) -> Result<Tensor> {
        let shape = x.shape();
        let (rows, width) = (shape[0], shape[1..].iter().product::<usize>());
        let heads = width.checked_div(head_dim).unwrap_or(0);
        let x = self.reshape(x, &[rows, heads, head_dim])?;
        Ok(self.operations.rope(&x, rotations, inverse)?)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        Ok(x.reshape(shape)?)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        Ok(self.operations.swiglu(&gate, up)?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(self.operations.add(x, y)?)
    }

    fn add_rows(&self, x: Tensor, table: &Tensor, places: &[usize]) -> Result<Tensor> {
        Ok(self.operations.add_rows(x, table, places)?)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        Ok(self.operations.rows(x, rows)?)
    }
}

/// Tokens that the device has chosen; a negative one stands for none.
fn tokens(chosen: &Indices) -> Result<Vec<Option<u32>>> {
    Ok(chosen.to_host()?.iter().map(|id| u32::try_from(*id).ok()).collect())
}

fn turns(table: &RopeTable, positions: Range<usize>) -> Turns<'_> {
    Turns { inv_freq: table.inv_freq(), scale: table.attention_scale(), positions }
}

impl Cuda {
    /// [`Device::sample`], whose tokens come `into` a place on the device.
    fn sample_into(
        &self,
        logits: &Tensor,
        draws: &[Draw],
        units: &[f64],
        into: &Indices,
    ) -> Result<()> {
        let own = |&Draw { temperature, top_k, top_p, min_p }: &Draw| moa_backend_cuda::Draw {
            temperature,
            top_k,
            top_p,
            min_p,
        };
        let draws: Vec<_> = draws.iter().map(own).collect();
        Ok(self.operations.sample(logits, &draws, units, into)?)
    }

    /// Logits of a part of the vocabulary as columns of `logits`, and zeros for the others.
    fn logits_into(
        &self,
        x: &Tensor,
        weight: &CudaMatrix,
        columns: Range<usize>,
        logits: &Tensor,
    ) -> Result<()> {
        logits.clear()?;
        Ok(self.operations.linear_into(x, weight, &logits.columns(columns)?)?)
    }
}
