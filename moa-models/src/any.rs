//! Devices that are chosen when a program runs: enums over what is otherwise generic over the device.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use moa_core::{CacheType, Plan};

use crate::checkpoint::template::Message;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::device::cuda::Cuda;
#[cfg(feature = "wgpu")]
use crate::device::wgpu::Wgpu;
use crate::{
    ChatSession, Checkpoint, Completion, Constraint, Engine, EngineOptions, Error, Event,
    GenerateOptions, ModelConfig, OpenOptions, Prompt, RequestId, Result, Usage,
};

/// Where a model is to run, as a user names it: `cpu`, `cuda`, `cuda:N`, `wgpu` or `wgpu:N`, counted from 0.
///
/// All names are read in every build; opening a device that the build lacks is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// The host's processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda(usize),
    /// A GPU over Vulkan, Metal or DX12; `None` for the one that wgpu prefers.
    Wgpu(Option<usize>),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let (kind, number) = match name.split_once(':') {
            Some((kind, number)) => (kind, number.parse().ok().map(Some)),
            None => (name, Some(None)),
        };
        match (kind, number) {
            ("cpu", Some(None)) => Ok(Self::Cpu),
            ("cuda", Some(ordinal)) => Ok(Self::Cuda(ordinal.unwrap_or(0))),
            ("wgpu", Some(index)) => Ok(Self::Wgpu(index)),
            _ => Err(Error::invalid("device", "cpu, cuda, cuda:N, wgpu or wgpu:N", name)),
        }
    }
}

/// An enum with a variant for each device of the build, and what does the same on each of them.
macro_rules! on_any {
    ($(#[$doc:meta])* $any:ident, $of:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[non_exhaustive]
        pub enum $any {
            /// On the CPU.
            Cpu($of<Cpu>),
            /// On an NVIDIA GPU.
            #[cfg(feature = "cuda")]
            Cuda($of<Cuda>),
            /// On a GPU over Vulkan, Metal or DX12.
            #[cfg(feature = "wgpu")]
            Wgpu($of<Wgpu>),
        }
    };
}

/// The same expression for each device; `=> Any` makes the enum of another type of what comes out.
macro_rules! each {
    ($self:expr, |$it:ident| $body:expr) => {
        match $self {
            Self::Cpu($it) => $body,
            #[cfg(feature = "cuda")]
            Self::Cuda($it) => $body,
            #[cfg(feature = "wgpu")]
            Self::Wgpu($it) => $body,
        }
    };
    ($self:expr, |$it:ident| $body:expr => $any:ident) => {
        match $self {
            Self::Cpu($it) => $any::Cpu($body),
            #[cfg(feature = "cuda")]
            Self::Cuda($it) => $any::Cuda($body),
            #[cfg(feature = "wgpu")]
            Self::Wgpu($it) => $any::Wgpu($body),
        }
    };
}

on_any!(
    /// A [`Checkpoint`] on a device that is chosen when the program runs. A variant has all that the checkpoint offers.
    ///
    /// ```no_run
    /// use moa_core::Plan;
    /// use moa_models::{AnyCheckpoint, Dtype};
    ///
    /// let device = std::env::args().nth(1).unwrap_or("cpu".into()).parse()?;
    /// let checkpoint = AnyCheckpoint::open(device, Dtype::Bf16, "model")?;
    /// let plan = Plan::load("plan.json")?;
    /// println!("{}", checkpoint.complete(&plan, "What is in line 7?", 256)?.text);
    /// # Ok::<(), moa_models::Error>(())
    /// ```
    AnyCheckpoint,
    Checkpoint
);

impl Clone for AnyCheckpoint {
    /// The network is shared, not copied.
    fn clone(&self) -> Self {
        each!(self, |it| it.clone() => Self)
    }
}

impl AnyCheckpoint {
    /// [`Checkpoint::open`] on this device, with KV caches of this type, a [`Dtype`](crate::Dtype) or a
    /// [`CacheType`]; CUDA has no f32.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a device that the build has no feature for; those of the device, and of
    /// [`Checkpoint::open`].
    pub fn open(
        device: DeviceName,
        cache: impl Into<CacheType>,
        folder: impl AsRef<Path>,
    ) -> Result<Self> {
        Self::open_with(device, cache, folder, &OpenOptions::default())
    }

    /// [`open`](Self::open) with options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(
        device: DeviceName,
        cache: impl Into<CacheType>,
        folder: impl AsRef<Path>,
        options: &OpenOptions<'_>,
    ) -> Result<Self> {
        match device {
            DeviceName::Cpu => Ok(Self::Cpu(options.open(Cpu::new(cache), folder)?)),
            #[cfg(feature = "cuda")]
            DeviceName::Cuda(ordinal) => {
                Ok(Self::Cuda(options.open(Cuda::open(ordinal, cache)?, folder)?))
            }
            #[cfg(feature = "wgpu")]
            DeviceName::Wgpu(index) => {
                Ok(Self::Wgpu(options.open(Wgpu::open(index, cache)?, folder)?))
            }
            #[cfg(not(all(feature = "cuda", feature = "wgpu")))]
            other => {
                let expected =
                    "one that this build has: the features `cuda` and `wgpu` bring theirs";
                Err(Error::invalid("device", expected, other))
            }
        }
    }

    /// [`Checkpoint::complete`].
    ///
    /// # Errors
    /// As [`Checkpoint::complete`].
    pub fn complete(&self, plan: &Plan, text: &str, max_new_tokens: usize) -> Result<Completion> {
        each!(self, |it| it.complete(plan, text, max_new_tokens))
    }

    /// [`Checkpoint::check_plan`].
    ///
    /// # Errors
    /// As [`Checkpoint::check_plan`].
    pub fn check_plan(&self, plan: &Plan) -> Result<()> {
        each!(self, |it| it.check_plan(plan))
    }

    /// [`Checkpoint::engine`].
    pub fn engine(&self, options: EngineOptions) -> AnyEngine {
        each!(self, |it| it.engine(options) => AnyEngine)
    }

    /// [`ChatSession::with_options`].
    ///
    /// # Errors
    /// As [`ChatSession::with_options`].
    pub fn chat(
        &self,
        plan: &Plan,
        capacity: usize,
        options: EngineOptions,
    ) -> Result<AnyChatSession> {
        Ok(each!(
            self,
            |it| ChatSession::with_options(it, plan, capacity, options)? => AnyChatSession
        ))
    }

    /// [`ChatSession::restore`].
    ///
    /// # Errors
    /// As [`ChatSession::restore`].
    pub fn restore_chat(
        &self,
        plan: &Plan,
        bytes: &[u8],
        options: EngineOptions,
    ) -> Result<AnyChatSession> {
        Ok(each!(
            self,
            |it| ChatSession::restore(it, plan, bytes, options)? => AnyChatSession
        ))
    }

    /// The model's dimensions and kinds of layers.
    pub fn config(&self) -> &ModelConfig {
        each!(self, |it| it.model.config())
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        each!(self, |it| &it.tokenizer)
    }
}

on_any!(
    /// An [`Engine`] on a device that is chosen when the program runs; [`AnyCheckpoint::engine`] makes it.
    AnyEngine,
    Engine
);

impl AnyEngine {
    /// [`Engine::submit`].
    pub fn submit(
        &mut self,
        prompt: impl Into<Prompt>,
        plan: &Plan,
        options: GenerateOptions,
    ) -> RequestId {
        each!(self, |it| it.submit(prompt, plan, options))
    }

    /// [`Engine::constrain`].
    pub fn constrain(&mut self, id: RequestId, constraint: Box<dyn Constraint>) -> bool {
        each!(self, |it| it.constrain(id, constraint))
    }

    /// [`Engine::step`].
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step(&mut self) -> Result<Option<Event>> {
        each!(self, |it| it.step())
    }

    /// [`Engine::poll`].
    pub fn poll(&mut self) -> Option<Event> {
        each!(self, |it| it.poll())
    }

    /// [`Engine::cancel`].
    pub fn cancel(&mut self, id: RequestId) -> Option<Completion> {
        each!(self, |it| it.cancel(id))
    }

    /// [`Engine::complete_all`].
    ///
    /// # Errors
    /// As [`Engine::complete_all`].
    pub fn complete_all(&mut self) -> Result<Vec<Completion>> {
        each!(self, |it| it.complete_all())
    }

    /// [`Engine::is_idle`].
    pub fn is_idle(&self) -> bool {
        each!(self, |it| it.is_idle())
    }

    /// [`Engine::take_usage`].
    pub fn take_usage(&mut self) -> Usage {
        each!(self, |it| it.take_usage())
    }
}

on_any!(
    /// A [`ChatSession`] on a device that is chosen when the program runs; [`AnyCheckpoint::chat`] makes it.
    AnyChatSession,
    ChatSession
);

impl AnyChatSession {
    /// [`ChatSession::say`].
    ///
    /// # Errors
    /// As [`ChatSession::say`].
    pub fn say(&mut self, content: &str, options: GenerateOptions) -> Result<()> {
        each!(self, |it| it.say(content, options))
    }

    /// [`ChatSession::step`].
    ///
    /// # Errors
    /// As [`ChatSession::step`].
    pub fn step(&mut self) -> Result<Option<Event>> {
        each!(self, |it| it.step())
    }

    /// [`ChatSession::answer`].
    ///
    /// # Errors
    /// As [`ChatSession::answer`].
    pub fn answer(&mut self, content: &str, options: GenerateOptions) -> Result<Completion> {
        each!(self, |it| it.answer(content, options))
    }

    /// [`ChatSession::cancel`].
    ///
    /// # Errors
    /// As [`ChatSession::cancel`].
    pub fn cancel(&mut self) -> Result<()> {
        each!(self, |it| it.cancel())
    }

    /// [`ChatSession::save`].
    ///
    /// # Errors
    /// As [`ChatSession::save`].
    pub fn save(&self) -> Result<Vec<u8>> {
        each!(self, |it| it.save())
    }

    /// [`ChatSession::messages`].
    pub fn messages(&self) -> &[Message] {
        each!(self, |it| it.messages())
    }

    /// [`ChatSession::set_messages`].
    ///
    /// # Errors
    /// As [`ChatSession::set_messages`].
    pub fn set_messages(&mut self, messages: Vec<Message>) -> Result<()> {
        each!(self, |it| it.set_messages(messages))
    }

    /// [`ChatSession::kv_bytes`].
    pub fn kv_bytes(&self) -> u64 {
        each!(self, |it| it.kv_bytes())
    }

    /// [`ChatSession::take_usage`].
    pub fn take_usage(&mut self) -> Usage {
        each!(self, |it| it.take_usage())
    }
}
