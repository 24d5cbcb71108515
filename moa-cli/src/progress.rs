use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moa_models::Stage;

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
    pub(crate) fn step(&self) {
        self.0.inc(1);
    }

    /// `done` steps of `total` are done.
    pub(crate) fn set(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }
}

/// What a long job of the library tells: the bar begins anew with each stage.
impl moa_models::Progress for Progress {
    fn update(&mut self, stage: Stage, done: usize, total: usize) -> ControlFlow<()> {
        if self.0.prefix() != stage.name() {
            self.0.reset();
            self.0.set_prefix(stage.name());
        }
        self.set(done, total);
        ControlFlow::Continue(())
    }

    fn remark(&mut self, text: &str) {
        self.0.set_message(text.to_string());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
