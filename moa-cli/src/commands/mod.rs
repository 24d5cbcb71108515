//! One file per subcommand: its flags, and what it does with them.

pub(crate) mod bench;
pub(crate) mod compress;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod plan;
pub(crate) mod profile;
pub(crate) mod quantize;
pub(crate) mod quickstart;
pub(crate) mod report;
pub(crate) mod search;
#[cfg(feature = "serve")]
pub(crate) mod serve;
pub(crate) mod validate;

mod chat;
mod plan_make;
