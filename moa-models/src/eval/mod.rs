//! Questions with known answers: what a plan leaves of a model's memory of its context.

mod ask;
mod item_log;
mod question;
mod report;

pub use item_log::ItemLog;
pub use question::{Question, Reference, Scoring, Turn};
pub use report::{
    Asked, DepthBin, EFFECTIVE_ACCURACY, EffectiveContext, RetrievalItem, RetrievalReport,
    effective_context,
};
