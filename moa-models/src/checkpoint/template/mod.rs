//! Chat templates.

mod guard;
mod json_style;
mod named;
mod python;
mod rewrite;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

use crate::checkpoint::fingerprint::fingerprint;
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::checkpoint::text::{is_file, read_text};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::date::Date;
use crate::error::{Error, Result};

/// Instructions a template may execute; each also stands for 64 bytes of memory it may make.
const FUEL: u64 = 1_000_000;
/// Stack of the thread that a template runs on: its nesting is the stranger's choice, and is bounded by
/// the template's tokens and its budget.
const STACK: usize = 256 << 20;
/// Time that a template has, and more for long messages: what its budget does not count, such as comparisons, has
/// an end here.
const TIME: Duration = Duration::from_secs(4);
/// Bytes of messages for another second.
const BYTES_A_SECOND: usize = 10 << 20;
/// Most bytes of a template's source: some ten times those of the longest known.
const MOST_SOURCE: usize = 512 << 10;
const NAME: &str = "chat_template";

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
/// `raise_exception`, `strftime_now`, `{% generation %}` blocks, Python's string methods), but under a
/// budget of instructions and memory: a template is a program by a stranger.
///
/// The text begins with the begin-of-sequence token where the template says so, so it is encoded
/// with `add_special = false`. Special tokens spelled out in a message become those tokens.
///
/// ```
/// use moa_models::{ChatTemplate, Message};
///
/// let chat = [Message::user("Hello!"), Message::assistant("Hi."), Message::user("Bye.")];
/// let text = ChatTemplate::llama2().render(&chat, true)?;
/// assert_eq!(text, "<s>[INST] Hello! [/INST] Hi. </s><s>[INST] Bye. [/INST]");
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
    tokens: SpecialTokens,
    date: Option<Date>,
    /// Made when it is first needed: a template that does not compile is no harm to those who use none.
    compiled: Arc<OnceLock<std::result::Result<Environment<'static>, Fault>>>,
    /// It did not end in time: its thread cannot be stopped, and there shall be no second one.
    hangs: Arc<AtomicBool>,
}

/// What is wrong with a template's source.
#[derive(Clone, Debug)]
struct Fault {
    reason: String,
    out_of_fuel: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, `chat_template` in
    /// `tokenizer_config.json`, or `chat_template.json`, which processors have (of several templates the
    /// one named `default`). `None` when there is none.
    ///
    /// Vicuna's checkpoints come without: a folder whose name, or whose `_name_or_path` in
    /// `config.json`, contains `vicuna` gets [`vicuna`](Self::vicuna).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DanglingLink`], [`Error::LfsPointer`], [`Error::Json`] and
    /// [`Error::Config`] for the files.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let tokens = SpecialTokens::from_dir(dir)?;
        let file = dir.join("chat_template.jinja");
        if is_file(&file)? {
            return Ok(Some(Self::build(&read_text(&file)?, tokens)));
        }
        for file in ["tokenizer_config.json", "chat_template.json"] {
            let file = dir.join(file);
            if is_file(&file)?
                && let Some(source) = source(&JsonObject::read(&file)?)?
            {
                return Ok(Some(Self::build(&source, tokens)));
            }
        }
        if is_vicuna(dir) {
            tracing::info!(dir = %dir.display(), "no chat template; taking Vicuna's");
            return Ok(Some(Self::vicuna()));
        }
        Ok(None)
    }

    /// A template from its source, with the texts of the begin and end tokens it may use. It is compiled
    /// when it is first used.
    #[must_use]
    pub fn new(source: impl AsRef<str>, bos_token: &str, eos_token: &str) -> Self {
        Self::build(source.as_ref(), SpecialTokens::new(bos_token, eos_token))
    }

    /// A template in a file, for a model with this tokenizer, whose special tokens it may use.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DanglingLink`] or [`Error::LfsPointer`] if the file cannot be read.
    pub fn from_file(path: impl AsRef<Path>, tokenizer: &Tokenizer) -> Result<Self> {
        Ok(Self::build(&read_text(path.as_ref())?, tokenizer.special_tokens().clone()))
    }

    /// The template as its author wrote it.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    fn build(source: &str, tokens: SpecialTokens) -> Self {
        Self {
            source: source.into(),
            tokens,
            date: None,
            compiled: Arc::default(),
            hangs: Arc::default(),
        }
    }

    /// Fixes the date that `strftime_now` gives, which is else the local time of each rendering.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such day.
    pub fn with_date(mut self, year: i32, month: u32, day: u32) -> Result<Self> {
        let date = Date::new(year, month, day).ok_or_else(|| {
            Error::invalid("date", "a day of the calendar", format!("{year}-{month}-{day}"))
        })?;
        (self.date, self.compiled) = (Some(date), Arc::default());
        Ok(self)
    }

    /// Sixteen hex digits that tell one template from another.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        fingerprint(self.source.as_bytes())
    }

    /// The text of `messages`; with `add_generation_prompt` it ends where the model's answer
    /// begins.
    ///
    /// # Errors
    /// [`Error::Template`] when the template does not compile, raises an exception or exceeds its budget.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let len: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let turn =
            |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
        let turns = messages.iter().map(turn).collect();
        let none = Value::from(());
        self.render_values(turns, none.clone(), none, len, add_generation_prompt)
    }

    /// [`render`](Self::render) of messages that have more than a role and a content, such as calls of
    /// tools, with the tools that the model may call: objects as OpenAI's API has them.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_objects<M, T>(
        &self,
        messages: &[M],
        tools: Option<&T>,
        add_generation_prompt: bool,
    ) -> Result<String>
    where
        M: serde::Serialize,
        T: serde::Serialize,
    {
        self.render_with(messages, tools, &(), add_generation_prompt)
    }

    /// [`render_objects`](Self::render_objects) with further variables for the template, such as `enable_thinking`: an
    /// object of them by name. They stand before texts of special tokens, and not before messages, tools and
    /// `add_generation_prompt`.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_with<M, T, V>(
        &self,
        messages: &[M],
        tools: Option<&T>,
        variables: &V,
        add_generation_prompt: bool,
    ) -> Result<String>
    where
        M: serde::Serialize,
        T: serde::Serialize,
        V: serde::Serialize,
    {
        let json = serde_json::to_vec(&(messages, tools, variables));
        let json = json.map_err(|error| Error::Template {
            reason: format!("messages that are not JSON: {error}"),
            out_of_fuel: false,
        })?;
        let turns = messages.iter().map(|one| Value::from(Serde(one))).collect();
        let tools = tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)));
        let variables = Value::from(Serde(variables));
        self.render_values(turns, tools, variables, json.len(), add_generation_prompt)
    }

    /// Whether the template tells the model of tools.
    #[must_use]
    pub fn knows_tools(&self) -> bool {
        self.source.contains("tools")
    }

    fn render_values(
        &self,
        turns: Vec<Value>,
        tools: Value,
        variables: Value,
        len: usize,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let own = self.clone();
        let render = move || {
            let environment = own.compiled.get_or_init(|| own.compile());
            let mut environment = environment.clone()?;
            // A long document is no misuse: what comes in may also be copied a few times.
            environment.set_fuel(Some(FUEL.saturating_add(len as u64)));
            let tokens = Value::from_pairs(own.tokens.iter());
            let context = context! {
                messages => turns,
                add_generation_prompt,
                // transformers passes both even when there are none.
                tools,
                ..context! { ..variables, ..context! { documents => Value::from(()) }, ..tokens }
            };
            environment.get_template(NAME).and_then(|t| t.render(context)).map_err(fault)
        };
        self.within_time(len, render)?
            .map_err(|Fault { reason, out_of_fuel }| Error::Template { reason, out_of_fuel })
    }

    /// Runs `work` where deep recursion has room, and no longer than messages of `len` bytes may take.
    fn within_time<T: Send + 'static>(
        &self,
        len: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let failed = |reason: String| Error::Template { reason, out_of_fuel: false };
        let late = || Error::Template {
            reason: format!("it did not end within {} s", TIME.as_secs()),
            out_of_fuel: true,
        };
        if self.hangs.load(Ordering::SeqCst) {
            return Err(late());
        }
        let (sender, receiver) = mpsc::channel();
        let ended = Ended(Arc::clone(&self.hangs));
        let work = move || {
            let _ended = ended;
            // Whoever waited may be gone.
            drop(sender.send(work()));
        };
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(work);
        thread.map_err(|e| failed(format!("no thread to run it on: {e}")))?;
        let time = TIME + Duration::from_secs((len / BYTES_A_SECOND) as u64);
        let broken = || failed("the template engine failed".into());
        match receiver.recv_timeout(time) {
            Ok(done) => Ok(done),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(broken()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.hangs.store(true, Ordering::SeqCst);
                // It may have ended just before that.
                let last = receiver.try_recv();
                if !matches!(last, Err(mpsc::TryRecvError::Empty)) {
                    self.hangs.store(false, Ordering::SeqCst);
                }
                last.map_err(|error| match error {
                    mpsc::TryRecvError::Empty => late(),
                    mpsc::TryRecvError::Disconnected => broken(),
                })
            }
        }
    }

    fn compile(&self) -> std::result::Result<Environment<'static>, Fault> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(fault)?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        python::add(&mut environment);
        environment.add_filter("tojson", json_style::tojson);
        environment.add_function("raise_exception", raise_exception);
        let date = self.date;
        environment.add_function("strftime_now", move |format: &str| {
            date.unwrap_or_else(Date::now).strftime(format)
        });
        let refused = |reason| Fault { reason, out_of_fuel: false };
        if self.source.len() > MOST_SOURCE {
            return Err(refused(format!("a template has at most {MOST_SOURCE} bytes")));
        }
        environment.add_function(guard::OWN, guard::own);
        environment.add_function(guard::ATTRIBUTE, guard::attribute);
        let source = guard::guard(&rewrite::rewrite(&self.source).map_err(refused)?);
        environment.add_template_owned(NAME, source).map_err(fault)?;
        Ok(environment)
    }
}

/// Says at the end of a rendering, also of one that nobody waits for any more, that none hangs.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

fn fault(error: minijinja::Error) -> Fault {
    Fault { reason: error.to_string(), out_of_fuel: error.kind() == ErrorKind::OutOfFuel }
}

/// The template's source in a `tokenizer_config.json` or `chat_template.json`.
fn source(config: &JsonObject) -> Result<Option<String>> {
    use serde_json::Value::{Array, Object, String};
    let expected = "a template, or several by name with one named default";
    let (value, default) = match config.get(NAME) {
        None => return Ok(None),
        Some(String(source)) => return Ok(Some(source.clone())),
        Some(value @ Array(list)) => {
            let default = list.iter().find(|one| one["name"] == "default");
            (value, default.and_then(|one| one["template"].as_str()))
        }
        Some(value @ Object(map)) => (value, map.get("default").and_then(|one| one.as_str())),
        Some(value) => (value, None),
    };
    match default {
        Some(source) => Ok(Some(source.to_owned())),
        None => Err(config.invalid(NAME, expected, value)),
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
