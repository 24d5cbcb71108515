use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use moa_core::Dtype;
use moa_models::{BlockType, Quantized, TensorType};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::Files;
use crate::interrupt;
use crate::model;
use crate::output::{Context, bytes};
use crate::progress::Progress;

/// Write a model as a GGUF file, quantised or as it is
///
/// Architectures: all that moa reads. In a file of blocks the matrix that makes the logits gets Q6_K (in one of Q8_0
/// that), vectors stay in f32. Configuration, tokenizer and chat template go into the file, and are read back
/// and compared before the file gets its name.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa quantize --model assets/moa-tiny --type q8_0 --out moa-tiny.gguf"
)]
pub(crate) struct Args {
    /// Model folder (config.json and *.safetensors), a GGUF file, or a model of the hub
    #[arg(long, value_name = "DIR|FILE.gguf|OWNER/NAME[/FILE.gguf][@REVISION]")]
    model: PathBuf,
    /// Type of the matrices: 8.5 bits for each weight, 4.5, 4.5 and better where rows are multiples of 256, or numbers
    #[arg(long = "type", value_name = "TYPE")]
    kind: Kind,
    /// File to write
    #[arg(long, value_name = "FILE.gguf")]
    out: PathBuf,
    /// Write over a file that is there
    #[arg(long)]
    force: bool,
}

/// [`TensorType`] as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k")]
    Q4K,
    F16,
    Bf16,
    F32,
}

impl From<Kind> for TensorType {
    fn from(flag: Kind) -> Self {
        match flag {
            Kind::Q8_0 => BlockType::Q8_0.into(),
            Kind::Q4_0 => BlockType::Q4_0.into(),
            Kind::Q4K => BlockType::Q4K.into(),
            Kind::F16 => Dtype::F16.into(),
            Kind::Bf16 => Dtype::Bf16.into(),
            Kind::F32 => Dtype::F32.into(),
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    if args.out.exists() && !args.force {
        let got = format!("{}, which exists", args.out.display());
        return Err(Error::argument("--out", "a new file, or --force given", got));
    }
    Files::default().reads([&args.model]).writes("--out", &args.out)?;
    let folder = model::folder(&args.model, context)?;
    // The file that is begun goes.
    interrupt::watch();
    let mut bar = Progress::of_stages(context);
    let quantized = moa_models::quantize(&folder, args.kind, &args.out, &mut bar)?;
    drop(bar);
    context.result(&Written { file: args.out.clone(), quantized })
}

/// What was written, as it is shown.
#[derive(Debug, Serialize)]
struct Written {
    file: PathBuf,
    #[serde(flatten)]
    quantized: Quantized,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Quantized { bytes: size, bits_per_weight, tensors, error } = &self.quantized;
        let types: Vec<String> = tensors.iter().map(|(name, n)| format!("{n} {name}")).collect();
        writeln!(
            f,
            "{}: {}, {bits_per_weight:.2} bits a weight",
            self.file.display(),
            bytes(*size as u64)
        )?;
        write!(f, "tensors {}; error {:.2} % of the weights' size", types.join(", "), 100.0 * error)
    }
}
