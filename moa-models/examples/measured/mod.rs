//! What examples that measure share: where a model runs, with which weights, and under which plan.

use moa_core::{DEFAULT_SINK, ElasticRule, ModelShape, Plan};
use moa_models::{Checkpoint, Cpu, Dtype, Math, OpenOptions, Result};

/// `--cuda`, `--random` and `--uniform SHARE`.
#[derive(Default)]
pub(crate) struct Model {
    on_gpu: bool,
    random: Option<u32>,
    density: Option<f64>,
}

/// What is done with a model on whichever device it is.
pub(crate) trait Measure {
    fn measure<D: Math>(&self, checkpoint: Checkpoint<D>) -> Result<()>;
}

impl Model {
    /// Whether the argument was one of these. `number` is the one after it.
    pub(crate) fn takes(&mut self, argument: &str, number: impl FnOnce() -> Option<f64>) -> bool {
        match argument {
            "--cuda" => self.on_gpu = true,
            "--random" => self.random = Some(0),
            "--uniform" => self.density = number(),
            _ => return false,
        }
        true
    }

    pub(crate) fn plan(&self, shape: ModelShape) -> Result<Plan> {
        Ok(match self.density {
            Some(density) => Plan::uniform(shape, DEFAULT_SINK, ElasticRule::new(0.0, density)?)?,
            None => Plan::full(shape)?,
        })
    }

    pub(crate) fn measure(&self, folder: &str, what: &impl Measure) -> Result<()> {
        let open = OpenOptions::default().random_weights(self.random);
        match self.on_gpu {
            false => {
                // As the command runs it.
                let device = Cpu::new(Dtype::Bf16).narrow_activations(true);
                what.measure(open.open(device, folder)?)
            }
            #[cfg(feature = "cuda")]
            true => what.measure(open.open(moa_models::Cuda::new(0, Dtype::Bf16)?, folder)?),
            #[cfg(not(feature = "cuda"))]
            true => panic!("this build has no GPU"),
        }
    }
}
