use crate::Result;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::decoder::session::Session;
use crate::device::Math;

/// The sequences of the running requests, in the order of those.
///
/// Steps that only decode are run by a session, which a device prepares for these sequences; it is
/// given up as soon as one joins or leaves, or a prompt is to be read.
pub(crate) struct Batch<D: Math> {
    sequences: Vec<Sequence<D>>,
    /// Has all the sequences while there is one.
    session: Option<Session<D>>,
}

impl<D: Math> Batch<D> {
    pub(crate) fn new() -> Self {
        Self { sequences: Vec::new(), session: None }
    }

    /// The sequences one by one.
    pub(crate) fn apart(&mut self) -> &mut Vec<Sequence<D>> {
        if let Some(session) = self.session.take() {
            self.sequences = session.into_sequences();
        }
        &mut self.sequences
    }

    /// The sequences as one batch that decodes.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if there is none.
    pub(crate) fn session(&mut self, model: &Decoder<D>) -> Result<&mut Session<D>> {
        let session = match self.session.take() {
            Some(session) => session,
            None => model.session(std::mem::take(&mut self.sequences))?,
        };
        Ok(self.session.insert(session))
    }

    /// Drops all sequences.
    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }
}
