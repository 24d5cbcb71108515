use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::families::Family;
use crate::families::llama::Defaults;
use crate::{Error, Result};

/// Granite 3 without experts: Llama with four factors, on the embedding, scores, branches and logits.
#[derive(Clone, Copy, Debug)]
pub struct Granite;

impl Family for Granite {
    fn model_types(&self) -> &[&str] {
        &["granite"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        // transformers takes 1 for each that is absent, that of scores too.
        let factor = |field| Ok::<_, Error>(file.number_above(field, 0.0)?.unwrap_or(1.0));
        Ok(ModelConfig {
            attention_multiplier: Some(factor("attention_multiplier")?),
            embedding_multiplier: factor("embedding_multiplier")?,
            residual_multiplier: factor("residual_multiplier")?,
            logits_scaling: factor("logits_scaling")?,
            ..Defaults::default().config(file)?
        })
    }
}
