//! What the libraries warn of, on stderr.

use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::terminal::to_stderr;

/// Writes events of this project's libraries to stderr, each line once: several GPUs tell the same.
struct Log {
    level: LevelFilter,
    told: Mutex<HashSet<String>>,
}

/// Begins to write: warnings, nothing with `quiet`, and more with each `-v`.
pub(crate) fn begin(quiet: bool, verbose: u8) {
    let level = match (verbose, quiet) {
        (0, true) => return,
        (0, false) => LevelFilter::WARN,
        (1, _) => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    // A second one would be refused; there is none.
    let _ = tracing::subscriber::set_global_default(Log { level, told: Mutex::default() });
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level && metadata.target().starts_with("moa_")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let name = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            _ => "debug",
        };
        let line = format!("{name}: {}{}", line.message, line.fields);
        let is_new = self.told.lock().is_ok_and(|mut told| told.insert(line.clone()));
        if is_new {
            to_stderr(line);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The text of an event.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
        // A text takes all that is written.
        debug_assert!(written.is_ok());
    }
}
