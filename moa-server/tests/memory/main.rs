//! Steps whose memory runs out: requests are told so, and the server goes on.

#[allow(dead_code, reason = "the other tests use all of it")]
#[path = "../server/client.rs"]
mod client;
#[path = "../../../moa-models/tests/faults/failing.rs"]
mod failing;

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use moa_core::{ElasticRule, Plan};
use moa_models::{Checkpoint, Cpu};
use moa_server::{Server, ServerOptions};
use serde_json::json;

use client::Client;
use failing::Failing;

/// Least size that there is nothing of.
static LEAST: AtomicUsize = AtomicUsize::new(usize::MAX);
static FAILED: AtomicU64 = AtomicU64::new(0);

/// There are no large pieces while it is told so.
fn fails(size: usize) -> bool {
    let fails = size >= LEAST.load(Relaxed);
    FAILED.fetch_add(u64::from(fails), Relaxed);
    fails
}

#[global_allocator]
static ALLOCATOR: Failing = Failing(fails);

/// Smaller than what the activations of a long prompt take, and larger than what a short one and its text take.
const LARGE: usize = 1 << 20;

#[test]
fn a_step_without_memory_is_503_and_the_server_goes_on() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
    let checkpoint = Checkpoint::open(Cpu::default(), folder).unwrap();
    let plan = Plan::uniform(checkpoint.model.shape(), 8, ElasticRule::fixed(48)).unwrap();
    let mut options = ServerOptions { prefill_chunk: 4096, ..ServerOptions::default() };
    options.address.set_port(0);
    let server = Server::bind(checkpoint, plan, options).unwrap();
    let (client, stop) = (Client(server.address()), server.shutdown_handle());
    let thread = std::thread::spawn(move || server.run());

    let long = json!({ "prompt": vec![300; 4000], "max_tokens": 2, "temperature": 0 });
    let short = json!({ "prompt": "The sea", "max_tokens": 8, "temperature": 0 });
    let before = client.ask("/v1/completions", &short)["choices"].clone();
    LEAST.store(LARGE, Relaxed);
    // Far more often than a device may fail.
    let answers: Vec<_> = (0..20).map(|_| client.post("/v1/completions", &long)).collect();
    let between = client.ask("/v1/completions", &short)["choices"].clone();
    LEAST.store(usize::MAX, Relaxed);
    assert!(FAILED.load(Relaxed) >= 20);
    for answer in answers {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
        let error = &answer.json()["error"];
        assert!(
            error["message"].as_str().unwrap().contains("a step of the batch failed"),
            "{error}"
        );
    }
    assert_eq!(between, before);
    let told = client.ask("/v1/completions", &long);
    assert_eq!(told["usage"]["completion_tokens"], 2);
    assert_eq!(client.metric("moa_kv_bytes"), 0.0);
    stop.shutdown();
    thread.join().unwrap().unwrap();
}
