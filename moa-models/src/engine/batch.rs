use crate::Result;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::decoder::session::{Recordings, Session};
use crate::device::Math;

/// The sequences of the running requests, in the order of those.
///
/// Steps that only decode are run by a session, which a device prepares for these sequences; it is
/// given up as soon as one joins or leaves, or a prompt is to be read. What the device recorded goes from one to the next.
pub(crate) struct Batch<D: Math> {
    sequences: Vec<Sequence<D>>,
    /// Has what is recorded while there is no session.
    recordings: Recordings<D>,
    /// Has all the sequences while there is one.
    session: Option<Session<D>>,
}

impl<D: Math> Batch<D> {
    pub(crate) fn new() -> Self {
        Self { sequences: Vec::new(), recordings: Recordings::default(), session: None }
    }

    /// The sequences one by one.
    pub(crate) fn apart(&mut self) -> &mut Vec<Sequence<D>> {
        if let Some(session) = self.session.take() {
            (self.sequences, self.recordings) = session.into_parts();
        }
        &mut self.sequences
    }

    /// One of the sequences, as it is between steps.
    pub(crate) fn get(&self, at: usize) -> Option<&Sequence<D>> {
        match &self.session {
            Some(session) => session.sequences().get(at),
            None => self.sequences.get(at),
        }
    }

    /// How many of so many guesses one of the sequences can take in and forget again.
    pub(crate) fn can_check(&self, at: usize, guesses: usize) -> usize {
        let fits = |guesses: &usize| self.get(at).is_some_and(|one| one.can_check(*guesses));
        (1..=guesses).rev().find(fits).unwrap_or(0)
    }

    /// The sequences as one batch that decodes.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if there is none.
    pub(crate) fn session(&mut self, model: &Decoder<D>) -> Result<&mut Session<D>> {
        let session = match self.session.take() {
            Some(session) => session,
            None => {
                let (sequences, kept) = (&mut self.sequences, &mut self.recordings);
                model.session_with(std::mem::take(sequences), std::mem::take(kept))?
            }
        };
        Ok(self.session.insert(session))
    }

    /// Whether the device has recorded a step of them, and waits for it only to
    /// [fetch](Session::fetch) what it chose.
    pub(crate) fn is_recorded(&self) -> bool {
        self.session.as_ref().is_some_and(Session::is_recorded)
    }

    /// Drops what the device has recorded, which takes memory. Returns whether there was something.
    pub(crate) fn forget(&mut self) -> bool {
        !self.take_recordings().is_empty()
    }

    /// What the device has recorded, which is gone from here then.
    pub(crate) fn take_recordings(&mut self) -> Recordings<D> {
        self.apart();
        std::mem::take(&mut self.recordings)
    }

    /// Begins with what the device has recorded elsewhere, in place of what it has here.
    pub(crate) fn set_recordings(&mut self, recordings: Recordings<D>) {
        self.apart();
        self.recordings = recordings;
    }

    /// How often the device has recorded a step.
    pub(crate) fn recordings(&self) -> usize {
        self.session.as_ref().map_or(self.recordings.count(), Session::recordings)
    }

    /// Drops all sequences.
    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }
}
