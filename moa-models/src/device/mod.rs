//! What a device offers to a model. The forward pass ([`crate::Decoder`]) and the profiling sweep are
//! written once over these traits.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod rank;
pub(crate) mod replay;
pub(crate) mod rope_table;
pub(crate) mod thread_rank;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;

use std::ops::Range;

use moa_core::{BlockType, CacheState, CacheType, SparseAttentionBackend};

use crate::checkpoint::mapped::MappedTensor;
use crate::decoder::block::parts;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::rope_table::RopeTable;
use crate::{Error, Result, memory};

/// A cache of a device's attention.
type Cache<D> = <<D as Device>::Attention as SparseAttentionBackend>::Cache;

/// A linear layer before it is on a device.
#[derive(Clone, Debug)]
pub struct LinearWeights {
    /// `[out, in]`.
    pub weight: MappedTensor,
    /// `[out]`.
    pub bias: Option<MappedTensor>,
}

/// How many bytes of a device's own memory were in use at most, and how many are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Most bytes in use at once since [`Device::reset_peak`].
    pub peak_bytes: u64,
    /// Bytes that can still be had.
    pub available_bytes: u64,
}

/// How a device chooses a token from logits: each restriction applies to what the one before left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the likeliest token, the lowest of equals, whatever the rest says.
    pub temperature: f32,
    /// Likeliest tokens to keep; 0 keeps all.
    pub top_k: usize,
    /// Probability that the likeliest tokens kept have together; 1 keeps all.
    pub top_p: f32,
    /// Least share of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
}

/// A device that a model runs on: the types it computes with, its attention and its memory.
///
/// Activations are packed along the first axis: `[tokens, features]`, or `[tokens, heads, head_dim]`
/// around attention.
pub trait Device: Send + Sync {
    /// Activations on the device.
    type Tensor: Clone + Send + Sync;
    /// A linear layer's or embedding's weight, `[out, in]`.
    type Matrix: Send + Sync;
    /// The weight of a norm, or the bias of a linear layer, on the device.
    type Vector: Send + Sync;
    /// Linear layers of one input, which a device may compute as one.
    type Joined: Send + Sync;
    /// Rotary angles of packed tokens.
    type Rotations: Send + Sync;
    /// The attention backend of this device, which makes the caches of sequences.
    type Attention: SparseAttentionBackend<Tensor = Self::Tensor, Cache: Send + Sync, Error: Into<Error>>;

    /// The device's attention backend.
    fn attention(&self) -> &Self::Attention;

    /// The cache type of KV heads whose plan says none; `None` on a device that does not tell, where keys of 4 bits are
    /// stored as they are.
    fn default_cache_type(&self) -> Option<CacheType> {
        None
    }

    /// Checks that the device has `bytes` more, before they are taken piece by piece for `what`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device knows that fewer than `bytes` bytes are free. A device
    /// that cannot know always returns `Ok`.
    fn check_room(&self, what: &'static str, bytes: u64) -> Result<()> {
        let _ = (what, bytes);
        Ok(())
    }

    /// Rows from which a step computes each row to the same bits, however many others there are, and in attention
    /// new tokens of a sequence alike. An engine reads prompts in stretches of at least as many tokens, so that a
    /// prompt whose beginning was read before gives the logits of one that is read whole. 1 where no number of
    /// rows is promised that.
    fn many_rows(&self) -> usize {
        1
    }

    /// Most rows of a step that computes each row to the bits that a step of `rows` rows gives, none of whose
    /// sequences takes more than `few_rows(1)` of them; so many rows may hold guesses of tokens to come. All where
    /// no number of rows is promised that.
    fn few_rows(&self, rows: usize) -> usize {
        let _ = rows;
        usize::MAX
    }

    /// The name of what [`save_cache`](Self::save_cache) saves, the caches' type of elements included; `None` if
    /// the device does not give caches back.
    fn saved_cache_type(&self) -> Option<String> {
        None
    }

    /// A cache's written slots as bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] where [`saved_cache_type`](Self::saved_cache_type) is `None`, [`Error::Backend`] if the
    /// device fails.
    fn save_cache(&self, cache: &Cache<Self>) -> Result<Vec<u8>>
    where
        Self: Sized,
    {
        let _ = cache;
        Err(Error::invalid("device", "one that gives its caches back", "another"))
    }

    /// The cache that was [saved](Self::save_cache) in this state.
    ///
    /// # Errors
    /// [`Error::Invalid`] where [`saved_cache_type`](Self::saved_cache_type) is `None`, [`Error::Backend`] if the
    /// bytes are not as many as the state says or the device fails, [`Error::OutOfMemory`].
    fn restore_cache(&self, state: CacheState, bytes: &[u8]) -> Result<Cache<Self>>
    where
        Self: Sized,
    {
        let _ = (state, bytes);
        Err(Error::invalid("device", "one that takes caches", "another"))
    }

    /// Lengths of a tensor's axes.
    fn shape(&self, x: &Self::Tensor) -> Vec<usize>;

    /// A tensor from host values.
    ///
    /// # Errors
    /// [`Error::Backend`] if `values` has not as many entries as `shape` says;
    /// [`Error::OutOfMemory`] or [`Error::Backend`] if the device has no memory for them.
    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Self::Tensor>;

    /// A tensor's values.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device fails.
    fn values(&self, x: Self::Tensor) -> Result<Vec<f32>>;

    /// Memory of the device, if it has its own.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device fails.
    fn memory(&self) -> Result<Option<Memory>> {
        Ok(None)
    }

    /// Counts the peak of [`memory`](Self::memory) from now on.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device fails.
    fn reset_peak(&self) -> Result<()> {
        Ok(())
    }

    /// Waits for the device, where calls return before it is done.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device failed. Earlier calls that returned before the device was
    /// done report their failure here.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// A decode step of `batch` that the device records once and launches again for every token;
    /// `None` if the device has no faster way than one operation after the other.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Backend`] if the step cannot be prepared.
    ///
    /// # Safety
    /// For as long as the result is used: the caches of `batch` and all that the described step reads
    /// live and stay where they are, nothing else changes the caches while a step runs, each step is told their
    /// lengths, and no sequence exceeds its capacity. The description keeps what [`Replay::run`] says.
    unsafe fn replay(&self, batch: &ReplayBatch<'_, Self>) -> Result<Option<Box<dyn Replay<Self>>>>
    where
        Self: Sized,
    {
        let _ = batch;
        Ok(None)
    }

    /// Tokens of a sequence for which a step takes about as long as for one, where so many query heads share a KV
    /// head: guesses are checked in [recorded](Self::replay) steps of as many tokens. For a group of 1 it is more than 1 where
    /// steps are recorded, and 1 where none is.
    fn replayed_tokens(&self, group: usize) -> usize {
        let _ = group;
        1
    }

    /// Whether [`sample`](Self::sample) chooses tokens on the device.
    fn can_sample(&self) -> bool {
        false
    }

    /// A token for each row of logits `[rows, vocab]`, chosen in its own way with a uniform number in [0, 1) of its
    /// own. A device need not choose as another does with the same numbers, but equal inputs give equal
    /// tokens, whatever the other rows are. `None` for a row with a logit that is infinite or not a number.
    ///
    /// # Errors
    /// [`Error::Invalid`] where [`can_sample`](Self::can_sample) is false, [`Error::Backend`] if there are not as many
    /// draws and numbers as rows or the device fails.
    fn sample(
        &self,
        logits: &Self::Tensor,
        draws: &[Draw],
        units: &[f64],
    ) -> Result<Vec<Option<u32>>> {
        let _ = (logits, draws, units);
        Err(Error::invalid("device", "one that can sample", "one that cannot"))
    }
}

/// Brings weights to a device.
pub trait Load: Device {
    /// Bytes of a weight of `elements` elements on the device, 0 where it stays in its file's map.
    fn weight_bytes(&self, elements: u64) -> u64 {
        let _ = elements;
        0
    }

    /// Bytes of linear layers' weights of `elements` elements and `outputs` outputs, as
    /// [`weight_bytes`](Self::weight_bytes).
    fn linear_bytes(&self, elements: u64, outputs: u64) -> u64 {
        let _ = outputs;
        self.weight_bytes(elements)
    }

    /// Bytes of a weight `[out, in]` that the device keeps in quantised blocks; `None` if it makes other elements
    /// of them.
    fn block_bytes(&self, blocks: BlockType, shape: [usize; 2]) -> Option<u64> {
        let _ = (blocks, shape);
        None
    }

    /// Brings an embedding or output matrix to the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device has not enough memory, [`Error::Backend`] on a device
    /// that does not say why an allocation failed; [`Error::Invalid`] if the tensor has not two
    /// axes, on a device that checks it here.
    fn matrix(&self, tensor: MappedTensor) -> Result<Self::Matrix>;

    /// Brings the weight of a linear layer inside of the model to the device, which may keep it in
    /// another type.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device has not enough memory, [`Error::Backend`] on a device
    /// that does not say why an allocation failed; [`Error::Invalid`] if the tensor has not two
    /// axes; [`Error::Backend`] if a weight that is to be rounded to 8 bits is not finite.
    fn linear_matrix(&self, tensor: MappedTensor) -> Result<Self::Matrix> {
        self.matrix(tensor)
    }

    /// Brings a norm's weight or a bias to the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device has not enough memory, [`Error::Backend`] on a device
    /// that does not say why an allocation failed.
    fn vector(&self, tensor: MappedTensor) -> Result<Self::Vector>;

    /// Brings linear layers of one input to the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Backend`] or [`Error::Invalid`] as
    /// [`linear_matrix`](Self::linear_matrix). A device that computes the layers as one also
    /// returns [`Error::Invalid`] if there is no layer, their inputs differ in width, or only some
    /// of them have biases.
    fn join(&self, parts: Vec<LinearWeights>) -> Result<Self::Joined>;
}

/// The forward operations of a decoder on one device.
///
/// # Errors of every operation
/// An operation returns [`Error::Backend`], or [`Error::Invalid`] where the device checks before
/// its backend does, with the argument, what was expected and what came, if its arguments do not
/// fit together. It returns [`Error::OutOfMemory`] or [`Error::Backend`] if the device fails.
pub trait Math: Load {
    /// Rows `ids` of an embedding times `factor`, `[ids, hidden]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Backend`] if an id is not below the number of the table's
    /// rows; those of [every operation](Math#errors-of-every-operation).
    fn embed(&self, table: &Self::Matrix, ids: &[u32], factor: f32) -> Result<Self::Tensor>;

    /// `x / sqrt(mean(x^2) + eps) * weight` per row.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32) -> Result<Self::Tensor>;

    /// `x . weight^T + bias` by each of the layers that were joined.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn linears(&self, x: &Self::Tensor, joined: &Self::Joined) -> Result<Vec<Self::Tensor>>;

    /// [`linears`](Self::linears) of [`rms_norm`](Self::rms_norm), which a device may compute as one.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn normed_linears(
        &self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        joined: &Self::Joined,
    ) -> Result<Vec<Self::Tensor>> {
        self.linears(&self.rms_norm(x, weight, eps)?, joined)
    }

    /// [`swiglu`](Self::swiglu) of the two layers of [`normed_linears`](Self::normed_linears), which a device may compute as
    /// one.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn normed_swiglu(
        &self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        gate_up: &Self::Joined,
    ) -> Result<Self::Tensor> {
        let [gate, up] = parts(self.normed_linears(x, weight, eps, gate_up)?)?;
        self.swiglu(gate, &up)
    }

    /// `x + y . weight^T + bias`: the end of a residual branch.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn linear_add(
        &self,
        x: Self::Tensor,
        y: &Self::Tensor,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
    ) -> Result<Self::Tensor>;

    /// `x . weight^T` by the output matrix, as exact as the device can: logits decide
    /// between near equals.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn logits(&self, x: &Self::Tensor, weight: &Self::Matrix) -> Result<Self::Tensor>;

    /// [`logits`](Self::logits) by a part of the output matrix, as these columns of `[rows, total]` of
    /// zeros.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn logits_within(
        &self,
        x: &Self::Tensor,
        weight: &Self::Matrix,
        columns: Range<usize>,
        total: usize,
    ) -> Result<Self::Tensor> {
        let part = self.logits(x, weight)?;
        let rows = self.shape(&part)[0];
        let part = self.values(part)?;
        if part.len() != rows * columns.len() || columns.end > total {
            let expected = format!("{rows} x {} of {total} columns", columns.len());
            return Err(Error::invalid("part of logits", expected, part.len()));
        }
        let mut all = memory::filled(rows * total, 0.0, "logits")?;
        for (to, from) in all.chunks_mut(total).zip(part.chunks(columns.len())) {
            to[columns.clone()].copy_from_slice(from);
        }
        self.tensor(all, &[rows, total])
    }

    /// Rotary angles of packed sequences, each with the positions of its new tokens.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn rotations(&self, sequences: &[(&RopeTable, Range<usize>)]) -> Result<Self::Rotations>;

    /// Splits rows into heads and rotates each (half-split layout): `[tokens, heads * head_dim]`
    /// becomes `[tokens, heads, head_dim]`. `inverse` rotates back, which is also the gradient.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn rope(
        &self,
        x: Self::Tensor,
        head_dim: usize,
        rotations: &Self::Rotations,
        inverse: bool,
    ) -> Result<Self::Tensor>;

    /// `x[row] + table[places[row]]` for each row of keys `[tokens, heads, head_dim]`; `table` is a
    /// [`tensor`](Device::tensor) of rows of as many elements.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Backend`] with the place that `table` does not have; those of
    /// [every operation](Math#errors-of-every-operation).
    fn add_rows(
        &self,
        x: Self::Tensor,
        table: &Self::Tensor,
        places: &[usize],
    ) -> Result<Self::Tensor> {
        self.add(x, &self.rows(table, places)?)
    }

    /// The same values under another shape.
    ///
    /// # Errors
    /// [`Error::Backend`] if `shape` has not as many entries as `x`.
    fn reshape(&self, x: Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;

    /// `silu(gate) * up`.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn swiglu(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;

    /// Rows of `x`, in the order given.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Backend`] with the row that `x` does not have; those of
    /// [every operation](Math#errors-of-every-operation).
    fn rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;
}

/// Gradients of the operations by their input, for profiling. Weights get no gradients.
///
/// The errors of these operations are those of [every operation](Math#errors-of-every-operation); a
/// product with a weight of 8 bits is [`Error::Invalid`].
pub trait Backward: Math {
    /// Attention whose caches round nothing, for the forward pass of profiling.
    ///
    /// Influence is `A/(1-A) * (D - dO . V)`: where a head is sure of one key, `1 - A` and the bracket
    /// are both nearly 0. An output of rounded keys and values leaves in the bracket what rounding
    /// cost, and the quotient makes that the largest entry of all.
    fn exact_attention(&self) -> &Self::Attention;

    /// Checks that the device has gradients for the model's weights, before work that needs them
    /// begins.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the weights have 8 bits.
    fn check_gradients(&self) -> Result<()> {
        Ok(())
    }

    /// `d_y . weight`.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn linear_backward(&self, d_y: &Self::Tensor, weight: &Self::Matrix) -> Result<Self::Tensor>;

    /// Gradient of [`Math::linears`] by `x`, from those of its outputs.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn linears_backward(&self, d_y: &[Self::Tensor], joined: &Self::Joined)
    -> Result<Self::Tensor>;

    /// Gradient of [`Math::rms_norm`] by `x`.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn rms_norm_backward(
        &self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        d_y: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// Gradients of [`Math::swiglu`] by gate and up.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::Invalid`] or [`Error::OutOfMemory`], as
    /// [every operation](Math#errors-of-every-operation).
    fn swiglu_backward(
        &self,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        d_y: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    /// Puts `x` at `rows` of a zero tensor of `total` rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Backend`] if `x` has not as many rows as `rows` is long, or
    /// `rows` ends beyond `total`; those of [every operation](Math#errors-of-every-operation).
    fn place_rows(
        &self,
        x: &Self::Tensor,
        rows: Range<usize>,
        total: usize,
    ) -> Result<Self::Tensor>;
}
