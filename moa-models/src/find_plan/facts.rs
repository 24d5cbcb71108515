//! Facts for calibration: a statement that can stand in any text, a question about it in other words,
//! and its answer.

use moa_core::SplitMix64;

/// A statement, a question about it in other words, and the words or number that answer it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) statement: String,
    pub(crate) question: String,
    pub(crate) answer: String,
}

/// `{who}` is a name; `{what}` is drawn from the values.
struct Kind {
    statement: &'static str,
    question: &'static str,
    values: Values,
}

enum Values {
    Words(&'static [&'static str]),
    /// Whole numbers of so many digits.
    Digits(u32),
    /// Letters and digits.
    Codes,
}

use Values::{Codes, Digits, Words};

const KINDS: &[Kind] = &[
    Kind {
        statement: "{who} keeps the spare key of the house in the {what}.",
        question: "Where is the spare key of {who}'s house?",
        values: Words(&[
            "kitchen", "garden", "attic", "stable", "cellar", "library", "barn", "chapel",
        ]),
    },
    Kind {
        statement: "The number of the room in which {who} sleeps is {what}.",
        question: "In which room does {who} sleep? Give the number.",
        values: Digits(2),
    },
    Kind {
        statement: "Every morning {who} drinks a large cup of {what} before work.",
        question: "What does {who} drink in the morning?",
        values: Words(&["coffee", "milk", "tea", "cocoa", "lemonade", "broth", "cider", "water"]),
    },
    Kind {
        statement: "The new coat that {who} bought last week is {what}.",
        question: "What colour is the coat that {who} bought?",
        values: Words(&["blue", "green", "red", "yellow", "purple", "orange", "grey", "brown"]),
    },
    Kind {
        statement: "The secret code of {who}'s safe is {what}.",
        question: "Which code opens the safe of {who}?",
        values: Digits(4),
    },
    Kind {
        statement: "For the summer {who} has rented a cottage in {what}.",
        question: "Where did {who} rent a cottage?",
        values: Words(&[
            "Norway", "Spain", "Ireland", "Greece", "Wales", "Denmark", "Italy", "Malta",
        ]),
    },
    Kind {
        statement: "As a child {who} learned to play the {what} from an uncle.",
        question: "Which instrument does {who} play?",
        values: Words(&["violin", "flute", "piano", "trumpet", "harp", "cello", "organ", "guitar"]),
    },
    Kind {
        statement: "On the farm {who} owns exactly {what} sheep.",
        question: "How many sheep does {who} own?",
        values: Digits(3),
    },
    Kind {
        statement: "The telephone number of {who} is {what}.",
        question: "Which number must be dialled to reach {who}?",
        values: Digits(5),
    },
    Kind {
        statement: "The ticket that {who} bought for the lottery bears the number {what}.",
        question: "What is the number of the lottery ticket of {who}?",
        values: Digits(6),
    },
];

/// What has to be copied to the letter: numbers, codes and words that nothing foretells.
const KEYS: &[Kind] = &[
    Kind {
        statement: "The pass key of {who} is {what}. Remember it.",
        question: "What is the pass key of {who}?",
        values: Digits(5),
    },
    Kind {
        statement: "{who}: {what}.",
        question: "Which number stands behind the name {who}?",
        values: Digits(6),
    },
    Kind {
        statement: "Access for {who} is granted with the code {what} only.",
        question: "With which code is access for {who} granted?",
        values: Codes,
    },
    Kind {
        statement: "One of the special numbers for {who} is: {what}.",
        question: "What is the special number for {who}?",
        values: Digits(7),
    },
    Kind {
        statement: "Whoever speaks to {who} has to say the word {what} first.",
        question: "Which word has to be said first to {who}?",
        values: Words(&[
            "lantern", "meadow", "copper", "thistle", "harbour", "velvet", "saffron", "anchor",
        ]),
    },
];

const NAMES: &[&str] = &[
    "Martha", "Edwin", "Clara", "Rupert", "Agnes", "Walter", "Sylvia", "Hugo", "Beatrice", "Oscar",
    "Lydia", "Conrad", "Matilda", "Felix", "Harriet", "Julian", "Ottilie", "Bernard", "Cecily",
    "Leopold", "Rosalind", "Gilbert", "Winifred", "Ambrose",
];

/// `count` facts about different people, at most one a name.
pub(crate) fn facts(rng: &mut SplitMix64, count: usize) -> Vec<Fact> {
    drawn(rng, count, KINDS)
}

/// `count` keys of different people, kinds mixed.
pub(crate) fn keys(rng: &mut SplitMix64, count: usize) -> Vec<Fact> {
    drawn(rng, count, KEYS)
}

fn drawn(rng: &mut SplitMix64, count: usize, kinds: &[Kind]) -> Vec<Fact> {
    let mut names = NAMES.to_vec();
    (0..count.min(names.len()))
        .map(|_| {
            let who = names.swap_remove(rng.below(names.len()));
            let kind = &kinds[rng.below(kinds.len())];
            let answer = match kind.values {
                Words(words) => rng.pick(words).to_string(),
                Digits(digits) => {
                    let least = 10usize.pow(digits - 1);
                    (least + rng.below(9 * least)).to_string()
                }
                Codes => {
                    let letters = [(); 3].map(|()| char::from(b'A' + rng.below(26) as u8));
                    format!("{}{}", letters.iter().collect::<String>(), 100 + rng.below(900))
                }
            };
            Fact {
                statement: kind.statement.replace("{who}", who).replace("{what}", &answer),
                question: kind.question.replace("{who}", who),
                answer,
            }
        })
        .collect()
}

/// `text` with each statement between two of its sentences, one in each of as many equal parts.
pub(crate) fn scatter(rng: &mut SplitMix64, text: &str, statements: &[&str]) -> String {
    let ends: Vec<usize> = text.match_indices(". ").map(|(at, _)| at + 2).collect();
    let mut scattered = String::with_capacity(text.len() + 100 * statements.len());
    let mut from = 0;
    for (part, statement) in statements.iter().enumerate() {
        let depth = (part as f64 + rng.unit()) / statements.len() as f64;
        let place = depth * text.len() as f64;
        let at = ends.partition_point(|end| (*end as f64) < place);
        let at = ends.get(at).copied().unwrap_or(text.len()).max(from);
        scattered.push_str(&text[from..at]);
        if !scattered.is_empty() && !scattered.ends_with(char::is_whitespace) {
            scattered.push(' ');
        }
        scattered.push_str(statement);
        scattered.push(' ');
        from = at;
    }
    scattered.push_str(&text[from..]);
    scattered.truncate(scattered.trim_end().len());
    scattered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_hold_their_answers_and_stand_in_the_text_in_their_order() {
        let mut rng = SplitMix64::new(3);
        let facts = [facts(&mut rng, 6), keys(&mut rng, 12)].concat();
        assert_eq!(facts.len(), 18);
        let text = "One sentence stands here. Another one follows it. ".repeat(40);
        let statements: Vec<&str> = facts.iter().map(|f| f.statement.as_str()).collect();
        let scattered = scatter(&mut rng, &text, &statements);
        let places: Vec<_> = statements.iter().map(|s| scattered.find(s).unwrap()).collect();
        assert!(places.is_sorted());
        for fact in &facts {
            assert!(fact.statement.contains(&fact.answer) && !fact.question.contains(&fact.answer));
        }
        // Nothing of the text is lost.
        let mut rest = scattered;
        statements.iter().for_each(|s| rest = rest.replacen(&format!("{s} "), "", 1));
        assert_eq!(rest.trim_end(), text.trim_end());
    }
}
