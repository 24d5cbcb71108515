use std::fmt::Display;
use std::io::{self, Write};

use moa_models::Dtype;
use serde_json::Value;

use crate::args::{Device, Global, WeightType};
use crate::error::{Error, Result};

/// What all commands share: where results go, and the global options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) seed: u64,
    pub(crate) device: Device,
    pub(crate) cache: Dtype,
    pub(crate) weights: Option<WeightType>,
    /// Threads of the search; 0 for all.
    pub(crate) threads: usize,
    /// Nothing is written at all: another GPU's thread writes the same.
    muted: bool,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            quiet: global.quiet,
            seed: global.seed,
            device: global.device,
            cache: global.cache_dtype.into(),
            weights: global.weights,
            threads: global.threads.unwrap_or(0),
            muted: false,
        }
    }

    /// One that writes nothing.
    #[cfg(feature = "cuda")]
    pub(crate) fn muted(&self) -> Self {
        Self { json: false, quiet: true, muted: true, ..*self }
    }

    /// Checks that the model runs on one device.
    pub(crate) fn check_one_device(&self, what: &'static str) -> Result<()> {
        match self.device {
            #[cfg(feature = "cuda")]
            Device::CudaGroup(gpus) => {
                Err(Error::argument(what, "one device", format!("GPUs {gpus:?}")))
            }
            _ => {
                let _ = what;
                Ok(())
            }
        }
    }

    /// Writes a result for people to stdout, with a line end; nothing with `--json`.
    pub(crate) fn print(&self, text: impl Display) -> Result<()> {
        self.stream(format_args!("{text}\n"))
    }

    /// Writes a part of a line to stdout at once; nothing with `--json`.
    pub(crate) fn stream(&self, text: impl Display) -> Result<()> {
        if self.json || self.muted { Ok(()) } else { to_stdout(&text) }
    }

    /// Writes the result for programs, with `--json` only.
    pub(crate) fn json(&self, value: &Value) -> Result<()> {
        if self.json { to_stdout(&format_args!("{value}\n")) } else { Ok(()) }
    }

    /// Writes a remark to stderr, unless `--quiet` or `--json`.
    pub(crate) fn note(&self, text: impl Display) {
        if !self.quiet && !self.json {
            eprintln!("{text}");
        }
    }
}

fn to_stdout(text: &dyn Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|source| Error::Stream { stream: "stdout", source })
}

/// Lays rows out in columns: the first to the left, the others, which are numbers, to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, (cell, &width)) in cells.zip(&widths).enumerate() {
            match column {
                0 => text.push_str(&format!("{cell:<width$}")),
                _ => text.push_str(&format!("  {cell:>width$}")),
            }
        }
        text.trim_end().to_string()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.push(widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>().join("  "));
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// Bytes in the largest binary unit that leaves at least 1.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} TiB")
}

/// A share as a percentage.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["plan".to_string(), "1".to_string()], vec!["a".to_string(), "1234".to_string()]];
        let text = table(&["name", "n"], &rows);
        assert_eq!(text, "name     n\n----  ----\nplan     1\na     1234");
    }

    #[test]
    fn units_are_binary() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
        assert_eq!(bytes(1 << 50), "1024.00 TiB");
    }
}
