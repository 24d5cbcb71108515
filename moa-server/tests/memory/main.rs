//! Steps whose memory runs out: requests are told so, and the server goes on.

#[allow(dead_code, reason = "the other tests use all of it")]
#[path = "../server/client.rs"]
mod client;
#[path = "../../../moa-models/tests/faults/failing.rs"]
mod failing;

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use std::sync::{Mutex, PoisonError, mpsc};

use moa_core::{ElasticRule, Plan, Sharding};
use moa_models::{Checkpoint, Cpu, Shard, ThreadRank, on_ranks};
use moa_server::{Error, Server, ServerOptions, ShutdownHandle, follow};
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

/// Serves, and tells how.
type Told = mpsc::Sender<(Client, ShutdownHandle)>;

fn options() -> ServerOptions {
    let mut options = ServerOptions { prefill_chunk: 4096, ..ServerOptions::default() };
    options.address.set_port(0);
    options
}

fn serve(part: Checkpoint<Cpu>, plan: Plan, told: &Told) -> Result<(), Error> {
    let server = Server::bind(part, plan, options())?;
    let _ = told.send((Client(server.address()), server.shutdown_handle()));
    server.run()
}

#[test]
fn a_step_without_memory_is_503_and_the_server_goes_on() {
    a_step_without_memory_is_503(|plan, folder, told| {
        serve(Checkpoint::open(Cpu::default(), folder)?, plan, &told)
    });
}

#[test]
fn a_step_that_ranks_have_no_memory_for_is_503_and_the_server_goes_on() {
    a_step_without_memory_is_503(|plan, folder, told| {
        let sharding = Sharding::balanced(&plan, 512, 2)?;
        let work = |rank| {
            let shard = Shard::new(&sharding, rank)?;
            let part = Checkpoint::open_shard(Cpu::default(), folder, shard)?;
            match part.model.is_first() {
                true => serve(part, plan.clone(), &told),
                false => follow(part, plan.clone(), options()),
            }
        };
        on_ranks(ThreadRank::group(2)?, work).map(drop)
    });
}

fn a_step_without_memory_is_503(serve: fn(Plan, &Path, Told) -> Result<(), Error>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
    let shape = moa_core::ModelShape::from_config_json(
        &std::fs::read_to_string(folder.join("config.json")).unwrap(),
    );
    let plan = Plan::uniform(shape.unwrap(), 8, ElasticRule::fixed(48)).unwrap();
    let (told, address) = mpsc::channel();
    let thread = std::thread::spawn(move || serve(plan, &folder, told));
    let (client, stop) = address.recv().unwrap();
    let failed = FAILED.load(Relaxed);

    let long = json!({ "prompt": vec![300; 4000], "max_tokens": 2, "temperature": 0 });
    let short = json!({ "prompt": "The sea", "max_tokens": 8, "temperature": 0 });
    let before = client.ask("/v1/completions", &short)["choices"].clone();
    LEAST.store(LARGE, Relaxed);
    // Far more often than a device may fail.
    let answers: Vec<_> = (0..20).map(|_| client.post("/v1/completions", &long)).collect();
    let between = client.ask("/v1/completions", &short)["choices"].clone();
    LEAST.store(usize::MAX, Relaxed);
    assert!(FAILED.load(Relaxed) >= failed + 20);
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
