use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a model folder and its text.
///
/// Every variant says where it happened, what was expected and what came. The crate never panics
/// on a bad file or a bad argument.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A link leads nowhere: the file that it stands for was moved, deleted or never fetched.
    #[error("{}: a link to {}, which does not exist", path.display(), target.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// What it leads to.
        target: PathBuf,
    },

    /// A file is what git keeps in place of a large file.
    #[error(
        "{}: a git-lfs pointer, not the file itself; `git lfs pull` in its folder fetches the file",
        path.display()
    )]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },

    /// A saved sequence is damaged, or another model's, plan's or device's.
    #[error("saved sequence: {place}: expected {expected}, got {got}")]
    SavedSequence {
        /// The part of it.
        place: String,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },

    /// A model is to guess for another one, and has other tokens.
    #[error(
        "{}: expected token `{token}` to be {id}, as in the model that it guesses for, got {}",
        path.display(),
        got.map_or("no such token".to_owned(), |id| id.to_string())
    )]
    DraftVocabulary {
        /// Its tokenizer.
        path: PathBuf,
        /// The token's text.
        token: String,
        /// The id of the model that answers.
        id: u32,
        /// The id that it has.
        got: Option<u32>,
    },

    /// A file is not the JSON it should be: bad syntax, or the same key twice.
    #[error("{}: not a valid JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser met and where, with line and column.
        reason: String,
    },

    /// A configuration file lacks a field that has no default.
    #[error("{}: field `{field}` is missing", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The field, with dots between nested objects.
        field: String,
    },

    /// A field of a configuration file has a value that no supported model has.
    #[error("{}: field `{field}` must be {expected}, got {got}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, with dots between nested objects.
        field: String,
        /// The values it may have.
        expected: String,
        /// The value found.
        got: String,
    },

    /// A folder is no model's.
    #[error("{}: no config.json, expected a model folder or a GGUF file, got {got}", path.display())]
    NoConfig {
        /// The folder.
        path: PathBuf,
        /// What lies there instead.
        got: String,
    },

    /// A folder holds no safetensors weights.
    #[error("{}: no weights: expected `model.safetensors` or `model.safetensors.index.json`, got {got}", path.display())]
    NoWeights {
        /// The model folder.
        path: PathBuf,
        /// What lies there instead.
        got: String,
    },

    /// A safetensors file is truncated, overlapping or otherwise not what its header says.
    #[error("{}: not a valid safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A GGUF file is truncated, contradicts itself, or is of a kind that is not known.
    #[error("{}: GGUF: {place} must be {expected}, got {got}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The key, the tensor or the part of the header.
        place: String,
        /// What it may be.
        expected: String,
        /// What was found.
        got: String,
    },

    /// A shard is not there that the index, another file, or the number in the other shards' names, says of.
    #[error("{}: shard `{shard}` is missing, expected beside the others", index.display())]
    ShardMissing {
        /// The index file, the first one of several GGUF files, or the folder where there is none.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
    },

    /// The index of a sharded checkpoint names something other than a file beside it.
    #[error("{}: shard `{shard}` must be a plain file name beside the index", index.display())]
    ShardName {
        /// The index file.
        index: PathBuf,
        /// The name found.
        shard: String,
    },

    /// Two shards have tensors of one name that differ.
    #[error("tensor `{name}` lies in two files and differs, {} and {}", first.display(), second.display())]
    TensorTwice {
        /// The tensor.
        name: String,
        /// One of the files.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },

    /// A tensor that the model or the index needs is not there.
    #[error("{}: tensor `{name}` is missing", path.display())]
    TensorMissing {
        /// The file or folder searched.
        path: PathBuf,
        /// The tensor.
        name: String,
    },

    /// A tensor has another shape than the configuration asks for.
    #[error("{}: tensor `{name}` must have shape {expected:?}, got {got:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that follows from the configuration.
        expected: Vec<usize>,
        /// The shape found.
        got: Vec<usize>,
    },

    /// A tensor has no plain floating-point elements; quantised checkpoints are not supported.
    #[error(
        "{}: tensor `{name}` must have elements F32, F16 or BF16, got {got} \
         (quantised checkpoints are not supported)",
        path.display()
    )]
    TensorDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The element type found.
        got: String,
    },

    /// A checkpoint has tensors that the model of its configuration does not have.
    #[error(
        "{}: {} that the configuration does not ask for: {}; without them the model may say something \
         else; open it with ignore_extra_tensors (--ignore-extra-tensors) to go on",
        path.display(),
        count(names.len()),
        listed(names)
    )]
    TensorsUnread {
        /// The model folder, or the GGUF file.
        path: PathBuf,
        /// All of them.
        names: Vec<String>,
    },

    /// The weights are quantised in a way that cannot be read.
    #[error(
        "{}: the weights are quantised ({scheme}), which cannot be read; take the model's checkpoint in \
         16 bits",
        path.display()
    )]
    Quantized {
        /// The model folder.
        path: PathBuf,
        /// The way, such as `GPTQ, 4 bits`.
        scheme: String,
    },

    /// A model folder has neither `tokenizer.json` nor a `tokenizer.model` of SentencePiece.
    #[error(
        "{0}: no tokenizer.json nor SentencePiece's tokenizer.model, got {got}; transformers writes one: python -c \"from transformers import \
         AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained('{0}')\"",
        path.display()
    )]
    NoTokenizer {
        /// The model folder.
        path: PathBuf,
        /// What lies there instead.
        got: String,
    },

    /// A tokenizer could not be loaded, or refused a text or a token.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What the tokenizer says.
        reason: String,
    },

    /// The tokenizer belongs to a model of another vocabulary.
    #[error(
        "{}: tokenizer of another vocabulary: token `{token}` has id {id}, \
         the model's vocabulary ends before {vocab_size}",
        path.display()
    )]
    TokenizerVocabulary {
        /// The tokenizer file.
        path: PathBuf,
        /// The token with the highest id.
        token: String,
        /// Its id.
        id: u32,
        /// `vocab_size` of the model's configuration.
        vocab_size: usize,
    },

    /// The model folder has no chat template, and none was chosen by the caller.
    #[error(
        "{}: no chat template: expected `chat_template` in tokenizer_config.json or a file \
         chat_template.jinja; choose one by name or file (--template), or raw prompts (--raw)",
        path.display()
    )]
    NoChatTemplate {
        /// The model folder.
        path: PathBuf,
    },

    /// A chat template does not compile, raised an exception or did not end within its budget.
    #[error("chat template: {reason}")]
    Template {
        /// What the template engine says, with the line.
        reason: String,
        /// The template used up its budget of instructions and memory.
        out_of_fuel: bool,
    },

    /// An argument is out of its range.
    #[error("{what} must be {expected}, got {got}")]
    Invalid {
        /// The argument.
        what: &'static str,
        /// The values it may have.
        expected: String,
        /// The value that came.
        got: String,
    },

    /// The logits of a step cannot be sampled from.
    #[error("logits must be finite for at least one token and never NaN, got {got}")]
    Logits {
        /// What was found, with the token id.
        got: String,
    },

    /// A sequence would grow past what the model or the open context allows.
    #[error("context of {asked} tokens asked for, at most {limit} allowed")]
    ContextExceeded {
        /// Tokens needed, or the fewest that a text can have which was not cut into tokens.
        asked: usize,
        /// Tokens allowed.
        limit: usize,
    },

    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,

    /// A line of a JSON Lines file is not what it should be.
    #[error("{}, line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },

    /// A question of an evaluation cannot be asked.
    #[error("{place}: {source}")]
    Question {
        /// Where the question comes from, such as a file and the number of a case in it.
        place: String,
        /// What is wrong with it.
        source: Box<Error>,
    },

    /// A file of results was written under other settings than those of this run.
    #[error(
        "{}: written with {setting} = {got}, not {expected}; name another file or use the same settings",
        path.display()
    )]
    OtherSettings {
        /// The file.
        path: PathBuf,
        /// The setting.
        setting: String,
        /// Its value in this run.
        expected: String,
        /// Its value in the file.
        got: String,
    },

    /// Another run has the file open.
    #[error("{}: another run writes this file; wait for its end or name another file", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },

    /// A result is infinite or no number.
    #[error("{what} must be finite, got {got}")]
    NotFinite {
        /// What was computed, with the layer, the head and the position as far as they are known.
        what: String,
        /// The value that came.
        got: String,
    },

    /// No calibration item could be made for a length.
    #[error("no calibration item of {length} tokens: {reason}")]
    NoCalibration {
        /// The length.
        length: usize,
        /// Why.
        reason: String,
    },

    /// A plan, profile, search or cache refused its input.
    #[error(transparent)]
    Core(#[from] moa_core::Error),

    /// A device with another part of the model failed, or was given up before a step was done.
    #[error("rank {rank}, which has another part of the model, failed or left")]
    Rank {
        /// The rank, from 0.
        rank: usize,
    },

    /// A device with another part of the model hangs, or is far behind.
    #[error("rank {rank}, which has another part of the model, did not come within {seconds} s")]
    RankSilent {
        /// The rank, from 0.
        rank: usize,
        /// How long it was waited for.
        seconds: f64,
    },

    /// A device's memory was too short for what all that share the model were to do, so that none of them has done it. All
    /// get this, and can go on.
    #[error("rank {rank}, which has a part of the model: {reason}")]
    RankOutOfMemory {
        /// The rank, from 0.
        rank: usize,
        /// Its [`Error::OutOfMemory`].
        reason: String,
    },

    /// A step of several requests failed, of which this one was part.
    #[error("a step of the batch failed: {reason}")]
    Step {
        /// The error of the step.
        reason: String,
        /// Whether [memory was too short](Error::is_out_of_memory): a smaller step, or one of fewer requests, may have the
        /// memory that it needs.
        out_of_memory: bool,
    },

    /// The device has not enough memory: less of it may be asked for.
    #[error("{what}: {}", shortage(*bytes, *free))]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for, where they are known.
        bytes: Option<u64>,
        /// Bytes that were free, where they are known.
        free: Option<u64>,
    },

    /// The device failed.
    #[error("device: {0}")]
    Backend(Box<dyn std::error::Error + Send + Sync>),

    /// A file could not be had from the hub.
    #[cfg(feature = "hub")]
    #[error("download of `{file}` of `{model}`: {reason}")]
    Download {
        /// The model id, `owner/name`.
        model: String,
        /// The file asked for.
        file: String,
        /// What the hub or the network says.
        reason: String,
    },

    /// Which of a repository's GGUF files a model of the hub is, its name does not say.
    #[cfg(feature = "hub")]
    #[error(
        "{id}: {}",
        match (&files[..], several) {
            ([], _) => "there is no GGUF file".to_owned(),
            (_, true) => format!("that may be several GGUF files; name one, as owner/name/FILE: {}", files.join(", ")),
            (_, false) => format!("there is no such GGUF file; there is {}", files.join(", ")),
        }
    )]
    HubFile {
        /// The model that was asked for.
        id: String,
        /// Whether several files may be meant, or else none.
        several: bool,
        /// The GGUF files that there are; of a model in several the first.
        files: Vec<String>,
    },
}

impl From<moa_backend_cpu::Error> for Error {
    fn from(source: moa_backend_cpu::Error) -> Self {
        use moa_backend_cpu::Error::{Core, OutOfMemory};
        match source {
            Core(error) => error.into(),
            OutOfMemory { what, bytes } => {
                Self::OutOfMemory { what, bytes: Some(bytes), free: None }
            }
            other => Self::Backend(Box::new(other)),
        }
    }
}

#[cfg(feature = "cuda")]
impl From<moa_backend_cuda::Error> for Error {
    fn from(source: moa_backend_cuda::Error) -> Self {
        use moa_backend_cuda::Error::{Core, Driver, HostMemory, OutOfMemory};
        match source {
            Core(error) => error.into(),
            OutOfMemory { what, bytes, free } => {
                Self::OutOfMemory { what, bytes: Some(bytes), free: Some(free) }
            }
            HostMemory { what, bytes } => {
                Self::OutOfMemory { what, bytes: Some(bytes), free: None }
            }
            // The driver's own number for it, where a graph or a module takes memory.
            Driver { call, code: 2, .. } => {
                Self::OutOfMemory { what: call, bytes: None, free: None }
            }
            other => Self::Backend(Box::new(other)),
        }
    }
}

#[cfg(feature = "wgpu")]
impl From<moa_backend_wgpu::Error> for Error {
    fn from(source: moa_backend_wgpu::Error) -> Self {
        use moa_backend_wgpu::Error::{Core, OutOfMemory};
        match source {
            Core(error) => error.into(),
            OutOfMemory { what, bytes } => {
                Self::OutOfMemory { what, bytes: Some(bytes), free: None }
            }
            other => Self::Backend(Box::new(other)),
        }
    }
}

fn count(tensors: usize) -> String {
    if tensors == 1 { "a tensor".to_owned() } else { format!("{tensors} tensors") }
}

/// The first few of many names.
fn listed(names: &[String]) -> String {
    let more = if names.len() > 4 { ", .." } else { "" };
    format!("{}{more}", names[..names.len().min(4)].join(", "))
}

/// What an out-of-memory error knows: the bytes asked for, and those that were free.
fn shortage(bytes: Option<u64>, free: Option<u64>) -> String {
    let bytes = bytes.map_or(String::new(), |bytes| format!("{bytes} bytes of "));
    let free = free.map_or(String::new(), |free| format!(", {free} are free"));
    format!("cannot allocate {bytes}memory{free}")
}

impl Error {
    /// An [`Error::Io`] at `path`.
    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// An [`Error::Gguf`]: `place` of the file `path` must be `expected`, but is `got`.
    pub(crate) fn gguf(path: &Path, place: &str, expected: &str, got: impl fmt::Display) -> Self {
        Self::Gguf {
            path: path.to_owned(),
            place: place.to_owned(),
            expected: expected.to_owned(),
            got: got.to_string(),
        }
    }

    /// Whether memory was too short, here or on another device that has a part of the model: less of it may be asked for.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(
            self,
            Self::OutOfMemory { .. }
                | Self::RankOutOfMemory { .. }
                | Self::Step { out_of_memory: true, .. }
        )
    }

    /// Whether it is about what was asked for, and so comes on every device that shares a model.
    pub(crate) fn is_of_request(&self) -> bool {
        matches!(self, Self::Invalid { .. } | Self::ContextExceeded { .. } | Self::Core(_))
    }

    /// An [`Error::Invalid`]: `what` must be `expected`, but is `got`.
    pub(crate) fn invalid(
        what: &'static str,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        Self::Invalid { what, expected: expected.into(), got: got.to_string() }
    }
}
