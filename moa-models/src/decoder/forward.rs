use std::ops::Range;

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
    /// another model opened a sequence, an earlier step of a sequence failed half-way, or some sequences have
    /// keys evicted and others have not. Every sequence is then as it was.
    ///
    /// [`Error::Backend`] or [`Error::OutOfMemory`] if the device fails, [`Error::Rank`] if another
    /// rank does. Where that is half-way, the sequences of the batch refuse further use.
    pub fn forward(
        &self,
        batch: &mut [&mut Sequence<D>],
        tokens: &[&[u32]],
        logits: LogitRows<'_>,
    ) -> Result<D::Tensor> {
        let hidden = self.hidden_states(batch, tokens, logits)?;
        self.output(&hidden).map_err(|error| self.failure(error))
    }

    /// Logits `[rows, vocab]` of some rows of [hidden states](Self::hidden_states).
    pub(crate) fn logits_of(&self, hidden: &D::Tensor, rows: Range<usize>) -> Result<D::Tensor> {
        let rows = self.device.rows(hidden, &rows.collect::<Vec<_>>());
        rows.and_then(|rows| self.output(&rows)).map_err(|error| self.failure(error))
    }

    /// Appends as [`forward`](Self::forward), and returns what the output matrix would be given: the hidden states
    /// `[rows, hidden_size]` after the last norm, for embeddings and probes. [`Device::values`](crate::Device::values)
    /// brings them to the host.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden_states(
        &self,
        batch: &mut [&mut Sequence<D>],
        tokens: &[&[u32]],
        rows: LogitRows<'_>,
    ) -> Result<D::Tensor> {
        self.check_step(batch, tokens)?;
        let total = tokens.iter().map(|new| new.len()).sum::<usize>();
        if let LogitRows::Rows(rows) = rows
            && let Some(row) = rows.iter().find(|row| **row >= total)
        {
            return Err(Error::invalid("logit row", format!("below {total}"), row));
        }
        self.begins();
        self.append(batch, tokens, rows).map_err(|error| self.failure(error))
    }

    /// [`hidden_states`](Self::hidden_states) of what has been checked.
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
        let rotations = self.rotations(&positions)?;
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
        // Where keys were evicted, each KV head is a sequence of its own to attention.
        let apart = batch[0].evicted.is_some();
        let caches_a_layer = if apart { self.local.kv_heads } else { 1 };
        let x = self.blocks(x, |index, qkv| {
            let mut appends: Vec<_> = batch
                .iter_mut()
                .zip(&counts)
                .flat_map(|(s, &tokens)| {
                    let first = index * caches_a_layer;
                    let caches = &mut s.caches[first..first + caches_a_layer];
                    caches.iter_mut().map(move |cache| Append { cache, tokens })
                })
                .collect();
            let layer = &self.layers[index];
            if apart {
                return self.extend_heads(layer, &mut appends, &counts, qkv, &rotations);
            }
            Ok(self.extend(layer, device.attention(), &mut appends, qkv, &rotations, false)?.out)
        })?;
        batch.iter_mut().for_each(|sequence| sequence.broken = false);
        device.rms_norm(&device.rows(&x, &rows)?, &self.norm, self.eps())
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
        let apart = batch[0].evicted.is_some();
        for (sequence, new) in batch.iter().zip(tokens) {
            self.check_owner(sequence)?;
            if sequence.evicted.is_some() != apart {
                let expected = "sequences that all have keys evicted, or none";
                return Err(Error::invalid("batch", expected, "both"));
            }
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
