//! What people see at their terminal: stderr, and texts that control nothing.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to stderr, which whoever closed it does not read.
pub(crate) fn to_stderr(text: impl Display) {
    write_stderr(&format!("{text}\n"));
}

/// Writes a prompt to stderr.
pub(crate) fn ask(text: &str) {
    write_stderr(text);
}

fn write_stderr(text: &str) {
    // A terminal that is gone, a full disk behind `2>`: no reason to lose the work.
    let _ = io::stderr().write_all(plain(text).as_bytes());
}

/// A text without control characters, by which a file could rewrite what a terminal shows; lines stay lines.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let is_control = |c: char| c.is_control() && c != '\n' && c != '\t';
    match text.contains(is_control) {
        true => Cow::Owned(text.replace(is_control, "\u{fffd}")),
        false => Cow::Borrowed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(plain("a\tb\n"), "a\tb\n");
        assert_eq!(plain("\u{1b}[2J\u{9b}x\r"), "\u{fffd}[2J\u{fffd}x\u{fffd}");
    }
}
