//! Built-in calibration prompts: long records of keyed values and a question that needs one line
//! of them. Every answer depends on one far token group, which is what calibration needs (MoA,
//! section 4.3: general text teaches a plan nothing about long dependencies).

use std::collections::HashSet;

use crate::rng::SplitMix64;

/// First words of keys.
pub(crate) const FIRST: &[&str] = &[
    "absent", "alert", "amused", "ancient", "aquatic", "average", "bitter", "blue", "bored",
    "brave", "brief", "bright", "broad", "broken", "busy", "calm", "careful", "chilly", "clean",
    "clever", "cloudy", "cold", "cool", "crowded", "curious", "curly", "curved", "damp", "dark",
    "deep", "dizzy", "dusty", "eager", "early", "earthy", "easy", "elated", "elegant", "empty",
    "famous", "fancy", "fast", "fierce", "fluffy", "fresh", "funny", "gentle", "giant", "gifted",
    "glossy", "good", "green", "happy", "heavy", "helpful", "hollow", "huge", "hungry", "jolly",
    "juicy", "kind", "large", "lazy", "little", "lively", "lonely", "long", "loud", "lucky",
    "mighty", "misty", "modern", "muddy", "noisy", "open", "orange", "oval", "perfect", "plain",
    "proud", "purple", "quick", "quiet", "rainy", "rapid", "rare", "rich", "ripe", "round",
    "royal", "rustic", "salty", "shiny", "silent", "silky", "silly", "sleepy", "slow", "small",
    "smooth", "solid", "spicy", "square", "steady", "stormy", "strange", "strong",
];

/// Second words of keys.
pub(crate) const SECOND: &[&str] = &[
    "acorn", "airport", "album", "almond", "angel", "ankle", "apron", "arcade", "arch", "armchair",
    "army", "arrival", "arrow", "artist", "aunt", "autumn", "avenue", "award", "bacon", "badge",
    "badger", "bagel", "bakery", "balcony", "ball", "balloon", "bamboo", "bandana", "banjo",
    "bank", "banner", "barley", "barn", "barrel", "baseball", "basket", "bat", "bath", "beach",
    "bead", "beam", "bean", "bear", "beaver", "bed", "bee", "beetle", "bell", "belt", "bench",
    "berry", "bicycle", "bike", "birch", "bird", "biscuit", "blade", "blanket", "block", "blossom",
    "board", "boat", "bone", "bonfire", "book", "boot", "bottle", "boulder", "bow", "bowl", "box",
    "boy", "bracelet", "brake", "branch", "bread", "breeze", "brick", "bridge", "broom", "brother",
    "brush", "bubble", "bucket", "buffalo", "bulb", "bull", "bus", "bush", "butter", "button",
    "cabbage", "cabin", "cable", "cactus", "cake", "calendar", "calf", "camel", "camera", "can",
    "canal", "candle", "canoe", "cap", "captain", "car", "card", "carpet", "carrot", "cart",
    "castle", "cat", "cave", "ceiling", "cereal", "chain", "chair", "chalk", "cheese", "cherry",
    "chess", "chest", "chicken", "child", "chin", "church", "circle", "city", "clam", "class",
    "clay", "cliff", "clock", "cloth", "cloud", "clover", "coach", "coal", "coast", "coat",
    "coffee", "coin", "collar", "comb", "computer", "condor", "cook", "coral", "cord", "corn",
    "cotton", "couch", "cow", "crab", "cradle", "crane", "crayon", "cream", "creek", "crow",
    "crown", "cub", "cup", "curtain", "dagger", "daisy", "dance", "dawn", "deer", "desert", "desk",
    "diamond", "dinner", "dish", "dock", "doctor", "dog", "doll", "dollar", "dolphin", "donkey",
    "door", "dragon", "drawer", "dress", "drum", "duck", "eagle", "ear", "earth", "egg", "elbow",
    "elephant", "elevator", "engine", "envelope", "eye", "face", "farm", "farmer", "father",
    "feather", "fence", "ferry", "fiddle", "field", "finger", "fire", "fish", "flag", "flame",
    "flock", "floor", "flower", "flute", "fog", "foot", "forest", "fork", "fountain", "fox",
    "frame", "frog", "fruit", "fur", "game", "garage", "garden", "garlic", "gate", "ghost",
    "giraffe", "glacier", "glass", "globe", "glove", "goat", "gold", "goose", "grape", "grass",
    "guitar", "gym", "hair", "hall", "hammer", "hand", "harbor", "harp", "hat", "hawk", "heron",
    "hill", "hive", "hole", "honey", "hook", "horn", "horse", "hospital", "hotel", "hour", "house",
    "ice", "ink", "iron", "island", "ivory", "jackal", "jacket", "jaguar", "jam", "jar", "jeans",
    "jeep", "jewel", "judge", "juice", "jungle", "kangaroo", "kettle", "key", "king", "kitchen",
    "kite", "kitten", "knee", "knife", "lace", "ladder", "lake", "lantern", "lawn", "lawyer",
    "leaf", "leg", "lemon", "letter", "library", "light", "lily", "lion", "lip", "lizard", "lock",
    "log", "lunch", "lynx", "magnet", "mail", "mantle", "map", "marble", "market", "mask",
    "meadow", "meal", "melon", "metal", "milk", "mint", "mirror", "monkey", "moon", "moth",
    "mother", "motor", "mountain", "mouse", "mouth", "mud", "music", "nail", "napkin", "neck",
    "needle", "nest", "net", "night", "north", "nose", "note", "number", "nurse", "nut", "oak",
    "oasis", "ocean", "office", "oil", "onion", "orchard", "otter", "oven", "owl", "ox", "paddle",
    "page", "paint", "palm", "pan", "panda", "paper", "park", "parrot", "party", "path", "peach",
    "peanut", "pear", "pen", "pencil", "penguin", "pepper", "piano", "picture", "pie", "pig",
    "pillar", "pilot", "pin", "pine", "pipe", "pizza", "plane", "planet", "plant", "plate", "plow",
    "pocket", "poem", "pond", "pony", "pool", "potato", "prince", "purse", "queen", "quilt",
    "rabbit", "radio", "rain", "rat", "raven", "rice", "ridge", "ring", "river", "road", "robin",
    "rocket", "roof", "room", "rope", "rose", "saddle", "sailor", "salad", "salt", "sand",
    "school", "scissors", "sea", "seal", "seat", "seed", "shark", "sheep", "shelf", "shell",
    "ship", "shirt", "shoe", "shop", "shovel", "silver", "sister", "skate", "skirt", "sky",
    "slope", "snail", "snake", "snow", "soap", "sock", "sofa", "song", "soup", "spade", "sparrow",
    "spider", "spoon", "spring", "squirrel", "stable", "stair", "star", "station", "steam",
    "steel", "stem", "stick", "stone", "store", "storm", "stove", "straw", "street", "sugar",
    "suit", "summit", "sun", "swan", "sweater", "swing", "table", "tail", "tea", "teacher",
    "temple", "tent", "thistle", "thread", "throne", "ticket", "tie", "tiger", "toad", "toast",
    "toe", "tomato", "tongue", "tooth", "towel", "tower", "town", "toy", "track", "tractor",
    "train", "tray", "tree", "truck", "trumpet", "tulip", "tunnel", "turkey", "turtle", "umbrella",
    "uncle", "valley", "vase", "vessel", "violin", "volcano", "wagon", "wall", "wallet", "walnut",
    "warden", "wasp", "watch", "water", "wave", "wax", "whale", "wheat", "wheel", "whistle",
    "willow", "window", "wing", "winter", "wire", "wolf", "wood", "wool", "worm", "yard", "yarn",
    "zebra", "zephyr", "zipper",
];

/// A way of writing a record: introduction, line, question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phrasing {
    introduction: &'static str,
    /// `{key}` and `{value}` are replaced.
    line: &'static str,
    /// `{key}` is replaced.
    question: &'static str,
}

/// The built-in phrasings. Small models follow only those near to what they were trained on, so
/// calibration asks the dense model which of them it answers (see
/// [`Checkpoint::calibrate`](crate::Checkpoint::calibrate)).
pub const PHRASINGS: &[Phrasing] = &[
    Phrasing {
        introduction: "Here is a register with one entry per line. Every entry has a name and a numerical content. Read it carefully, a question about one of the entries follows.\n\n",
        line: "line {key}: REGISTER_CONTENT is <{value}>\n",
        question: "\nThat was the register. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.",
    },
    Phrasing {
        introduction: "Here is a list of storage lockers. Every locker has a name and a code. Read the list carefully, a question about one of the lockers follows.\n\n",
        line: "Locker {key} has the code {value}.\n",
        question: "\nThat was the whole list. What is the code of locker {key}? Answer with the number.",
    },
    Phrasing {
        introduction: "The following notes assign a number to each name.\n\n",
        line: "{key} = {value}\n",
        question: "\nWhich number do the notes assign to {key}? Answer with the number.",
    },
];

/// Of the keys that the words allow, about half: drawing distinct ones stays quick.
const MOST_ENTRIES: usize = 30_000;

/// A prompt whose answer is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPrompt {
    /// The user's message.
    pub text: String,
    /// The value that was asked for.
    pub answer: u32,
}

impl Phrasing {
    /// A phrasing of one's own: in `line`, `{key}` and `{value}` are replaced, in `question` `{key}`.
    pub const fn new(
        introduction: &'static str,
        line: &'static str,
        question: &'static str,
    ) -> Self {
        Self { introduction, line, question }
    }

    /// A record of `lines` lines (at most 4,000) and a question about one of them, drawn with `seed`.
    pub fn prompt(&self, lines: usize, seed: u64) -> RecordPrompt {
        let (mut rng, entries, text) = self.record(lines, seed);
        self.ask(&text, &entries[rng.below(entries.len())])
    }

    /// The record of [`prompt`](Self::prompt) with `questions` questions, one drawn from each of as
    /// many equal parts of it, in order.
    pub fn prompts(&self, lines: usize, seed: u64, questions: usize) -> Vec<RecordPrompt> {
        let (mut rng, entries, text) = self.record(lines, seed);
        let place = |part: usize| entries.len() * part / questions;
        (0..questions)
            .map(|part| place(part) + rng.below((place(part + 1) - place(part)).max(1)))
            .map(|line| self.ask(&text, &entries[line]))
            .collect()
    }

    fn record(&self, lines: usize, seed: u64) -> (SplitMix64, Vec<(String, u32)>, String) {
        let mut rng = SplitMix64::new(seed);
        let entries = entries(&mut rng, lines.clamp(1, 4000));
        let mut text = self.introduction.to_string();
        for (key, value) in &entries {
            text.push_str(&self.line.replace("{key}", key).replace("{value}", &value.to_string()));
        }
        (rng, entries, text)
    }

    fn ask(&self, record: &str, (key, answer): &(String, u32)) -> RecordPrompt {
        RecordPrompt {
            text: format!("{record}{}", self.question.replace("{key}", key)),
            answer: *answer,
        }
    }
}

/// Distinct keys with a value each, at most [`MOST_ENTRIES`]; fewer are the beginning of more.
pub(crate) fn entries(rng: &mut SplitMix64, count: usize) -> Vec<(String, u32)> {
    let count = count.min(MOST_ENTRIES);
    let mut used = HashSet::new();
    let mut entries = Vec::with_capacity(count);
    let mut second = SECOND.to_vec();
    while entries.len() < count {
        // Second words come round in random order, so that short records repeat none.
        let turn = entries.len() % second.len();
        let other = turn + rng.below(second.len() - turn);
        second.swap(turn, other);
        let key = format!("{}-{}", rng.pick(FIRST), second[turn]);
        if used.insert(key.clone()) {
            entries.push((key, 1 + rng.below(50_000) as u32));
        }
    }
    entries
}

/// A record line in LongEval's wording, with its line end.
pub(crate) fn record_line(key: &str, value: u32) -> String {
    format!("line {key}: REGISTER_CONTENT is <{value}>\n")
}

/// The question about a record line in LongEval's wording.
pub(crate) fn line_question(key: &str) -> String {
    format!("Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.")
}

/// The last integer in a text, which is how LongEval reads an answer.
pub(crate) fn last_integer(text: &str) -> Option<i64> {
    text.split(|c: char| !c.is_ascii_digit()).rfind(|run| !run.is_empty())?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_with_their_seed_and_hold_their_answer() {
        for phrasing in PHRASINGS {
            let prompt = phrasing.prompt(50, 7);
            assert_eq!(prompt, phrasing.prompt(50, 7));
            assert_ne!(prompt, phrasing.prompt(50, 8));
            assert!(prompt.text.contains(&prompt.answer.to_string()));

            let line = |prompt: &RecordPrompt| {
                let key = phrasing.question.replace("{key}", "|");
                let (before, after) = key.split_once('|').unwrap();
                let key = prompt.text.rsplit(before).next().unwrap().strip_suffix(after).unwrap();
                prompt.text.lines().position(|line| line.contains(key)).unwrap()
            };
            let places: Vec<_> = phrasing.prompts(50, 7, 5).iter().map(line).collect();
            let first = places[0] / 10 * 10;
            assert!(
                places.iter().zip(0..).all(|(p, part)| (p - first).abs_diff(10 * part + 5) < 9)
            );
            assert_eq!(phrasing.prompts(2, 7, 3).len(), 3);
        }
    }

    #[test]
    fn last_integer_is_the_last_run_of_digits() {
        assert_eq!(last_integer("line 3 is <4821>."), Some(4821));
        assert_eq!(last_integer("no number"), None);
        assert_eq!(last_integer("99999999999999999999999"), None);
    }
}
