use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use moa_core::{MAX_LENGTH, Space};
use moa_models::{Objective, Task, TokenWeight};

use crate::error::Error;

/// Options of every subcommand.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Print one JSON object on stdout and nothing else there
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, notes or warnings on stderr
    #[arg(long, global = true)]
    pub(crate) quiet: bool,
    /// More on stderr of what the libraries do; twice for all of it
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Seed of everything drawn: calibration prompts, sampling, shortened cases
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
    /// Where the model runs: cpu, or where this build has the features `cuda` and `wgpu`, cuda:N and
    /// wgpu:N for GPU N; several GPUs, cuda:0,1,.., share a model in generate, eval, bench, serve, profile and compress
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: Device,
    /// Type of keys and values in KV caches, where a plan does not choose one for a head; with cuda of weights
    /// and activations too, which are bf16 beside narrower caches. cuda has all but f32, the CPU and wgpu all
    /// [default: bf16; int8 in plans that compress and search find within --kv-bytes]
    #[arg(long, global = true, value_name = "TYPE")]
    pub(crate) cache_dtype: Option<CacheType>,
    /// Type of linear layers' weights on an NVIDIA GPU, if not that of caches: fp8 halves the
    /// model's memory, but cannot be profiled
    #[arg(long, global = true, value_name = "TYPE")]
    pub(crate) weights: Option<WeightType>,
    /// Type of what is multiplied with fp8 weights in prompts, if not that of caches: fp8 reads long prompts faster,
    /// and costs accuracy, and on Hopper speed of decoding
    #[arg(long, global = true, value_name = "TYPE")]
    pub(crate) activations: Option<ActivationType>,
    /// CPU threads [default: all]
    #[arg(long, global = true, value_name = "N", value_parser = parse_threads)]
    pub(crate) threads: Option<usize>,
}

/// Where a model can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    /// By number, from 0.
    #[cfg(feature = "cuda")]
    Cuda(usize),
    /// Several that share a model.
    #[cfg(feature = "cuda")]
    CudaGroup(crate::gpus::Gpus),
    /// By number, from 0, or the one that wgpu prefers.
    #[cfg(feature = "wgpu")]
    Wgpu(Option<usize>),
}

/// What `--device` takes.
const DEVICES: &str = match (cfg!(feature = "cuda"), cfg!(feature = "wgpu")) {
    (true, true) => "cpu, cuda, cuda:N, cuda:N,M,.., wgpu, wgpu:N",
    (true, false) => "cpu, cuda, cuda:N, cuda:N,M,.. (wgpu needs a build with `--features wgpu`)",
    (false, true) => "cpu, wgpu, wgpu:N (cuda needs a build with `--features cuda`)",
    (false, false) => {
        "cpu (cuda needs a build with `--features cuda`, wgpu one with `--features wgpu`)"
    }
};

/// The number in `KIND:N`; none in `KIND`.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn number(name: &str, kind: &str) -> Option<Option<usize>> {
    match name.strip_prefix(kind)? {
        "" => Some(None),
        rest => rest.strip_prefix(':')?.parse().ok().map(Some),
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        #[cfg(feature = "cuda")]
        if let Some(ordinal) = number(name, "cuda") {
            return Ok(Self::Cuda(ordinal.unwrap_or(0)));
        }
        #[cfg(feature = "cuda")]
        if let Some(gpus) = name.strip_prefix("cuda:").and_then(crate::gpus::Gpus::parse) {
            return Ok(Self::CudaGroup(gpus));
        }
        #[cfg(feature = "wgpu")]
        if let Some(index) = number(name, "wgpu") {
            return Ok(Self::Wgpu(index));
        }
        match name {
            "cpu" => Ok(Self::Cpu),
            other => Err(Error::Device { got: other.to_string(), available: DEVICES }),
        }
    }
}

/// [`moa_models::CacheType`] as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheType {
    Bf16,
    F16,
    F32,
    /// 8 bits and a scale for each key and each value of a token
    Int8,
    /// Floats of 8 bits (e4m3) and such scales
    Fp8,
    /// Keys as in int8, values as in int4
    K8v4,
    /// 4 bits and such scales
    Int4,
    /// int8, k8v4 or int4 for each head, by what it loses (compress alone)
    Auto,
}

impl From<CacheType> for moa_models::CacheType {
    fn from(flag: CacheType) -> Self {
        match flag {
            CacheType::Bf16 | CacheType::Auto => Self::Bf16,
            CacheType::F16 => Self::F16,
            CacheType::F32 => Self::F32,
            CacheType::Int8 => Self::Int8,
            CacheType::Fp8 => Self::Fp8,
            CacheType::K8v4 => Self::K8V4,
            CacheType::Int4 => Self::Int4,
        }
    }
}

/// What weights can be besides of the type of caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightType {
    /// e4m3 with a factor for each output.
    Fp8,
}

/// What activations can be besides of the type of caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationType {
    /// e4m3 with a factor for each token, in steps of 129 and more.
    Fp8,
}

/// The model of a command.
#[derive(Debug, Args)]
pub(crate) struct ModelArg {
    /// Model folder (config.json, *.safetensors, tokenizer.json), or a GGUF file; in builds with the
    /// feature `hub` also a model of the Hugging Face hub
    #[arg(long, value_name = "DIR|FILE.gguf|OWNER/NAME[/FILE.gguf][@REVISION]")]
    pub(crate) model: PathBuf,
    /// Go on where the folder has tensors that its configuration does not ask for
    #[arg(long)]
    pub(crate) ignore_extra_tensors: bool,
    /// Read the weights into memory instead of mapping their files, which others may then shorten
    #[arg(long)]
    pub(crate) no_mmap: bool,
}

/// What the attention heads of a run see.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Plan file [default: dense attention]
    #[arg(long, value_name = "FILE", conflicts_with = "uniform")]
    pub(crate) plan: Option<PathBuf>,
    /// Every head sees the sink and a window, together this share of the context
    #[arg(long, value_name = "DENSITY", value_parser = parse_density)]
    pub(crate) uniform: Option<f64>,
    /// Take a plan that was made for other weights of the same dimensions
    #[arg(long, requires = "plan", conflicts_with = "uniform")]
    pub(crate) any_weights: bool,
}

/// Calibration prompts.
#[derive(Debug, Args)]
pub(crate) struct DataArg {
    /// `tasks` for built-in questions of graded difficulty, of which those are used that the model
    /// answers; `records` for the long lists among them alone; or a file: lines of {"prompt", "answer"?},
    /// {"messages"} or {"text"}, or a text (.txt, .text, .md). Texts beside prompts are to keep their predictions; of texts
    /// alone, windows are the items, whose last --max-response tokens are to be predicted. Every third item of a file,
    /// and a half of each of one or two texts, are held out: plans are judged by them, and nothing is profiled on them
    #[arg(long, default_value = "tasks", value_name = "tasks|records|FILE")]
    pub(crate) data: String,
}

/// What every head keeps at least.
#[derive(Debug, Args)]
pub(crate) struct SpanArgs {
    /// First positions of the context that every head sees [default: 64 where a head keeps four times that on
    /// average at the shortest length, else an eighth of what it keeps, as a power of two from 4 up]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub(crate) sink: Option<usize>,
    /// Smallest span of any head, sink included [default: 16 more than the sink]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub(crate) min_span: Option<usize>,
}

/// What a plan must not harm.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ObjectiveArgs {
    /// What a plan must not harm
    #[arg(long, default_value = "margin", value_parser = objective_parser())]
    pub(crate) objective: Objective,
    /// How much each token of a response counts: all alike (uniform), or by its cross entropy under
    /// dense attention (hard)
    #[arg(long, default_value = "uniform", value_name = "WEIGHT", value_parser = weight_parser())]
    pub(crate) token_weight: TokenWeight,
}

fn weight_parser() -> impl TypedValueParser<Value = TokenWeight> {
    PossibleValuesParser::new(TokenWeight::ALL.map(|(_, name)| name))
        .try_map(|name| name.parse::<TokenWeight>())
}

/// Parses an [`Objective`], listing its names in the help.
fn objective_parser() -> impl TypedValueParser<Value = Objective> {
    PossibleValuesParser::new(Objective::ALL.map(|(_, name)| name))
        .try_map(|name| name.parse::<Objective>())
}

/// Parses a [`Space`], listing its names in the help.
pub(crate) fn space_parser() -> impl TypedValueParser<Value = Space> {
    PossibleValuesParser::new(Space::ALL.map(|(_, name)| name))
        .try_map(|name| name.parse::<Space>())
}

/// Parses a [`Task`], listing their names in the help.
pub(crate) fn task_parser() -> impl TypedValueParser<Value = Task> {
    PossibleValuesParser::new(Task::ALL.map(|(_, name)| name)).try_map(|name| name.parse::<Task>())
}

/// The values of a list, each once, in their order.
pub(crate) fn distinct<T: PartialEq + Copy>(list: &[T]) -> Vec<T> {
    let is_first = |(index, value): &(usize, &T)| !list[..*index].contains(value);
    list.iter().enumerate().filter(is_first).map(|(_, value)| *value).collect()
}

/// A share of the context in (0, 1].
pub(crate) fn parse_density(text: &str) -> Result<f64, Error> {
    let fault = || Error::argument("density", "a number above 0 and at most 1", text);
    let density: f64 = text.parse().map_err(|_| fault())?;
    if density > 0.0 && density <= 1.0 { Ok(density) } else { Err(fault()) }
}

/// A count or a length of at least 1.
pub(crate) fn parse_count(text: &str) -> Result<usize, Error> {
    let fault = || Error::argument("count", "a whole number from 1 to 2^31", text);
    text.parse().ok().filter(|n| (1..=MAX_LENGTH).contains(n)).ok_or_else(fault)
}

/// A count or a length that may be 0.
pub(crate) fn parse_size(text: &str) -> Result<usize, Error> {
    let fault = || Error::argument("count", "a whole number from 0 to 2^31", text);
    text.parse().ok().filter(|n| *n <= MAX_LENGTH).ok_or_else(fault)
}

/// A number of depth bins.
pub(crate) fn parse_depth_bins(text: &str) -> Result<usize, Error> {
    let fault = || Error::argument("depth bins", "a whole number from 1 to 10", text);
    text.parse().ok().filter(|n| (1..=10).contains(n)).ok_or_else(fault)
}

fn parse_threads(text: &str) -> Result<usize, Error> {
    let fault = || Error::argument("threads", "a whole number from 1 to 1024", text);
    text.parse().ok().filter(|n| (1..=1024).contains(n)).ok_or_else(fault)
}

/// `layer:kv_head`.
pub(crate) fn parse_head(text: &str) -> Result<(usize, usize), Error> {
    let fault = || Error::argument("head", "LAYER:KV_HEAD, such as 3:0", text);
    let (layer, head) = text.split_once(':').ok_or_else(fault)?;
    Ok((layer.trim().parse().map_err(|_| fault())?, head.trim().parse().map_err(|_| fault())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_with_what_is_expected() {
        for text in ["0", "-0.1", "1.01", "nan", "inf", "half", ""] {
            let message = parse_density(text).unwrap_err().to_string();
            assert!(message.contains("above 0 and at most 1"), "{message}");
        }
        assert_eq!(parse_density("1").unwrap(), 1.0);
        assert!(parse_count("0").is_err() && parse_count("-3").is_err());
        assert_eq!((parse_size("0").unwrap(), parse_count("2147483648").unwrap()), (0, 1 << 31));
        for text in ["2147483649", "9223372036854775808", "18446744073709551615", "1e30"] {
            assert!(parse_count(text).is_err() && parse_size(text).is_err(), "{text}");
        }
        assert!(parse_threads("0").is_err() && parse_threads("4096").is_err());
        assert_eq!(parse_head("3:0").unwrap(), (3, 0));
        assert!(parse_head("3").is_err() && parse_head("a:b").is_err());
    }

    #[test]
    fn unknown_device_says_what_there_is() {
        for name in ["tpu", "cuda:", "cuda:x", "cuda0", "cuda:-1", "wgpu:", "wgpu:x", "wgpu0", ""] {
            let message = name.parse::<Device>().unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("cpu"), "{message}");
        }
        assert_eq!("cpu".parse::<Device>().unwrap(), Device::Cpu);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_cuda_names_the_feature() {
        let message = "cuda:1".parse::<Device>().unwrap_err().to_string();
        assert!(message.contains("--features cuda"), "{message}");
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn gpus_are_counted_from_0() {
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        assert_eq!("cuda:3".parse::<Device>().unwrap(), Device::Cuda(3));
    }

    #[test]
    #[cfg(not(feature = "wgpu"))]
    fn a_build_without_wgpu_names_the_feature() {
        let message = "wgpu".parse::<Device>().unwrap_err().to_string();
        assert!(message.contains("--features wgpu"), "{message}");
    }

    #[test]
    #[cfg(feature = "wgpu")]
    fn an_adapter_is_numbered_or_chosen_by_wgpu() {
        assert_eq!("wgpu".parse::<Device>().unwrap(), Device::Wgpu(None));
        assert_eq!("wgpu:1".parse::<Device>().unwrap(), Device::Wgpu(Some(1)));
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn several_gpus_keep_their_order() {
        let Device::CudaGroup(gpus) = "cuda:2,0,3".parse::<Device>().unwrap() else {
            panic!("not a group")
        };
        assert_eq!(gpus.ordinals(), [2, 0, 3]);
        for name in ["cuda:0,0", "cuda:0,", "cuda:,1", "cuda:0,x", "cuda:0,1,999"] {
            let message = name.parse::<Device>().unwrap_err().to_string();
            assert!(message.contains("cuda:N,M,.."), "{message}");
        }
    }
}
