use std::fmt;

use moa_core::{AtLength, CacheType, ModelShape, Plan, Provenance};
use serde::Serialize;

use crate::HeadMap;
use crate::text::{bytes, percent, table};

/// Context lengths to look at a plan when none are asked for, ascending: those that its search bounded or
/// profiled, else 1024 and 8192.
pub fn lengths_of(plan: &Plan) -> Vec<usize> {
    let provenance = &plan.provenance;
    let mut lengths: Vec<usize> = provenance.density_bounds.iter().map(|b| b.length).collect();
    lengths.extend(&provenance.profile_lengths);
    if lengths.is_empty() {
        lengths.extend([1024, 8192]);
    }
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

/// One plan at some context lengths: a table and drawn head maps as text, everything as JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSummary {
    model: ModelShape,
    fingerprint: Option<String>,
    sink: usize,
    min_span: usize,
    provenance: Provenance,
    /// The cache type of each head, layer-major, where the plan says any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cache_types: Vec<Option<CacheType>>,
    at: Vec<PlanSize>,
}

/// Sizes of a plan at one context length.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSize {
    /// Context length, in tokens.
    pub length: usize,
    /// Mean share of the context that heads keep.
    pub density: f64,
    /// Bytes of keys and values of one sequence.
    pub kv_bytes: u64,
    /// Bytes of a dense cache for the same sequence, in 16 bits at least.
    pub kv_bytes_dense: u64,
    /// Span of each KV head.
    pub spans: HeadMap,
}

impl PlanSummary {
    /// The summary of `plan` at `lengths`, where one cache slot, key and value together, takes
    /// `slot_bytes` bytes.
    pub fn new(plan: &Plan, lengths: &[usize], slot_bytes: u64) -> Self {
        let size = |&length: &usize| PlanSize {
            length,
            density: plan.density(length),
            kv_bytes: plan.kv_bytes(length, slot_bytes),
            kv_bytes_dense: plan
                .shape()
                .kv_bytes(length, plan.shape().dense_slot_bytes(slot_bytes)),
            spans: HeadMap::new(plan, length),
        };
        Self {
            model: plan.shape(),
            fingerprint: plan.fingerprint().map(str::to_string),
            sink: plan.sink(),
            min_span: plan.min_span(),
            provenance: plan.provenance.clone(),
            cache_types: plan.cache_types().to_vec(),
            at: lengths.iter().map(size).collect(),
        }
    }

    /// Sizes at each length.
    pub fn sizes(&self) -> &[PlanSize] {
        &self.at
    }

    /// The sizes as a table.
    pub fn table(&self) -> String {
        table(&PlanSize::HEAD, &self.at.iter().map(PlanSize::row).collect::<Vec<_>>())
    }

    /// The head maps, side by side as far as they fit.
    pub fn maps(&self) -> Vec<HeadMap> {
        self.at.iter().map(|size| size.spans.clone()).collect()
    }
}

/// The table and the drawn maps.
impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n\n{}", self.table(), HeadMap::draw(&self.maps()))
    }
}

impl PlanSize {
    /// Names of the columns of a row.
    pub(crate) const HEAD: [&str; 6] =
        ["context", "density", "KV cache", "dense", "smallest span", "largest"];

    pub(crate) fn row(&self) -> Vec<String> {
        let spans = &self.spans.spans;
        vec![
            self.length.to_string(),
            percent(self.density),
            bytes(self.kv_bytes),
            bytes(self.kv_bytes_dense),
            spans.iter().min().map_or(0, |s| *s).to_string(),
            spans.iter().max().map_or(0, |s| *s).to_string(),
        ]
    }
}

/// Values at context lengths, on one line.
pub fn at_lengths(values: &[AtLength]) -> String {
    values.iter().map(|v| format!("{:.4} at {}", v.value, v.length)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_core::ElasticRule;
    use serde_json::json;

    #[test]
    fn text_and_json_say_the_same() {
        let shape = ModelShape { layers: 1, query_heads: 4, kv_heads: 2, head_dim: 8 };
        let rules = vec![ElasticRule::FULL.into(), ElasticRule::fixed(100).into()];
        let plan = Plan::new(shape, 4, 8, rules).unwrap();
        let summary = PlanSummary::new(&plan, &[400], 32);
        let text = summary.to_string();
        assert!(text.contains("62.5 %") && text.contains("layer 0   ██ ▂▂"), "{text}");
        let value = json!(summary);
        assert_eq!(value["at"][0]["spans"], json!([[400, 100]]));
        assert_eq!(value["at"][0]["kv_bytes"], 2 * 500 * 8 * 2);
        assert_eq!(value["at"][0]["kv_bytes_dense"], 2 * 800 * 8 * 2);
        assert_eq!(lengths_of(&plan), [1024, 8192]);
        // What a dense cache has does not depend on a narrower type.
        let narrow = json!(PlanSummary::new(&plan, &[400], CacheType::Int4.slot_bytes(8)));
        assert_eq!(narrow["at"][0]["kv_bytes_dense"], 2 * 800 * 8 * 2);
        assert!(narrow["at"][0]["kv_bytes"].as_u64() < value["at"][0]["kv_bytes"].as_u64());
    }
}
