//! RULER's aggregation tasks: the commonest of many words, and the most frequent of coded words.

use std::collections::HashSet;

use super::haystack::shuffle;
use crate::eval::{Question, Reference, Scoring};
use crate::find_plan::records::{FIRST, SECOND, entries};
use moa_core::SplitMix64;

/// Words that are common, all of which are asked for.
const COMMON: usize = 10;
/// From this length on, words repeat as often as in RULER; it asks nothing shorter.
const LONG: usize = 4096;

/// Words that the question needs at least: the common ones, and one that is not.
pub(super) const SHORTEST_CWE: usize = COMMON + 1;
/// Words drawn, of which few are left by rounding, for three of different frequency.
pub(super) const SHORTEST_FWE: usize = 40;

/// Common words extraction over `words` different words, after a solved example.
pub(super) fn cwe(words: usize, length: usize, mut rng: SplitMix64) -> Question {
    let rng = &mut rng;
    let (example, own) = match length < LONG {
        true => ((20, 3, 1), (words, 6, 1)),
        false => ((40, 10, 3), (words, 30, 3)),
    };
    let (text, common) = word_list(own, rng);
    let (example, answer) = word_list(example, rng);
    let ask = |list: &str| {
        format!(
            "Below is a numbered list of words. In these words, some appear more often than others. \
             Memorize the ones that appear most often.\n{list}\nQuestion: What are the {COMMON} most \
             common words in the above list?"
        )
    };
    let prefix = format!(" Answer: The top {COMMON} words that appear most often in the list are:");
    let text = format!("{}{prefix} {}\n{}", ask(&example), numbered(&answer), ask(&text));
    let references = common.into_iter().map(|text| Reference { text, depth: None });
    Question::one(text, references.collect(), Scoring::Contains).with_answer_prefix(prefix)
}

/// `count` words, common and other ones repeated so often, as a numbered list; and the common ones.
fn word_list(
    (count, common, other): (usize, usize, usize),
    rng: &mut SplitMix64,
) -> (String, Vec<String>) {
    // Sorted, so that a word that stands in both lists is one word.
    let known: std::collections::BTreeSet<&str> =
        FIRST.iter().chain(SECOND.iter()).copied().collect();
    let mut words: Vec<String> = known.into_iter().map(str::to_string).collect();
    shuffle(rng, &mut words);
    if count > words.len() {
        // Beyond the single words there are tens of thousands of pairs.
        words.extend(entries(rng, count - words.len()).into_iter().map(|(key, _)| key));
    }
    words.truncate(count);
    let mut list = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let times = if index < COMMON { common } else { other };
        list.extend(std::iter::repeat_n(word.clone(), times));
    }
    shuffle(rng, &mut list);
    words.truncate(COMMON);
    (numbered(&list), words)
}

fn numbered(words: &[String]) -> String {
    let lines: Vec<_> = words.iter().zip(1..).map(|(word, n)| format!("{n}. {word}")).collect();
    lines.join(" ")
}

/// Frequent words extraction: about `words` coded words drawn by Zipf's law with exponent 2, of
/// which the commonest stands for noise and the three after it are asked for.
pub(super) fn fwe(words: usize, length: usize, mut rng: SplitMix64) -> Question {
    let rng = &mut rng;
    let mut used = HashSet::new();
    let mut vocabulary = vec!["...".to_string()];
    while vocabulary.len() < (length / 50).max(4) {
        let word: String = (0..6).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
        if used.insert(word.clone()) {
            vocabulary.push(word);
        }
    }
    let zeta = std::f64::consts::PI.powi(2) / 6.0;
    let mut text = Vec::new();
    for (word, rank) in vocabulary.iter().zip(1u32..) {
        let times = words as f64 / f64::from(rank).powi(2) / zeta;
        text.extend(std::iter::repeat_n(word.as_str(), times as usize));
    }
    shuffle(rng, &mut text);
    let text = format!(
        "Read the following coded text and track the frequency of each coded word. Find the three \
         most frequently appeared coded words. {}\nQuestion: Do not provide any explanation. Please \
         ignore the dots '....'. What are the three most frequently appeared words in the above coded \
         text?",
        text.join(" ")
    );
    let references = vocabulary[1..4].iter().map(|w| Reference { text: w.clone(), depth: None });
    Question::one(text, references.collect(), Scoring::Contains).with_answer_prefix(
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// How often words occur, most often first.
    fn counts<'a>(words: impl Iterator<Item = &'a str>) -> Vec<(usize, &'a str)> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        words.for_each(|word| *counts.entry(word).or_default() += 1);
        let mut counts: Vec<_> = counts.into_iter().map(|(word, n)| (n, word)).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn the_common_words_are_those_asked_for() {
        for (length, words, common, other) in [(1024, 60, 6, 1), (4096, 300, 30, 3)] {
            let question = cwe(words, length, SplitMix64::new(1));
            let (example, own) = question.turns[0].text.rsplit_once("\nBelow is").unwrap();
            assert_eq!(example.matches(" 10. ").count(), 2, "the list and its answer");
            let list = own.lines().nth(1).unwrap();
            let counts = counts(list.split(' ').skip(1).step_by(2));
            assert_eq!(counts.len(), words);
            assert!(counts[..10].iter().all(|(n, _)| *n == common));
            assert!(counts[10..].iter().all(|(n, _)| *n == other));
            let asked: HashSet<_> =
                question.turns[0].references.iter().map(|r| r.text.as_str()).collect();
            assert_eq!(asked, counts[..10].iter().map(|(_, word)| *word).collect());
        }
        // More words than there are single ones.
        let (list, _) = word_list((5000, 1, 1), &mut SplitMix64::new(2));
        assert_eq!(counts(list.split(' ').skip(1).step_by(2)).len(), 5000);
    }

    #[test]
    fn the_frequent_words_are_those_asked_for() {
        let question = fwe(3000, 4096, SplitMix64::new(1));
        let text = question.turns[0].text.split_once("coded words. ").unwrap().1;
        let counts = counts(text.lines().next().unwrap().split(' '));
        assert_eq!(counts[0], (1823, "..."));
        let asked: Vec<_> = question.turns[0].references.iter().map(|r| r.text.as_str()).collect();
        assert_eq!(counts[1..4].iter().map(|(_, word)| *word).collect::<Vec<_>>(), asked);
        assert_eq!(counts[1].0, 455);
        // The shortest still tells the three apart.
        let question = fwe(SHORTEST_FWE, 512, SplitMix64::new(1));
        let text = question.turns[0].text.split_once("coded words. ").unwrap().1;
        let times = |r: &Reference| text.matches(&r.text).count();
        let times: Vec<_> = question.turns[0].references.iter().map(times).collect();
        assert!(times[0] > times[1] && times[1] > times[2] && times[2] > 0, "{times:?}");
    }
}
