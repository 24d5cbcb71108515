use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use moa_models::Checkpoint;
use moa_server::{Server, ServerOptions};
use serde_json::json;

use crate::args::{ModelArg, PlanArgs, parse_count, parse_size};
use crate::error::{Error, Result};
use crate::model::{self, Reopen, on_model};
use crate::output::{Context, bytes};
use crate::speculate::SpeculateArgs;
use crate::style::StyleArgs;

/// Answer requests over HTTP, in the shape of OpenAI's API
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    moa serve --model assets/moa-tiny --plan plan.json --port 8080\n  \
    curl localhost:8080/v1/completions -d '{\"prompt\": \"Once upon a time\"}'")]
pub(crate) struct Args {
    /// TOML file of flags under their own names, such as `port = 8080`; flags and MOA_API_KEY win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArg,
    /// Seed of random weights in place of the folder's, which need not be there: for tests of load
    #[arg(long, value_name = "SEED")]
    random_weights: Option<u32>,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    style: StyleArgs,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "ADDRESS")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// The model's name in requests [default: that of its folder or file]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Key that clients must authorise themselves with; can be given several times. An empty one is refused, as it
    /// may stand for one that was forgotten
    #[arg(long, env = "MOA_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Vec<String>,
    /// Origin whose pages may use the server from a browser, * for all; can be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Keys and values of all requests that run together, such as 4GiB; on each of several GPUs [default: 1GiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    kv_memory: Option<u64>,
    /// Keys and values kept of ended requests, for others that begin alike; 0 for none [default: 256MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    prefix_cache: Option<u64>,
    /// With a plan, keep prompts also after every so many tokens, in at most a quarter of --prefix-cache; 0 for not [default: 2048]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    prefix_every: Option<usize>,
    /// Keys and values kept in host memory, where they go from a GPU's [default: none]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    prefix_host: Option<u64>,
    /// Most sequences that run together [default: 64]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_batch: Option<usize>,
    /// Most prompt tokens that one step reads [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    prefill_chunk: Option<usize>,
    #[command(flatten)]
    speculate: SpeculateArgs,
    /// Most requests that wait; others get 503 [default: 256]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_queue: Option<usize>,
    /// New tokens of a request that does not say how many [default: what generation_config.json says, else
    /// 1024; 16 in /v1/completions, as OpenAI has it]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_new_tokens: Option<usize>,
    /// Longest prompt and answer together, at most and by default the model's context
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    context: Option<usize>,
    /// Fewest tokens that a request is given room for: a plan leaves short texts too little, and a
    /// conversation grows [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    min_context: Option<usize>,
    /// Largest body of a request [default: 2MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_body: Option<u64>,
    /// Most connections [default: 900]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_connections: Option<usize>,
    /// Most seconds that a request may take [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = parse_count)]
    request_timeout: Option<usize>,
    /// Most seconds that a client may take to send its request or to take in an answer [default: 15]
    #[arg(long, value_name = "SECONDS", value_parser = parse_count)]
    client_timeout: Option<usize>,
    /// Seconds that requests have to end when the server is told to stop [default: 7]
    #[arg(long, value_name = "SECONDS", value_parser = parse_size)]
    grace: Option<usize>,
}

impl Args {
    fn options(&self) -> ServerOptions {
        tracing::debug!("configuration file: {:?}", self.config);
        let default = ServerOptions::default();
        let seconds = |given: Option<usize>, default: Duration| {
            given.map_or(default, |seconds| Duration::from_secs(seconds as u64))
        };
        ServerOptions {
            address: SocketAddr::new(self.host, self.port),
            model_name: self.name.clone(),
            api_keys: self.api_key.clone(),
            cors_origins: self.cors.clone(),
            kv_memory: self.kv_memory.unwrap_or(default.kv_memory),
            prefix_cache: self.prefix_cache.unwrap_or(default.prefix_cache),
            prefix_every: self.prefix_every.unwrap_or(default.prefix_every),
            prefix_host: self.prefix_host.unwrap_or(default.prefix_host),
            max_batch: self.max_batch.unwrap_or(default.max_batch),
            prefill_chunk: self.prefill_chunk.unwrap_or(default.prefill_chunk),
            speculation: self.speculate.speculation(),
            max_queue: self.max_queue.unwrap_or(default.max_queue),
            default_max_tokens: self.max_new_tokens,
            max_context: self.context,
            min_context: self.min_context.unwrap_or(default.min_context),
            max_body: self.max_body.map_or(default.max_body, |most| most as usize),
            max_connections: self.max_connections.unwrap_or(default.max_connections),
            request_timeout: seconds(self.request_timeout, default.request_timeout),
            client_timeout: seconds(self.client_timeout, default.client_timeout),
            grace: seconds(self.grace, default.grace),
            handle_signals: true,
            ..default
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let options = model::options(&args.model).random_weights(args.random_weights);
    let plan = args.plan.plan.as_deref();
    on_model!(context, &args.model, options, plan, |model, own| serve(args, model, own))
}

fn serve<D: Reopen>(args: &Args, mut model: Checkpoint<D>, context: &Context) -> Result<()> {
    args.style.apply(&mut model)?;
    args.speculate.apply(&mut model, args.plan.any_weights, context)?;
    let chosen = model::choose_plan(&args.plan, &model, context)?;
    let limit = model.model.config().context_length();
    let options = args.options();
    let memory = options.kv_memory;
    let longest = options.max_context.unwrap_or(limit);
    if let Some(least) = args.min_context.filter(|least| *least > longest) {
        let expected = format!("at most the context of {longest} tokens");
        return Err(Error::argument("--min-context", expected, least));
    }
    if !model.model.is_first() {
        return moa_server::follow(model, chosen.plan, options).map_err(by_flag);
    }
    let ranks = model.model.ranks();
    let server = Server::bind(model, chosen.plan, options).map_err(by_flag)?;
    let mut fitting: Vec<(usize, u64, u64)> = Vec::new();
    for length in [1024, 4096, 16384, longest] {
        if length <= longest && fitting.last().is_none_or(|(last, ..)| *last < length) {
            let (own, dense) = server.fitting(length)?;
            fitting.push((length, own, dense));
        }
    }
    for (length, own, dense) in &fitting {
        context.note(format_args!(
            "{} of keys and values{}: {own} requests of {length} tokens with {}, {dense} dense{}",
            bytes(memory),
            if ranks > 1 { " on each GPU" } else { "" },
            chosen.name,
            if context.cache.dtype().is_none() { " in 16 bits" } else { "" },
        ));
    }
    let (name, address) = (server.model_name().to_owned(), server.address());
    context.note(format_args!("{name} at http://{address}"));
    context.json(&json!({
        "model": name,
        "address": address.to_string(),
        "plan": chosen.name,
        "devices": ranks,
        "kv_memory": memory,
        "fitting": fitting.iter().map(|(length, own, dense)| json!({
            "length": length, "requests": own, "requests_dense": dense,
        })).collect::<Vec<_>>(),
    }))?;
    Ok(server.run()?)
}

/// An error of the server's options under the names that they have as flags.
fn by_flag(error: moa_server::Error) -> Error {
    let moa_server::Error::Option { what, expected, got } = error else { return error.into() };
    let flag = match what {
        "api_keys" => "--api-key, or MOA_API_KEY where that is set,",
        "client_timeout" => "--client-timeout",
        "cors_origins" => "--cors",
        "default_max_tokens" => "--max-new-tokens",
        "kv_memory" => "--kv-memory",
        "max_batch" => "--max-batch",
        "max_body" => "--max-body",
        "max_connections" => "--max-connections",
        "max_context" => "--context",
        "max_queue" => "--max-queue",
        "model_name" => "--name",
        "prefill_chunk" => "--prefill-chunk",
        "prefix_host" => "--prefix-host",
        "request_timeout" => "--request-timeout",
        "speculation" => "--draft-model",
        other => other,
    };
    Error::argument(flag, expected, got)
}

/// Bytes, with a unit or without.
fn parse_bytes(text: &str) -> Result<u64, Error> {
    let fault = || Error::argument("bytes", "a number, or one with KiB, MiB or GiB", text);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        _ => return Err(fault()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| fault())?;
    match number * unit as f64 {
        bytes if (0.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err(fault()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        for (text, bytes) in [("0", 0), ("512", 512), ("1.5GiB", 3 << 29), ("2m", 2 << 20)] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "GiB", "-1", "1e99", "1 TB", "nan"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
