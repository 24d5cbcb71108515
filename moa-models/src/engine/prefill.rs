use crate::decoder::logits::LogitRows;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::{Error, Result};

impl<D: Math> Decoder<D> {
    /// Appends tokens, at most `chunk` a step, and returns the logits of the last one, `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no token, the chunk is 0, or a token is outside of the
    /// vocabulary; [`Error::Core`] if the sequence has no room for them; nothing has changed then.
    /// Else as [`Decoder::forward`].
    pub fn prefill(
        &self,
        sequence: &mut Sequence<D>,
        tokens: &[u32],
        chunk: usize,
    ) -> Result<Vec<f32>> {
        if tokens.is_empty() || chunk == 0 {
            return Err(Error::invalid("prompt and chunk", "at least 1 token", 0));
        }
        self.check_tokens(tokens)?;
        if tokens.len() > sequence.capacity() - sequence.len() {
            return Err(moa_core::Error::CapacityExceeded {
                len: sequence.len(),
                more: tokens.len(),
                capacity: sequence.capacity(),
            }
            .into());
        }
        let (last, before) = ((tokens.len() - 1) / chunk * chunk, tokens.chunks(chunk));
        for part in before.take(last / chunk) {
            self.forward(&mut [&mut *sequence], &[part], LogitRows::None)?;
        }
        let logits = self.forward(&mut [sequence], &[&tokens[last..]], LogitRows::Last)?;
        self.values(logits)
    }
}
