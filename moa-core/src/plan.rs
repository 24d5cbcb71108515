use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ElasticRule, Error, HeadRule, Provenance, Result, Span};

/// Dimensions of a Llama-type model that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub query_heads: usize,
    /// KV heads per layer; divides `query_heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

impl ModelShape {
    /// Query heads that share one KV head.
    pub const fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// KV heads of the whole model.
    pub const fn total_kv_heads(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// Checks that no dimension is 0 and that query heads divide evenly over KV heads.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the dimension.
    pub fn validate(&self) -> Result<()> {
        for (what, n) in [
            ("layers", self.layers),
            ("query_heads", self.query_heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
        ] {
            if n == 0 || n > 1 << 20 {
                return Err(Error::invalid(what, "between 1 and 2^20", n));
            }
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(
                "query_heads",
                format!("a multiple of kv_heads ({})", self.kv_heads),
                self.query_heads,
            ));
        }
        Ok(())
    }
}

impl fmt::Display for ModelShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} layers, {} query heads, {} KV heads, head_dim {}",
            self.layers, self.query_heads, self.kv_heads, self.head_dim
        )
    }
}

/// Default number of sink positions (MoA, section 4.1).
pub const DEFAULT_SINK: usize = 64;

/// One span rule per layer and KV head, for one model.
///
/// ```
/// use moa_core::{Dtype, ElasticRule, ModelShape, Plan};
/// let shape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 64 };
/// // StreamingLLM: every head keeps 64 sinks and the last quarter of the context.
/// let plan = Plan::uniform(shape, 64, ElasticRule::new(0.0, 0.25)?)?;
/// assert_eq!(plan.density(8192), 0.25);
/// // 2 layers of 2 heads of 2048 slots: a key and a value of 64 elements of 2 bytes each.
/// let slot_bytes = Dtype::Bf16.slot_bytes(shape.head_dim);
/// assert_eq!(plan.kv_bytes(8192, slot_bytes), 2 * 2 * 2048 * (64 + 64) * 2);
/// # Ok::<(), moa_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    shape: ModelShape,
    fingerprint: Option<String>,
    sink: usize,
    min_span: usize,
    rules: Vec<HeadRule>,
    /// One for each layer, or empty; not part of a plan's file.
    windows: Vec<Option<usize>>,
    /// Where the plan came from.
    pub provenance: Provenance,
}

impl Plan {
    /// A plan from one rule per layer and KV head, `rules[layer * kv_heads + kv_head]`.
    ///
    /// `min_span` is the smallest span any head gets, and must exceed `sink`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a dimension, the number of rules or `min_span` is wrong.
    pub fn new(
        shape: ModelShape,
        sink: usize,
        min_span: usize,
        rules: Vec<HeadRule>,
    ) -> Result<Self> {
        shape.validate()?;
        if min_span <= sink {
            return Err(Error::invalid("min_span", format!("more than sink ({sink})"), min_span));
        }
        if rules.len() != shape.total_kv_heads() {
            return Err(Error::invalid(
                "rules",
                format!(
                    "{} ({} layers x {} KV heads)",
                    shape.total_kv_heads(),
                    shape.layers,
                    shape.kv_heads
                ),
                rules.len(),
            ));
        }
        Ok(Self {
            shape,
            fingerprint: None,
            sink,
            min_span,
            rules,
            windows: Vec::new(),
            provenance: Provenance::default(),
        })
    }

    /// The same plan on a model whose layers themselves see so many recent keys and no more (sliding
    /// windows), one entry for each layer.
    ///
    /// A plan only hides keys. Where a sequence is longer than its layer's window, every head has no sink and
    /// at most the window: [`Span::within`]. Windows belong to the model and not to the plan, so that a plan's
    /// file does not hold them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one entry for each layer, or a window is 0.
    pub fn within(mut self, windows: Vec<Option<usize>>) -> Result<Self> {
        if windows.len() != self.shape.layers {
            let expected = format!("one for each of {} layers", self.shape.layers);
            return Err(Error::invalid("sliding windows", expected, windows.len()));
        }
        if windows.contains(&Some(0)) {
            return Err(Error::invalid("sliding window", "at least 1 key", 0));
        }
        self.windows = windows;
        Ok(self)
    }

    /// Most recent keys that layers themselves see, one for each layer, or none: [`within`](Self::within).
    pub fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// The same rule for every head: StreamingLLM's uniform window.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shape is not valid.
    pub fn uniform(shape: ModelShape, sink: usize, rule: ElasticRule) -> Result<Self> {
        shape.validate()?;
        let rule = HeadRule::union([rule])?;
        Self::new(shape, sink, sink + 1, vec![rule; shape.total_kv_heads()])
    }

    /// Every head sees everything: dense attention.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shape is not valid.
    pub fn full(shape: ModelShape) -> Result<Self> {
        Self::uniform(shape, 0, ElasticRule::FULL)
    }

    /// The heads in `full` (layer, KV head) see everything, the others `sink + window` keys:
    /// DuoAttention's retrieval and streaming heads.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a head does not exist or `window` is 0.
    pub fn retrieval_heads(
        shape: ModelShape,
        sink: usize,
        window: usize,
        full: &[(usize, usize)],
    ) -> Result<Self> {
        Span::new(sink, window)?;
        let mut plan = Self::uniform(shape, sink, ElasticRule::fixed(sink + window))?;
        for &(layer, head) in full {
            let place = plan.index(layer, head)?;
            plan.rules[place] = ElasticRule::FULL.into();
        }
        Ok(plan)
    }

    fn index(&self, layer: usize, head: usize) -> Result<usize> {
        if layer >= self.shape.layers || head >= self.shape.kv_heads {
            return Err(Error::invalid(
                "head",
                format!("layer < {} and KV head < {}", self.shape.layers, self.shape.kv_heads),
                format!("layer {layer}, KV head {head}"),
            ));
        }
        Ok(layer * self.shape.kv_heads + head)
    }

    /// The same plan, tied to the weights of this fingerprint.
    #[must_use]
    pub fn with_fingerprint(mut self, fingerprint: Option<String>) -> Self {
        self.fingerprint = fingerprint;
        self
    }

    /// The same plan with one head's rule replaced.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the head does not exist.
    pub fn with_rule(mut self, layer: usize, head: usize, rule: HeadRule) -> Result<Self> {
        let place = self.index(layer, head)?;
        self.rules[place] = rule;
        Ok(self)
    }

    /// Dimensions of the model the plan is for.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Fingerprint of the weights the plan was made for, if it was made for some.
    pub fn fingerprint(&self) -> Option<&str> {
        self.fingerprint.as_deref()
    }

    /// Sink positions of every head.
    pub fn sink(&self) -> usize {
        self.sink
    }

    /// Smallest span of any head.
    pub fn min_span(&self) -> usize {
        self.min_span
    }

    /// One rule per layer and KV head, layer-major.
    pub fn rules(&self) -> &[HeadRule] {
        &self.rules
    }

    /// Spans of one layer's KV heads in a sequence opened for `context_length` tokens.
    ///
    /// # Panics
    /// If `layer` does not exist.
    pub fn layer_spans(&self, layer: usize, context_length: usize) -> Vec<Span> {
        let heads = self.shape.kv_heads;
        let window = self.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
        self.rules[layer * heads..(layer + 1) * heads]
            .iter()
            .map(|rule| rule.span(context_length, self.sink, self.min_span))
            .map(|span| span.within(window, context_length))
            .collect()
    }

    /// Spans of all heads, layer-major.
    pub fn spans(&self, context_length: usize) -> Vec<Span> {
        (0..self.shape.layers).flat_map(|layer| self.layer_spans(layer, context_length)).collect()
    }

    /// Mean over KV heads of keys kept / `context_length`, for the native (GQA) cache.
    pub fn density(&self, context_length: usize) -> f64 {
        let kept: usize =
            self.spans(context_length).iter().map(|s| s.total().min(context_length)).sum();
        kept as f64 / (self.rules.len() * context_length.max(1)) as f64
    }

    /// Bytes of keys and values that one sequence opened for `context_length` tokens holds, given
    /// those of one slot ([`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes)).
    pub fn kv_bytes(&self, context_length: usize, slot_bytes: u64) -> u64 {
        let kept: u64 =
            self.spans(context_length).iter().map(|s| s.total().min(context_length) as u64).sum();
        kept * slot_bytes
    }

    /// KV footprint (Cache Me If You Can, arXiv 2506.17121): entries held, summed over all tokens that a
    /// sequence of `context_length` tokens reads and writes, as a share of those of dense attention.
    /// After token `t` a head holds `min(t, span)` entries.
    ///
    /// It is larger than the density: a head that keeps half of a context has lost nothing until then.
    pub fn kv_footprint(&self, context_length: usize) -> f64 {
        let spans = self.spans(context_length);
        let held: u128 = spans.iter().map(|span| span.kept_pairs(context_length)).sum();
        let all = Span::full(context_length).kept_pairs(context_length) * spans.len() as u128;
        held as f64 / all.max(1) as f64
    }

    /// Checks that the plan fits a model.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], which says both dimensions.
    pub fn check_shape(&self, model: &ModelShape) -> Result<()> {
        if self.shape != *model {
            return Err(Error::ShapeMismatch { what: "plan", expected: *model, got: self.shape });
        }
        Ok(())
    }

    /// Checks that the plan was made for these weights; a plan without fingerprint fits any.
    ///
    /// # Errors
    /// [`Error::FingerprintMismatch`].
    pub fn check_fingerprint(&self, model: &str) -> Result<()> {
        match &self.fingerprint {
            Some(own) if own != model => Err(Error::FingerprintMismatch {
                what: "plan",
                expected: model.to_string(),
                got: own.clone(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ModelShape = ModelShape { layers: 3, query_heads: 8, kv_heads: 2, head_dim: 16 };

    #[test]
    fn retrieval_heads_are_full_and_the_others_local() {
        let plan = Plan::retrieval_heads(SHAPE, 4, 12, &[(1, 0), (2, 1)]).unwrap();
        assert_eq!(
            plan.layer_spans(1, 100).iter().map(|s| s.total()).collect::<Vec<_>>(),
            [100, 16]
        );
        assert_eq!(plan.density(100), (2.0 * 100.0 + 4.0 * 16.0) / 600.0);
        assert!(matches!(
            Plan::retrieval_heads(SHAPE, 4, 12, &[(3, 0)]),
            Err(Error::Invalid { ref got, .. }) if got == "layer 3, KV head 0"
        ));
        assert!(Plan::retrieval_heads(SHAPE, 4, 0, &[]).is_err());
    }

    // A query of a sliding layer never sees past its window, and so no sink either.
    #[test]
    fn windows_of_the_model_end_spans_and_leave_no_sinks() {
        let plan = Plan::retrieval_heads(SHAPE, 4, 12, &[(0, 0), (1, 0)]).unwrap();
        let plan = plan.within(vec![None, Some(20), Some(10)]).unwrap();
        let spans = |n| plan.spans(n).iter().map(|s| (s.sink(), s.window())).collect::<Vec<_>>();
        assert_eq!(spans(100), [(4, 96), (4, 12), (0, 20), (0, 16), (0, 10), (0, 10)]);
        assert_eq!(plan.layer_spans(1, 20)[0], Span::new(4, 16).unwrap());
        assert_eq!(plan.kv_bytes(100, 1), 100 + 16 + 20 + 16 + 10 + 10);
        assert_eq!(plan.density(100), 1.72 / 6.0);
        let full = || Plan::full(SHAPE).unwrap();
        assert!(full().within(vec![None]).is_err() && full().within(vec![Some(0); 3]).is_err());
    }

    #[test]
    fn footprint_counts_what_is_held_after_every_token() {
        let plan = Plan::retrieval_heads(SHAPE, 4, 12, &[(0, 0), (1, 0), (2, 0)]).unwrap();
        let held = |span: usize| (1..=100).map(|t| span.min(t)).sum::<usize>() as f64;
        let expected = (held(100) + held(16)) / (2.0 * held(100));
        assert!((plan.kv_footprint(100) - expected).abs() < 1e-12);
        assert!(plan.kv_footprint(100) > plan.density(100));
    }

    #[test]
    fn plan_for_another_model_says_both_shapes() {
        let plan = Plan::full(SHAPE).unwrap().with_fingerprint(Some("aa".into()));
        let other = ModelShape { layers: 4, ..SHAPE };
        let message = plan.check_shape(&other).unwrap_err().to_string();
        assert!(message.contains("3 layers") && message.contains("4 layers"), "{message}");
        assert!(plan.check_shape(&SHAPE).is_ok());
        assert!(plan.check_fingerprint("aa").is_ok());
        assert!(matches!(plan.check_fingerprint("bb"), Err(Error::FingerprintMismatch { .. })));
    }

    #[test]
    fn full_plan_has_density_one_at_every_length() {
        let plan = Plan::full(SHAPE).unwrap();
        for n in [1, 2, 63, 64, 65, 1000] {
            assert_eq!((plan.density(n), plan.kv_footprint(n)), (1.0, 1.0));
        }
        assert!(Plan::new(SHAPE, 64, 64, vec![ElasticRule::FULL.into(); 6]).is_err());
        assert!(Plan::new(SHAPE, 64, 65, vec![ElasticRule::FULL.into(); 5]).is_err());
    }
}
