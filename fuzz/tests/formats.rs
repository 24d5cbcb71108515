//! A target for every file that comes from outside: seeds of `corpus/`, changed at random, must be read or refused
//! with an error, within 5 seconds, without a panic.
//!
//! Each runs for a second under `cargo test`. `BOLERO_RANDOM_TEST_TIME_MS` and `BOLERO_RANDOM_ITERATIONS` ask for more.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bolero::check;
use moa_core::{HeadScores, ModelShape, Plan, Profile};
use moa_models::{
    CalibrationPrompt, ChatTemplate, GenerationConfig, Gguf, ItemLog, Message, ModelConfig,
    RetrievalItem, Tokenizer, Weights,
};
use serde_json::json;

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };
const LIMIT: Duration = Duration::from_secs(5);
/// Limit of waiting, on a machine that other programs keep busy.
const LIMIT_OF_WAITING: Duration = Duration::from_secs(60);

/// What a reader takes of a thread: its own time where the system tells, and the clock's.
struct Timer(Instant, Option<Duration>);

impl Timer {
    fn start() -> Self {
        Self(Instant::now(), Self::own())
    }

    /// The time that this thread has run.
    fn own() -> Option<Duration> {
        let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
    }

    fn check(self, bytes: usize) {
        let waited = self.0.elapsed();
        let own = self.1.zip(Self::own()).map_or(waited, |(from, to)| to - from);
        assert!(own < LIMIT && waited < LIMIT_OF_WAITING, "{own:?}, {waited:?} for {bytes} bytes");
    }
}

/// Changes of a seed: which, where, what.
type Edit = (u8, u16, u8);

/// Numbers and texts that readers stumble over.
const TOKENS: [&str; 24] = [
    "0",
    "-1",
    "1e999",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "[[[[[[[[",
    "{\"a\":",
    "\u{feff}",
    "\u{0}",
    "1e-320",
    "{{",
    "%}",
    " not ",
    "|",
    "-",
    "2147483649",
    "🦀",
];

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn changed(seed: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for &(kind, place, value) in edits {
        let at = if bytes.is_empty() { 0 } else { usize::from(place) % bytes.len() };
        let token = TOKENS[usize::from(value) % TOKENS.len()].as_bytes();
        match kind % 8 {
            0 if at < bytes.len() => bytes[at] = value,
            1 if at < bytes.len() => bytes[at] ^= 1 << (value % 8),
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(at..at, token.iter().copied())),
            4 => {
                let end = bytes.len().min(at + usize::from(value) % 24);
                drop(bytes.splice(at..end, token.iter().copied()));
            }
            5 => {
                let end = bytes.len().min(at + usize::from(value));
                let part = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, part));
            }
            6 => {
                let end = bytes.len().min(at + usize::from(value) % 40);
                bytes.drain(at..end);
            }
            // Eight bytes of a binary number.
            _ if at + 8 <= bytes.len() => {
                let number = [u64::MAX, 1 << 62, 1 << 40, 1 << 31, 0][usize::from(value) % 5];
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            _ => {}
        }
    }
    bytes
}

fn fuzz(target: &str, read: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let seeds = seeds(target);
    // The seeds themselves are good files.
    seeds.iter().for_each(|seed| read(seed));
    check!().with_type::<(u8, Vec<Edit>)>().for_each(|(seed, edits)| {
        let bytes = changed(&seeds[usize::from(*seed) % seeds.len()], edits);
        let timer = Timer::start();
        read(&bytes);
        timer.check(bytes.len());
    });
}

/// A file of this thread.
fn file(bytes: &[u8], name: &str, read: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    read(&path);
}

#[test]
fn plan() {
    fuzz("plan", |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        for plan in [Plan::from_json(text), Plan::from_published_json(text, SHAPE, 4, 16)]
            .into_iter()
            .flatten()
        {
            // What is read can be used and written.
            for length in [1, 100, moa_core::MAX_LENGTH] {
                assert!(plan.density(length) <= 1.0);
                plan.kv_bytes(length, 64);
            }
            let again = Plan::from_json(&plan.to_file_json().unwrap()).unwrap();
            assert_eq!((again.shape(), again.sink()), (plan.shape(), plan.sink()));
            assert_eq!(again.rules(), plan.rules());
            assert_eq!(again.cache_types(), plan.cache_types());
        }
    });
}

#[test]
fn profile() {
    fuzz("profile", |bytes| {
        let Ok(profile) = Profile::from_bytes(bytes) else { return };
        for length in profile.lengths() {
            let span = moa_core::Span::new(2, 8).unwrap();
            assert!(!profile.at(length).unwrap().loss(0, 0, span).is_nan());
        }
        assert_eq!(Profile::from_bytes(&profile.to_bytes().unwrap()).unwrap(), profile);
    });
}

#[test]
fn items() {
    fuzz("items", |bytes| {
        file(bytes, "items.jsonl", |path| {
            for settings in [json!({ "plan": "aa", "seed": 0 }), json!({ "plan": "dense" })] {
                let before = fs::read(path).unwrap();
                match ItemLog::<(usize, f64)>::open(path, &settings) {
                    Ok((mut log, items)) => {
                        log.push(&(7, 0.5)).unwrap();
                        drop(log);
                        let again = ItemLog::<(usize, f64)>::open(path, &settings).unwrap().1;
                        assert_eq!(
                            (again.len(), &again[..items.len()]),
                            (items.len() + 1, &items[..])
                        );
                    }
                    Err(_) => assert_eq!(fs::read(path).unwrap(), before),
                }
            }
            let _ = ItemLog::<RetrievalItem>::open(path, &json!({ "plan": "aa", "seed": 0 }));
        });
    });
}

#[test]
fn safetensors() {
    fuzz("safetensors", |bytes| {
        file(bytes, "model.safetensors", |path| drop(Weights::open(path.parent().unwrap())));
    });
}

#[test]
fn gguf() {
    fuzz("gguf", |bytes| {
        file(bytes, "model.gguf", |path| {
            let Ok(gguf) = Gguf::open(path) else { return };
            let _ = gguf.tokenizer();
            let _ = ModelConfig::from_file(path);
        });
    });
}

#[test]
fn config() {
    fuzz("config", |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        let Ok(config) = ModelConfig::from_json(text) else { return };
        config.validate().unwrap();
        assert!(config.context_length() <= moa_core::MAX_LENGTH && config.parameters() > 0);
        Plan::full(config.shape()).unwrap();
    });
}

#[test]
fn tokenizer() {
    fuzz("tokenizer", |bytes| {
        file(bytes, "tokenizer.json", use_tokenizer);
    });
}

#[test]
fn tokenizer_model() {
    fuzz("tokenizer_model", |bytes| file(bytes, "tokenizer.model", use_tokenizer));
}

fn use_tokenizer(path: &Path) {
    let Ok(tokenizer) = Tokenizer::from_dir(path.parent().unwrap()) else { return };
    let Ok(ids) = tokenizer.encode("Hello abab, xyz 12 🦀", true) else { return };
    let _ = tokenizer.decode(&ids, false);
    let _ = tokenizer.decode(&[0, 5, u32::MAX], true);
    let _ = tokenizer.check_vocab_size(64);
}

#[test]
fn generation() {
    fuzz("generation", |bytes| {
        file(bytes, "generation_config.json", |path| {
            let Ok(config) = GenerationConfig::from_dir(path.parent().unwrap()) else { return };
            let _ = config.sampling(1);
        });
    });
}

#[test]
fn template() {
    let messages = [Message::system("Be."), Message::user("Hi, <s>!"), Message::assistant("Ho.")];
    fuzz("template", |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        let _ = ChatTemplate::new(text, "<s>", "</s>").render(&messages, true);
    });
}

/// Sequences that were saved, whose checksum fits.
#[test]
fn saved_sequence() {
    static MODEL: std::sync::LazyLock<moa_models::Checkpoint<moa_models::Cpu>> =
        std::sync::LazyLock::new(|| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
            moa_models::Checkpoint::open(moa_models::Cpu::default(), folder).unwrap()
        });
    let model = || &MODEL.model;
    let plan = || Plan::uniform(model().shape(), 4, moa_core::ElasticRule::fixed(24)).unwrap();
    let mut sequence = model().open(&plan(), 40, 2).unwrap();
    model().prefill(&mut sequence, &[5; 30], 64).unwrap();
    let seed = model().save_sequence(&sequence, &[5; 30]).unwrap();
    // Magic, version and the size of the header are before it, a checksum is last.
    let size = u64::from_le_bytes(seed[12..20].try_into().unwrap()) as usize;
    let (before, header) = (&seed[..12], &seed[20..20 + size]);
    let data = &seed[20 + size..seed.len() - 16];
    let read = |header: &[u8], data: &[u8]| {
        let size = (header.len() as u64).to_le_bytes();
        let mut bytes = [before, &size[..], header, data].concat();
        let checksum = moa_models::fingerprint(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        let (mut again, tokens) = model().restore_sequence(&plan(), &bytes)?;
        assert_eq!(again.len(), tokens.len());
        if again.len() < again.capacity() {
            model().prefill(&mut again, &[6], 64).unwrap();
        }
        Ok::<(), moa_models::Error>(())
    };
    read(header, data).unwrap();
    check!().with_type::<(Vec<Edit>, Vec<Edit>)>().for_each(|(of_header, of_data)| {
        let timer = Timer::start();
        let _ = read(&changed(header, of_header), &changed(data, &of_data[..of_data.len() / 2]));
        timer.check(header.len() + data.len());
    });
}

#[test]
fn prompts() {
    fuzz("prompts", |bytes| {
        file(bytes, "prompts.jsonl", |path| drop(CalibrationPrompt::load(path)));
    });
}

#[test]
fn scores() {
    fuzz("scores", |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        let Ok(scores) = HeadScores::from_text(text, SHAPE) else { return };
        scores.plan(4, 16, moa_core::FullHeads::Threshold(0.5)).unwrap();
    });
}
