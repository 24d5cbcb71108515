//! A call's new rows as caches of one type hold them.

use cubecl::CubeDim;
use cubecl::server::Handle;
use moa_core::{CacheType, RowType, rotation};

use super::{Call, arg, grid, words};
use crate::Result;
use crate::kernels::codes::row_words;
use crate::kernels::prepare::{ROW_UNITS, prepare, rotate_back};

/// Queries, keys and values. Rounded before the chunk attends to them, so that a key is one number wherever it is
/// read.
#[derive(Clone, Debug)]
pub(crate) struct Fresh {
    /// Rotated where keys are.
    pub(crate) q: Handle,
    /// Words of rows; of narrow types, then a word of scales for each row.
    pub(crate) k: Handle,
    pub(crate) v: Handle,
    /// Word of `k` where scales start.
    pub(crate) scales: u32,
}

impl Fresh {
    /// The tensors as they are.
    pub(crate) fn raw(call: &Call<'_>) -> Self {
        let [q, k, v] = [call.inputs.q, call.inputs.k, call.inputs.v];
        let [q, k, v] = [q, k, v].map(|tensor| tensor.handle().clone());
        Self { q, k, v, scales: 0 }
    }

    /// Queues the kernel that rounds them.
    pub(crate) fn new(call: &Call<'_>) -> Result<Self> {
        match call.own.dtype() {
            Some(dtype) => {
                let [k, v] = [call.inputs.k, call.inputs.v];
                let k = words(call.device, k, dtype)?;
                Ok(Self { k, v: words(call.device, v, dtype)?, ..Self::raw(call) })
            }
            None => Self::narrow(call),
        }
    }

    fn narrow(call: &Call<'_>) -> Result<Self> {
        let (device, own, dim) = (call.device, call.own, call.shape.head_dim);
        let rows = call.inputs.k.rows() * call.shape.kv_heads;
        let key_words = row_words(own.keys(), dim);
        let value_words = row_words(own.values(), dim);
        let rotates = own.keys().rotates();
        let query_rows = if rotates { call.inputs.q.rows() * call.shape.query_heads } else { 0 };
        // Kernels read loads of 16 bytes of them.
        let whole = |words: usize| words.next_multiple_of(4);
        let counts = [whole(rows * (key_words + 1)), whole(rows * value_words), query_rows * dim];
        let mut buffers = device.alloc_each("new keys and values", &counts)?.into_iter();
        let raw = Self::raw(call);
        let mut next = || buffers.next().unwrap_or_else(|| raw.q.clone());
        let (k, v, rotated) = (next(), next(), next());
        // Without feedback the kernel has no place for it.
        let feedback = call.inputs.key_feedback.filter(|_| own.keys() == RowType::Int4);
        let fed = feedback.map_or(&raw.q, |feedback| feedback.handle());
        // SAFETY: the tensors and the buffers have so many rows, and rows are whole words.
        unsafe {
            prepare::launch_unchecked(
                device.client(),
                grid(device, rows + query_rows),
                CubeDim::new_1d(ROW_UNITS as u32),
                arg(&raw.q),
                arg(&raw.k),
                arg(&raw.v),
                arg(fed),
                arg(&rotated),
                arg(&k),
                arg(&v),
                rows as u32,
                query_rows as u32,
                call.shape.kv_heads as u32,
                dim as u32,
                rotation(dim) as u32,
                key_words as u32,
                value_words as u32,
                own,
                feedback.is_some(),
            );
        }
        let q = if rotates { rotated } else { raw.q };
        Ok(Self { q, k, v, scales: (rows * key_words) as u32 })
    }
}

impl Call<'_> {
    /// The factor of scores: rotated queries and keys multiply them.
    pub(crate) fn scale(&self) -> f32 {
        match self.own.keys().rotates() {
            true => self.inputs.scores.scale / rotation(self.shape.head_dim) as f32,
            false => self.inputs.scores.scale,
        }
    }

    pub(crate) fn has_cap(&self) -> bool {
        self.inputs.scores.softcap.is_some()
    }

    /// The softcap, or a number for kernels that do not read it.
    pub(crate) fn cap(&self) -> f32 {
        self.inputs.scores.softcap.unwrap_or(1.0)
    }

    /// Rotates what attention made of rotated values back, for the heads of the call's group and `tokens` tokens from
    /// `first` on, whose caches have this table.
    pub(crate) fn rotate_back(&self, table: &Handle, heads: usize, first: usize, tokens: usize) {
        if !self.own.values().rotates() {
            return;
        }
        let dim = self.shape.head_dim;
        // SAFETY: the output has these rows.
        unsafe {
            rotate_back::launch_unchecked(
                self.device.client(),
                grid(self.device, tokens * heads * self.shape.group()),
                CubeDim::new_1d(ROW_UNITS as u32),
                arg(self.out.handle()),
                arg(table),
                first as u32,
                tokens as u32,
                self.shape.query_heads as u32,
                heads as u32,
                self.shape.group() as u32,
                dim as u32,
                rotation(dim) as u32,
            );
        }
    }
}

/// Whether rows are codes with scales.
pub(crate) fn is_narrow(own: CacheType) -> bool {
    own.keys().is_narrow()
}
