use crate::error::{Error, Result};

/// Finds stop strings in text that comes in pieces.
///
/// Text that may be the beginning of a stop string is held back until it is certain. The stop
/// string that ends first wins, so that the result does not depend on how the text was cut.
///
/// ```
/// use moa_models::StopStrings;
///
/// let mut stops = StopStrings::new(&["USER:".to_string()])?;
/// assert_eq!(stops.push("It is 7. U"), ("It is 7. ".to_string(), false));
/// assert_eq!(stops.push("SER: and"), (String::new(), true));
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// A matcher of `stops`; without any it returns all text at once.
    ///
    /// # Errors
    /// [`Error::Invalid`] when one of them is empty.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::invalid("stop string", "at least one character", "an empty one"));
        }
        Ok(Self { stops: stops.to_vec(), held: String::new(), stopped: false })
    }

    /// Whether there is none to look for.
    pub(crate) fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Takes the next piece of text. Returns the text that is certain to come before any stop
    /// string, and whether a stop string was completed. Text after that is dropped.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stopped {
            return (String::new(), true);
        }
        self.held.push_str(text);
        let ends = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = ends.min() {
            self.stopped = true;
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return (text, true);
        }
        let rest = self.held.split_off(self.held.len() - self.undecided());
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Ends the text; returns what was held back.
    #[must_use]
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn undecided(&self) -> usize {
        let begins = |stop: &String| {
            let longest = self.held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|n| self.held.as_bytes().ends_with(&stop.as_bytes()[..*n]))
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut stops = StopStrings::new(&stops).unwrap();
        let (mut all, mut stopped) = (String::new(), false);
        for piece in pieces {
            let (text, now) = stops.push(piece);
            all.push_str(&text);
            stopped = now;
        }
        all.push_str(&stops.finish());
        (all, stopped)
    }

    #[test]
    fn stop_string_across_pieces() {
        assert_eq!(run(&["</s>"], &["hello <", "/", "s> bye"]), ("hello ".into(), true));
        assert_eq!(run(&["USER:"], &["US", "A"]), ("USA".into(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["🦙🚀"], &["x🦙", "🦙", "🚀y"]), ("x🦙".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
    }

    #[test]
    fn text_that_may_begin_a_stop_string_is_held_back() {
        let mut stops = StopStrings::new(&["\n\nUSER".into()]).unwrap();
        assert_eq!(stops.push("end.\n"), ("end.".into(), false));
        assert_eq!(stops.push("\nUS"), (String::new(), false));
        assert_eq!(stops.push("ual"), ("\n\nUSual".into(), false));
        assert_eq!(stops.push("\n\nUSER"), (String::new(), true));
        assert_eq!(stops.push("more"), (String::new(), true));
    }

    #[test]
    fn empty_stop_string_is_an_error() {
        assert!(matches!(
            StopStrings::new(&["a".into(), String::new()]),
            Err(Error::Invalid { what: "stop string", .. })
        ));
    }

    proptest! {
        #[test]
        fn cutting_does_not_change_output(
            text in "[ab🦙]{0,24}",
            stops in prop::collection::vec("[ab🦙]{1,4}", 0..3),
            cuts in prop::collection::vec(1usize..5, 24),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut pieces = Vec::new();
            let mut chars: Vec<char> = text.chars().collect();
            for cut in cuts {
                let rest = chars.split_off(cut.min(chars.len()));
                pieces.push(chars.into_iter().collect::<String>());
                chars = rest;
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (whole, stopped) = run(&stops, &[&text]);
            prop_assert_eq!((whole.clone(), stopped), run(&stops, &pieces));
            prop_assert!(text.starts_with(&whole));
            prop_assert_eq!(stopped, stops.iter().any(|stop| text.contains(stop)));
        }
    }
}
