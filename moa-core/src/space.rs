use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::search::{fixed_grid, scaled_grid};
use crate::{ElasticRule, Error, Result};

/// What kind of plan a search chooses from: elastic rules, or the allocations of other methods, so
/// that they can be compared on the same profile, bounds and solver.
///
/// A fixed span has another density at every length. Bounded at several lengths it obeys the
/// shortest and wastes room at the others, so bound it at the length it is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// An elastic rule `S(N) = alpha + beta N` per KV head (MoA).
    #[default]
    Elastic,
    /// A span per KV head that is the same at every context length: `beta = 0`.
    Fixed,
    /// A fixed span per layer, which all its heads share.
    PerLayer,
    /// Every KV head keeps everything or the smallest span (DuoAttention's retrieval and streaming
    /// heads). Heads are ranked by the loss of going from the one to the other; as many of the first
    /// see everything as the bounds allow.
    Duo,
}

/// Spans of [`Space::Fixed`] and [`Space::PerLayer`]: finer than the elastic grid is at any one
/// length.
const FIXED_STEPS: usize = 64;

impl Space {
    /// Every space with its name on the command line and in files.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::Elastic, "elastic"),
        (Self::Fixed, "fixed"),
        (Self::PerLayer, "per-layer"),
        (Self::Duo, "duo"),
    ];

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elastic => "elastic",
            Self::Fixed => "fixed",
            Self::PerLayer => "per-layer",
            Self::Duo => "duo",
        }
    }

    /// Rules to choose from for contexts up to `longest` and spans of at least `min_span`.
    pub fn candidates(self, longest: usize, min_span: usize) -> Vec<ElasticRule> {
        let narrow = ElasticRule::fixed(min_span);
        match self {
            Self::Elastic => scaled_grid(longest),
            Self::Fixed | Self::PerLayer => {
                let wider = fixed_grid(longest, FIXED_STEPS).into_iter();
                let wider = wider.filter(|rule| rule.alpha > narrow.alpha);
                std::iter::once(narrow).chain(wider).collect()
            }
            Self::Duo => vec![narrow, ElasticRule::FULL],
        }
    }
}

impl FromStr for Space {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(space, _)| *space).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, n)| *n).collect();
            Error::invalid("space", names.join(", "), name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_unknown_ones_are_listed() {
        for (space, name) in Space::ALL {
            assert_eq!((name.parse::<Space>().unwrap(), space.name()), (space, name));
        }
        let message = "per-head".parse::<Space>().unwrap_err().to_string();
        assert!(message.contains("per-head") && message.contains("per-layer"), "{message}");
    }

    #[test]
    fn fixed_spans_begin_with_the_smallest_and_end_with_everything() {
        let rules = Space::Fixed.candidates(4096, 80);
        assert_eq!(rules.first(), Some(&ElasticRule::fixed(80)));
        assert_eq!(rules.last().map(|rule| rule.span(4096, 80)), Some(4096));
        assert!(rules.iter().all(|rule| rule.beta == 0.0));
        assert!(rules.is_sorted_by(|a, b| a.alpha < b.alpha));
    }
}
