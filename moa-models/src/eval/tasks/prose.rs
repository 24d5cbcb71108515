use crate::find_plan::records::{FIRST, SECOND};
use moa_core::SplitMix64;

/// `{a}` becomes an adjective, `{n}` a noun.
const SENTENCES: &[&str] = &[
    "The {a} {n} stood beside the {n}.",
    "Nobody in the {n} had seen so {a} a {n} before.",
    "In the morning the {n} was {a} and the {n} was {a}.",
    "They carried the {a} {n} past the {n} and went home.",
    "It was a {a} day, and the {n} lay near the {n}.",
    "He would not give his {a} {n} for any {n} in the world.",
    "She drew a {a} {n} and gave it to the keeper of the {n}.",
    "After the {n} came the {n}, as {a} as ever.",
    "The people of the {n} spoke of the {a} {n} all summer.",
    "Between the {n} and the {n} there was a {a} path.",
    "When the {n} was gone, the {n} seemed {a} to them.",
    "From the {n} one could see a {a} {n} and the sea.",
];

/// Prose without a fact in it, in which facts are put at drawn depths.
pub(super) struct Prose {
    rng: SplitMix64,
    facts: Vec<(f64, String)>,
}

impl Prose {
    /// Prose drawn with `rng`.
    pub(super) fn new(rng: SplitMix64) -> Self {
        Self { rng, facts: Vec::new() }
    }

    /// Puts a fact at `depth`, from 0 to 1.
    pub(super) fn put(&mut self, depth: f64, fact: String) {
        self.facts.push((depth, fact));
    }

    /// `sentences` sentences with the facts between them. More sentences begin with the same ones.
    pub(super) fn text(mut self, sentences: usize) -> String {
        self.facts.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut facts = self.facts.iter().peekable();
        let mut text = String::new();
        for index in 0..=sentences {
            while let Some((_, fact)) =
                facts.next_if(|(depth, _)| index as f64 >= (depth * sentences as f64).floor())
            {
                text.push_str(fact);
            }
            if index < sentences {
                text.push_str(&sentence(&mut self.rng));
                text.push(if index % 5 == 4 { '\n' } else { ' ' });
            }
        }
        text
    }
}

fn sentence(rng: &mut SplitMix64) -> String {
    let mut rest = rng.pick(SENTENCES);
    let mut text = String::new();
    while let Some((before, after)) = rest.split_once('{') {
        text.push_str(before);
        text.push_str(rng.pick(if after.starts_with('a') { &FIRST } else { &SECOND }));
        rest = &after[2..];
    }
    text + rest
}
