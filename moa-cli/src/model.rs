use std::path::Path;

use moa_core::{DEFAULT_SINK, ElasticRule, ModelShape, Plan};
use moa_models::{Checkpoint, CpuOps, LlamaConfig};

use crate::args::PlanArgs;
use crate::error::{Error, Result};
use crate::output::Context;

/// A checkpoint on the CPU.
pub(crate) type Model = Checkpoint<CpuOps>;

/// Opens a model folder.
pub(crate) fn open(folder: &Path, context: &Context) -> Result<Model> {
    if !folder.is_dir() {
        let source = match std::fs::metadata(folder) {
            Ok(_) => std::io::Error::from(std::io::ErrorKind::NotADirectory),
            Err(error) => error,
        };
        return Err(Error::Read { path: folder.to_path_buf(), source });
    }
    Ok(Checkpoint::open(CpuOps::new(context.cache), folder)?)
}

/// Dimensions of a model from its `config.json`, without its weights.
pub(crate) fn shape(config: &Path) -> Result<ModelShape> {
    let config = LlamaConfig::from_file(config)?;
    Ok(ModelShape {
        layers: config.num_hidden_layers,
        query_heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    })
}

/// Every head keeps the same share of the context.
pub(crate) fn uniform(shape: ModelShape, sink: usize, density: f64) -> Result<Plan> {
    Ok(Plan::uniform(shape, sink, ElasticRule::new(0.0, density)?)?)
}

/// The plan of a run, with a name for it.
#[derive(Debug)]
pub(crate) struct ChosenPlan {
    pub(crate) plan: Plan,
    pub(crate) name: String,
}

/// The plan that the flags ask for, checked against the model.
pub(crate) fn choose_plan(args: &PlanArgs, model: &Model) -> Result<ChosenPlan> {
    let shape = model.model.shape();
    if let Some(path) = &args.plan {
        let plan = Plan::load(path)?;
        check_plan(&plan, model, args.any_weights).map_err(|e| e.at(path.display().to_string()))?;
        return Ok(ChosenPlan { plan, name: path.display().to_string() });
    }
    Ok(match args.uniform {
        Some(density) => ChosenPlan {
            plan: uniform(shape, DEFAULT_SINK, density)?,
            name: format!("uniform {density}"),
        },
        None => ChosenPlan { plan: Plan::full(shape)?, name: "dense".to_string() },
    })
}

/// Checks that a plan is for this model, and unless `any_weights` for these weights.
pub(crate) fn check_plan(plan: &Plan, model: &Model, any_weights: bool) -> Result<()> {
    match any_weights {
        true => Ok(plan.check_shape(&model.model.shape())?),
        false => Ok(model.check_plan(plan)?),
    }
}
