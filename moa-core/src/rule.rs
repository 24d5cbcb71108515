use serde::{Deserialize, Serialize};

use crate::{Error, Result, Span};

/// The paper's elastic rule: a head's span grows linearly with the context length,
/// `S(N) = alpha + beta * N` (MoA, arXiv 2406.14909, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Line")]
pub struct ElasticRule {
    /// Offset, in keys.
    pub alpha: f64,
    /// Keys per token of context.
    pub beta: f64,
}

/// An [`ElasticRule`] as it is read, before the check.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    alpha: f64,
    beta: f64,
}

impl TryFrom<Line> for ElasticRule {
    type Error = Error;

    fn try_from(line: Line) -> Result<Self> {
        Self::new(line.alpha, line.beta)
    }
}

impl From<ElasticRule> for Line {
    fn from(rule: ElasticRule) -> Self {
        Self { alpha: rule.alpha, beta: rule.beta }
    }
}

impl ElasticRule {
    /// The rule that keeps everything.
    pub const FULL: Self = Self { alpha: 0.0, beta: 1.0 };

    /// `alpha + beta * N`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a coefficient is not finite or `beta` is negative.
    pub fn new(alpha: f64, beta: f64) -> Result<Self> {
        if !alpha.is_finite() {
            return Err(Error::invalid("alpha", "a finite number", alpha));
        }
        if !beta.is_finite() || beta < 0.0 {
            return Err(Error::invalid("beta", "a finite number of at least 0", beta));
        }
        Ok(Self { alpha, beta })
    }

    /// A span that does not depend on the context length.
    pub const fn fixed(span: usize) -> Self {
        Self { alpha: span as f64, beta: 0.0 }
    }

    /// `clamp(alpha + beta * context_length, min, context_length)`, in keys, rounded down so that a
    /// bound on density is never passed by rounding.
    pub fn span(self, context_length: usize, min: usize) -> usize {
        // The cast saturates; 1e-6 absorbs the rounding of a product such as 0.1 * 10.
        let keys = (self.alpha + self.beta * context_length as f64 + 1e-6).floor() as usize;
        keys.max(min).min(context_length)
    }
}

/// The rule of one KV head: the largest of one or more [`ElasticRule`]s.
///
/// Search gives one line per head. A KV head that serves several query heads of a published
/// per-query-head plan needs the largest of their spans at every length, which is what several
/// lines express exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "RuleRepr", try_from = "RuleRepr")]
pub struct HeadRule(Vec<ElasticRule>);

#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected {\"alpha\": number, \"beta\": number} or an array of at least one of these"
)]
enum RuleRepr {
    One(Line),
    Union(Vec<Line>),
}

impl From<HeadRule> for RuleRepr {
    fn from(rule: HeadRule) -> Self {
        match rule.0[..] {
            [one] => Self::One(one.into()),
            _ => Self::Union(rule.0.into_iter().map(Line::from).collect()),
        }
    }
}

impl TryFrom<RuleRepr> for HeadRule {
    type Error = Error;

    fn try_from(repr: RuleRepr) -> Result<Self> {
        let lines = match repr {
            RuleRepr::One(one) => vec![one],
            RuleRepr::Union(lines) => lines,
        };
        let rules: Result<Vec<_>> = lines.into_iter().map(ElasticRule::try_from).collect();
        Self::union(rules?)
    }
}

impl From<ElasticRule> for HeadRule {
    fn from(rule: ElasticRule) -> Self {
        Self(vec![rule])
    }
}

impl HeadRule {
    /// The largest of `rules` at every length; repeated rules are kept once.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no rule or one is not valid.
    pub fn union(rules: impl IntoIterator<Item = ElasticRule>) -> Result<Self> {
        let mut lines: Vec<ElasticRule> = Vec::new();
        for rule in rules {
            let rule = ElasticRule::new(rule.alpha, rule.beta)?;
            if !lines.contains(&rule) {
                lines.push(rule);
            }
        }
        if lines.is_empty() {
            return Err(Error::invalid("rule", "at least one (alpha, beta)", "none"));
        }
        Ok(Self(lines))
    }

    /// The lines whose maximum is the rule; never empty.
    pub fn lines(&self) -> &[ElasticRule] {
        &self.0
    }

    /// Keys a query may see in a sequence opened for `context_length` tokens.
    pub fn span(&self, context_length: usize, sink: usize, min: usize) -> Span {
        let total = self.0.iter().map(|line| line.span(context_length, min)).max().unwrap_or(min);
        Span::of_total(total, sink)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_is_clamped_and_rounded_down() {
        let rule = ElasticRule::new(-100.0, 0.25).unwrap();
        assert_eq!(rule.span(1000, 80), 150);
        assert_eq!(rule.span(400, 80), 80);
        assert_eq!(rule.span(50, 80), 50, "never more than the context");
        assert_eq!(ElasticRule::new(0.5, 0.1).unwrap().span(1003, 1), 100);
        assert_eq!(ElasticRule::new(1e300, 0.0).unwrap().span(7, 1), 7);
        assert_eq!(ElasticRule::FULL.span(12345, 1), 12345);
    }

    #[test]
    fn bad_coefficients_are_named() {
        for (alpha, beta, what) in [
            (f64::NAN, 0.5, "alpha"),
            (f64::INFINITY, 0.5, "alpha"),
            (0.0, f64::NAN, "beta"),
            (0.0, -0.1, "beta"),
        ] {
            match ElasticRule::new(alpha, beta) {
                Err(Error::Invalid { what: w, .. }) => assert_eq!(w, what),
                other => panic!("{other:?}"),
            }
        }
        assert!(HeadRule::union([]).is_err());
    }

    #[test]
    fn union_is_the_largest_at_every_length() {
        let (a, b) = (ElasticRule::fixed(1024), ElasticRule::new(-1024.0, 1.0).unwrap());
        let both = HeadRule::union([a, b, a]).unwrap();
        assert_eq!(both.lines().len(), 2);
        for n in [100, 1500, 2048, 2049, 9000] {
            assert_eq!(both.span(n, 64, 128).total(), a.span(n, 128).max(b.span(n, 128)));
        }
    }
}
