use moa_core::Append;

use crate::decoder::logits::LogitRows;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::{Error, Result};

impl<D: Math> Decoder<D> {
    /// Appends `tokens[i]` to `batch[i]` and returns logits `[rows, vocab]`.
    ///
    /// # Errors
    /// [`Error::Core`] with [`CapacityExceeded`](moa_core::Error::CapacityExceeded) if a sequence
    /// has no room; [`Error::Invalid`] if there is not one list of new tokens for each sequence, a
    /// list is empty, a token is not in the vocabulary, a logit row is not one of the new tokens,
    /// or an earlier step of a sequence failed half-way. Every sequence is then as it was.
    ///
    /// [`Error::Backend`] or [`Error::OutOfMemory`] if the device fails, [`Error::Rank`] if another
    /// rank does. Where that is half-way, the sequences of the batch refuse further use.
    pub fn forward(
        &self,
        batch: &mut [&mut Sequence<D>],
        tokens: &[&[u32]],
        logits: LogitRows<'_>,
    ) -> Result<D::Tensor> {
        self.check_step(batch, tokens)?;
        let total = tokens.iter().map(|new| new.len()).sum::<usize>();
        if let LogitRows::Rows(rows) = logits
            && let Some(row) = rows.iter().find(|row| **row >= total)
        {
            return Err(Error::invalid("logit row", format!("below {total}"), row));
        }
        self.append(batch, tokens, logits).inspect_err(|_| self.tell_failure())
    }

    /// [`forward`](Self::forward) of what has been checked.
    fn append(
        &self,
        batch: &mut [&mut Sequence<D>],
        tokens: &[&[u32]],
        logits: LogitRows<'_>,
    ) -> Result<D::Tensor> {
        let device = &self.device;
        let positions: Vec<_> = batch
            .iter()
            .zip(tokens)
            .map(|(s, new)| (&s.rope, s.len()..s.len() + new.len()))
            .collect();
        let rotations = device.rotations(&positions)?;
        let counts: Vec<usize> = tokens.iter().map(|t| t.len()).collect();
        let rows: Vec<usize> = match logits {
            LogitRows::Last => counts
                .iter()
                .scan(0, |end, n| {
                    *end += n;
                    Some(*end - 1)
                })
                .collect(),
            LogitRows::Rows(rows) => rows.to_vec(),
            LogitRows::None => Vec::new(),
        };
        let x = self.embed(&tokens.concat())?;
        batch.iter_mut().for_each(|sequence| sequence.broken = true);
        let x = self.blocks(x, |index, qkv| {
            let mut appends: Vec<_> = batch
                .iter_mut()
                .zip(&counts)
                .map(|(s, &tokens)| Append { cache: &mut s.caches[index], tokens })
                .collect();
            let layer = &self.layers[index];
            Ok(self.extend(layer, device.attention(), &mut appends, qkv, &rotations, false)?.out)
        })?;
        batch.iter_mut().for_each(|sequence| sequence.broken = false);
        let h = device.rms_norm(&device.rows(&x, &rows)?, &self.norm, self.eps())?;
        self.output(&h)
    }

    /// Checks a step before it changes anything.
    pub(crate) fn check_step(&self, batch: &[&mut Sequence<D>], tokens: &[&[u32]]) -> Result<()> {
        if batch.len() != tokens.len() || batch.is_empty() {
            return Err(Error::invalid(
                "tokens",
                format!("one list for each of {} sequences", batch.len()),
                tokens.len(),
            ));
        }
        for (sequence, new) in batch.iter().zip(tokens) {
            if sequence.broken {
                return Err(Error::invalid(
                    "sequence",
                    "one whose last step did not fail",
                    "a broken one",
                ));
            }
            if new.is_empty() {
                return Err(Error::invalid("tokens", "at least 1 per sequence", 0));
            }
            sequence.check_append(new.len())?;
            self.check_tokens(new)?;
        }
        Ok(())
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        match tokens.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::invalid("token id", format!("below {vocab}"), id)),
            None => Ok(()),
        }
    }
}
