//! The command as its users see it.

mod bad_input;
mod bench;
mod common;
mod eval;
mod faults;
mod folders;
#[cfg(feature = "hub")]
mod hub;
mod pipeline;
mod quantize;
mod progress;
mod report;
mod spaces;
