//! Decode steps of one sequence that are recorded once and launched again.

mod arena;
mod stream;

use std::cell::Cell;
use std::sync::Arc;

use cubecl::client::Graph;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim, bytes::Bytes};

use crate::attention::recorded::Part;
use crate::attention::{Row, arg};
use crate::kernels::quants::widen_blocks;
use crate::kernels::rows::{LIKELIEST_UNITS, gather, likeliest};
use crate::kernels::words::per_word;
use crate::linear::linear_into;
use crate::{Cache, Device, Error, Matrix, Result, Tensor};

pub(crate) use arena::Arena;
use stream::OwnStream;

const OP: &str = "recorded step";

/// Tokens for which a step is recorded beyond those that there are: one with more is recorded anew.
const AHEAD: usize = 1024;

/// Words before the angles of what a step is brought.
const BEFORE_ANGLES: usize = 4;

/// Cubes that look for the likeliest token.
const SHARES: usize = 128;

/// Dimensions of a model for a [`Step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Query heads of a layer.
    pub query_heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Most tokens that the sequence may hold.
    pub capacity: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

/// A decode step of one sequence, of which CubeCL records the launches once.
///
/// A step is described by operations of [`crate::ops`] and those of this, on tensors of [`Step::embed`] and what is computed of
/// them. All of it works on a stream of its own. What changes from step to step lies in a buffer: the token, the
/// sequence's length, and the angles of its position.
pub struct Step {
    device: Device,
    /// On the stream of all else.
    shared: Device,
    layers: Vec<Vec<Part>>,
    shape: StepShape,
    /// See [`crate::kernels::decode::Brought`].
    brought: Handle,
    logits: Tensor,
    /// What each share of the logits has found.
    found: Handle,
    /// Tokens that the step is queued for.
    tokens: Cell<usize>,
    /// Bytes that the step was seen to take.
    bytes: Cell<u64>,
    arena: Arc<Arena>,
    /// Dropped last.
    _stream: OwnStream,
}

/// What was recorded of a [`Step`].
pub struct Recording {
    graph: Graph,
    tokens: usize,
    /// What its launches compute lies here.
    _all: Handle,
}

impl Step {
    /// Of the sequence that has these caches, one of each layer; `None` where no step of them is recorded: on runtimes that are not
    /// wgpu's, of caches of narrow types, of heads that decode has no kernel for, and where a few others are recorded already.
    ///
    /// # Errors
    /// [`Error::Argument`] if a cache is on another device, [`Error::TooLarge`], [`Error::Lost`].
    pub fn new(device: &Device, caches: &[&Cache], shape: StepShape) -> Result<Option<Self>> {
        // Kernels turn pairs of dimensions half a head apart, four of them at once.
        let whole = shape.head_dim.is_multiple_of(8);
        if !whole || !device.client().name().starts_with("wgpu") {
            return Ok(None);
        }
        if caches.iter().any(|cache| !cache.device().is(device)) {
            return Err(Error::argument(OP, "cache", "on the step's device", "on another"));
        }
        let StepShape { query_heads, kv_heads, head_dim, vocab_size, .. } = shape;
        if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::argument(OP, "kv_heads", "a divisor of query heads", kv_heads));
        }
        let parts = |cache: &&Cache| Part::of(device, cache, query_heads / kv_heads, head_dim);
        let Some(layers) = caches.iter().map(parts).collect() else { return Ok(None) };
        let Some(stream) = OwnStream::take() else { return Ok(None) };
        let arena = Arc::<Arena>::default();
        let aside = device.aside(stream.0, Arc::clone(&arena));
        Ok(Some(Self {
            shared: device.clone(),
            layers,
            shape,
            brought: aside.alloc("step", BEFORE_ANGLES + head_dim, 4)?,
            logits: Tensor::uninitialised(&aside, OP, &[1, vocab_size])?,
            found: aside.alloc("likeliest tokens", 3 * SHARES, 4)?,
            tokens: Cell::new(0),
            bytes: Cell::new(0),
            device: aside,
            arena,
            _stream: stream,
        }))
    }

    /// Puts the token of the next step in place, for a sequence that holds `len` tokens before it, with the cosines and sines of
    /// its position. Returns whether `recording` is of such a step.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are `head_dim / 2` angles and room for a token, [`Error::Lost`].
    pub fn bring(
        &self,
        token: u32,
        len: usize,
        angles: impl Iterator<Item = (f32, f32)>,
        recording: Option<&Recording>,
    ) -> Result<bool> {
        let StepShape { head_dim, capacity, vocab_size, .. } = self.shape;
        if len >= capacity {
            return Err(Error::argument(OP, "len", format_args!("below {capacity}"), len));
        }
        if token as usize >= vocab_size {
            return Err(Error::argument(OP, "token", format_args!("below {vocab_size}"), token));
        }
        let mut words = vec![0; BEFORE_ANGLES + head_dim];
        (words[0], words[1]) = (token, len as u32);
        let half = head_dim / 2;
        let mut count = 0;
        for (at, (cos, sin)) in angles.enumerate().take(half) {
            words[BEFORE_ANGLES + at] = cos.to_bits();
            words[BEFORE_ANGLES + half + at] = sin.to_bits();
            count = at + 1;
        }
        if count != half {
            return Err(Error::argument(OP, "angles", half, count));
        }
        // What was queued on the other stream may be of these caches.
        self.shared.flush(OP)?;
        let bytes = Bytes::from_bytes_vec(bytemuck::cast_slice(&words).to_vec());
        self.device.client().write(&self.brought, bytes);
        let fits = recording.is_some_and(|recording| len < recording.tokens);
        if !fits && len >= self.tokens.get() {
            self.tokens.set((len + 1 + AHEAD).min(capacity));
        }
        Ok(fits)
    }

    /// Queues the step as it is described.
    ///
    /// # Errors
    /// The error of `step`; [`Error::Device`].
    pub fn queue<E: From<Error>>(&self, step: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let (done, bytes) = self.arena.during(None, step);
        self.bytes.set(bytes);
        done?;
        Ok(self.device.flush(OP)?)
    }

    /// Records the step, as it is described, after one that was [queued](Self::queue). `None` where CubeCL cannot, after which nothing
    /// has happened.
    ///
    /// # Errors
    /// The error of `step`.
    pub fn record<E: From<Error>>(
        &self,
        step: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<Recording>, E> {
        let all = self.device.alloc("step", self.bytes.get() as usize, 1)?;
        let prepared = self.device.asked(|client| {
            client.graph_prepare()?;
            client.start_capture()
        });
        let done = match prepared {
            Ok(()) => self.arena.during(Some(all.clone()), step).0,
            Err(_) => Ok(()),
        };
        // Also of one that has not begun.
        let graph = self.device.asked(|client| client.stop_capture());
        done?;
        let made = |graph| Recording { graph, tokens: self.tokens.get(), _all: all };
        Ok(graph.ok().map(made))
    }

    /// Launches what was recorded.
    ///
    /// # Safety
    /// The recording is of this, and all that its step reads and writes lives and is where it was; the caches hold as many tokens as
    /// was [said](Self::bring), and have room for one.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub unsafe fn launch(&self, recording: &Recording) -> Result<()> {
        // SAFETY: as the caller promises; what is brought is written on the same stream.
        self.device.ask(OP, |_| unsafe { recording.graph.replay() })?;
        // Before anything that the other stream does with the caches.
        self.device.flush(OP)
    }

    /// The row of an embedding for the token in place times `factor`, `[1, hidden]`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless the table has a row for each token, [`Error::TooLarge`].
    pub fn embed(&self, table: &Matrix, factor: f32) -> Result<Tensor> {
        if table.rows() < self.shape.vocab_size {
            let expected = format_args!("at least {}", self.shape.vocab_size).to_string();
            return Err(Error::argument(OP, "rows", expected, table.rows()));
        }
        let out = Tensor::uninitialised(&self.device, OP, &[1, table.cols()])?;
        let client = self.device.client();
        match table.dtype() {
            Some(dtype) => {
                let row = Row::of(table.cols());
                let (cubes, dim) = self.device.cubes(row.vectors);
                // SAFETY: the token is a row of the table, and the output has one.
                unsafe {
                    gather::launch_unchecked(
                        client,
                        cubes,
                        dim,
                        row.width,
                        row.width / per_word(dtype),
                        arg(&table.words),
                        arg(&self.brought),
                        arg(out.handle()),
                        row.vectors as u32,
                        row.vectors as u32,
                        factor,
                        dtype,
                    );
                }
            }
            None => {
                let loads = table.cols() / table.elements.per_load();
                let (cubes, dim) = self.device.cubes(loads);
                // SAFETY: as above, with a unit for each load.
                unsafe {
                    widen_blocks::launch_unchecked(
                        client,
                        cubes,
                        dim,
                        arg(&table.words),
                        arg(&self.brought),
                        arg(out.handle()),
                        loads as u32,
                        loads as u32,
                        table.steps as u32,
                        1,
                        factor,
                        table.elements,
                    );
                }
            }
        }
        Ok(out)
    }

    /// Attention of the token over a layer's cache and itself, and the append: `[1, heads, head_dim]` each, queries and keys not
    /// yet rotated, which is done where `turned` says so.
    ///
    /// # Safety
    /// When it runs, the caches hold as many tokens as was [said](Self::bring), and have room for one.
    ///
    /// # Errors
    /// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
    pub unsafe fn attend(
        &self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        scale: f32,
        turned: bool,
    ) -> Result<Tensor> {
        let StepShape { query_heads, kv_heads, head_dim, .. } = self.shape;
        for (what, tensor, heads) in [("q", q, query_heads), ("k", k, kv_heads), ("v", v, kv_heads)]
        {
            if tensor.shape() != [1, heads, head_dim] {
                let expected = format_args!("[1, {heads}, {head_dim}]").to_string();
                return Err(Error::shape(OP, what, expected, tensor.shape()));
            }
        }
        let Some(parts) = self.layers.get(layer) else {
            let expected = format_args!("below {}", self.layers.len()).to_string();
            return Err(Error::argument(OP, "layer", expected, layer));
        };
        let [out, lse] = self.device.alloc_two("tensor", q.len(), query_heads)?;
        let out = Tensor::from_handle(&self.device, out, q.shape())?;
        let lse = Tensor::from_handle(&self.device, lse, &[1, query_heads])?;
        for part in parts {
            let (device, brought, tokens) = (&self.device, &self.brought, self.tokens.get());
            // SAFETY: shapes were checked; of caches as the caller promises.
            unsafe {
                part.launch(device, [q, k, v], [&out, &lse], brought, tokens, scale, turned)?;
            }
        }
        Ok(out)
    }

    /// Writes logits `h . weight^T` of one row to where [`Step::logits`] and [`Step::likeliest`] find them.
    ///
    /// # Errors
    /// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
    pub fn write_logits(&self, h: &Tensor, weight: &Matrix) -> Result<()> {
        if h.rows() != 1 || weight.rows() != self.shape.vocab_size {
            let expected = format_args!("1 row, {} features", self.shape.vocab_size).to_string();
            let got = format_args!("{}, {}", h.rows(), weight.rows()).to_string();
            return Err(Error::argument(OP, "logits", expected, got));
        }
        linear_into(h, weight, &self.logits)
    }

    /// Looks for the highest logit.
    pub fn find_likeliest(&self) {
        let len = self.shape.vocab_size;
        // SAFETY: there are as many logits, and room for what each cube finds.
        unsafe {
            likeliest::launch_unchecked(
                self.device.client(),
                CubeCount::Static(SHARES as u32, 1, 1),
                CubeDim::new_1d(LIKELIEST_UNITS as u32),
                arg(self.logits.handle()),
                arg(&self.found),
                len as u32,
                len.div_ceil(SHARES) as u32,
            );
        }
    }

    /// Waits for the step: the token of the highest logit, the lowest of equals; `None` if a logit is infinite or not a number.
    ///
    /// # Errors
    /// [`Error::Device`] and [`Error::Lost`].
    pub fn likeliest(&self) -> Result<Option<u32>> {
        let bytes = self.device.read(OP, &self.found)?;
        let words = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned::<u32>);
        let words: Vec<u32> = words.take(3 * SHARES).collect();
        // A share without a higher one has found none.
        let (mut top, mut token) = (f32::MIN, None);
        for share in words.chunks_exact(3) {
            if share[2] != 0 {
                return Ok(None);
            }
            let own = f32::from_bits(share[0]);
            if own > top {
                (top, token) = (own, Some(share[1]));
            }
        }
        Ok(token)
    }

    /// Logits of the last step, `[1, vocabulary]`, which the next one overwrites.
    pub fn logits(&self) -> &Tensor {
        &self.logits
    }
}
