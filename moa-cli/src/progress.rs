use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moa_models::{Next, Stage};

use crate::output::Context;

/// A progress bar on stderr; nothing where stderr is no terminal, or with `--json` or `--quiet`.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar of `total` steps.
    pub(crate) fn new(context: &Context, label: &str, total: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden());
        if !context.json && !context.quiet && std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let template = "{prefix:10} {bar:30} {pos}/{len} {elapsed} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_string());
        Self(bar)
    }

    /// One step is done.
    pub(crate) fn step(&self) -> Next {
        self.0.inc(1);
        Next::Continue
    }

    /// `done` steps of `total` are done.
    pub(crate) fn set(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }

    /// A remark behind the bar.
    pub(crate) fn message(&self, text: String) {
        self.0.set_message(text);
    }

    /// A step of [`moa_models::compress`].
    pub(crate) fn stage(&self, stage: Stage, done: usize, total: usize) -> Next {
        let label = stage.name();
        if self.0.prefix() != label {
            self.0.reset();
            self.0.set_prefix(label);
        }
        self.set(done, total);
        Next::Continue
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
