use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::plan_file::PlanFile;
use crate::{CacheType, ElasticRule, Error, HeadRule, LayerLayout, Provenance, Result, Span};

/// Dimensions of a Llama-type model that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "ShapeFile")]
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

/// A [`ModelShape`] as it is read, before the check.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ShapeFile {
    layers: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl TryFrom<ShapeFile> for ModelShape {
    type Error = Error;

    fn try_from(file: ShapeFile) -> Result<Self> {
        let ShapeFile { layers, query_heads, kv_heads, head_dim } = file;
        let shape = Self { layers, query_heads, kv_heads, head_dim };
        shape.validate().map(|()| shape)
    }
}

/// Most tokens of a context, and most keys of a sink or a window: the largest number that an entrance takes.
pub const MAX_LENGTH: usize = 1 << 31;

/// Most query heads of a model. Large models have some ten thousand.
const MAX_HEADS: usize = 1 << 20;

/// Checks that `length`, which `what` names, is at most [`MAX_LENGTH`].
///
/// # Errors
/// [`Error::Invalid`].
pub(crate) fn check_length(what: &str, length: usize) -> Result<usize> {
    match length <= MAX_LENGTH {
        true => Ok(length),
        false => Err(Error::invalid(what, "at most 2^31 tokens", length)),
    }
}

impl ModelShape {
    /// The dimensions in a Hugging Face `config.json`, as transformers reads them: without
    /// `num_key_value_heads` every query head has keys of its own, and without `head_dim` the heads
    /// share `hidden_size` evenly.
    ///
    /// A plan is checked against them by [`Plan::check_shape`]. A published plan needs them to be read at
    /// all, since it does not say how many query heads share a KV head.
    ///
    /// ```
    /// use moa_core::ModelShape;
    /// let config = r#"{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    ///     "hidden_size": 4096, "vocab_size": 128256}"#;
    /// let shape = ModelShape { layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128 };
    /// assert_eq!(ModelShape::from_config_json(config)?, shape);
    /// # Ok::<(), moa_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text is not such an object or the dimensions are not those of a model.
    pub fn from_config_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Config {
            num_hidden_layers: usize,
            num_attention_heads: usize,
            num_key_value_heads: Option<usize>,
            head_dim: Option<usize>,
            hidden_size: Option<usize>,
        }
        let config: Config = serde_json::from_str(text)
            .map_err(|e| Error::invalid("config.json", "the dimensions of a model", e))?;
        let query_heads = config.num_attention_heads;
        let even = config.hidden_size.filter(|size| query_heads > 0 && size % query_heads == 0);
        let Some(head_dim) = config.head_dim.or(even.map(|size| size / query_heads)) else {
            let expected =
                format!("a multiple of num_attention_heads ({query_heads}), or head_dim");
            let got = config.hidden_size.map_or("no such field".into(), |size| size.to_string());
            return Err(Error::invalid("hidden_size", expected, got));
        };
        let kv_heads = config.num_key_value_heads.unwrap_or(query_heads);
        let shape = Self { layers: config.num_hidden_layers, query_heads, kv_heads, head_dim };
        shape.validate().map(|()| shape)
    }

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
        if self.layers.checked_mul(self.query_heads).is_none_or(|heads| heads > MAX_HEADS) {
            let got = format!("{} x {}", self.layers, self.query_heads);
            return Err(Error::invalid("layers x query_heads", "at most 2^20", got));
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
/// A plan's file and what serde reads and writes are the same: [`to_json`](Self::to_json).
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "PlanFile", try_from = "PlanFile")]
pub struct Plan {
    shape: ModelShape,
    fingerprint: Option<String>,
    sink: usize,
    min_span: usize,
    rules: Vec<HeadRule>,
    /// One for each rule, or empty where no head has one.
    cache_types: Vec<Option<CacheType>>,
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
        check_length("sink", sink)?;
        check_length("min_span", min_span.saturating_sub(1))?;
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
            cache_types: Vec::new(),
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
        check_length("sink", sink)?;
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
        Span::new(check_length("sink", sink)?, check_length("window", window)?)?;
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

    /// The same plan with the types in which heads hold keys and values, one entry for each
    /// [rule](Self::rules). A head without one has the type that the engine is opened with.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one entry for each head.
    pub fn with_cache_types(mut self, types: Vec<Option<CacheType>>) -> Result<Self> {
        if types.len() != self.rules.len() {
            let expected = format!("{} KV heads", self.rules.len());
            return Err(Error::invalid("cache types", expected, types.len()));
        }
        self.cache_types = if types.iter().all(Option::is_none) { Vec::new() } else { types };
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

    /// The types in which heads hold keys and values, one for each [rule](Self::rules); empty where the plan
    /// says none.
    pub fn cache_types(&self) -> &[Option<CacheType>] {
        &self.cache_types
    }

    /// The type of one KV head, where the plan says one.
    pub fn cache_type(&self, layer: usize, head: usize) -> Option<CacheType> {
        self.cache_types.get(layer * self.shape.kv_heads + head).copied().flatten()
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

    /// The cache geometry of one layer in a sequence opened for `context_length` tokens: [`LayerLayout::new`]
    /// of [`layer_spans`](Self::layer_spans), with the types of its heads.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the layer does not exist, the length is 0, or the layer's slots cannot be counted.
    pub fn layout(&self, layer: usize, context_length: usize, slack: usize) -> Result<LayerLayout> {
        self.index(layer, 0)?;
        let layout =
            LayerLayout::new(&self.layer_spans(layer, context_length), context_length, slack)?;
        match &self.cache_types[..] {
            [] => Ok(layout),
            types => {
                let heads = self.shape.kv_heads;
                layout.with_cache_types(&types[layer * heads..(layer + 1) * heads])
            }
        }
    }

    /// [`layout`](Self::layout) of every layer.
    ///
    /// ```
    /// use moa_core::{ModelShape, Plan};
    /// let shape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 64 };
    /// let plan = Plan::retrieval_heads(shape, 4, 60, &[(1, 0)])?;
    /// let slots: Vec<usize> = plan.layouts(4096, 0)?.iter().map(|layer| layer.slots()).collect();
    /// assert_eq!(slots, [64 + 64, 4096 + 64]);
    /// # Ok::<(), moa_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if the length is 0 or a layer's slots cannot be counted.
    pub fn layouts(&self, context_length: usize, slack: usize) -> Result<Vec<LayerLayout>> {
        (0..self.shape.layers).map(|layer| self.layout(layer, context_length, slack)).collect()
    }

    /// One layer's mask as numbers to add to scores, `[kv_heads, queries.len(), queries.end]`: 0 where the
    /// queries of a group see the key at a position, else minus infinity. With it any engine that takes
    /// a mask can try a plan's quality, at dense attention's cost. An engine that does not know groups
    /// repeats each head's mask [`ModelShape::group`] times.
    ///
    /// ```
    /// use moa_core::{ModelShape, Plan};
    /// let shape = ModelShape { layers: 1, query_heads: 2, kv_heads: 1, head_dim: 64 };
    /// let plan = Plan::retrieval_heads(shape, 1, 2, &[])?;
    /// let hidden = f32::NEG_INFINITY;
    /// assert_eq!(plan.additive_mask(0, 4096, 3..5)?, [
    ///     0.0, hidden, 0.0, 0.0, hidden, // query 3
    ///     0.0, hidden, hidden, 0.0, 0.0, // query 4
    /// ]);
    /// # Ok::<(), moa_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if the layer does not exist.
    pub fn additive_mask(
        &self,
        layer: usize,
        context_length: usize,
        queries: Range<usize>,
    ) -> Result<Vec<f32>> {
        self.index(layer, 0)?;
        let spans = self.layer_spans(layer, context_length);
        let mask = |span: Span| span.additive_mask(queries.clone(), 0..queries.end);
        Ok(spans.into_iter().flat_map(mask).collect())
    }

    /// Spans of all heads, layer-major.
    pub fn spans(&self, context_length: usize) -> Vec<Span> {
        (0..self.shape.layers).flat_map(|layer| self.layer_spans(layer, context_length)).collect()
    }

    /// Mean over KV heads of keys kept / `context_length`, for the native (GQA) cache.
    pub fn density(&self, context_length: usize) -> f64 {
        self.kept(context_length) as f64
            / (self.rules.len() as u128 * context_length.max(1) as u128) as f64
    }

    /// Bytes of keys and values that one sequence opened for `context_length` tokens holds, given
    /// those of one slot ([`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes))
    /// of a head whose [type](Self::with_cache_types) the plan does not say.
    pub fn kv_bytes(&self, context_length: usize, slot_bytes: u64) -> u64 {
        let slot = |head: usize| {
            let own = self.cache_types.get(head).copied().flatten();
            u128::from(own.map_or(slot_bytes, |own| own.slot_bytes(self.shape.head_dim)))
        };
        let spans = self.spans(context_length).into_iter().enumerate();
        let held = spans.map(|(head, span)| {
            (span.total().min(context_length) as u128).saturating_mul(slot(head))
        });
        u64::try_from(held.fold(0, u128::saturating_add)).unwrap_or(u64::MAX)
    }

    /// Keys of all heads together.
    fn kept(&self, context_length: usize) -> u128 {
        let kept = |span: &Span| span.total().min(context_length) as u128;
        self.spans(context_length).iter().map(kept).sum()
    }

    /// KV footprint (Cache Me If You Can, arXiv 2506.17121): entries held, summed over all tokens that a
    /// sequence of `context_length` tokens reads and writes, as a share of those of dense attention.
    /// After token `t` a head holds `min(t, span)` entries.
    ///
    /// It is larger than the density: a head that keeps half of a context has lost nothing until then.
    pub fn kv_footprint(&self, context_length: usize) -> f64 {
        let spans = self.spans(context_length);
        let held = spans.iter().map(|span| span.kept_pairs(context_length));
        let held = held.fold(0, u128::saturating_add);
        let all = Span::full(context_length).kept_pairs(context_length);
        let all = all.saturating_mul(spans.len() as u128);
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

    #[test]
    fn bytes_are_those_of_each_head_and_its_type() {
        let mut types = vec![None; 6];
        (types[2], types[5]) = (Some(CacheType::Int8), Some(CacheType::Int4));
        let plan = Plan::retrieval_heads(SHAPE, 4, 12, &[(1, 0)]).unwrap();
        assert!(plan.clone().with_cache_types(vec![None; 5]).is_err());
        assert_eq!(plan.clone().with_cache_types(vec![None; 6]).unwrap(), plan);
        let plan = plan.with_cache_types(types).unwrap();
        assert_eq!((plan.cache_type(1, 0), plan.cache_type(1, 1)), (Some(CacheType::Int8), None));
        let bytes = 100 * 2 * (16 + 2) + 16 * 2 * (8 + 2) + 4 * 16 * 64;
        assert_eq!(plan.kv_bytes(100, 64), bytes);
        let layouts = plan.layouts(100, 0).unwrap();
        assert_eq!(layouts.iter().map(|layer| layer.bytes(16, 64)).sum::<u64>(), bytes);
        let has = |cache_type| cache_type == CacheType::Int8;
        assert!(layouts[1].check_cache_types("x", has).is_ok());
        assert!(matches!(
            layouts[2].check_cache_types("x", has),
            Err(Error::CacheType { cache_type: CacheType::Int4, head: Some(1), .. })
        ));
        let text = plan.to_json();
        assert_eq!(Plan::from_json(&text).unwrap(), plan);
        use serde_json::{Value, json};
        let mut file: Value = serde_json::from_str(&text).unwrap();
        let types = file["cache_types"].take();
        for (at, of_layer) in [(0, json!([null, "int3"])), (1, json!(["int8"])), (2, json!([]))] {
            file["cache_types"] = types.clone();
            file["cache_types"][at] = of_layer;
            assert!(matches!(Plan::from_json(&file.to_string()), Err(Error::Invalid { .. })));
        }
        file["cache_types"] = json!([types[0]]);
        assert!(matches!(Plan::from_json(&file.to_string()), Err(Error::Invalid { .. })));
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
    fn sizes_beyond_any_model_are_errors_or_large_numbers() {
        let most = ModelShape { layers: 1 << 20, query_heads: 1 << 20, kv_heads: 1 << 20, ..SHAPE };
        assert!(Plan::full(most).is_err());
        for far in [MAX_LENGTH + 1, usize::MAX] {
            assert!(Plan::retrieval_heads(SHAPE, 1, far, &[]).is_err());
            assert!(Plan::retrieval_heads(SHAPE, far, 1, &[]).is_err());
            assert!(Plan::uniform(SHAPE, far, ElasticRule::FULL).is_err());
            let min_span = far.saturating_add(1);
            assert!(Plan::new(SHAPE, 0, min_span, vec![ElasticRule::FULL.into(); 6]).is_err());
        }
        let plan = Plan::full(SHAPE).unwrap();
        for length in [usize::MAX / 4, usize::MAX] {
            assert_eq!((plan.density(length), plan.kv_footprint(length)), (1.0, 1.0));
            assert_eq!(plan.kv_bytes(length, u64::MAX), u64::MAX);
        }
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
