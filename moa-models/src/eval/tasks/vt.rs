use super::haystack::{NOISE, distinct};
use crate::eval::{Question, Reference, Scoring};
use moa_core::SplitMix64;

/// Assignments of the chain: a value, and four times the variable before.
const CHAIN: usize = 5;

/// Lines of noise in the example that comes first: 500 tokens of most tokenizers, as in RULER, and
/// fewer where that would be an eighth of the question or more.
fn example_lines(length: usize) -> usize {
    (length / 256).clamp(1, 15)
}

/// RULER's variable tracking: a chain of assignments in noise, after a solved example, and the
/// question which variables hold its value.
pub(super) fn build(lines: usize, length: usize, mut rng: SplitMix64) -> Question {
    let rng = &mut rng;
    let chain = Chain::draw(rng, 5);
    let example = Chain::draw(rng, 3);
    let (text, prefix, _) = example.ask(example_lines(length), rng);
    let example = format!("{text}{prefix} {}\n", example.names.join(" "));
    let (text, prefix, depths) = chain.ask(lines, rng);
    let references =
        chain.names.into_iter().zip(depths).map(|(text, d)| Reference { text, depth: Some(d) });
    Question::one(format!("{example}\n{text}"), references.collect(), Scoring::Contains)
        .with_answer_prefix(prefix)
}

struct Chain {
    names: Vec<String>,
    value: usize,
}

impl Chain {
    /// A value and distinct names of so many capital letters.
    fn draw(rng: &mut SplitMix64, letters: usize) -> Self {
        let mut names: Vec<String> = Vec::new();
        while names.len() < CHAIN {
            let name = (0..letters).map(|_| char::from(b'A' + rng.below(26) as u8)).collect();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Self { names, value: 10_000 + rng.below(89_999) }
    }

    /// The question over `lines` lines of noise, how the answer begins, and the depth of each name.
    fn ask(&self, lines: usize, rng: &mut SplitMix64) -> (String, String, Vec<f64>) {
        let mut text = vec![NOISE.to_string(); lines];
        let mut places = distinct(rng, lines.max(CHAIN), CHAIN);
        places.sort_unstable();
        for (index, place) in places.iter().enumerate() {
            let name = &self.names[index];
            let line = match index {
                0 => format!("VAR {name} = {}", self.value),
                _ => format!("VAR {name} = VAR {} ", self.names[index - 1]),
            };
            text.insert((place + index).min(text.len()), line);
        }
        let depths = places.iter().map(|place| *place as f64 / lines.max(CHAIN) as f64).collect();
        let value = self.value;
        let text = format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n\
             {}\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            text.join("\n")
        );
        let prefix = format!(
            " Answer: According to the chain(s) of variable assignment in the text above, {CHAIN} \
             variables are assigned the value {value}, they are: "
        );
        (text, prefix, depths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_comes_first_and_the_chain_is_whole() {
        for lines in [1, 5, 40] {
            let question = build(lines, 4096, SplitMix64::new(3));
            let text = &question.turns[0].text;
            let (example, own) = text.split_once("\n\nMemorize and track").unwrap();
            assert!(example.starts_with("Memorize and track"));
            assert_eq!(example.matches(NOISE).count(), 15);
            assert_eq!(own.matches(NOISE).count(), lines);
            let names: Vec<_> = question.turns[0].references.iter().map(|r| &r.text).collect();
            let mut rest = own;
            let value = own.rsplit("the value ").next().unwrap().split(' ').next().unwrap();
            let mut from = value.to_string();
            for name in names {
                // Each is assigned what the one before was, and after it.
                rest = rest.split_once(&format!("VAR {name} = {from}")).unwrap().1;
                from = format!("VAR {name}");
            }
            assert!(question.answer_prefix.ends_with(&format!("the value {value}, they are: ")));
        }
        assert_eq!((example_lines(100), example_lines(512), example_lines(9999)), (1, 2, 15));
    }
}
