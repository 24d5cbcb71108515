use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use moa_models::{Decoder, Math, Speculation};

use crate::error::{Error, Result};

/// The limits of a server and what it lets in. The default serves this machine alone, without a key.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// The model's name in requests; `None` for that of its folder or file.
    pub model_name: Option<String>,
    /// Keys that clients may authorise themselves with, of visible ASCII; none lets everybody in.
    pub api_keys: Vec<String>,
    /// Origins whose pages may use the server from a browser, as browsers write them (`https://example.com`, no `/` at
    /// the end); `*` stands for all.
    pub cors_origins: Vec<String>,
    /// Bytes of keys and values of all requests that run together; where several devices share the model, on the one that
    /// has most of them, here and below.
    pub kv_memory: u64,
    /// Bytes of keys and values that are kept of ended requests, for others that begin alike; 0 for none.
    pub prefix_cache: u64,
    /// A plan's rings cannot be cut where another prompt parts from one that was read. So the sequences of prompts are
    /// also kept after every so many tokens, in at most a quarter of [`prefix_cache`](Self::prefix_cache); 0 for not.
    pub prefix_every: usize,
    /// Bytes of keys and values that are kept in host memory when they go from there; 0 for none. A second tier for
    /// devices with memory of their own, of which one has the model.
    pub prefix_host: u64,
    /// Most sequences that run together.
    pub max_batch: usize,
    /// Most prompt tokens that one step reads.
    pub prefill_chunk: usize,
    /// Where guesses of the next tokens come from, several of which one step checks. The model of
    /// [`Draft`](moa_models::Speculation::Draft) is the checkpoint's.
    pub speculation: Speculation,
    /// Most requests that wait; others get 503.
    pub max_queue: usize,
    /// Most choices of one request: `n` times its prompts.
    pub max_choices: usize,
    /// New tokens of a request that does not say how many, at most the context; `None` for what the model's authors
    /// say, else 1024, of a chat or a response, and as in OpenAI's API for 16 of `/v1/completions`.
    pub default_max_tokens: Option<usize>,
    /// Longest prompt and answer together, at most the model's context; `None` for that.
    pub max_context: Option<usize>,
    /// Fewest tokens that a sequence has room for. A plan gives heads a share of the length, which of a
    /// short text leaves next to nothing; and a conversation grows before it is read again.
    pub min_context: usize,
    /// Largest body of a request, in bytes.
    pub max_body: usize,
    /// Most connections.
    pub max_connections: usize,
    /// Time that a request may take from its last byte to its answer's last token.
    pub request_timeout: Duration,
    /// Time that a client may take to send a request's head, and again to send its body, and to take in
    /// what is sent.
    pub client_timeout: Duration,
    /// Time that requests have to end when the server is told to stop.
    pub grace: Duration,
    /// Stop at SIGINT and SIGTERM.
    pub handle_signals: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            model_name: None,
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            kv_memory: 1 << 30,
            prefix_cache: 256 << 20,
            prefix_every: 2048,
            prefix_host: 0,
            max_batch: 64,
            prefill_chunk: 512,
            speculation: Speculation::Off,
            max_queue: 256,
            max_choices: 16,
            default_max_tokens: None,
            max_context: None,
            min_context: 512,
            max_body: 2 << 20,
            max_connections: 900,
            request_timeout: Duration::from_secs(600),
            client_timeout: Duration::from_secs(15),
            // Docker kills 10 seconds after it has asked.
            grace: Duration::from_secs(7),
            handle_signals: false,
        }
    }
}

impl ServerOptions {
    /// Longest prompt and answer together.
    pub(crate) fn context<D: Math>(&self, model: &Decoder<D>) -> usize {
        self.max_context.unwrap_or_else(|| model.config().context_length())
    }

    /// Checks what a model has no room for.
    pub(crate) fn check_context<D: Math>(&self, model: &Decoder<D>) -> Result<()> {
        let (own, context) = (model.config().context_length(), self.context(model));
        if context > own {
            let expected = format!("at most the model's context of {own} tokens");
            return Err(Error::option("max_context", expected, context));
        }
        match self.default_max_tokens.filter(|most| *most > context) {
            Some(most) => {
                let expected = format!("at most the context of {context} tokens");
                Err(Error::option("default_max_tokens", expected, most))
            }
            None => Ok(()),
        }
    }

    /// Checks what a model that several devices share cannot do.
    pub(crate) fn check_ranks(&self, ranks: usize) -> Result<()> {
        match self.speculation {
            Speculation::Draft { .. } if ranks > 1 => {
                let expected = "none or one of n-grams where several devices share the model";
                Err(Error::option("speculation", expected, "another model's"))
            }
            // Which copies are made in time would differ.
            _ if ranks > 1 && self.prefix_host > 0 => {
                let expected = "0 where several devices share the model";
                Err(Error::option("prefix_host", expected, self.prefix_host))
            }
            _ => Ok(()),
        }
    }

    /// Checks that every limit lets something through.
    pub(crate) fn validate(&self) -> Result<()> {
        let at_least_1 = [
            ("max_batch", self.max_batch),
            ("prefill_chunk", self.prefill_chunk),
            ("max_queue", self.max_queue),
            ("max_choices", self.max_choices),
            ("max_body", self.max_body),
            ("max_connections", self.max_connections),
            ("default_max_tokens", self.default_max_tokens.unwrap_or(1)),
            ("max_context", self.max_context.unwrap_or(1)),
        ];
        // Clocks end somewhere: a moment so far away is none.
        const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
        let times = [
            ("request_timeout", self.request_timeout),
            ("client_timeout", self.client_timeout),
            ("grace", self.grace),
        ];
        let is_bad = |(what, time): &(&str, Duration)| {
            *time > LONGEST || (time.is_zero() && *what != "grace")
        };
        if let Some((what, time)) = times.into_iter().find(is_bad) {
            return Err(Error::option(
                what,
                "more than 0 s and at most ten years",
                format!("{time:?}"),
            ));
        }
        match at_least_1.into_iter().find(|(_, n)| *n == 0) {
            Some((what, n)) => Err(Error::option(what, "at least 1", n)),
            None if self.kv_memory == 0 => Err(Error::option("kv_memory", "at least 1 byte", 0)),
            None if self.model_name.as_ref().is_some_and(String::is_empty) => {
                Err(Error::option("model_name", "at least one character", "none"))
            }
            None => {
                self.api_keys.iter().try_for_each(|key| check_key(key))?;
                self.cors_origins.iter().try_for_each(|origin| check_origin(origin))
            }
        }
    }
}

/// Refuses keys that no head of a request can hold, without telling them.
fn check_key(key: &str) -> Result<()> {
    let got = match key {
        "" => "an empty one",
        key if key.trim() != key => "one with white space at an end",
        key if !key.bytes().all(|byte| matches!(byte, b' '..=b'~')) => "one with other characters",
        _ => return Ok(()),
    };
    Err(Error::option("api_keys", "one or more characters of visible ASCII each", got))
}

/// Refuses what no browser says of a page: an origin is `scheme://host`, perhaps with a port.
fn check_origin(origin: &str) -> Result<()> {
    let is_origin = origin.split_once("://").is_some_and(|(scheme, host)| {
        let is_other = |c: char| {
            c.is_whitespace() || c.is_control() || c.is_ascii_uppercase() || "/?#@*".contains(c)
        };
        !scheme.is_empty()
            && !host.is_empty()
            && !scheme.contains(is_other)
            && !host.contains(is_other)
    });
    match is_origin || origin == "*" || origin == "null" {
        true => Ok(()),
        false => {
            let expected =
                "* or origins such as https://example.com, in lower case and without a path";
            Err(Error::option("cors_origins", expected, format!("{origin:?}")))
        }
    }
}
