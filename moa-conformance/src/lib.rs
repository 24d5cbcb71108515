//! Every law that a backend of mixture-of-spans attention keeps, as named trials.
//!
//! [`SparseAttentionBackend`] promises that the output of attention does not depend on how a sequence
//! was cut into chunks, on what else is in the batch, or on spare capacity, and that a failed call
//! changes nothing. The suite checks these laws on random sequences against a naive reference in f64,
//! and beside them ten traps that other implementations fell into, softcaps and learned sinks, what attention values influence,
//! and what is to be refused. It is the same for every backend, inside and outside of this repository.
//!
//! # A backend's tests
//! A test target of its own, with `harness = false` in `Cargo.toml`:
//!
//! ```toml
//! [[test]]
//! name = "conformance"
//! harness = false
//! ```
//!
//! In it, a [`Subject`] says how numbers come into the backend and out of it, [`suite`] makes the trials of
//! what `open` opens, and [`run`] is `main`:
//!
//! ```no_run
//! # use moa_conformance::{Stop, Subject, run, suite};
//! # fn main_of<S: Subject>(
//! #     open: impl Fn() -> Result<S, Stop> + Clone + Send + 'static,
//! # ) -> std::process::ExitCode {
//! run(suite("own", open))
//! # }
//! ```
//!
//! `cargo test` runs them like other tests: with filters, `--list`, `--test-threads`. The folder
//! `examples/own_backend` of the repository is a whole such package.
//!
//! [`block_products`] are the trials of linear layers whose weights lie in quantised blocks.
//!
//! # What cannot be shown
//! A trial without its GPU, or of an operation that the backend does not offer, shows nothing. It
//! does not pass then but is *ignored*, with a reason ([`Stop::ignored`]); [`run`] counts the reasons
//! at the end. [`trials!`] makes trials of a backend's other tests, so that they can do the same.
//!
//! [`SparseAttentionBackend`]: moa_core::SparseAttentionBackend

mod backward;
mod blocks;
mod cases;
mod errors;
mod feedback;
mod influence;
mod laws;
mod numbers;
mod run;
mod scores;
mod subject;
mod suite;
mod traps;
mod trial;
mod world;

pub use backward::backward;
pub use blocks::{BlockProducts, block_products, random_blocks};
pub use numbers::{close, distance, error, f64s, normal};
pub use run::run;
pub use subject::{Cache, Error, Subject};
pub use suite::{part, suite};
pub use trial::{IntoVerdict, Stop, Trial, Verdict};
pub use world::{Entry, Output, Poison, Poisoned, World, batch, extend};
