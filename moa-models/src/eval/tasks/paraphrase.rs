use super::haystack::in_essay;
use super::sources::TaskSources;
use crate::eval::{Question, Reference, Scoring};
use moa_core::SplitMix64;

/// What is said of somebody, and a question that it answers without a word in common: what joins the
/// two is knowledge of the world. `{}` is the name.
const FACTS: &[(&str, &str)] = &[
    (
        "{} has rented a flat right beside the Brandenburg Gate.",
        "Which character lives in Germany?",
    ),
    ("From the kitchen of {} one can see the Eiffel Tower.", "Which character lives in France?"),
    ("{} walks past the Colosseum on the way to work.", "Which character lives in Italy?"),
    ("{} sells postcards in front of Big Ben.", "Which character works in England?"),
    ("{} guides visitors through the Kremlin.", "Which character works in Russia?"),
    ("{} photographs weddings at the Taj Mahal.", "Which character works in India?"),
    ("{} was born a stone's throw from the pyramids of Giza.", "Which character is Egyptian?"),
    ("{} grew up at the foot of Mount Fuji.", "Which character comes from Japan?"),
    (
        "{} spent last summer in a hut near the Matterhorn.",
        "Which character has been to Switzerland?",
    ),
    ("{} once fell asleep inside the Sagrada Familia.", "Which character has been to Spain?"),
    ("{} is said to have danced on the Great Wall.", "Which character has been to China?"),
    (
        "{} sends back every dish that has seen milk or cheese.",
        "Which character cannot digest lactose?",
    ),
    ("{} has not eaten meat or fish for twenty years.", "Which character is a vegetarian?"),
    ("{} reads with the fingertips, on raised dots.", "Which character is blind?"),
    ("{} talks with the hands and hears nothing at all.", "Which character is deaf?"),
    ("{} spends every night behind the telescope.", "Which character is an astronomer?"),
    ("{} pulls out teeth and fills cavities.", "Which character is a dentist?"),
    ("{} bakes loaves before the sun is up.", "Which character makes bread for a living?"),
    (
        "{} has put four strings and a bow under the chin since childhood.",
        "Which character plays the violin?",
    ),
    ("{} moves rooks and bishops for prize money.", "Which character plays chess?"),
];

const NAMES: &[&str] = &[
    "Amara", "Bertram", "Cosima", "Dmitri", "Eloise", "Farid", "Greta", "Hiroshi", "Ingrid",
    "Joaquin", "Katinka", "Leopold", "Mirela", "Nadir", "Ottilie", "Priya", "Quentin", "Rosalind",
    "Stavros", "Tabitha",
];

/// A fact about somebody in an essay, asked for in words that the text does not use, beside another
/// fact about somebody else (as NoLiMa does: nothing literal to match leads to the needle).
pub(super) fn build(words: usize, sources: &TaskSources, mut rng: SplitMix64) -> Question {
    let rng = &mut rng;
    let (fact, question) = FACTS[rng.below(FACTS.len())];
    let (name, other) = {
        let two = super::haystack::distinct(rng, NAMES.len(), 2);
        (NAMES[two[0]], NAMES[two[1]])
    };
    let decoys: Vec<_> = FACTS.iter().filter(|(_, q)| related(q) != related(question)).collect();
    let decoy = decoys[rng.below(decoys.len())].0;
    let mut needles = [fact.replace("{}", name), decoy.replace("{}", other)];
    let first = rng.below(2);
    needles.swap(0, first);
    let (context, depths) = in_essay(sources, words, &needles, rng);
    let depth = Some(depths[first]);
    let text = format!(
        "You will answer a question based on the following text. Some facts about characters are \
         hidden in it; the question uses other words than they do.\n\n{context}\n\nUse the \
         information in the text to answer the question. Your answer should be short and only the \
         name of the character.\n\nQuestion: {question}"
    );
    let reference = Reference { text: name.to_string(), depth };
    Question::one(text, vec![reference], Scoring::Contains).with_answer_prefix(" Answer:")
}

/// What kind of question it is: a decoy of the same kind could answer it as well.
fn related(question: &str) -> &str {
    question.rsplit_once(' ').map_or(question, |(kind, _)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_question_shares_a_word_with_its_fact() {
        let words = |text: &str| -> HashSet<String> {
            let words = text.split(|c: char| !c.is_alphabetic()).map(str::to_lowercase);
            words.filter(|word| word.len() > 3).collect()
        };
        for (fact, question) in FACTS {
            let common: Vec<_> = words(fact).intersection(&words(question)).cloned().collect();
            assert!(common.is_empty(), "{question}: {common:?}");
            assert_eq!(fact.matches("{}").count(), 1);
        }
        let essay = TaskSources::default();
        assert!(NAMES.iter().all(|name| !essay.essay().contains(name)));
    }

    #[test]
    fn the_fact_is_in_the_text_at_its_depth() {
        for seed in 0..20 {
            let question = build(2000, &TaskSources::default(), SplitMix64::new(seed));
            let (text, reference) = (&question.turns[0].text, &question.turns[0].references[0]);
            let place = text.find(&reference.text).unwrap() as f64 / text.len() as f64;
            // Depths count sentences, which differ in length.
            assert!((place - reference.depth.unwrap()).abs() < 0.2, "{seed}");
            assert_eq!(text.matches(&reference.text).count(), 1);
        }
    }
}
