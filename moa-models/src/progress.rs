//! What long jobs (calibration, profiling, search, refinement, evaluation) tell their caller.

use std::fmt;
use std::ops::ControlFlow;

use crate::{Error, Result};

/// A part of a long job.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// A file of a model is downloaded, in MiB.
    Download,
    /// Weights are rounded to blocks, in tensors.
    Quantize,
    /// The dense model answers calibration prompts.
    Calibrate,
    /// The influence of keys on the answers is measured.
    Profile,
    /// Plans are searched in a profile.
    Search,
    /// Losses of plans are measured.
    Measure,
    /// The model answers questions, or predicts a text.
    Evaluate,
}

impl Stage {
    /// The stage in one word, as a progress bar shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::Quantize => "quantize",
            Self::Calibrate => "calibrate",
            Self::Profile => "profile",
            Self::Search => "search",
            Self::Measure => "measure",
            Self::Evaluate => "evaluate",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A listener of a long job, which may also cancel it.
///
/// A closure `FnMut(Stage, usize, usize) -> ControlFlow<()>` is one, and `()` is one that does not
/// care.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use moa_models::{Error, Progress, Stage};
///
/// let mut last = 0;
/// let mut listener = |_stage: Stage, done: usize, _total: usize| {
///     last = done;
///     if done < 2 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
/// };
/// listener.advance(Stage::Measure, 1, 9)?;
/// assert!(matches!(listener.advance(Stage::Measure, 2, 9), Err(Error::Cancelled)));
/// assert_eq!(last, 2);
/// # Ok::<(), Error>(())
/// ```
pub trait Progress {
    /// `done` of `total` steps of `stage` are done. [`ControlFlow::Break`] cancels the job.
    fn update(&mut self, stage: Stage, done: usize, total: usize) -> ControlFlow<()>;

    /// A job says what it has found so far, such as `12.5000 right`. Listeners need not care.
    fn remark(&mut self, _text: &str) {}

    /// [`update`](Self::update) as a job calls it, which ends with `?` where it is cancelled.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the listener breaks off.
    fn advance(&mut self, stage: Stage, done: usize, total: usize) -> Result<()> {
        match self.update(stage, done, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

impl<F: FnMut(Stage, usize, usize) -> ControlFlow<()>> Progress for F {
    fn update(&mut self, stage: Stage, done: usize, total: usize) -> ControlFlow<()> {
        self(stage, done, total)
    }
}

impl Progress for () {
    fn update(&mut self, _: Stage, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
