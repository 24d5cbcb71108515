use std::time::Duration;

use crate::{Error, Result};

/// Limits of the solver.
///
/// The result does not depend on `threads`. It depends on the speed of the machine only where
/// `time_limit` cuts a search short.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// At most this many distinct rules in one layer. The dual bound is exact up to 3; above that it
    /// is the bound without the limit, so the gap that is reported may be larger than the true one.
    pub max_rules_per_layer: Option<usize>,
    /// Cells into which the loss range of every length but the longest is cut.
    pub intervals: usize,
    /// Most plans to return; the ones that spread best over the front are kept.
    pub max_plans: usize,
    /// Wall time after which no sub-problem is started, but for the first one of each length.
    /// `wasm32-unknown-unknown` has no clock, so that there is no limit there, and no threads.
    pub time_limit: Duration,
    /// Threads; 0 takes as many as the machine offers.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_rules_per_layer: None,
            intervals: 4,
            max_plans: 10,
            time_limit: Duration::from_secs(60),
            threads: 0,
        }
    }
}

impl Options {
    pub(crate) fn validate(&self) -> Result<()> {
        for (what, n) in [
            ("max_rules_per_layer", self.max_rules_per_layer.unwrap_or(1)),
            ("intervals", self.intervals),
            ("max_plans", self.max_plans),
        ] {
            if n == 0 {
                return Err(Error::invalid(what, "at least 1", n));
            }
        }
        if self.intervals > 64 {
            return Err(Error::invalid("intervals", "at most 64", self.intervals));
        }
        Ok(())
    }

    pub(super) fn workers(&self) -> usize {
        match self.threads {
            // Threads cannot be started there.
            _ if cfg!(all(target_family = "wasm", target_os = "unknown")) => 1,
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}
