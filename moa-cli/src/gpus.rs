//! A model that several GPUs share.

use std::path::Path;
use std::sync::Arc;

use moa_core::{Plan, Sharding};
use moa_models::{Checkpoint, Cuda, ModelConfig, NcclRank, Rank, Shard, on_ranks};

use crate::args::ModelArg;
use crate::error::{Error, Result};
use crate::model;
use crate::output::Context;

/// Most GPUs of one run: as many as a machine has.
const MOST: usize = 16;

/// At least two GPUs, each once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gpus {
    ordinals: [u8; MOST],
    count: usize,
}

impl std::fmt::Debug for Gpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.ordinals())
    }
}

impl Gpus {
    /// Numbers with commas between them.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut gpus = Self { ordinals: [0; MOST], count: 0 };
        for number in text.split(',') {
            let ordinal: u8 = number.parse().ok()?;
            if gpus.ordinals().contains(&ordinal) || gpus.count == MOST {
                return None;
            }
            gpus.ordinals[gpus.count] = ordinal;
            gpus.count += 1;
        }
        (gpus.count > 1).then_some(gpus)
    }

    /// Their numbers, by rank.
    pub(crate) fn ordinals(&self) -> &[u8] {
        &self.ordinals[..self.count]
    }

    /// Runs `work` for each of them, on a thread of its own and with its part of the model; only the first
    /// one's context writes. Heads are dealt for `plan`, or evenly, at `length` tokens.
    pub(crate) fn run(
        &self,
        config: &ModelConfig,
        plan: Option<&Path>,
        length: usize,
        context: &Context,
        work: impl Fn(Cuda, Shard<Cuda>, &Context) -> Result<()> + Sync,
    ) -> Result<()> {
        let plan = match plan {
            Some(path) => {
                let plan = Plan::load(path)?;
                let checked = plan.check_shape(&config.shape());
                checked.map_err(|e| Error::from(e).at(path.display().to_string()))?;
                plan
            }
            None => Plan::full(config.shape())?,
        };
        let plan = config.windowed(&plan)?;
        let sharding = Sharding::balanced(&plan, length, self.count);
        let sharding = sharding.map_err(|e| Error::from(e).at("--device"))?;
        let done = on_ranks(NcclRank::group(self.count)?, |rank: Arc<NcclRank>| {
            let number = rank.rank();
            let device = model::cuda(self.ordinals()[number].into(), context)?;
            rank.connect(&device)?;
            if number == 0 {
                context.note(format_args!("{} GPUs; bytes are those of the first", self.count));
            }
            let context = if number == 0 { *context } else { context.muted() };
            work(device, Shard::new(&sharding, rank)?, &context)
        });
        done.map(drop)
    }

    /// [`run`](Self::run) with a model folder.
    pub(crate) fn run_model(
        &self,
        of: &ModelArg,
        plan: Option<&Path>,
        context: &Context,
        work: impl Fn(Checkpoint<Cuda>, &Context) -> Result<()> + Sync,
    ) -> Result<()> {
        let folder = model::folder(&of.model, context)?;
        let config = ModelConfig::from_file(&folder)?;
        self.run(&config, plan, config.context_length(), context, |device, shard, context| {
            work(model::options(of).open_shard(device, &folder, shard)?, context)
        })
    }
}
