//! Speculative decoding: tokens are guessed, and a step checks all guesses at once.
//!
//! A guess is kept where it is the token that the request's own sampler chooses from the logits of the step, so
//! that a request gets the tokens that it would get without guesses, drawn ones included; on a GPU up to rounding, as
//! several rows are summed in another order than one.

use serde::{Deserialize, Serialize};

use crate::engine::pace::Candidate;

/// Where the engine takes guesses from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speculation {
    /// There are none.
    #[default]
    Off,
    /// From the request's own tokens: what followed the last few tokens where they stood before ("prompt
    /// lookup"). It pays where answers quote their prompt, and is left off where measured times and guesses
    /// that were right say that it does not.
    Ngram {
        /// Most tokens that are guessed for one step. A device may allow fewer
        /// ([`Device::few_rows`](crate::Device::few_rows), [`Device::replayed_tokens`](crate::Device::replayed_tokens)).
        draft_tokens: usize,
        /// Leave guesses out of steps that they do not make faster, by measured times; else all are checked.
        adaptive: bool,
    },
    /// From another model ([`Checkpoint::set_draft`](crate::Checkpoint::set_draft)): a smaller one, or the same one with
    /// a plan of short spans. It makes its guesses with the random numbers and penalties of the request, and reads
    /// the request's prompt when that is decoded. Without such a model there are none.
    Draft {
        /// As in [`Ngram`](Self::Ngram).
        draft_tokens: usize,
        /// Neither guess nor read prompts where it does not pay, by measured times; else always.
        adaptive: bool,
    },
}

impl Speculation {
    /// [`Ngram`](Self::Ngram) with up to 6 tokens.
    #[must_use]
    pub const fn ngram() -> Self {
        Self::Ngram { draft_tokens: 6, adaptive: true }
    }

    /// [`Draft`](Self::Draft) with up to 6 tokens.
    #[must_use]
    pub const fn draft() -> Self {
        Self::Draft { draft_tokens: 6, adaptive: true }
    }

    /// Most tokens guessed for one step, which is the slack that a sequence needs for them.
    #[must_use]
    pub const fn draft_tokens(self) -> usize {
        match self {
            Self::Off => 0,
            Self::Ngram { draft_tokens, .. } | Self::Draft { draft_tokens, .. } => draft_tokens,
        }
    }

    pub(crate) const fn is_adaptive(self) -> bool {
        match self {
            Self::Off => true,
            Self::Ngram { adaptive, .. } | Self::Draft { adaptive, .. } => adaptive,
        }
    }
}

/// Lengths of the ends of a text that are looked up, longest first.
const NGRAMS: [usize; 3] = [4, 3, 2];
/// How likely a guess is taken to be right before any was seen: so much that one which was right makes it worth a
/// check, and none does not.
const FIRST_RATE: f64 = 0.25;
/// Weight of the newest guess.
const NEWEST: f64 = 0.15;
/// The kind of guesses that are another model's.
const MODEL: usize = NGRAMS.len();

/// The guesses of one request.
#[derive(Debug, Default)]
pub(crate) struct Drafter {
    /// For each of [`NGRAMS`], and for [`MODEL`]: how likely its next guess is right.
    rates: [Option<f64>; NGRAMS.len() + 1],
}

/// What a request is thought to go on with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draft {
    pub(crate) tokens: Vec<u32>,
    /// Which of [`NGRAMS`] it comes from, or [`MODEL`].
    kind: usize,
    /// How likely each token is right, if those before it are.
    pub(crate) rate: f64,
}

impl Draft {
    /// Another model's guesses, of which none is made yet.
    pub(crate) fn of_model(rate: f64) -> Self {
        Self { tokens: Vec::new(), kind: MODEL, rate }
    }

    pub(crate) fn candidate(&self) -> Candidate {
        Candidate { rate: self.rate, most: self.tokens.len() }
    }
}

/// What a rate is after so many guesses that were right, and one that was wrong or none.
pub(crate) fn learned(mut rate: f64, right: usize, then_wrong: bool) -> f64 {
    for _ in 0..right {
        rate += NEWEST * (1.0 - rate);
    }
    if then_wrong {
        rate -= NEWEST * rate;
    }
    rate
}

impl Drafter {
    /// A guess of at most so many tokens after `history`: what followed on the longest of its ends, the last time that
    /// it stood before.
    pub(crate) fn draft(&self, history: &[u32], most: usize) -> Draft {
        let [.., second, last] = history else { return Draft::default() };
        let mut found = None;
        // A look through all tokens takes less than an index of them, even of long texts.
        for at in stood(&history[..history.len() - 1], [*second, *last]) {
            let (here, end) = (history[..at].iter().rev(), history.iter().rev());
            let common = here.zip(end).take(NGRAMS[0]).take_while(|(a, b)| a == b).count();
            let Some(kind) = NGRAMS.iter().position(|n| *n <= common) else { continue };
            if found.is_none_or(|(best, _)| kind < best) {
                found = Some((kind, at));
            }
            if kind == 0 {
                break;
            }
        }
        let Some((kind, at)) = found else { return Draft::default() };
        // A text that repeats itself goes on repeating.
        let period = history.len() - at;
        let tokens = (0..most).map(|i| history[at + i % period]).collect();
        Draft { tokens, kind, rate: self.rates[kind].unwrap_or(FIRST_RATE) }
    }

    /// So many guesses were right, and whether the next was wrong.
    pub(crate) fn learn(&mut self, draft: &Draft, right: usize, then_wrong: bool) {
        let rate = self.rates[draft.kind].get_or_insert(draft.rate);
        *rate = learned(*rate, right, then_wrong);
    }

    /// How likely the next guess of another model is right, if it has made some.
    pub(crate) fn rate_of_model(&self) -> Option<f64> {
        self.rates[MODEL]
    }
}

/// Places after those where two tokens stand, from the last on.
fn stood(tokens: &[u32], pair: [u32; 2]) -> impl Iterator<Item = usize> {
    const STRETCH: usize = 64;
    let is_it = move |first: u32, second: u32| (first == pair[0]) & (second == pair[1]);
    // Whole stretches are compared at once: in numbers, one token of two stands at every place.
    let has = move |at: &usize| {
        let own = &tokens[*at..tokens.len().min(at + STRETCH + 1)];
        own.iter().zip(&own[1..]).fold(false, |any, (a, b)| any | is_it(*a, *b))
    };
    let firsts = (0..tokens.len()).step_by(STRETCH).rev().filter(has);
    let places = move |first: usize| first..tokens.len().saturating_sub(1).min(first + STRETCH);
    let found = firsts.flat_map(move |first| places(first).rev());
    found.filter(move |at| is_it(tokens[*at], tokens[at + 1])).map(|at| at + 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pace::Pace;

    #[test]
    fn the_longest_end_that_stood_before_is_continued() {
        let drafter = Drafter::default();
        assert!(drafter.draft(&[5, 6, 7], 4).tokens.is_empty());
        let text = [1, 2, 3, 4, 9, 8, 3, 4, 7, 0, 1, 2, 3, 4];
        // Of `3 4` the later one is nearer, but `1 2 3 4` is longer.
        assert_eq!(drafter.draft(&text, 3).tokens, [9, 8, 3]);
        assert_eq!(drafter.draft(&[&text[..], &[9, 3, 4]].concat(), 3).tokens, [9, 3, 4]);
        // Over several stretches, and at their ends.
        for at in [0, 62, 63, 64, 127, 128, 199] {
            let mut text = vec![1; 200];
            text.splice(at..at, [7, 8, 9]);
            assert_eq!(drafter.draft(&[&text[..], &[7, 8]].concat(), 1).tokens, [9], "{at}");
        }
        let fresh = Drafter::default();
        assert_eq!(fresh.draft(&[7, 7, 7], 5).tokens, [7; 5]);
        assert!(fresh.draft(&[7, 7, 7, 1], 0).tokens.is_empty());
    }

    #[test]
    fn guesses_stop_where_they_do_not_pay_and_begin_again_where_they_would() {
        let mut drafter = Drafter::default();
        let pace = Pace::default();
        let text = [3, 4, 5, 3, 4];
        let mut checked = 0;
        let share = |draft: Draft| pace.shares(&[draft.candidate()], 6, |_| 0.0).0[0];
        // None was right yet.
        let first = drafter.draft(&text, 6);
        assert_eq!(share(first.clone()), 0);
        drafter.learn(&first, 1, false);
        assert!(share(drafter.draft(&text, 6)) > 0);
        while share(drafter.draft(&text, 6)) > 0 {
            let draft = drafter.draft(&text, 6);
            drafter.learn(&draft, 0, true);
            checked += 1;
        }
        assert!((1..12).contains(&checked), "{checked}");
        let draft = drafter.draft(&text, 6);
        (0..20).for_each(|_| drafter.learn(&draft, 1, false));
        assert!(share(drafter.draft(&text, 6)) > 3);
    }
}
