//! Decode steps of one sequence that CubeCL records, launched again for every token.

use std::ops::Range;

use moa_backend_wgpu::{Cache, Matrix, Recording, Step, StepShape, Tensor};

use super::Wgpu;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::rope_table::RopeTable;
use crate::device::{Device, Draw};
use crate::{Error, Result};

/// Recordings that may fail before steps are queued launch by launch for good.
const TRIES: usize = 3;

/// A decode step of one sequence. The first one is queued launch by launch, the next one is recorded; so again for a sequence that
/// has grown beyond what was recorded.
pub(super) struct Recorded {
    recording: Option<Recording>,
    step: Step,
    /// Whether the step was queued for a sequence of this length.
    rehearsed: bool,
    recordings: usize,
    failures: usize,
    rope: RopeTable,
    /// Whether a layer's queries and keys are rotated.
    rotary: Vec<bool>,
    scale: f32,
}

impl Recorded {
    /// `None` where such steps are not recorded.
    pub(super) fn new(device: &Wgpu, batch: &ReplayBatch<'_, Wgpu>) -> Result<Option<Self>> {
        let shifted = batch.key_shifts.iter().chain(&batch.key_feedback).any(Option::is_some);
        let caches = batch.caches.iter().map(|layer| match layer[..] {
            [only] => Some(only),
            _ => None,
        });
        let Some(caches) = caches.collect::<Option<Vec<&Cache>>>() else { return Ok(None) };
        let Some(first) = caches.first() else { return Ok(None) };
        if batch.tokens != 1 || !batch.changes || shifted {
            return Ok(None);
        }
        let shape = StepShape {
            query_heads: batch.query_heads,
            kv_heads: first.as_ref().layout().heads().len(),
            head_dim: batch.head_dim,
            capacity: batch.capacity,
            vocab_size: batch.vocab_size,
        };
        let Some(step) = Step::new(device.gpu(), &caches, shape)? else { return Ok(None) };
        Ok(Some(Self {
            recording: None,
            step,
            rehearsed: false,
            recordings: 0,
            failures: 0,
            rope: batch.rope.clone(),
            rotary: batch.rotary.clone(),
            scale: batch.scale,
        }))
    }
}

impl Replay<Wgpu> for Recorded {
    /// CubeCL keeps the buffers of what it has recorded.
    fn serves_others(&self) -> bool {
        false
    }

    fn is_rehearsed(&self) -> bool {
        self.rehearsed
    }

    fn is_recorded(&self) -> bool {
        self.recording.is_some() || self.failures >= TRIES
    }

    fn recordings(&self) -> usize {
        self.recordings
    }

    fn run(
        &mut self,
        _device: &Wgpu,
        tokens: &[u32],
        lens: &[usize],
        step: &dyn Fn(&dyn Replay<Wgpu>) -> Result<()>,
    ) -> Result<()> {
        let (&[token], &[len]) = (tokens, lens) else {
            return Err(Error::invalid("tokens", "1 of 1 sequence", tokens.len()));
        };
        let angles = self.rope.cos_sin(len);
        if !self.step.bring(token, len, angles, self.recording.as_ref())?
            && self.recording.take().is_some()
        {
            self.rehearsed = false;
        }
        if self.recording.is_none() && self.rehearsed && self.failures < TRIES {
            self.recording = self.step.record(|| step(self))?;
            match self.recording {
                Some(_) => self.recordings += 1,
                None => self.failures += 1,
            }
        }
        match &self.recording {
            // SAFETY: whoever asked for this keeps the caches, of which `lens` tells, and the model where they are.
            Some(recording) => unsafe { self.step.launch(recording) }?,
            None => {
                self.step.queue(|| step(self))?;
                self.rehearsed = true;
            }
        }
        Ok(())
    }

    fn embed(&self, _device: &Wgpu, table: &Matrix, factor: f32) -> Result<Tensor> {
        Ok(self.step.embed(table, factor)?)
    }

    fn attend(&self, _device: &Wgpu, layer: usize, [q, k, v]: [Tensor; 3]) -> Result<Tensor> {
        let turned = self.rotary.get(layer).copied().unwrap_or_default();
        // SAFETY: as in `run`.
        Ok(unsafe { self.step.attend(layer, [&q, &k, &v], self.scale, turned) }?)
    }

    fn write_logits(
        &self,
        _device: &Wgpu,
        h: &Tensor,
        matrix: &Matrix,
        columns: Range<usize>,
    ) -> Result<()> {
        match columns {
            Range { start: 0, end } if end == matrix.rows() => {
                Ok(self.step.write_logits(h, matrix)?)
            }
            _ => Err(Error::invalid("columns", "all", format!("{columns:?}"))),
        }
    }

    fn finish(&self, _device: &Wgpu) -> Result<()> {
        self.step.find_likeliest();
        Ok(())
    }

    fn sample(&self, device: &Wgpu, draws: &[Draw], units: &[f64]) -> Result<()> {
        device.sample(self.step.logits(), draws, units).map(drop)
    }

    fn logits(&self) -> &Tensor {
        self.step.logits()
    }

    fn chosen(&self) -> Result<Vec<Option<u32>>> {
        Ok(vec![self.step.likeliest()?])
    }

    fn advance(&self, cache: &mut Cache) -> Result<()> {
        Ok(cache.advance(1)?)
    }
}
