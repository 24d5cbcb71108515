use moa_models::Compressed;
use serde_json::{Value, json};

use crate::output::percent;

/// What [`moa_models::compress`] measured.
pub(crate) fn json(found: &Compressed) -> Value {
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
pub(crate) fn text(found: &Compressed) -> String {
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
