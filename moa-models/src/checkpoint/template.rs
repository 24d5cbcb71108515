use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

use crate::checkpoint::json::JsonObject;
use crate::checkpoint::json_style::python_json;
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::date::Date;
use crate::error::{Error, Result};

/// Instructions a template may execute; each also stands for 64 bytes of memory it may make.
const FUEL: u64 = 1_000_000;
const NAME: &str = "chat_template";

/// FastChat's `vicuna_v1.1`: a system line, then `USER: ... ASSISTANT: ...</s>`.
const VICUNA: &str = "\
{{ bos_token }}\
{% if messages and messages[0].role == 'system' %}\
{% set system = messages[0].content %}{% set messages = messages[1:] %}\
{% else %}\
{% set system = \"A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.\" %}\
{% endif %}\
{{ system + ' ' }}\
{% for message in messages %}\
{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}\
{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}\
{% else %}{{ raise_exception('no role ' + message.role + ' in a Vicuna chat') }}\
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

/// Llama 2 chat: `[INST] <<SYS>> ... <</SYS>> ... [/INST] ... </s>`.
const LLAMA2: &str = "\
{% set system = '' %}\
{% if messages and messages[0].role == 'system' %}\
{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}\
{% set messages = messages[1:] %}\
{% endif %}\
{% for message in messages %}\
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user, assistant, user, ...') }}\
{% elif message.role == 'user' %}\
{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}\
{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}\
{% endif %}\
{% endfor %}";

/// Llama 3 instruct, without the date lines of 3.1 and later.
const LLAMA3: &str = "\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}\
{{ message.content | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Instructions before the first turn.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// A Jinja template that turns messages into the text a chat model was trained on.
///
/// Templates are run as transformers runs them (`trim_blocks`, `lstrip_blocks`,
/// `raise_exception`, `strftime_now`, Python's string methods), but under a budget of
/// instructions and memory: a template is a program by a stranger.
///
/// The text begins with the begin-of-sequence token where the template says so, so it is encoded
/// with `add_special = false`. Special tokens spelled out in a message become those tokens.
///
/// ```
/// use moa_models::{ChatTemplate, Message};
///
/// let chat = [Message::user("Hello!"), Message::assistant("Hi."), Message::user("Bye.")];
/// let text = ChatTemplate::llama2()?.render(&chat, true)?;
/// assert_eq!(text, "<s>[INST] Hello! [/INST] Hi. </s><s>[INST] Bye. [/INST]");
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: SpecialTokens,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, or `chat_template` in
    /// `tokenizer_config.json` (of several the one named `default`). `None` when there is neither.
    ///
    /// Vicuna's checkpoints come without: a folder whose name, or whose `_name_or_path` in
    /// `config.json`, contains `vicuna` gets [`vicuna`](Self::vicuna).
    ///
    /// # Errors
    /// [`Error::Template`] when it does not compile, [`Error::Io`], [`Error::Json`] and
    /// [`Error::Config`] for the files.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let tokens = SpecialTokens::from_dir(dir)?;
        let file = dir.join("chat_template.jinja");
        if file.is_file() {
            let source = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
            return Self::compile(source, tokens).map(Some);
        }
        let file = dir.join("tokenizer_config.json");
        if file.is_file()
            && let Some(source) = source(&JsonObject::read(&file)?)?
        {
            return Self::compile(source, tokens).map(Some);
        }
        if is_vicuna(dir) {
            tracing::info!(dir = %dir.display(), "no chat template; taking Vicuna's");
            return Self::vicuna().map(Some);
        }
        Ok(None)
    }

    /// A template from its source, with the texts of the begin and end tokens it may use.
    ///
    /// # Errors
    /// [`Error::Template`] when it does not compile.
    pub fn new(source: impl Into<String>, bos_token: &str, eos_token: &str) -> Result<Self> {
        Self::compile(source.into(), SpecialTokens::new(bos_token, eos_token))
    }

    /// The template of Vicuna v1.1 and v1.5, with FastChat's default system line.
    ///
    /// # Errors
    /// [`Error::Template`] if the built-in template does not compile, which the tests exclude.
    pub fn vicuna() -> Result<Self> {
        Self::new(VICUNA, "<s>", "</s>")
    }

    /// The template of Llama 2 chat.
    ///
    /// # Errors
    /// [`Error::Template`] if the built-in template does not compile, which the tests exclude.
    pub fn llama2() -> Result<Self> {
        Self::new(LLAMA2, "<s>", "</s>")
    }

    /// The template of Llama 3 instruct.
    ///
    /// # Errors
    /// [`Error::Template`] if the built-in template does not compile, which the tests exclude.
    pub fn llama3() -> Result<Self> {
        Self::new(LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    }

    /// Fixes the date that `strftime_now` gives, which is else the time of each rendering in UTC.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such day.
    pub fn with_date(mut self, year: i32, month: u32, day: u32) -> Result<Self> {
        let date = Date::new(year, month, day).ok_or_else(|| {
            Error::invalid("date", "a day of the calendar", format!("{year}-{month}-{day}"))
        })?;
        add_strftime(&mut self.environment, move || date);
        Ok(self)
    }

    /// The text of `messages`; with `add_generation_prompt` it ends where the model's answer
    /// begins.
    ///
    /// # Errors
    /// [`Error::Template`] when the template raises an exception or exceeds its budget.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut environment = self.environment.clone();
        // A long document is no misuse: what comes in may also be copied a few times.
        let len: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        environment.set_fuel(Some(FUEL.saturating_add(len as u64)));
        let tokens = Value::from_pairs(self.tokens.iter());
        let turn =
            |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
        let turns: Vec<Value> = messages.iter().map(turn).collect();
        let context = context! {
            messages => turns,
            add_generation_prompt,
            // transformers passes both even when there are none.
            tools => Value::from(()),
            documents => Value::from(()),
            ..tokens
        };
        environment.get_template(NAME).and_then(|t| t.render(context)).map_err(fail)
    }

    fn compile(source: String, tokens: SpecialTokens) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(fail)?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        add_strftime(&mut environment, Date::now);
        environment.add_template_owned(NAME, source).map_err(fail)?;
        Ok(Self { environment, tokens })
    }
}

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

fn add_strftime(
    environment: &mut Environment<'_>,
    date: impl Fn() -> Date + Send + Sync + 'static,
) {
    environment.add_function("strftime_now", move |format: &str| {
        date().strftime(format).map_err(|directive| {
            let message = format!("strftime_now knows no directive {directive}");
            minijinja::Error::new(ErrorKind::InvalidOperation, message)
        })
    });
}

/// `json.dumps` of Python; minijinja's own escapes HTML.
fn tojson(value: Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    kwargs.assert_all_used()?;
    python_json(&value, indent).map_err(|e| {
        minijinja::Error::new(ErrorKind::BadSerialization, "cannot be written as JSON")
            .with_source(e)
    })
}

fn fail(error: minijinja::Error) -> Error {
    let out_of_fuel = error.kind() == ErrorKind::OutOfFuel;
    Error::Template { reason: error.to_string(), out_of_fuel }
}

/// The template's source in a `tokenizer_config.json`.
fn source(config: &JsonObject) -> Result<Option<String>> {
    let expected = "a template, or a list of {name, template} with one named default";
    match config.get(NAME) {
        None => Ok(None),
        Some(serde_json::Value::String(source)) => Ok(Some(source.clone())),
        Some(value) => {
            let list = value.as_array().map_or(&[][..], Vec::as_slice);
            let default = list.iter().find(|one| one["name"] == "default");
            let source = default.and_then(|one| one["template"].as_str());
            source.map(|s| Some(s.to_owned())).ok_or_else(|| config.invalid(NAME, expected, value))
        }
    }
}

fn is_vicuna(dir: &Path) -> bool {
    let contains = |name: &str| name.to_lowercase().contains("vicuna");
    let folder = dir.file_name().is_some_and(|name| contains(&name.to_string_lossy()));
    let origin = || {
        let config = JsonObject::read(&dir.join("config.json")).ok()?;
        config.text("_name_or_path").ok()?.map(contains)
    };
    folder || origin().unwrap_or(false)
}
