use std::path::Path;
use std::time::Instant;

use candle_core::{Error, Result};
use moa_core::{ElasticRule, Influence, Plan};
use moa_models::{Dtype, Cpu, Item, Decoder, ModelConfig, LogitRows, Objective, Weights};

use crate::{Run, prompt};

/// moa's Llama with f32 caches, dense and with a plan.
pub(crate) struct Moa {
    model: Decoder<Cpu>,
    dense: Plan,
    plan: Plan,
}

impl Moa {
    /// Opens a Hugging Face folder and a plan file.
    pub(crate) fn open(folder: &Path, plan: Option<&Path>) -> Result<Self> {
        let config = ModelConfig::from_file(folder).map_err(Error::wrap)?;
        let weights = Weights::open(folder).map_err(Error::wrap)?;
        let model =
            Decoder::load(Cpu::new(Dtype::F32), config, &weights).map_err(Error::wrap)?;
        let dense = Plan::full(model.shape()).map_err(Error::wrap)?;
        let plan = match plan {
            Some(path) => Plan::load(path),
            None => Plan::uniform(model.shape(), 64, ElasticRule { alpha: 0.0, beta: 0.25 }),
        };
        Ok(Self { plan: plan.map_err(Error::wrap)?, dense, model })
    }

    pub(crate) fn density(&self, tokens: usize) -> f64 {
        self.plan.density(tokens)
    }

    /// Prefill in chunks of 2048 tokens, then `decode` steps of one token.
    pub(crate) fn run(&self, tokens: usize, decode: usize, with_plan: bool) -> Result<Run> {
        let ids = prompt(tokens + decode, self.model.config().vocab_size);
        let plan = if with_plan { &self.plan } else { &self.dense };
        let mut sequence = self.model.open(plan, ids.len(), 0).map_err(Error::wrap)?;
        let start = Instant::now();
        let logits = self
            .model
            .prefill(&mut sequence, &ids[..tokens], 2048)
            .map_err(Error::wrap)?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        let (argmax, max_logit) =
            logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, x)| {
                if *x > best.1 { (i as u32, *x) } else { best }
            });
        let start = Instant::now();
        for id in &ids[tokens..] {
            self.model
                .forward(&mut [&mut sequence], &[&[*id]], LogitRows::Last)
                .map_err(Error::wrap)?;
        }
        Ok(Run {
            prefill_seconds,
            decode_seconds: start.elapsed().as_secs_f64(),
            argmax,
            max_logit,
        })
    }

    /// Seconds of one profiling item of `tokens` tokens (response of 16), and of a dense forward pass
    /// over the same tokens.
    pub(crate) fn profile(&self, tokens: usize) -> Result<serde_json::Value> {
        let ids = prompt(tokens, self.model.config().vocab_size);
        let item = Item::new(&ids[..tokens - 16], &ids[tokens - 16..]).map_err(Error::wrap)?;
        let mut influence = Influence::new(self.model.shape(), tokens, 64).map_err(Error::wrap)?;
        let (mut profile, mut forward) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..2 {
            forward = forward.min(self.run(tokens, 0, false)?.prefill_seconds);
            let start = Instant::now();
            self.model.profile(&item, Objective::Margin, &mut influence).map_err(Error::wrap)?;
            profile = profile.min(start.elapsed().as_secs_f64());
        }
        Ok(serde_json::json!({
            "forward_seconds": forward,
            "profile_seconds": profile,
            "ratio": profile / forward,
        }))
    }
}
