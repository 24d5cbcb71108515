use std::cell::Cell;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use moa_models::Stage;
use serde::Serialize;

use crate::interrupt;
use crate::output::{Context, table};
use crate::terminal::to_stderr;

/// How far a job is, on stderr: a bar at a terminal, and elsewhere a line as each stage begins and every half a
/// minute; nothing with `--quiet`.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: Option<Lines>,
    /// Whether the name is that of the stage which the library tells.
    follows_stages: bool,
    /// How long the stages took that the library told and that have ended.
    ended: Vec<(&'static str, Duration)>,
    /// The stage that runs, and its beginning.
    running: Option<(&'static str, Instant)>,
}

/// How long a stage of a job took.
#[derive(Debug, Serialize)]
pub(crate) struct StageSeconds {
    stage: &'static str,
    seconds: f64,
}

impl StageSeconds {
    pub(crate) fn table(stages: &[Self]) -> String {
        let row = |own: &Self| vec![own.stage.to_string(), format!("{:.1}", own.seconds)];
        table(&["stage", "seconds"], &stages.iter().map(row).collect::<Vec<_>>())
    }
}

impl Progress {
    /// A job of `total` steps that has one stage.
    pub(crate) fn new(context: &Context, label: &str, total: usize) -> Self {
        let progress = Self::begin(context, false);
        progress.bar.set_prefix(label.to_string());
        progress.set(0, total);
        progress
    }

    /// A job whose stages and steps the library tells.
    pub(crate) fn of_stages(context: &Context) -> Self {
        Self::begin(context, true)
    }

    fn begin(context: &Context, follows_stages: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let is_terminal = std::io::stderr().is_terminal();
        if !context.json && !context.quiet && is_terminal {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let template = "{prefix:10} {bar:30} {pos}/{len} {elapsed} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let lines = (!context.quiet && !is_terminal).then(Lines::default);
        Self { bar, lines, follows_stages, ended: Vec::new(), running: None }
    }

    /// How long each stage took so far, in the order in which they first began; what a stage took that came several
    /// times is added.
    pub(crate) fn seconds(&self) -> Vec<StageSeconds> {
        let running = self.running.map(|(stage, begin)| (stage, begin.elapsed()));
        let mut sums: Vec<StageSeconds> = Vec::new();
        for (stage, time) in self.ended.iter().copied().chain(running) {
            let seconds = time.as_secs_f64();
            match sums.iter_mut().find(|sum| sum.stage == stage) {
                Some(sum) => sum.seconds += seconds,
                None => sums.push(StageSeconds { stage, seconds }),
            }
        }
        sums
    }

    /// One step is done.
    pub(crate) fn step(&self) {
        self.bar.inc(1);
        self.tell();
    }

    /// `done` steps of `total` are done.
    pub(crate) fn set(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.tell();
    }

    /// Writes a line if it is time for one.
    fn tell(&self) {
        let elapsed = self.bar.elapsed();
        if self.lines.as_ref().is_some_and(|lines| lines.is_due(elapsed)) {
            let (name, done) = (self.bar.prefix(), self.bar.position());
            let total = self.bar.length().unwrap_or(0);
            let remark = match self.bar.message() {
                text if text.is_empty() => text,
                text => format!(", {text}"),
            };
            to_stderr(format_args!(
                "{name}: {done}/{total}, {}{remark}",
                FormattedDuration(elapsed)
            ));
        }
    }
}

/// What a long job of the library tells: a bar that follows stages begins anew with each.
impl moa_models::Progress for Progress {
    fn update(&mut self, stage: Stage, done: usize, total: usize) -> ControlFlow<()> {
        if self.follows_stages && self.bar.prefix() != stage.name() {
            let before = self.running.replace((stage.name(), Instant::now()));
            self.ended.extend(before.map(|(stage, begin)| (stage, begin.elapsed())));
            self.bar.reset();
            self.bar.set_prefix(stage.name());
            self.lines = self.lines.take().map(|_| Lines::default());
        }
        self.set(done, total);
        match interrupt::is_asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn remark(&mut self, text: &str) {
        self.bar.set_message(text.to_string());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Least time between two lines of a stage.
const BETWEEN_LINES: Duration = Duration::from_secs(30);

/// When the last line of a stage was written, from its beginning.
#[derive(Debug, Default)]
struct Lines(Cell<Option<Duration>>);

impl Lines {
    /// Whether it is time for a line; it is then taken as written.
    fn is_due(&self, elapsed: Duration) -> bool {
        let is_due = self.0.get().is_none_or(|last| elapsed >= last + BETWEEN_LINES);
        if is_due {
            self.0.set(Some(elapsed));
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_has_a_line_at_its_begin_and_at_most_two_a_minute() {
        let lines = Lines::default();
        let due: Vec<u64> =
            (2..100).filter(|seconds| lines.is_due(Duration::from_secs(*seconds))).collect();
        assert_eq!(due, [2, 32, 62, 92]);
    }
}
