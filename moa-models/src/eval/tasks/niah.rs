use super::haystack::{NOISE, among_lines, distinct, in_essay, shuffle};
use super::sources::TaskSources;
use crate::eval::{Question, Reference, Scoring};
use crate::find_plan::records::{FIRST, SECOND};
use moa_core::SplitMix64;

/// One of RULER's needle-in-a-haystack tasks: what is hidden in what, and what is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Niah {
    haystack: Haystack,
    key: Kind,
    value: Kind,
    /// Keys hidden.
    keys: usize,
    /// Values of each key.
    values: usize,
    /// Keys asked for.
    queries: usize,
}

#[derive(Clone, Copy, Debug)]
enum Haystack {
    /// A line of noise again and again.
    Noise,
    /// Running text.
    Essay,
    /// Needles that nobody asks for.
    Needles,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Word,
    Number,
    Uuid,
}

/// A single needle in an essay.
const SINGLE: Niah = Niah {
    haystack: Haystack::Essay,
    key: Kind::Word,
    value: Kind::Number,
    keys: 1,
    values: 1,
    queries: 1,
};

impl Niah {
    pub(super) const SINGLE_1: Self = Self { haystack: Haystack::Noise, ..SINGLE };
    pub(super) const SINGLE_2: Self = SINGLE;
    pub(super) const SINGLE_3: Self = Self { value: Kind::Uuid, ..SINGLE };
    pub(super) const MULTIKEY_1: Self = Self { keys: 4, ..SINGLE };
    pub(super) const MULTIKEY_2: Self = Self { haystack: Haystack::Needles, ..SINGLE };
    pub(super) const MULTIKEY_3: Self =
        Self { haystack: Haystack::Needles, key: Kind::Uuid, value: Kind::Uuid, ..SINGLE };
    pub(super) const MULTIVALUE: Self = Self { values: 4, ..SINGLE };
    pub(super) const MULTIQUERY: Self = Self { keys: 4, queries: 4, ..SINGLE };

    /// Lines or words that a question needs at least.
    pub(super) const SHORTEST: usize = 4;

    /// A question over `units` lines, or words of an essay.
    pub(super) fn build(
        self,
        units: usize,
        sources: &TaskSources,
        mut rng: SplitMix64,
    ) -> Question {
        let rng = &mut rng;
        let keys: Vec<String> = (0..self.keys).map(|_| self.key.draw(rng)).collect();
        let mut hidden: Vec<(usize, String)> = (0..self.keys)
            .flat_map(|key| (0..self.values).map(move |_| key))
            .map(|key| (key, self.value.draw(rng)))
            .collect();
        let asked = distinct(rng, self.keys, self.queries);
        shuffle(rng, &mut hidden);
        let needle = |key: &str, value: &str| {
            format!("One of the special magic {} for {key} is: {value}.", self.value.plural())
        };
        let needles: Vec<_> = hidden.iter().map(|(key, v)| needle(&keys[*key], v)).collect();
        let (context, depths) = match self.haystack {
            Haystack::Essay => in_essay(sources, units, &needles, rng),
            Haystack::Noise => among_lines(vec![NOISE.to_string(); units], &needles, rng),
            Haystack::Needles => {
                let other = |_| needle(&self.key.draw(rng), &self.value.draw(rng));
                let lines = (0..units).map(other).collect();
                among_lines(lines, &needles, rng)
            }
        };
        let mut references = Vec::new();
        for key in &asked {
            let own = hidden.iter().zip(&depths).filter(|((of, _), _)| of == key);
            references.extend(
                own.map(|((_, value), depth)| Reference {
                    text: value.clone(),
                    depth: Some(*depth),
                }),
            );
        }
        let queries: Vec<&str> = asked.iter().map(|key| keys[*key].as_str()).collect();
        self.ask(&context, &queries, references)
    }

    /// RULER's wording.
    fn ask(self, context: &str, queries: &[&str], references: Vec<Reference>) -> Question {
        let query = match queries.split_last() {
            Some((last, others)) if !others.is_empty() => {
                format!("{}, and {last}", others.join(", "))
            }
            _ => queries.concat(),
        };
        let plural = self.value.plural();
        let (some, what, values, are) = match references.len() {
            1 => ("A", "What is", &plural[..plural.len() - 1], "is"),
            _ => ("Some", "What are all", plural, "are"),
        };
        let text = format!(
            "{some} special magic {values} {are} hidden within the following text. Make sure to \
             memorize it. I will quiz you about the {values} afterwards.\n{context}\n{what} the \
             special magic {values} for {query} mentioned in the provided text?"
        );
        let prefix =
            format!(" The special magic {values} for {query} mentioned in the provided text {are}");
        Question::one(text, references, Scoring::Contains).with_answer_prefix(prefix)
    }
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Word => "words",
            Self::Number => "numbers",
            Self::Uuid => "uuids",
        }
    }

    /// A word of two parts, a number of seven digits, or a random UUID.
    fn draw(self, rng: &mut SplitMix64) -> String {
        match self {
            Self::Word => format!("{}-{}", rng.pick(&FIRST), rng.pick(&SECOND)),
            Self::Number => (1_000_000 + rng.below(9_000_000)).to_string(),
            Self::Uuid => {
                let (a, b) = (rng.next_u64(), rng.next_u64());
                format!(
                    "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
                    a >> 32,
                    a >> 16 & 0xffff,
                    a & 0xfff,
                    b >> 48 & 0x3fff | 0x8000,
                    b & 0xffff_ffff_ffff
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(niah: Niah, units: usize) -> Question {
        niah.build(units, &TaskSources::default(), SplitMix64::new(5))
    }

    #[test]
    fn wording_is_rulers() {
        let one = question(Niah::SINGLE_1, 9);
        let text = &one.turns[0].text;
        assert!(text.starts_with(
            "A special magic number is hidden within the following text. Make sure to memorize it. \
             I will quiz you about the number afterwards.\n"
        ));
        assert_eq!(text.matches(NOISE).count(), 9);
        let key = text.split("One of the special magic numbers for ").nth(1).unwrap();
        let (key, value) = key.split_once(" is: ").unwrap();
        assert_eq!(value.split_once('.').unwrap().0, one.turns[0].references[0].text);
        assert!(text.ends_with(&format!(
            "\nWhat is the special magic number for {key} mentioned in the provided text?"
        )));
        assert_eq!(
            one.answer_prefix,
            format!(" The special magic number for {key} mentioned in the provided text is")
        );

        let four = question(Niah::MULTIQUERY, 90);
        let text = &four.turns[0].text;
        assert!(text.starts_with("Some special magic numbers are hidden within"));
        let queries = four.answer_prefix.split(" for ").nth(1).unwrap();
        assert_eq!((queries.matches(", ").count(), queries.matches(", and ").count()), (3, 1));
        assert!(text.contains("\nWhat are all the special magic numbers for "));
        assert_eq!(four.turns[0].references.len(), 4);
    }

    #[test]
    fn needles_are_as_many_as_the_task_says() {
        for (niah, needles, asked) in [
            (Niah::SINGLE_1, 1, 1),
            (Niah::SINGLE_2, 1, 1),
            (Niah::SINGLE_3, 1, 1),
            (Niah::MULTIKEY_1, 4, 1),
            (Niah::MULTIKEY_2, 301, 1),
            (Niah::MULTIKEY_3, 301, 1),
            (Niah::MULTIVALUE, 4, 4),
            (Niah::MULTIQUERY, 4, 4),
        ] {
            let question = question(niah, 300);
            let text = &question.turns[0].text;
            assert_eq!(text.matches("One of the special magic ").count(), needles, "{niah:?}");
            let references = &question.turns[0].references;
            assert_eq!(references.len(), asked, "{niah:?}");
            for reference in references {
                assert_eq!(text.matches(&reference.text).count(), 1, "{niah:?}");
            }
        }
    }

    #[test]
    fn uuids_are_of_version_4() {
        let mut rng = SplitMix64::new(2);
        for _ in 0..100 {
            let uuid = Kind::Uuid.draw(&mut rng);
            let parts: Vec<_> = uuid.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{uuid}");
            let mark = uuid.as_bytes();
            assert!(mark[14] == b'4' && b"89ab".contains(&mark[19]), "{uuid}");
        }
    }
}
