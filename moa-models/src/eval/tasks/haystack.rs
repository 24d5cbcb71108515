use super::sources::TaskSources;
use moa_core::SplitMix64;

/// RULER's noise.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Depths in percent at which RULER puts needles into essays: 40 of them, from 0 to 100.
const DEPTHS: usize = 40;

/// `words` words of the essay with `needles` between its sentences, in the order given, and the depth
/// of each. An essay that is too short is repeated.
pub(super) fn in_essay(
    sources: &TaskSources,
    words: usize,
    needles: &[String],
    rng: &mut SplitMix64,
) -> (String, Vec<f64>) {
    let essay = sources.essay();
    let words: Vec<&str> = essay.split_whitespace().cycle().take(words).collect();
    let sentences = sentences(&words);
    let mut depths: Vec<usize> = match needles.len() {
        few if few <= DEPTHS => distinct(rng, DEPTHS, few),
        many => (0..many).map(|_| rng.below(DEPTHS)).collect(),
    };
    depths.sort_unstable();
    let depths: Vec<f64> = depths.iter().map(|d| *d as f64 / (DEPTHS - 1) as f64).collect();
    let mut parts = Vec::new();
    let mut last = 0;
    for (needle, depth) in needles.iter().zip(&depths) {
        let next = (sentences.len() as f64 * depth) as usize;
        parts.extend(sentences[last..next].iter().cloned());
        parts.push(needle.clone());
        last = next;
    }
    parts.extend(sentences[last..].iter().cloned());
    (parts.join(" "), depths)
}

/// Lines with `needles` among them, the last needle first, as RULER inserts them, and the depth of each.
pub(super) fn among_lines(
    mut lines: Vec<String>,
    needles: &[String],
    rng: &mut SplitMix64,
) -> (String, Vec<f64>) {
    let count = lines.len().max(needles.len());
    let mut places = distinct(rng, count, needles.len());
    places.sort_unstable_by(|a, b| b.cmp(a));
    for (place, needle) in places.iter().zip(needles) {
        lines.insert((*place).min(lines.len()), needle.clone());
    }
    let depths = places.iter().map(|place| *place as f64 / count as f64).collect();
    (lines.join("\n"), depths)
}

/// `count` different numbers below `n`, of which there are as many, in random order.
pub(super) fn distinct(rng: &mut SplitMix64, n: usize, count: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    for place in 0..count {
        let other = place + rng.below(n - place);
        all.swap(place, other);
    }
    all.truncate(count);
    all
}

/// A list in random order.
pub(super) fn shuffle<T>(rng: &mut SplitMix64, list: &mut [T]) {
    for place in 1..list.len() {
        list.swap(place, rng.below(place + 1));
    }
}

/// Words joined to sentences, which end at `.`, `!` or `?`, quotes and brackets behind it included.
fn sentences(words: &[&str]) -> Vec<String> {
    let mut sentences: Vec<String> = Vec::new();
    let mut open = false;
    for word in words {
        match sentences.last_mut().filter(|_| open) {
            Some(sentence) => {
                sentence.push(' ');
                sentence.push_str(word);
            }
            None => sentences.push((*word).to_string()),
        }
        open = !word.trim_end_matches(['"', '\'', ')', ']']).ends_with(['.', '!', '?']);
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_stand_between_sentences_at_their_depths() {
        let words: Vec<&str> = "One two. \"Three four!\" Five. Six".split(' ').collect();
        assert_eq!(sentences(&words), ["One two.", "\"Three four!\"", "Five.", "Six"]);
        let sources = TaskSources { essay: Some("Aa bb. Cc dd.".into()), ..Default::default() };
        let needles = ["N1.".to_string(), "N2.".to_string()];
        let mut rng = SplitMix64::new(4);
        let (text, depths) = in_essay(&sources, 400, &needles, &mut rng);
        assert_eq!(text.matches("Aa bb. ").count() + text.matches("Cc dd.").count(), 200);
        let place = |needle| text.find(needle).unwrap() as f64 / text.len() as f64;
        assert!((place("N1.") - depths[0]).abs() < 0.01, "{depths:?}");
        assert!((place("N2.") - depths[1]).abs() < 0.01 && depths[0] < depths[1], "{depths:?}");
        let lines = vec!["-".to_string(); 100];
        let (text, depths) = among_lines(lines, &needles, &mut rng);
        let place = |needle| text.lines().position(|l| l == needle).unwrap() as f64 / 102.0;
        assert!((place("N1.") - depths[0]).abs() < 0.02 && (place("N2.") - depths[1]).abs() < 0.02);
    }

    #[test]
    fn distinct_numbers_are_distinct() {
        let mut rng = SplitMix64::new(1);
        let mut all = distinct(&mut rng, 9, 9);
        all.sort_unstable();
        assert_eq!(all, (0..9).collect::<Vec<_>>());
        let mut list = [1, 2, 3, 4, 5];
        shuffle(&mut rng, &mut list);
        list.sort_unstable();
        assert_eq!(list, [1, 2, 3, 4, 5]);
    }
}
