//! The operations on CPU threads, over [`moa_backend_cpu`]. Weights stay in the type or the blocks of their
//! file, and in its memory map.

use std::ops::Range;

use half::{bf16, f16};
use moa_backend_cpu::ops::{self as kernels, WeightData, WeightRef};
use moa_backend_cpu::{Cache, CpuBackend, FEW_ROWS, MANY_ROWS, Tensor};
use moa_core::{CacheState, CacheType, Dtype};

use crate::checkpoint::mapped::MappedTensor;
use crate::device::rope_table::RopeTable;
use crate::device::{Backward, Device, LinearWeights, Load, Math};
use crate::{Error, Result, memory};

/// Runs a model on the CPU.
#[derive(Clone, Debug, Default)]
pub struct Cpu {
    attention: CpuBackend,
    /// With f32 caches.
    exact: CpuBackend,
    narrow: bool,
}

impl Cpu {
    /// With KV caches of this type, a [`Dtype`] or a [`CacheType`].
    pub fn new(cache: impl Into<CacheType>) -> Self {
        Self {
            attention: CpuBackend::new(cache),
            exact: CpuBackend::new(Dtype::F32),
            narrow: false,
        }
    }

    /// Whether activations are rounded to bf16 before they meet weights in bf16, and queries and weights of attention before they
    /// meet keys and values in bf16 ([`CpuBackend::narrow_products`]), on machines that multiply such
    /// pairs (AVX-512 BF16), as GPUs do. Prompts then take about half the time. Where the machine multiplies tiles of
    /// bf16 (AMX, on Linux), prompts also round quantised weights to bf16, and activations before them, and take activations
    /// of 16 bits before weights in f16. It is off in [`Cpu::new`], whose products are of f32, or of blocks as they are.
    #[must_use]
    pub fn narrow_activations(self, narrow: bool) -> Self {
        Self { attention: self.attention.narrow_products(narrow), narrow, ..self }
    }
}

/// A weight in its file's memory map, or a copy where the file does not align it.
#[derive(Debug)]
pub struct CpuMatrix {
    rows: usize,
    cols: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Mapped(MappedTensor),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl CpuMatrix {
    fn new(tensor: MappedTensor) -> Result<Self> {
        let &[rows, cols] = tensor.shape() else {
            return Err(Error::invalid("weight", "2 axes", tensor.shape().len()));
        };
        let bytes = tensor.bytes();
        let aligned = match tensor.dtype() {
            None => true,
            Some(Dtype::F32) => bytemuck::try_cast_slice::<_, f32>(bytes).is_ok(),
            Some(_) => bytemuck::try_cast_slice::<_, u16>(bytes).is_ok(),
        };
        let data = match (aligned, tensor.dtype()) {
            (true, _) | (_, None) => Data::Mapped(tensor),
            (false, Some(Dtype::F32)) => {
                Data::F32(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            (false, Some(Dtype::F16)) => {
                Data::F16(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect())
            }
            // Files have no other types.
            (false, Some(_)) => {
                Data::BF16(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect())
            }
        };
        Ok(Self { rows, cols, data })
    }

    fn data(&self) -> WeightData<'_> {
        match &self.data {
            // `new` has checked the alignment; lengths follow from the file's validation.
            Data::Mapped(tensor) => match (tensor.blocks(), tensor.dtype()) {
                (Some(blocks), _) => WeightData::Blocks(blocks, tensor.bytes()),
                (_, Some(Dtype::F32)) => WeightData::F32(bytemuck::cast_slice(tensor.bytes())),
                (_, Some(Dtype::F16)) => WeightData::F16(bytemuck::cast_slice(tensor.bytes())),
                _ => WeightData::Bf16(bytemuck::cast_slice(tensor.bytes())),
            },
            Data::F32(data) => WeightData::F32(data),
            Data::F16(data) => WeightData::F16(data),
            Data::BF16(data) => WeightData::Bf16(data),
        }
    }

    fn view(&self) -> Result<WeightRef<'_>> {
        Ok(WeightRef::new(self.data(), self.rows, self.cols)?)
    }
}

/// Cosines and sines of packed tokens, `[tokens, head_dim / 2]` each.
#[derive(Debug)]
pub struct CpuRotations {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Cpu {
    fn linear(&self, x: &Tensor, weight: &CpuMatrix, bias: Option<&Vec<f32>>) -> Result<Tensor> {
        Ok(kernels::linear(x, self.weight(weight)?, bias.map(Vec::as_slice))?)
    }

    fn weight<'a>(&self, weight: &'a CpuMatrix) -> Result<WeightRef<'a>> {
        Ok(weight.view()?.narrow_activations(self.narrow))
    }
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type Joined = Vec<(CpuMatrix, Option<Vec<f32>>)>;
    type Rotations = CpuRotations;
    type Attention = CpuBackend;

    fn attention(&self) -> &CpuBackend {
        &self.attention
    }

    fn many_rows(&self) -> usize {
        MANY_ROWS
    }

    fn few_rows(&self, rows: usize) -> usize {
        match rows {
            ..=FEW_ROWS => FEW_ROWS,
            MANY_ROWS.. => usize::MAX,
            // Products may be of either kind.
            _ => rows,
        }
    }

    fn default_cache_type(&self) -> Option<CacheType> {
        Some(self.attention.cache_type())
    }

    fn saved_cache_type(&self) -> Option<String> {
        Some(format!("cpu {}", self.attention.cache_type()))
    }

    fn save_cache(&self, cache: &Cache) -> Result<Vec<u8>> {
        Ok(cache.to_bytes()?)
    }

    fn restore_cache(&self, state: CacheState, bytes: &[u8]) -> Result<Cache> {
        Ok(Cache::from_bytes(state, self.attention.cache_type(), bytes)?)
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::new(values, shape)?)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        Ok(x.into_data())
    }
}

impl Load for Cpu {
    fn matrix(&self, tensor: MappedTensor) -> Result<CpuMatrix> {
        CpuMatrix::new(tensor)
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Vec<f32>> {
        tensor.to_f32()
    }

    fn join(&self, parts: Vec<LinearWeights>) -> Result<Self::Joined> {
        let load = |LinearWeights { weight, bias }| {
            Ok((self.matrix(weight)?, bias.map(|bias| bias.to_f32()).transpose()?))
        };
        parts.into_iter().map(load).collect()
    }
}

impl Math for Cpu {
    fn embed(&self, table: &CpuMatrix, ids: &[u32], factor: f32) -> Result<Tensor> {
        let cols = table.cols;
        let mut embedded = Tensor::zeros(&[ids.len(), cols])?;
        for (out, &id) in embedded.data_mut().chunks_mut(cols).zip(ids) {
            let row = id as usize;
            if row >= table.rows {
                return Err(Error::invalid("token id", format!("below {}", table.rows), id));
            }
            let place = row * cols..(row + 1) * cols;
            match table.data() {
                WeightData::F32(x) => out.copy_from_slice(&x[place]),
                WeightData::F16(x) => {
                    out.iter_mut().zip(&x[place]).for_each(|(o, x)| *o = x.to_f32())
                }
                WeightData::Bf16(x) => {
                    out.iter_mut().zip(&x[place]).for_each(|(o, x)| *o = x.to_f32())
                }
                WeightData::Blocks(blocks, bytes) => blocks.widen(bytes, place.start, out),
            }
        }
        if factor != 1.0 {
            embedded.data_mut().iter_mut().for_each(|x| *x *= factor);
        }
        Ok(embedded)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vec<f32>, eps: f32) -> Result<Tensor> {
        Ok(kernels::rms_norm(x, weight, eps)?)
    }

    fn linear_add(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &CpuMatrix,
        bias: Option<&Vec<f32>>,
    ) -> Result<Tensor> {
        self.add(x, &self.linear(y, weight, bias)?)
    }

    fn logits(&self, x: &Tensor, weight: &CpuMatrix) -> Result<Tensor> {
        self.linear(x, weight, None)
    }

    fn linears(&self, x: &Tensor, joined: &Self::Joined) -> Result<Vec<Tensor>> {
        let mut layers = Vec::with_capacity(joined.len());
        for (weight, bias) in joined {
            layers.push((self.weight(weight)?, bias.as_deref()));
        }
        Ok(kernels::linears(x, &layers)?)
    }

    fn rotations(&self, sequences: &[(&RopeTable, Range<usize>)]) -> Result<CpuRotations> {
        let pairs =
            sequences.iter().map(|(table, positions)| table.inv_freq.len() * positions.len());
        let pairs = pairs.sum();
        let room = || memory::room(pairs, "rotary angles");
        let (mut cos, mut sin) = (room()?, room()?);
        for (table, positions) in sequences {
            for (c, s) in positions.clone().flat_map(|position| table.cos_sin(position)) {
                cos.push(c);
                sin.push(s);
            }
        }
        Ok(CpuRotations { cos, sin })
    }

    fn rope(
        &self,
        x: Tensor,
        head_dim: usize,
        CpuRotations { cos, sin }: &CpuRotations,
        inverse: bool,
    ) -> Result<Tensor> {
        let (rows, width) = (x.rows(), x.row_len());
        if head_dim == 0 || width % head_dim != 0 {
            return Err(Error::invalid(
                "row",
                format!("a multiple of head_dim ({head_dim})"),
                width,
            ));
        }
        let mut x = self.reshape(x, &[rows, width / head_dim, head_dim])?;
        // The tables already hold one row per packed token.
        let mut positions = memory::room(rows, "positions")?;
        positions.extend(0..rows);
        kernels::rope(&mut x, cos, sin, &positions, inverse)?;
        Ok(x)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        Ok(x.reshape(shape)?)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        Ok(kernels::swiglu(&gate, up)?)
    }

    fn add(&self, mut x: Tensor, y: &Tensor) -> Result<Tensor> {
        kernels::add_assign(&mut x, y)?;
        Ok(x)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let width = x.row_len();
        let mut chosen = Tensor::zeros(&[&[rows.len()], &x.shape()[1..]].concat())?;
        for (to, &row) in chosen.data_mut().chunks_mut(width.max(1)).zip(rows) {
            if row >= x.rows() {
                return Err(Error::invalid("row", format!("below {}", x.rows()), row));
            }
            to.copy_from_slice(&x.data()[row * width..(row + 1) * width]);
        }
        Ok(chosen)
    }
}

impl Backward for Cpu {
    fn exact_attention(&self) -> &CpuBackend {
        &self.exact
    }

    fn linear_backward(&self, d_y: &Tensor, weight: &CpuMatrix) -> Result<Tensor> {
        Ok(kernels::linear_backward_input(d_y, self.weight(weight)?)?)
    }

    fn linears_backward(&self, d_y: &[Tensor], joined: &Self::Joined) -> Result<Tensor> {
        let mut sum = None;
        for (d_y, (weight, _)) in d_y.iter().zip(joined) {
            let d_x = self.linear_backward(d_y, weight)?;
            sum = Some(match sum {
                Some(sum) => self.add(sum, &d_x)?,
                None => d_x,
            });
        }
        sum.ok_or_else(|| Error::invalid("joined layers", "at least 1", 0))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Vec<f32>,
        eps: f32,
        d_y: &Tensor,
    ) -> Result<Tensor> {
        Ok(kernels::rms_norm_backward(x, weight, eps, d_y)?)
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        Ok(kernels::swiglu_backward(gate, up, d_y)?)
    }

    fn place_rows(&self, x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
        if x.rows() != rows.len() || rows.end > total {
            return Err(Error::invalid("rows", format!("{} of {total}", rows.len()), x.rows()));
        }
        let width = x.row_len();
        let mut placed = Tensor::zeros(&[&[total], &x.shape()[1..]].concat())?;
        placed.data_mut()[rows.start * width..rows.end * width].copy_from_slice(x.data());
        Ok(placed)
    }
}
