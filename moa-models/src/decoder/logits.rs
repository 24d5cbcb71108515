//! Which logits a step computes, and what is read off them.

use crate::{Error, Result};

/// Which rows of a step get logits.
#[derive(Clone, Copy, Debug)]
pub enum LogitRows<'a> {
    /// The last token of each sequence.
    Last,
    /// These rows of the packed batch.
    Rows(&'a [usize]),
    /// None: the step only fills caches; the result has no rows.
    None,
}

/// The token of the highest logit and that logit; the lowest id of equals.
pub(crate) fn likeliest(logits: &[f32]) -> (u32, f32) {
    let first = (0, f32::NEG_INFINITY);
    logits.iter().zip(0..).fold(
        first,
        |best, (&logit, id)| {
            if logit > best.1 { (id, logit) } else { best }
        },
    )
}

/// Whether a token can be chosen by these logits.
///
/// # Errors
/// [`Error::Logits`] if one is infinite or not a number, or none is finite.
pub(crate) fn check_logits(logits: &[f32]) -> Result<()> {
    if let Some(id) = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        return Err(Error::Logits { got: format!("{} for token {id}", logits[id]) });
    }
    if logits.iter().all(|x| *x == f32::NEG_INFINITY) {
        return Err(Error::Logits { got: format!("no finite one among {}", logits.len()) });
    }
    Ok(())
}
