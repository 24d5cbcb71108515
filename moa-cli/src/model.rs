use std::path::{Path, PathBuf};

use moa_core::{DEFAULT_SINK, ElasticRule, ModelShape, Plan};
use moa_models::{
    CacheType, Checkpoint, Cpu, Dtype, Eviction, HubId, Math, ModelConfig, OpenOptions, is_gguf,
};

use crate::args::{ModelArg, PlanArgs, WeightType};
use crate::error::{Error, Result};
use crate::output::Context;

/// Evaluates an expression with the operations of the device that `--device` names. It is compiled
/// once for each device.
macro_rules! on_device {
    ($context:expr, |$device:ident| $body:expr) => {
        match $context.device {
            $crate::args::Device::Cpu => {
                let $device = $crate::model::cpu($context)?;
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::args::Device::Cuda(ordinal) => {
                let $device = $crate::model::cuda(ordinal, $context)?;
                $body
            }
            #[cfg(feature = "wgpu")]
            $crate::args::Device::Wgpu(index) => {
                let $device = $crate::model::wgpu(index, $context)?;
                let _idle = $crate::model::Idle($device.clone());
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::args::Device::CudaGroup(gpus) => {
                let got = format!("GPUs {gpus:?}");
                return Err($crate::error::Error::argument(
                    "--device",
                    "one device for this command",
                    got,
                )
                .into());
            }
        }
    };
}
pub(crate) use on_device;

/// Evaluates an expression with the model of a [`ModelArg`] on the device that `--device` names, or with its
/// parts on several, each with a context of its own. Heads are dealt to several for a plan's file, if one is given.
macro_rules! on_model {
    ($context:expr, $of:expr, $plan:expr, |$model:ident, $own:ident| $body:expr) => {{
        let options = $crate::model::options($of);
        $crate::model::on_model!($context, $of, options, $plan, |$model, $own| $body)
    }};
    ($context:expr, $of:expr, $options:expr, $plan:expr, |$model:ident, $own:ident| $body:expr) => {
        match $context.device {
            #[cfg(feature = "cuda")]
            $crate::args::Device::CudaGroup(gpus) => {
                gpus.run_model($of, &$options, $plan, $context, |$model, $own| $body)
            }
            _ => {
                let _ = $plan;
                $crate::model::on_device!($context, |device| {
                    let folder = $crate::model::folder(&$of.model, $context)?;
                    let ($model, $own) = ($options.open(device, folder)?, $context);
                    $body
                })
            }
        }
    };
}
pub(crate) use on_model;

/// The CPU, where weights stay as they are in their file. Who asks for caches of f32 gets products of f32 too.
pub(crate) fn cpu(context: &Context) -> Result<Cpu> {
    match context.weights {
        Some(WeightType::Fp8) => Err(Error::argument("--weights", "left out on the CPU", "fp8")),
        None => Ok(Cpu::new(context.cache).narrow_activations(context.cache != Dtype::F32.into())),
    }
}

/// Refuses weights that a command which needs gradients cannot have, before anything is read.
pub(crate) fn check_gradients(context: &Context) -> Result<()> {
    match context.weights {
        Some(WeightType::Fp8) => Err(Error::argument("--weights", "left out in profiling", "fp8")),
        None => Ok(()),
    }
}

/// A GPU; activations have the type of the caches, or bf16 where that is narrow, and weights unless another one is
/// asked for; so have what large products of these take.
#[cfg(feature = "cuda")]
pub(crate) fn cuda(ordinal: usize, context: &Context) -> Result<moa_models::Cuda> {
    use moa_models::{Cuda, Dtype};

    use crate::args::ActivationType;
    if context.cache == Dtype::F32.into() {
        return Err(Error::argument("--cache-dtype", "a type but f32 on an NVIDIA GPU", "f32"));
    }
    let device = Cuda::open(ordinal, context.cache)?;
    let device = match context.weights {
        Some(WeightType::Fp8) => device.with_fp8_weights(),
        None => device,
    };
    Ok(match context.activations {
        Some(ActivationType::Fp8) => device.with_fp8_activations()?,
        None => device,
    })
}

/// A GPU by wgpu, where weights keep the type of their file.
#[cfg(feature = "wgpu")]
pub(crate) fn wgpu(index: Option<usize>, context: &Context) -> Result<moa_models::Wgpu> {
    match context.weights {
        Some(WeightType::Fp8) => Err(Error::argument("--weights", "left out on wgpu", "fp8")),
        None => Ok(moa_models::Wgpu::open(index, context.cache)?),
    }
}

/// Waits for a device at its end: some drivers crash when the process ends while they work.
#[cfg(feature = "wgpu")]
pub(crate) struct Idle(pub(crate) moa_models::Wgpu);

#[cfg(feature = "wgpu")]
impl Drop for Idle {
    fn drop(&mut self) {
        // What kept the device from its work has been told where it was asked for.
        let _ = moa_models::Device::synchronize(&self.0);
    }
}

/// A device that the flags name, opened for a second model.
pub(crate) trait Reopen: Math + Sized + 'static {
    fn reopen(context: &Context) -> Result<Self>;
}

impl Reopen for Cpu {
    fn reopen(context: &Context) -> Result<Self> {
        cpu(context)
    }
}

#[cfg(feature = "cuda")]
impl Reopen for moa_models::Cuda {
    fn reopen(context: &Context) -> Result<Self> {
        match context.device {
            crate::args::Device::Cuda(ordinal) => cuda(ordinal, context),
            _ => Err(Error::argument("--device", "one GPU with --draft-model", "several")),
        }
    }
}

#[cfg(feature = "wgpu")]
impl Reopen for moa_models::Wgpu {
    fn reopen(context: &Context) -> Result<Self> {
        match context.device {
            crate::args::Device::Wgpu(index) => wgpu(index, context),
            _ => wgpu(None, context),
        }
    }
}

/// Opens a model on a device.
pub(crate) fn open<D: Math>(device: D, of: &ModelArg, context: &Context) -> Result<Checkpoint<D>> {
    Ok(options(of).open(device, folder(&of.model, context)?)?)
}

/// What the flags of a model say of opening it.
pub(crate) fn options(of: &ModelArg) -> OpenOptions<'static> {
    OpenOptions::default().ignore_extra_tensors(of.ignore_extra_tensors).mmap(!of.no_mmap)
}

/// The folder or GGUF file that `--model` names, or that a model of the hub has in the cache.
pub(crate) fn folder(model: &Path, context: &Context) -> Result<PathBuf> {
    if model.is_dir() || is_gguf(model) {
        return Ok(model.to_path_buf());
    }
    let read = |source| Error::Read { path: model.to_path_buf(), source };
    match std::fs::symlink_metadata(model) {
        Ok(metadata) if metadata.is_symlink() && !model.exists() => {
            let target = std::fs::read_link(model).map_err(read)?;
            let path = model.to_path_buf();
            return Err(moa_models::Error::DanglingLink { path, target }.into());
        }
        Ok(_) => drop(moa_core::open_file(model).map_err(read)?),
        Err(error) => match model.to_str().map(str::parse::<HubId>) {
            Some(Ok(id)) => return from_hub(&id, context),
            _ => return Err(read(error)),
        },
    }
    Err(Error::argument(
        "--model",
        "a model folder (config.json, *.safetensors, tokenizer.json) or a GGUF file",
        format!("a file, {}", model.display()),
    ))
}

#[cfg(feature = "hub")]
fn from_hub(id: &HubId, context: &Context) -> Result<PathBuf> {
    let mut bar = crate::progress::Progress::of_stages(context);
    Ok(moa_models::fetch(id, &mut bar)?)
}

#[cfg(not(feature = "hub"))]
fn from_hub(id: &HubId, _: &Context) -> Result<PathBuf> {
    Err(Error::Hub { id: id.to_string() })
}

/// Dimensions of a model from its `config.json` or GGUF file, without its weights.
pub(crate) fn shape(config: &Path) -> Result<ModelShape> {
    Ok(ModelConfig::from_file(config)?.shape())
}

/// Every head keeps the same share of the context.
pub(crate) fn uniform(shape: ModelShape, sink: usize, density: f64) -> Result<Plan> {
    Ok(Plan::uniform(shape, sink, ElasticRule::new(0.0, density)?)?)
}

/// The plan of a run, with a name for it.
#[derive(Debug)]
pub(crate) struct ChosenPlan {
    pub(crate) plan: Plan,
    /// Keys are evicted after the prompt, of which dense attention, the plan, has read all.
    pub(crate) eviction: Option<Eviction>,
    pub(crate) name: String,
}

/// The plan that the flags ask for, checked against the model.
pub(crate) fn choose_plan<D: Math>(
    args: &PlanArgs,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<ChosenPlan> {
    let shape = model.model.shape();
    if let Some(path) = &args.plan {
        let plan = Plan::load(path)?;
        check_plan(&plan, path, model, args.any_weights)?;
        let is_other = |own: &Option<CacheType>| own.is_some_and(|own| own != context.cache);
        if context.cache_dtype.is_some() && plan.cache_types().iter().any(is_other) {
            context.note(format_args!(
                "{}: the plan says the types of keys and values, which hold in place of --cache-dtype {}",
                path.display(),
                context.cache
            ));
        }
        return Ok(ChosenPlan { plan, eviction: None, name: path.display().to_string() });
    }
    Ok(match args.uniform {
        Some(density) => ChosenPlan {
            plan: uniform(shape, DEFAULT_SINK, density)?,
            eviction: None,
            name: format!("uniform {density}"),
        },
        None => ChosenPlan { plan: Plan::full(shape)?, eviction: None, name: "dense".to_string() },
    })
}

/// Checks that the plan of a file is for this model, and unless `any_weights` for these weights.
pub(crate) fn check_plan<D: Math>(
    plan: &Plan,
    path: &Path,
    model: &Checkpoint<D>,
    any_weights: bool,
) -> Result<()> {
    let checked = match any_weights {
        true => plan.check_shape(&model.model.shape()).map_err(Error::from),
        false => model.check_plan(plan).map_err(Error::from),
    };
    checked.map_err(|error| match error.is_of_other_weights() {
        true => error.at(format!("{} (see --any-weights)", path.display())),
        false => error.at(path.display().to_string()),
    })
}
