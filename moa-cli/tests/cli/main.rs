//! The command as its users see it.

mod bad_input;
mod common;
mod pipeline;
mod report;
mod spaces;
