//! The command as its users see it.

mod bad_input;
mod bench;
mod calibration;
mod common;
mod eval;
mod faults;
mod folders;
#[cfg(feature = "hub")]
mod hub;
mod pipeline;
mod progress;
mod quantize;
mod report;
#[cfg(feature = "serve")]
mod serve;
mod spaces;
