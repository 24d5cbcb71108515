//! Tokens drawn on the device.

use super::launch::SAMPLE;
use super::{Indices, Operations, check_dtype};
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::{Dtype, Error, Result, Tensor};

/// How tokens are drawn from logits: each restriction applies to what the one before left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Likeliest tokens to keep, with all that are as likely as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Probability that the likeliest tokens kept have together; 1 keeps all.
    pub top_p: f32,
    /// Least share of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
}

/// As in `kernels/sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct SampleArgs {
    logits: DevicePointer,
    units: DevicePointer,
    out: DevicePointer,
    stride: i64,
    vocab: i32,
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    padding: i32,
}

const _: () = assert!(size_of::<SampleArgs>() == 56);

/// Most tokens of a vocabulary: the kernel's sums are whole numbers of 64 bits.
const VOCABULARY: usize = 1 << 23;

impl Operations {
    /// Draws a token from each row of logits, f32 `[rows, vocab]`. `units` are uniform numbers in
    /// [0, 1), one a row, which alone decide among the tokens that are kept; -1 where a logit is
    /// infinite or not a number.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are as many units and entries of `into` as rows,
    /// [`Error::Argument`] if a number is out of its range, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn sample(&self, logits: &Tensor, draw: Draw, units: &[f64], into: &Indices) -> Result<()> {
        const OP: &str = "sample";
        let &[rows, vocab] = logits.shape() else {
            return Err(Error::shape(OP, "logits", "[rows, vocab]", logits.shape()));
        };
        self.check_place(OP, "logits", logits)?;
        self.check_indices(OP, into)?;
        check_dtype(OP, "logits", logits, Dtype::F32)?;
        if units.len() != rows || into.len() != rows || vocab > VOCABULARY {
            let expected = format!("[{}, at most {VOCABULARY}]", units.len().min(into.len()));
            return Err(Error::shape(OP, "logits", expected, logits.shape()));
        }
        let Draw { temperature, top_k, top_p, min_p } = draw;
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::argument(OP, "temperature", "a number above 0", temperature));
        }
        if !(top_p > 0.0 && top_p <= 1.0 && (0.0..=1.0).contains(&min_p)) {
            let got = format!("{top_p} and {min_p}");
            return Err(Error::argument(OP, "top_p and min_p", "shares, top_p above 0", got));
        }
        if let Some(unit) = units.iter().find(|unit| !(0.0..1.0).contains(*unit)) {
            return Err(Error::argument(OP, "unit", "in [0, 1)", unit));
        }
        // 31 bits of them.
        let range = 1usize << 31;
        let units = units.iter().map(|unit| (unit * range as f64) as usize);
        let units = self.indices(units, range)?;
        let args = SampleArgs {
            logits: logits.pointer(),
            units: units.pointer(),
            out: into.pointer(),
            stride: logits.stride() as i64,
            vocab: vocab as i32,
            temperature,
            top_k: top_k.min(vocab) as i32,
            top_p,
            min_p,
            padding: 0,
        };
        let kernels = self.lazily(&self.sampling, Source::Sample, &SAMPLE)?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch("sample", [rows, 1, 1], 1024, &args) }
    }
}
