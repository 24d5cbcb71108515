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
    let higher = |top: f32, x: &f32| if *x > top { *x } else { top };
    // In lanes of their own: one comparison after the other takes as long as some layers.
    let (groups, rest) = logits.as_chunks::<16>();
    let mut tops = [f32::NEG_INFINITY; 16];
    for group in groups {
        tops.iter_mut().zip(group).for_each(|(top, x)| *top = higher(*top, x));
    }
    let top = tops.iter().chain(rest).fold(f32::NEG_INFINITY, higher);
    let is_top = |x: &f32| *x == top && top > f32::NEG_INFINITY;
    (logits.iter().position(is_top).unwrap_or(0) as u32, top)
}

/// Whether a token can be chosen by these logits.
///
/// # Errors
/// [`Error::Logits`] if one is infinite or not a number, or none is finite.
pub(crate) fn check_logits(logits: &[f32]) -> Result<()> {
    let is_bad = |x: &f32| x.is_nan() || *x == f32::INFINITY;
    // Without an end before the last, so that many are looked at together.
    if logits.iter().fold(false, |bad, x| bad | is_bad(x))
        && let Some(id) = logits.iter().position(is_bad)
    {
        return Err(Error::Logits { got: format!("{} for token {id}", logits[id]) });
    }
    if logits.iter().all(|x| *x == f32::NEG_INFINITY) {
        return Err(Error::Logits { got: format!("no finite one among {}", logits.len()) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_is_the_lowest_id_of_the_highest_logit() {
        const LOW: f32 = f32::NEG_INFINITY;
        let mut logits = vec![-1.0; 40];
        for (at, top) in [(39, 0.5), (33, 0.5), (17, 0.5), (16, 2.0), (3, 2.0), (0, 2.0)] {
            logits[at] = top;
            assert_eq!(likeliest(&logits), (at as u32, top));
        }
        assert_eq!(likeliest(&[-0.0, 0.0]).0, 0);
        assert_eq!(likeliest(&[f32::NAN, LOW, -3.0]), (2, -3.0));
        for none in [&[][..], &[f32::NAN, LOW], &[LOW; 20]] {
            assert_eq!(likeliest(none), (0, LOW));
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_named() {
        let mut logits = vec![f32::NEG_INFINITY; 50];
        assert!(check_logits(&logits).unwrap_err().to_string().contains("no finite one among 50"));
        logits[3] = 0.0;
        check_logits(&logits).unwrap();
        for (at, bad) in [(47, f32::NAN), (20, f32::INFINITY)] {
            logits[at] = bad;
            let message = check_logits(&logits).unwrap_err().to_string();
            assert!(message.contains(&format!("{bad} for token {at}")), "{message}");
        }
    }
}
