//! The server over real sockets, on the model that comes with the repository.

mod api;
mod bodies;
mod client;
mod limits;
mod prefix;
mod ranks;
mod responses;
mod scripted;
mod tools;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread::JoinHandle;

use moa_core::{ElasticRule, HeadRule, Plan};
use moa_models::{Checkpoint, Cpu, Dtype};
use moa_server::{Server, ServerOptions, ShutdownHandle};

use client::Client;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}

fn checkpoint() -> Checkpoint<Cpu> {
    static TINY: LazyLock<Checkpoint<Cpu>> =
        LazyLock::new(|| Checkpoint::open(Cpu::new(Dtype::F32), folder()).expect("moa-tiny"));
    TINY.clone()
}

/// Spans of 24 and 48 keys, whose rings wrap in any longer text.
fn narrow() -> Plan {
    let shape = checkpoint().model.shape();
    let rules = (0..shape.layers * shape.kv_heads)
        .map(|head| HeadRule::from(ElasticRule::fixed(if head % 2 == 1 { 24 } else { 48 })));
    Plan::new(shape, 8, 9, rules.collect()).expect("one rule per head")
}

/// A server on a thread of its own, which ends with this.
struct Running {
    client: Client,
    stop: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn new(options: ServerOptions) -> Self {
        Self::with_plan(narrow(), options)
    }

    fn with_plan(plan: Plan, options: ServerOptions) -> Self {
        Self::of(checkpoint(), plan, options)
    }

    fn of(checkpoint: Checkpoint<Cpu>, plan: Plan, mut options: ServerOptions) -> Self {
        options.address.set_port(0);
        let server = Server::bind(checkpoint, plan, options).expect("a free port");
        let (client, stop) = (Client(server.address()), server.shutdown_handle());
        let thread = std::thread::spawn(move || server.run().expect("a run"));
        Self { client, stop, thread: Some(thread) }
    }

    /// Stops the server, and waits for it.
    fn end(&mut self) {
        self.stop.shutdown();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server's thread");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// One server for all tests that need no limits of their own.
fn shared() -> Client {
    static SHARED: LazyLock<Running> = LazyLock::new(|| Running::new(ServerOptions::default()));
    SHARED.client
}
