use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};

use moa_models::{
    ChatTemplate, Checkpoint, GenerationConfig, KnownTexts, Math, PromptStyle, Tokenizer,
};
use serde_json::{Value, json};

use crate::grammar::Vocabulary;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use crate::worker::Command;

/// Bytes of conversations whose tokens are remembered.
const KNOWN_BYTES: usize = 8 << 20;

/// What handlers and the loop share. It knows nothing of the device.
pub(crate) struct State {
    pub(crate) options: ServerOptions,
    pub(crate) model: ModelInfo,
    pub(crate) text: TextSide,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) commands: mpsc::Sender<Command>,
    /// No new request is taken.
    pub(crate) stopping: AtomicBool,
    next_id: AtomicU64,
}

/// What clients are told of the model.
pub(crate) struct ModelInfo {
    pub(crate) name: String,
    pub(crate) created: u64,
    /// Longest prompt and answer together.
    pub(crate) context: usize,
    pub(crate) vocab_size: usize,
    /// Some heads forget keys in a sequence of that length.
    pub(crate) has_rings: bool,
    pub(crate) default_max_tokens: usize,
    /// Tells one model and plan from others.
    pub(crate) fingerprint: String,
    /// What the page shows of the plan.
    pub(crate) plan: Value,
}

/// Texts to tokens and back.
pub(crate) struct TextSide {
    pub(crate) tokenizer: Tokenizer,
    /// Conversations of late, which their next turns begin with.
    pub(crate) known: KnownTexts,
    /// `None` where the model has none, or texts are continued as they are.
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) generation: GenerationConfig,
    /// Tokens that end a text.
    #[cfg(feature = "grammar")]
    pub(crate) eos: Vec<u32>,
    pub(crate) vocabulary: Vocabulary,
}

impl State {
    pub(crate) fn new<D: Math>(
        checkpoint: &Checkpoint<D>,
        plan: Value,
        plan_fingerprint: &str,
        has_rings: bool,
        options: ServerOptions,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        let context = options.context(&checkpoint.model);
        let said = checkpoint.generation.max_new_tokens;
        let default_max_tokens =
            options.default_max_tokens.or(said.filter(|n| *n > 0)).unwrap_or(1024);
        let style = checkpoint.prompt_style();
        let template = match style {
            PromptStyle::Chat => checkpoint.template().ok().cloned(),
            PromptStyle::Raw => None,
        };
        let name = options.model_name.clone().unwrap_or_else(|| file_name(checkpoint.folder()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            model: ModelInfo {
                name,
                created: now.as_secs(),
                context,
                vocab_size: checkpoint.model.config().vocab_size,
                has_rings,
                default_max_tokens,
                fingerprint: format!("{}-{plan_fingerprint}", checkpoint.model.fingerprint()),
                plan,
            },
            text: TextSide {
                tokenizer: checkpoint.tokenizer.clone(),
                known: KnownTexts::new(&checkpoint.tokenizer, KNOWN_BYTES),
                template,
                generation: checkpoint.generation.clone(),
                #[cfg(feature = "grammar")]
                eos: checkpoint.eos_token_ids(),
                vocabulary: Vocabulary::default(),
            },
            metrics: Arc::default(),
            commands,
            stopping: AtomicBool::new(false),
            // Ids of two runs of the server differ.
            next_id: AtomicU64::new(u64::try_from(now.as_nanos()).unwrap_or(0)),
            options,
        }
    }

    /// A number that no other request has.
    pub(crate) fn unique(&self) -> u64 {
        let next = self.next_id.fetch_add(1, Ordering::Relaxed);
        moa_core::SplitMix64::new(next).next_u64()
    }

    /// What `GET /v1/models` says of the model.
    pub(crate) fn model_object(&self) -> Value {
        json!({
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "moa",
            "max_model_len": self.model.context,
        })
    }
}

fn file_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".to_owned())
}
