use super::documents::Documents;
use crate::eval::HELD_OUT_TEXT;

/// What generated questions are made from, beside what is built in.
#[derive(Clone, Debug, Default)]
pub struct TaskSources {
    /// The text that needles are hidden in, as RULER hides them in essays; `None` for
    /// [`HELD_OUT_TEXT`]. One that is too short for a question is repeated.
    pub essay: Option<String>,
    /// Documents and questions of [`Task::Qa1`](super::Task::Qa1), which RULER takes from SQuAD.
    pub squad: Option<Documents>,
    /// Documents and questions of [`Task::Qa2`](super::Task::Qa2), which RULER takes from HotpotQA.
    pub hotpotqa: Option<Documents>,
}

impl TaskSources {
    pub(super) fn essay(&self) -> &str {
        self.essay.as_deref().unwrap_or(HELD_OUT_TEXT)
    }
}
