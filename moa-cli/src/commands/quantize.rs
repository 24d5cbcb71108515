use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use moa_models::{BlockType, Quantized};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::check_file;
use crate::model;
use crate::output::{Context, bytes};
use crate::progress::Progress;

/// Write a model as a GGUF file of quantised blocks
///
/// Architectures: llama, mistral, qwen2, qwen3. The matrix that makes the logits gets Q6_K (in a file of Q8_0
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
    /// Type of the blocks: 8.5 bits for each weight, 4.5, or 4.5 and better, where rows are multiples of 256
    #[arg(long = "type", value_name = "TYPE")]
    kind: BlockKind,
    /// File to write
    #[arg(long, value_name = "FILE.gguf")]
    out: PathBuf,
    /// Write over a file that is there
    #[arg(long)]
    force: bool,
}

/// [`BlockType`] as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BlockKind {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k")]
    Q4K,
}

impl From<BlockKind> for BlockType {
    fn from(flag: BlockKind) -> Self {
        match flag {
            BlockKind::Q8_0 => Self::Q8_0,
            BlockKind::Q4_0 => Self::Q4_0,
            BlockKind::Q4K => Self::Q4K,
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    if args.out.exists() && !args.force {
        let got = format!("{}, which exists", args.out.display());
        return Err(Error::argument("--out", "a new file, or --force given", got));
    }
    check_file(&args.out)?;
    let folder = model::folder(&args.model, context)?;
    let mut bar = Progress::of_stages(context);
    let quantized = moa_models::quantize(&folder, args.kind.into(), &args.out, &mut bar)?;
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
