//! Tokens drawn on the device.

use bytemuck::{Pod, Zeroable};

use super::launch::SAMPLE;
use super::{Indices, Operations, check_dtype};
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::memory::address;
use crate::{Dtype, Error, Result, Tensor};

/// How a token is chosen from logits: each restriction applies to what the one before left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the likeliest token, the lowest of equals, whatever the rest says.
    pub temperature: f32,
    /// Likeliest tokens to keep, with all that are as likely as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Probability that the likeliest tokens kept have together; 1 keeps all.
    pub top_p: f32,
    /// Least share of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
}

/// As in `kernels/sample.cu`, as the next one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct SampleRow {
    unit: i32,
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct SampleArgs {
    logits: DevicePointer,
    rows: DevicePointer,
    out: DevicePointer,
    stride: i64,
    vocab: i32,
    padding: i32,
}

const _: () = assert!(size_of::<SampleArgs>() == 40 && size_of::<SampleRow>() == 20);

/// Most tokens of a vocabulary: the kernel's sums are whole numbers of 64 bits.
const VOCABULARY: usize = 1 << 23;

impl Operations {
    /// Chooses a token from each row of logits, f32 `[rows, vocab]`, each in its own way. `units` are uniform
    /// numbers in [0, 1), one a row, which alone decide among the tokens that are kept; -1 where a logit is
    /// infinite or not a number. A row's token does not depend on the other rows.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are as many draws, units and entries of `into` as rows,
    /// [`Error::Argument`] if a number is out of its range, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn sample(
        &self,
        logits: &Tensor,
        draws: &[Draw],
        units: &[f64],
        into: &Indices,
    ) -> Result<()> {
        const OP: &str = "sample";
        let &[rows, vocab] = logits.shape() else {
            return Err(Error::shape(OP, "logits", "[rows, vocab]", logits.shape()));
        };
        self.check_place(OP, "logits", logits)?;
        self.check_indices(OP, into)?;
        check_dtype(OP, "logits", logits, Dtype::F32)?;
        let given = [draws.len(), units.len(), into.len()];
        if given != [rows; 3] || vocab > VOCABULARY {
            let least = given.iter().min().unwrap_or(&0);
            let expected = format!("[{least}, at most {VOCABULARY}]");
            return Err(Error::shape(OP, "logits", expected, logits.shape()));
        }
        let row = |(draw, unit): (&Draw, &f64)| {
            let &Draw { temperature, top_k, top_p, min_p } = draw;
            if !(temperature >= 0.0 && temperature.is_finite()) {
                return Err(Error::argument(OP, "temperature", "0 or more", temperature));
            }
            if !(top_p > 0.0 && top_p <= 1.0 && (0.0..=1.0).contains(&min_p)) {
                let got = format!("{top_p} and {min_p}");
                return Err(Error::argument(OP, "top_p and min_p", "shares, top_p above 0", got));
            }
            if !(0.0..1.0).contains(unit) {
                return Err(Error::argument(OP, "unit", "in [0, 1)", unit));
            }
            // 31 bits of it.
            let unit = (unit * f64::from(1u32 << 31)) as i32;
            Ok(SampleRow { unit, temperature, top_k: top_k.min(vocab) as i32, top_p, min_p })
        };
        let own: Vec<SampleRow> = draws.iter().zip(units).map(row).collect::<Result<_>>()?;
        let bytes: &[u8] = bytemuck::cast_slice(&own);
        let table = self.device.alloc::<u8>("draws", bytes.len())?;
        self.stage(bytes.len(), address(&table), |staged| staged.copy_from_slice(bytes))?;
        let args = SampleArgs {
            logits: logits.pointer(),
            rows: address(&table),
            out: into.pointer(),
            stride: logits.stride() as i64,
            vocab: vocab as i32,
            padding: 0,
        };
        let kernels = self.lazily(&self.sampling, Source::Sample, &SAMPLE)?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch("sample", [rows, 1, 1], 1024, &args) }
    }
}
