use crate::Result;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::decoder::session::Session;
use crate::device::Math;

impl<D: Math> Decoder<D> {
    /// Runs `work` on a [`Session`] of these sequences.
    pub(crate) fn in_session<T>(
        &self,
        mut places: Vec<&mut Sequence<D>>,
        work: impl FnOnce(&mut Session<D>) -> Result<T>,
    ) -> Result<T> {
        let mut session = self.session(places.iter_mut().map(|place| place.take()).collect())?;
        let result = work(&mut session);
        for (place, sequence) in places.into_iter().zip(session.into_sequences()) {
            *place = sequence;
        }
        result
    }
}
