//! Whole models on CUDA against the same models on the CPU: logits, laws, greedy text, retrieval.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_GPU=1` they fail then. Golden logits of an
//! independent implementation are read from the folder that `MOA_TEST_DATA` names.

mod blocks;
mod errors;
mod families;
#[allow(dead_code, reason = "the other tests of files use all of it")]
#[path = "../loading/gguf/file.rs"]
mod file;
mod fp8;
mod laws;
mod logits;
mod narrow;
mod profile;
mod ranks;
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;

use moa_conformance::{Stop, run};
use moa_core::{ElasticRule, HeadRule, ModelShape, Plan};
use moa_models::{Checkpoint, Cpu, Cuda, Decoder, Dtype, LogitRows, Math, Sequence};

fn main() -> ExitCode {
    let trials = [
        blocks::trials(),
        errors::trials(),
        families::trials(),
        fp8::trials(),
        laws::trials(),
        logits::trials(),
        narrow::trials(),
        profile::trials(),
        ranks::trials(),
        text::trials(),
    ];
    run(trials.into_iter().flatten())
}

/// moa-tiny, from wherever the test runs: it may have been built on another machine.
fn moa_tiny() -> PathBuf {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let places = [built, "assets/moa-tiny", "../assets/moa-tiny"].map(Path::new);
    let found = places.iter().find(|place| place.join("config.json").is_file());
    found.unwrap_or_else(|| panic!("none of {places:?} is moa-tiny")).to_path_buf()
}

fn cpu() -> &'static Checkpoint<Cpu> {
    static TINY: LazyLock<Checkpoint<Cpu>> =
        LazyLock::new(|| Checkpoint::open(Cpu::default(), moa_tiny()).expect("moa-tiny"));
    &TINY
}

/// The first device. Trials without it are ignored; with `MOA_REQUIRE_GPU=1` they fail.
fn open(dtype: Dtype) -> Result<Cuda, Stop> {
    Cuda::new(0, dtype).map_err(|error| {
        Stop::unless_required("MOA_REQUIRE_GPU", format_args!("no CUDA device ({error})"))
    })
}

/// Models on the GPU, with how far their logits may be from the CPU's: a share of their spread.
type Models = Result<Vec<(Checkpoint<Cuda>, f64)>, Stop>;

/// moa-tiny in each element type, on operations that `change` has changed.
fn load(change: impl Fn(Cuda) -> Cuda) -> Models {
    let load = |(dtype, share)| Ok((Checkpoint::open(change(open(dtype)?), moa_tiny())?, share));
    [(Dtype::F16, 0.01), (Dtype::Bf16, 0.06)].into_iter().map(load).collect()
}

fn loaded(models: &'static Models) -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    let models = models.as_ref().map_err(Stop::clone)?;
    Ok(models.iter().map(|(checkpoint, share)| (checkpoint, *share)).collect())
}

/// moa-tiny on the GPU.
fn cuda() -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    static TINY: LazyLock<Models> = LazyLock::new(|| load(|ops| ops));
    loaded(&TINY)
}

/// `len` tokens of English text.
fn prose(len: usize) -> Vec<u32> {
    const TEXT: &str = "The keeper of the lighthouse wrote down the weather every evening, and \
        every morning he read what he had written and found that he did not remember any of it. ";
    let tokenizer = &cpu().tokenizer;
    let mut ids = tokenizer.encode(TEXT, true).expect("plain text");
    while ids.len() < len {
        // Numbered, so that no stretch of the text repeats exactly.
        let more = format!("Evening {}. {TEXT}", ids.len());
        ids.extend(tokenizer.encode(&more, false).expect("plain text"));
    }
    ids.truncate(len);
    ids
}

/// Fixed spans of all heads: `odd` keys where layer + KV head is odd, else `even`.
fn alternating(shape: ModelShape, sink: usize, odd: usize, even: usize) -> Plan {
    let heads = (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |h| layer + h));
    let rules = heads
        .map(|place| HeadRule::from(ElasticRule::fixed(if place % 2 == 1 { odd } else { even })));
    Plan::new(shape, sink, sink + 1, rules.collect()).expect("one rule per head")
}

/// Dense, and spans that prompts of a hundred tokens wrap.
fn plans(shape: ModelShape) -> [Plan; 2] {
    [Plan::full(shape).expect("a valid shape"), alternating(shape, 8, 24, 48)]
}

/// One step; the logits of all its tokens.
fn step<D: Math>(model: &Decoder<D>, sequence: &mut Sequence<D>, tokens: &[u32]) -> Vec<Vec<f32>> {
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = model.forward(&mut [sequence], &[tokens], LogitRows::Rows(&rows)).unwrap();
    let values = model.device().values(logits).unwrap();
    values.chunks(model.config().vocab_size).map(<[f32]>::to_vec).collect()
}

/// Reads `tokens` in chunks; the logits of the last.
fn read<D: Math>(
    model: &Decoder<D>,
    sequence: &mut Sequence<D>,
    tokens: &[u32],
    chunk: usize,
) -> Vec<f32> {
    model.prefill(sequence, tokens, chunk).unwrap()
}

/// Largest difference as a share of the spread (standard deviation) of `expected`.
fn difference(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let spread = expected.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let worst = got.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    // Not a maximum that forgets what is not a number.
    let worst = worst.fold(0.0, |most, x| if x <= most { most } else { x });
    worst / spread.sqrt()
}

#[track_caller]
fn close(what: &str, got: &[f32], expected: &[f32], share: f64) {
    let difference = difference(got, expected);
    println!("{what}: {difference:.5} of the spread, {share} allowed");
    assert!(difference <= share, "{what}: {difference} of the spread, more than {share}");
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = |best: usize, (i, z): (usize, &f32)| if *z > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, best) as u32
}
