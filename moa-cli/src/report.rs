use moa_core::{AtLength, Plan};
use moa_models::Compressed;
use serde_json::{Value, json};

use crate::head_map::{self, HeadMap};
use crate::output::{bytes, percent, table};

/// Lengths at which to look at a plan when none are asked for.
pub(crate) fn lengths_of(plan: &Plan) -> Vec<usize> {
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

/// Density, bytes and spans of a plan at each length.
pub(crate) fn sizes(plan: &Plan, lengths: &[usize], slot_bytes: u64) -> String {
    let rows: Vec<Vec<String>> = lengths
        .iter()
        .map(|&length| {
            let spans = HeadMap::new(plan, length).spans;
            let dense = dense_bytes(plan, length, slot_bytes);
            vec![
                length.to_string(),
                percent(plan.density(length)),
                bytes(plan.kv_bytes(length, slot_bytes)),
                bytes(dense),
                spans.iter().min().map_or(0, |s| *s).to_string(),
                spans.iter().max().map_or(0, |s| *s).to_string(),
            ]
        })
        .collect();
    table(&["context", "density", "KV cache", "dense", "smallest span", "largest"], &rows)
}

/// Bytes of a dense cache for the plan's model.
pub(crate) fn dense_bytes(plan: &Plan, length: usize, slot_bytes: u64) -> u64 {
    let shape = plan.shape();
    shape.total_kv_heads() as u64 * length as u64 * slot_bytes
}

/// The head maps of a plan.
pub(crate) fn maps(plan: &Plan, lengths: &[usize]) -> Vec<HeadMap> {
    lengths.iter().map(|&length| HeadMap::new(plan, length)).collect()
}

/// A table and the maps.
pub(crate) fn plan_text(plan: &Plan, lengths: &[usize], slot_bytes: u64) -> String {
    let drawing = head_map::draw(&maps(plan, lengths));
    format!("{}\n\n{drawing}", sizes(plan, lengths, slot_bytes))
}

/// A plan at some lengths.
pub(crate) fn plan_json(plan: &Plan, lengths: &[usize], slot_bytes: u64) -> Value {
    let at: Vec<Value> = lengths
        .iter()
        .map(|&length| {
            let map = HeadMap::new(plan, length);
            json!({
                "length": length,
                "density": plan.density(length),
                "kv_bytes": plan.kv_bytes(length, slot_bytes),
                "kv_bytes_dense": dense_bytes(plan, length, slot_bytes),
                "spans": map.layers().collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "model": plan.shape(),
        "fingerprint": plan.fingerprint(),
        "sink": plan.sink(),
        "min_span": plan.min_span(),
        "provenance": plan.provenance,
        "at": at,
    })
}

/// What [`moa_models::compress`] measured.
pub(crate) fn compressed_json(found: &Compressed) -> Value {
    json!({
        "dense_loss": found.refined.dense_loss,
        "start_loss": found.refined.start_loss,
        "loss": found.refined.loss,
        "evaluations": found.refined.evaluations,
        "searched_plans": found.found.plans.len(),
        "worst_gap": found.found.set.worst_gap,
    })
}

/// The same as a sentence.
pub(crate) fn compressed_text(found: &Compressed) -> String {
    let refined = &found.refined;
    format!(
        "Response loss: dense {:.4}, best searched plan {:.4}, chosen plan {:.4} ({} plans searched, \
         gap to the proven bound at most {}; {} plans measured)",
        refined.dense_loss,
        refined.start_loss,
        refined.loss,
        found.found.plans.len(),
        percent(found.found.set.worst_gap),
        refined.evaluations,
    )
}

/// Values at lengths, on one line.
pub(crate) fn at_lengths(values: &[AtLength]) -> String {
    values.iter().map(|v| format!("{:.4} at {}", v.value, v.length)).collect::<Vec<_>>().join(", ")
}
