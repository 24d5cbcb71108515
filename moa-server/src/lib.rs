//! An HTTP server in the shape of OpenAI's API, whose KV caches are as small as a
//! [plan](moa_core::Plan) allows.
//!
//! ```no_run
//! use moa_core::Plan;
//! use moa_models::{Checkpoint, Cpu};
//! use moa_server::{Server, ServerOptions};
//!
//! let checkpoint = Checkpoint::open(Cpu::default(), "model")?;
//! let plan = Plan::load("plan.json")?;
//! let server = Server::bind(checkpoint, plan, ServerOptions::default())?;
//! println!("http://{}", server.address());
//! server.run()?;
//! # Ok::<(), moa_server::Error>(())
//! ```
//!
//! # How it works
//! One thread owns the model: the one that calls [`Server::run`]. It runs the loop of an
//! [`Engine`](moa_models::Engine), into which requests come and from which they go between steps.
//! Handlers of HTTP requests run on threads of their own, turn texts into tokens, and talk to the loop
//! over channels. A handler that goes away, because its client has, ends its request within one step.
//!
//! Where several devices share the model, each has such a thread: the first one serves, and those of the others [`follow`] it
//! step by step.
//!
//! A request is admitted when its keys and values fit [`ServerOptions::kv_memory`]: the plan says exactly
//! how many bytes they take at the request's length. Others wait in a queue of bounded length.

mod connections;
mod error;
mod grammar;
mod http;
mod metrics;
mod options;
mod server;
mod state;
mod worker;

pub use error::{Error, Result};
pub use options::ServerOptions;
pub use server::{Server, ShutdownHandle, follow};
