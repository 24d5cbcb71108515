//! A model that several GPUs share.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use moa_core::{Plan, Sharding};
use moa_models::{Checkpoint, Cuda, ModelConfig, NcclRank, OpenOptions, Rank, Shard, on_ranks};

use crate::args::ModelArg;
use crate::error::{Error, Result};
use crate::gpus::Gpus;
use crate::model;
use crate::output::Context;
use crate::terminal::to_stderr;

/// How long ranks are waited for once one has failed.
const GRACE: Duration = Duration::from_secs(15);

/// Ends the process after a while: a rank that hangs would keep it, though the others have failed.
fn end_soon(error: &Error) {
    let (text, code) = (format!("error: {error}"), error.exit_code());
    std::thread::spawn(move || {
        std::thread::sleep(GRACE);
        to_stderr(format_args!("{text}\nerror: another GPU's thread hangs"));
        std::process::exit(code.into());
    });
}

impl Gpus {
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
        let sharding = Sharding::balanced(&plan, length, self.ordinals().len());
        let sharding = sharding.map_err(|e| Error::from(e).at("--device"))?;
        let done = on_ranks(NcclRank::group(self.ordinals().len())?, |rank: Arc<NcclRank>| {
            let number = rank.rank();
            let device = model::cuda(self.ordinals()[number].into(), context)?;
            rank.connect(&device)?;
            if number == 0 {
                context
                    .note(format_args!("{} GPUs; bytes are those of one", self.ordinals().len()));
            }
            let context = if number == 0 { *context } else { context.muted() };
            let done = work(device, Shard::new(&sharding, rank)?, &context);
            done.inspect_err(end_soon)
        });
        done.map(drop)
    }

    /// [`run`](Self::run) with a model folder, opened with these options.
    pub(crate) fn run_model(
        &self,
        of: &ModelArg,
        options: &OpenOptions<'_>,
        plan: Option<&Path>,
        context: &Context,
        work: impl Fn(Checkpoint<Cuda>, &Context) -> Result<()> + Sync,
    ) -> Result<()> {
        let folder = model::folder(&of.model, context)?;
        let config = ModelConfig::from_file(&folder)?;
        self.run(&config, plan, config.context_length(), context, |device, shard, context| {
            let checkpoint = options.open_shard(device, &folder, shard)?;
            checkpoint.model.all_loaded()?;
            work(checkpoint, context)
        })
    }
}
