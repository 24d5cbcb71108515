//! Files and results of real models: configurations, tokenizers, templates, weights, logits.
//!
//! They are not part of the repository: `MOA_TEST_DATA` names the folder that has them, as `configs`,
//! `models`, `tokenizers`, `checkpoints` and `plans`. Without it trials are ignored.

mod folders;
#[allow(dead_code)]
#[path = "../loading/gguf/file.rs"]
mod gguf_file;
mod golden;
mod plans;
mod smollm2;
mod stories260k;
#[path = "../streamed/mod.rs"]
mod streamed;
mod tokenizers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use moa_conformance::{Stop, run};
use moa_core::{ElasticRule, HeadRule, ModelShape, Plan};

fn main() -> ExitCode {
    let trials = [
        folders::trials(),
        golden::trials(),
        plans::trials(),
        smollm2::trials(),
        stories260k::trials(),
        tokenizers::trials(),
    ];
    run(trials.into_iter().flatten())
}

/// A file or folder of the test data.
fn test_data(path: &str) -> Result<PathBuf, Stop> {
    match std::env::var_os("MOA_TEST_DATA") {
        Some(data) => Ok(Path::new(&data).join(path)),
        None => Err(Stop::ignored("MOA_TEST_DATA does not name the folder of real models")),
    }
}

/// The model that comes with the repository.
fn moa_tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}

/// Fixed spans of all heads: `odd` keys where layer + KV head is odd, else `even`.
fn alternating(shape: ModelShape, sink: usize, odd: usize, even: usize) -> Plan {
    let heads = (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |h| layer + h));
    let rules = heads
        .map(|place| HeadRule::from(ElasticRule::fixed(if place % 2 == 1 { odd } else { even })));
    Plan::new(shape, sink, sink + 1, rules.collect()).expect("one rule per head")
}
