//! Operations row by row and element by element.

use std::ops::Range;

use cudarc::driver::result;

use super::launch::OpArgs;
use super::{Indices, Operations, check_dtype, check_shape, shaped};
use crate::memory::address;
use crate::{Dtype, Error, Result, Tensor};

/// The rotary frequencies of one sequence and the positions of its new tokens, from which
/// [`Operations::turns`] makes angles.
#[derive(Clone, Debug)]
pub struct Turns<'a> {
    /// Radians per position of each dimension pair, `[head_dim / 2]`; 0 for a pair that is left as it is.
    pub inv_freq: &'a [f64],
    /// Factor of cosine and sine, of pairs that turn.
    pub scale: f64,
    /// Absolute positions of the tokens.
    pub positions: Range<usize>,
}

impl Operations {
    /// Rows `ids` of an embedding, `[vocab, hidden]`, times `factor`, as f32 `[ids, hidden]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if a shape does not fit or an id is not a row of the table,
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn embed(&self, table: &Tensor, ids: &[u32], factor: f32) -> Result<Tensor> {
        let [vocab, _] = self.matrix("embed", "table", table)?;
        let ids = self.indices(ids.iter().map(|&id| id as usize), vocab)?;
        // SAFETY: every id is a row of the table.
        unsafe { self.embed_at(table, &ids, factor) }
    }

    /// [`embed`](Self::embed) of ids that are on the device already.
    ///
    /// # Errors
    /// [`Error::Argument`] if the table is not a matrix, [`Error::OutOfMemory`], [`Error::Driver`].
    ///
    /// # Safety
    /// When the device comes to it, every id is a row of the table.
    pub unsafe fn embed_at(&self, table: &Tensor, ids: &Indices, factor: f32) -> Result<Tensor> {
        const OP: &str = "embed";
        let [_, hidden] = self.matrix(OP, "table", table)?;
        let out = Tensor::uninitialised(&self.device, OP, &[ids.len(), hidden], Dtype::F32)?;
        let args = OpArgs { ids: ids.pointer(), eps: factor, ..shaped(&out).with_x(table) };
        // SAFETY: as the caller promises; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("embed", 8, &args) }?;
        Ok(out)
    }

    /// Rows of `x` along its first axis, in the order given.
    ///
    /// # Errors
    /// [`Error::Argument`] if a shape does not fit or a row does not exist, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        const OP: &str = "rows";
        if !x.row_len().is_multiple_of(8) || !x.stride().is_multiple_of(8) {
            return self.rows_one_by_one(x, rows);
        }
        self.check_rows(OP, "x", x)?;
        let places = self.indices(rows.iter().copied(), x.shape()[0])?;
        let shape = [&[rows.len()], &x.shape()[1..]].concat();
        let out = Tensor::uninitialised(&self.device, OP, &shape, x.dtype())?;
        let flag = i32::from(x.dtype() == Dtype::F32);
        let args = OpArgs { ids: places.pointer(), flag, ..shaped(&out).with_x(x) };
        // SAFETY: every row exists; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("rows", 8, &args) }?;
        Ok(out)
    }

    /// [`rows`](Self::rows) of a width that the kernel cannot take, as logits of some vocabularies have: a copy for each.
    fn rows_one_by_one(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        const OP: &str = "rows";
        self.check_place(OP, "x", x)?;
        let len = x.shape()[0];
        if let Some(row) = rows.iter().find(|row| **row >= len) {
            return Err(Error::argument(OP, "index", format_args!("below {len}").to_string(), row));
        }
        let shape = [&[rows.len()], &x.shape()[1..]].concat();
        let out = Tensor::uninitialised(&self.device, OP, &shape, x.dtype())?;
        let element = x.dtype().bytes();
        let [bytes, stride] = [x.row_len() * element, x.stride() * element];
        let stream = self.device.cuda_stream();
        self.device.bind()?;
        for (at, row) in rows.iter().enumerate().filter(|_| bytes > 0) {
            let to = out.pointer() + (at * bytes) as u64;
            let from = x.pointer() + (row * stride) as u64;
            // SAFETY: both rows exist; all of it is on the device's stream.
            unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
                .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
        }
        Ok(out)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` for each row of an f32 `[rows, cols]`, rounded to
    /// [`dtype`](Self::dtype); `weight` is f32 `[cols]`.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        const OP: &str = "rms_norm";
        self.check_rows(OP, "x", x)?;
        check_dtype(OP, "x", x, Dtype::F32)?;
        self.check_vector(OP, "weight", weight, x.row_len())?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), self.dtype)?;
        let args = OpArgs { w: weight.pointer(), eps, ..shaped(&out).with_x(x) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_rows("rms_norm", &args) }?;
        Ok(out)
    }

    /// `silu(gate) * up`.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        const OP: &str = "swiglu";
        self.check_rows(OP, "gate", gate)?;
        self.check_rows(OP, "up", up)?;
        check_shape(OP, "up", up, gate.shape())?;
        check_dtype(OP, "gate", gate, self.dtype)?;
        check_dtype(OP, "up", up, self.dtype)?;
        let out = Tensor::uninitialised(&self.device, OP, gate.shape(), self.dtype)?;
        let args = shaped(&out).with_x(gate).with_y(up);
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("swiglu", 8, &args) }?;
        Ok(out)
    }

    /// `x + y` with an f32 `x`.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        const OP: &str = "add";
        self.check_rows(OP, "x", &x)?;
        check_dtype(OP, "x", &x, Dtype::F32)?;
        self.check_rows(OP, "y", y)?;
        check_shape(OP, "y", y, x.shape())?;
        let x = x.into_unique()?;
        let flag = i32::from(y.dtype() == Dtype::F32);
        let args = OpArgs { flag, ..shaped(&x).with_x(&x).with_y(y) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("add", 8, &args) }?;
        Ok(x)
    }

    /// `x[row] + table[places[row]]` for each row of `x`; `table` is f32, its rows have as many elements.
    ///
    /// # Errors
    /// [`Error::Argument`] if a shape does not fit or a place does not exist, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn add_rows(&self, x: Tensor, table: &Tensor, places: &[usize]) -> Result<Tensor> {
        const OP: &str = "add_rows";
        self.check_rows(OP, "x", &x)?;
        self.check_rows(OP, "table", table)?;
        check_dtype(OP, "table", table, Dtype::F32)?;
        let expected = [&[places.len()], &table.shape()[1..]].concat();
        check_shape(OP, "x", &x, &expected)?;
        let places = self.indices(places.iter().copied(), table.shape()[0])?;
        let x = x.into_unique()?;
        let flag = i32::from(x.dtype() == Dtype::F32);
        let args = OpArgs { ids: places.pointer(), flag, ..shaped(&x).with_x(table) };
        // SAFETY: the shapes are checked, every place exists; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("add_rows", 8, &args) }?;
        Ok(x)
    }

    /// Rotates each head of `[tokens, heads, head_dim]` (half-split layout); `turns` holds a pair
    /// (cos, sin) for each token and dimension pair, f32 `[tokens, head_dim]`. `inverse` rotates
    /// back, which is also the gradient.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn rope(&self, x: &Tensor, turns: &Tensor, inverse: bool) -> Result<Tensor> {
        const OP: &str = "rope";
        let &[tokens, _, head_dim] = x.shape() else {
            return Err(Error::shape(OP, "x", "[tokens, heads, head dim]", x.shape()));
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::argument(OP, "head dim", "even", head_dim));
        }
        self.check_rows(OP, "x", x)?;
        self.check_rows(OP, "turns", turns)?;
        check_shape(OP, "turns", turns, &[tokens, head_dim])?;
        check_dtype(OP, "turns", turns, Dtype::F32)?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), x.dtype())?;
        let args = OpArgs {
            // Not null: f32.
            y: if x.dtype() == Dtype::F32 { x.pointer() } else { 0 },
            w: turns.pointer(),
            y_stride: head_dim as i64,
            flag: i32::from(inverse),
            ..shaped(&out).with_x(x)
        };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("rope", 2, &args) }?;
        Ok(out)
    }

    /// Pairs (cos, sin) of packed tokens for [`rope`](Self::rope), f32 `[tokens, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if sequences have frequencies of different lengths, or positions beyond
    /// 31 bits; [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn turns(&self, sequences: &[Turns<'_>]) -> Result<Tensor> {
        const OP: &str = "turns";
        let half = sequences.first().map_or(0, |sequence| sequence.inv_freq.len());
        let (mut tables, mut ids) = (Vec::<f64>::new(), Vec::<i32>::new());
        for (table, sequence) in sequences.iter().enumerate() {
            if sequence.inv_freq.len() != half {
                return Err(Error::argument(OP, "frequencies", half, sequence.inv_freq.len()));
            }
            let Ok(_) = i32::try_from(sequence.positions.end) else {
                let end = sequence.positions.end;
                return Err(Error::argument(OP, "positions", "below 2^31", end));
            };
            tables.extend(sequence.inv_freq.iter().map(|f| f / std::f64::consts::PI));
            tables.push(sequence.scale);
            let positions = sequence.positions.clone();
            ids.extend(positions.flat_map(|position| [table as i32, position as i32]));
        }
        let shape = [ids.len() / 2, 2 * half];
        let out = Tensor::uninitialised(&self.device, OP, &shape, Dtype::F32)?;
        let table_bytes: &[u8] = bytemuck::cast_slice(&tables);
        let bytes = [table_bytes, bytemuck::cast_slice(&ids)].concat();
        let inputs = self.device.alloc::<u8>("rotary frequencies", bytes.len())?;
        self.stage(bytes.len(), address(&inputs), |staged| staged.copy_from_slice(&bytes))?;
        let w = address(&inputs);
        let args = OpArgs { w, ids: w + table_bytes.len() as u64, ..shaped(&out) };
        // SAFETY: there are a table and a position for each row; all is on the device's stream.
        unsafe { self.kernels.by_elements("turns", 2, &args) }?;
        Ok(out)
    }

    /// An f32 tensor, rounded.
    pub(crate) fn cast(&self, x: &Tensor) -> Result<Tensor> {
        const OP: &str = "cast";
        self.check_rows(OP, "x", x)?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), self.dtype)?;
        let args = shaped(&out).with_x(x);
        // SAFETY: the shapes are the same; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("cast", 8, &args) }?;
        Ok(out)
    }
}
