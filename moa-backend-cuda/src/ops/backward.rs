//! Gradients of the operations by their input.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;

use super::launch::{BACKWARD, OpArgs, OpKernels};
use super::{Operations, check_dtype, check_shape, shaped};
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::linear::blas::Product;
use crate::{Dtype, Error, Result, Tensor};

/// Queries whose probabilities are in memory at once.
const STRETCH: usize = 512;

/// Tokens per side of the smallest influence block.
const BLOCK: usize = 64;

/// One layer's influence, and the gradients of its attention by q, k and v if they were asked for.
#[derive(Debug)]
pub struct AttentionGradients {
    /// Influence summed over blocks and over each KV head's query heads, f32
    /// `[kv_heads, side, side]`.
    pub blocks: Tensor,
    /// Gradients by q, k and v, f32, if they were asked for.
    pub by_inputs: Option<[Tensor; 3]>,
}

/// As in `kernels/backward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BackwardArgs {
    scores: DevicePointer,
    gains: DevicePointer,
    probabilities: DevicePointer,
    d_scores: DevicePointer,
    sums: DevicePointer,
    blocks: DevicePointer,
    stride: i64,
    first: i32,
    rows: i32,
    keys: i32,
    block: i32,
    side: i32,
    absolute: i32,
    scale: f32,
    gradients: i32,
    window: i32,
    padding: i32,
}

const _: () = assert!(size_of::<BackwardArgs>() == 96);

impl Operations {
    /// `d_y . weight`, the gradient of [`linear`](Self::linear) by its input, in f32.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn linear_backward(&self, d_y: &Tensor, weight: &Tensor) -> Result<Tensor> {
        const OP: &str = "linear_backward";
        let [_, input] = self.matrix(OP, "weight", weight)?;
        let d_x = Tensor::uninitialised(&self.device, OP, &[d_y.shape()[0], input], Dtype::F32)?;
        self.product(OP, d_y, weight, &d_x, (false, false))?;
        Ok(d_x)
    }

    /// `d_x + d_y . weight` with an f32 `d_x`.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn linear_backward_add(
        &self,
        d_x: Tensor,
        d_y: &Tensor,
        weight: &Tensor,
    ) -> Result<Tensor> {
        const OP: &str = "linear_backward_add";
        let [_, input] = self.matrix(OP, "weight", weight)?;
        check_dtype(OP, "d_x", &d_x, Dtype::F32)?;
        check_shape(OP, "d_x", &d_x, &[d_y.shape()[0], input])?;
        let d_x = d_x.into_unique()?;
        self.product(OP, d_y, weight, &d_x, (false, true))?;
        Ok(d_x)
    }

    /// Gradient of [`rms_norm`](Self::rms_norm) by `x`; all tensors are f32.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        d_y: &Tensor,
    ) -> Result<Tensor> {
        const OP: &str = "rms_norm_backward";
        self.check_rows(OP, "x", x)?;
        self.check_rows(OP, "d_y", d_y)?;
        check_shape(OP, "d_y", d_y, x.shape())?;
        for (what, tensor) in [("x", x), ("d_y", d_y)] {
            check_dtype(OP, what, tensor, Dtype::F32)?;
        }
        self.check_vector(OP, "weight", weight, x.row_len())?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), Dtype::F32)?;
        let args = OpArgs { w: weight.pointer(), eps, ..shaped(&out).with_x(x).with_y(d_y) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.backward()?.by_rows(OP, &args) }?;
        Ok(out)
    }

    /// Gradients of [`swiglu`](Self::swiglu) by gate and up, side by side in `[rows, 2 * cols]`, from
    /// that of its result, f32.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, d_y: &Tensor) -> Result<Tensor> {
        const OP: &str = "swiglu_backward";
        let &[rows, cols] = gate.shape() else {
            return Err(Error::shape(OP, "gate", "[rows, cols]", gate.shape()));
        };
        self.check_rows(OP, "gate", gate)?;
        for (what, tensor) in [("up", up), ("d_y", d_y)] {
            self.check_rows(OP, what, tensor)?;
            check_shape(OP, what, tensor, gate.shape())?;
        }
        check_dtype(OP, "gate", gate, self.dtype)?;
        check_dtype(OP, "up", up, self.dtype)?;
        check_dtype(OP, "d_y", d_y, Dtype::F32)?;
        if d_y.stride() != cols {
            return Err(Error::argument(OP, "d_y", "without gaps", d_y.stride()));
        }
        let out = Tensor::uninitialised(&self.device, OP, &[rows, 2 * cols], self.dtype)?;
        let args =
            OpArgs { w: d_y.pointer(), cols: cols as i32, ..shaped(&out).with_x(gate).with_y(up) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.backward()?.by_elements(OP, 8, &args) }?;
        Ok(out)
    }

    /// `x` at `rows` of a zero tensor of `total` rows.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `x` has that many rows, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn place_rows(&self, x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
        const OP: &str = "place_rows";
        if x.shape()[0] != rows.len() || rows.end > total {
            let expected = format_args!("{} rows of {total}", rows.len()).to_string();
            return Err(Error::shape(OP, "x", expected, x.shape()));
        }
        let shape = [&[total], &x.shape()[1..]].concat();
        let out = Tensor::zeros(&self.device, &shape, x.dtype())?;
        let x = x.clone().into_unique()?;
        let row_bytes = x.row_len() * x.dtype().bytes();
        if !rows.is_empty() && row_bytes > 0 {
            let to = out.pointer() + (rows.start * row_bytes) as u64;
            let stream = self.device.stream().cast();
            self.device.bind()?;
            // SAFETY: both tensors have these rows, without gaps, on the device's stream.
            unsafe { result::memcpy_dtod_async(to, x.pointer(), rows.len() * row_bytes, stream) }
                .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
        }
        Ok(out)
    }

    /// Influence of every attention value under causal attention to the `window` most recent keys, and the
    /// gradients by q, k and v, from that by the attention's output.
    ///
    /// Scores and gains are made in f32 for a stretch of queries at a time, and the output's part in
    /// influence is summed from them again: what was rounded in the output itself does not matter.
    /// `q` and `d_out` are `[tokens, query_heads, head_dim]`, `k` and `v` have `kv_heads`; a `d_out` of
    /// f32 is rounded. Blocks have a multiple of 64 tokens a side.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn attention_backward(
        &self,
        [q, k, v, d_out]: [&Tensor; 4],
        scale: f32,
        window: usize,
        block: usize,
        absolute: bool,
        gradients: bool,
    ) -> Result<AttentionGradients> {
        const OP: &str = "attention_backward";
        let &[tokens, query_heads, dim] = q.shape() else {
            return Err(Error::shape(OP, "q", "[tokens, query heads, head dim]", q.shape()));
        };
        let kv_heads = k.shape().get(1).copied().unwrap_or(0);
        if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) || tokens == 0 {
            let expected =
                format_args!("[{tokens}, a divisor of {query_heads}, {dim}]").to_string();
            return Err(Error::shape(OP, "k", expected, k.shape()));
        }
        for (what, tensor) in [("k", k), ("v", v)] {
            check_shape(OP, what, tensor, &[tokens, kv_heads, dim])?;
        }
        check_shape(OP, "d_out", d_out, q.shape())?;
        for (what, tensor) in [("q", q), ("k", k), ("v", v)] {
            self.check_rows(OP, what, tensor)?;
            check_dtype(OP, what, tensor, self.dtype)?;
        }
        if block == 0 || !block.is_multiple_of(BLOCK) || i32::try_from(block).is_err() {
            let expected = format_args!("a multiple of {BLOCK}").to_string();
            return Err(Error::argument(OP, "block", expected, block));
        }
        let rounded = match d_out.dtype() {
            Dtype::F32 => self.cast(d_out)?,
            _ => d_out.clone(),
        };
        check_dtype(OP, "d_out", &rounded, self.dtype)?;

        let side = tokens.div_ceil(block);
        let (rows, stride) = (tokens.min(STRETCH), tokens.next_multiple_of(8));
        let stretch = |dtype| Tensor::uninitialised(&self.device, OP, &[rows, stride], dtype);
        let zeros = |shape: &[usize]| Tensor::zeros(&self.device, shape, Dtype::F32);
        let sweep = Sweep {
            operations: self,
            kernels: self.backward()?,
            tensors: [q, k, v, &rounded],
            scores: stretch(Dtype::F32)?,
            gains: stretch(Dtype::F32)?,
            probabilities: stretch(self.dtype)?,
            d_scores: stretch(self.dtype)?,
            sums: zeros(&[rows, side])?,
            blocks: zeros(&[kv_heads, side, side])?,
            finite: match gradients {
                true => Some([self.finite(q)?, self.finite(k)?]),
                false => None,
            },
            by_inputs: match gradients {
                true => Some([zeros(q.shape())?, zeros(k.shape())?, zeros(v.shape())?]),
                false => None,
            },
            numbers: (scale, window.min(tokens), block, absolute),
        };
        for head in 0..query_heads {
            for first in (0..tokens).step_by(STRETCH) {
                sweep.stretch(head, first..tokens.min(first + STRETCH))?;
            }
        }
        let Sweep { blocks, by_inputs, .. } = sweep;
        Ok(AttentionGradients { blocks, by_inputs })
    }

    /// The elements that are finite, and 0 for others.
    fn finite(&self, x: &Tensor) -> Result<Tensor> {
        let out = Tensor::uninitialised(&self.device, "attention_backward", x.shape(), self.dtype)?;
        let args = shaped(&out).with_x(x);
        // SAFETY: the shapes are the same; all of it is on the device's stream.
        unsafe { self.backward()?.by_elements("finite", 8, &args) }?;
        Ok(out)
    }

    fn backward(&self) -> Result<Arc<OpKernels>> {
        self.lazily(&self.backward, Source::Backward, &BACKWARD)
    }
}

/// One layer's backward pass: its inputs, and room for one stretch of queries of one head.
struct Sweep<'a> {
    operations: &'a Operations,
    kernels: Arc<OpKernels>,
    /// q, k, v, d_out.
    tensors: [&'a Tensor; 4],
    scores: Tensor,
    gains: Tensor,
    probabilities: Tensor,
    d_scores: Tensor,
    sums: Tensor,
    blocks: Tensor,
    /// q and k, 0 where they are no numbers: a gradient by a score that is kept is none there already, and one that is
    /// hidden is 0, which times infinity would be none.
    finite: Option<[Tensor; 2]>,
    by_inputs: Option<[Tensor; 3]>,
    /// Factor of the scores, keys of a window, tokens of a block, whether sums are of absolute values.
    numbers: (f32, usize, usize, bool),
}

/// Rows of one head in memory: address and elements between rows.
type Rows = (DevicePointer, usize);

fn head(tensor: &Tensor, head: usize, first: usize) -> Rows {
    let packed = tensor.packed();
    let elements = first * tensor.stride() + head * packed.head as usize;
    (packed.data + (elements * tensor.dtype().bytes()) as u64, tensor.stride())
}

impl Sweep<'_> {
    fn stretch(&self, query_head: usize, queries: Range<usize>) -> Result<()> {
        let [q, k, v, d_out] = self.tensors;
        let &[_, query_heads, dim] = q.shape() else { return Ok(()) };
        let kv_head = query_head / (query_heads / k.shape()[1]);
        let (rows, keys, stride) = (queries.len(), queries.end, self.scores.stride());
        let at = |tensor| head(tensor, query_head, queries.start);
        let all = |tensor| head(tensor, kv_head, 0);
        let own = |tensor: &Tensor| (tensor.pointer(), stride);
        // scores = q k^T, gains = d_out v^T
        let wide = (Dtype::F32, false);
        self.product([rows, keys, dim], (at(q), false), (all(k), true), own(&self.scores), wide)?;
        self.product(
            [rows, keys, dim],
            (at(d_out), false),
            (all(v), true),
            own(&self.gains),
            wide,
        )?;

        let (scale, window, block, absolute) = self.numbers;
        let side = self.blocks.shape()[1];
        let args = BackwardArgs {
            scores: self.scores.pointer(),
            gains: self.gains.pointer(),
            probabilities: self.probabilities.pointer(),
            d_scores: self.d_scores.pointer(),
            sums: self.sums.pointer(),
            blocks: self.blocks.pointer() + (kv_head * side * side * 4) as u64,
            stride: stride as i64,
            first: queries.start as i32,
            rows: rows as i32,
            keys: keys as i32,
            block: block as i32,
            side: side as i32,
            absolute: i32::from(absolute),
            scale,
            gradients: i32::from(self.by_inputs.is_some()),
            window: window as i32,
            padding: 0,
        };
        let block_rows = (queries.end - 1) / block - queries.start / block + 1;
        let block_grid = [keys.div_ceil(block).div_ceil(256), block_rows, 1];
        // SAFETY: the buffers have room for a stretch; all of it is on the device's stream.
        unsafe {
            self.kernels.launch("attend_backward", [rows, 1, 1], 256, &args)?;
            self.kernels.launch("add_blocks", block_grid, 256, &args)?;
        }
        let (Some([d_q, d_k, d_v]), Some([q, k])) = (&self.by_inputs, &self.finite) else {
            return Ok(());
        };
        let (p, d_s) = (own(&self.probabilities), own(&self.d_scores));
        let add = (Dtype::F32, true);
        // d_q = d_scores k, d_k += d_scores^T q, d_v += p^T d_out
        self.product([rows, dim, keys], (d_s, false), (all(k), false), at(d_q), wide)?;
        self.product([keys, dim, rows], (d_s, true), (at(q), false), all(d_k), add)?;
        self.product([keys, dim, rows], (p, true), (at(d_out), false), all(d_v), add)
    }

    fn product(
        &self,
        [m, n, k]: [usize; 3],
        ((a, a_stride), a_transposed): (Rows, bool),
        ((weight, weight_stride), transposed): (Rows, bool),
        (d, d_stride): Rows,
        (output, accumulate): (Dtype, bool),
    ) -> Result<()> {
        let product = Product {
            m,
            n,
            k,
            a_stride,
            a_transposed,
            weight_stride,
            d_stride,
            transposed,
            input: self.operations.dtype.into(),
            output,
            accumulate,
        };
        // SAFETY: the tensors have these rows; all of it is on the device's stream.
        unsafe { self.operations.blas.run(product, a, weight, d) }
    }
}
