//! Calls of the system that fail, processes that end in the middle of one, and memory that runs out: what a run had done
//! stays, and the next run goes on from there.
//!
//! `MOA_FAULTS` is how many faults are tried (CONTRIBUTING.md), `MOA_FAULTS_SEED` which.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod calls;
mod compressing;
mod evaluating;
mod failing;
mod memory;
mod world;
