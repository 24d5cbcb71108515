//! Questions with known answers: what a plan leaves of a model's memory of its context.

pub(crate) mod agreement;
pub(crate) mod bench;
pub(crate) mod jsonl;
pub(crate) mod longbench;
pub mod metrics;
pub(crate) mod perplexity;
pub(crate) mod retrieval;
pub(crate) mod tasks;

mod ask;
mod ask_evicting;
mod held_out;
mod item_log;
mod peak;
mod question;
mod report;

pub use ask::{Evaluation, SizedQuestion};
pub use held_out::HELD_OUT_TEXT;
pub use item_log::ItemLog;
pub use question::{Prompting, Question, Reference, Scoring, Turn};
pub use report::{
    Asked, DepthBin, EFFECTIVE_ACCURACY, EffectiveContext, RetrievalItem, RetrievalReport,
    effective_context,
};
