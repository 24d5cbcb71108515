use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use moa_models::{
    Checkpoint, EngineOptions, Event, GenerateOptions, Math, Message, PromptStyle, SamplingOptions,
    read_text,
};
use serde_json::json;

use super::chat::{self, Conversation, OnOverflow};
use crate::args::{ModelArg, PlanArgs, parse_count, parse_size};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::{self, ChosenPlan, Reopen, on_model};
use crate::output::{Context, bytes, percent};
use crate::progress::Progress;
use crate::speculate::SpeculateArgs;
use crate::style::StyleArgs;

/// Continue prompts, streamed
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    moa generate --model assets/moa-tiny --plan plan.json --prompt-file prompt.txt\n  \
    moa generate --model assets/moa-tiny --uniform 0.25 --chat")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    prompts: PromptArgs,
    #[command(flatten)]
    style: StyleArgs,
    /// Instructions before the first turn
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens to add [default: what generation_config.json says, else 256]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_new_tokens: Option<usize>,
    /// Longest conversation of --chat, in tokens [default: the model's context, at most 8192]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count, conflicts_with_all = BATCH)]
    context: Option<usize>,
    /// What --chat does with a turn that the conversation has no room for [default: stop]
    #[arg(long, value_enum, value_name = "HOW", conflicts_with_all = BATCH)]
    on_overflow: Option<OnOverflow>,
    #[command(flatten)]
    speculate: SpeculateArgs,
    /// Go on with the conversation of --chat that --save-state wrote, without reading it again, by the same chat
    /// template
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_file", "system", "context"])]
    load_state: Option<PathBuf>,
    /// Write the conversation of --chat with its keys and values to a file when it ends, by Ctrl-C or SIGTERM too
    #[arg(long, value_name = "FILE", conflicts_with_all = BATCH)]
    save_state: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Text or special token that ends the answer; can be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Token that ends the answer, by its text or its id, besides those that the model's files name; can
    /// be given several times
    #[arg(long, value_name = "TOKEN|ID")]
    stop_token: Vec<String>,
}

/// What is given in place of `--chat`, one of which always is. Flags of `--chat` conflict with it: that they require
/// `--chat`, clap would forget where it conflicts with what is given.
const BATCH: [&str; 2] = ["prompt", "prompt_file"];

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// The prompt
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the prompt, or - for stdin; several of them run as one batch
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Conversation: every line of stdin is a turn
    #[arg(long)]
    chat: bool,
}

/// How tokens are chosen; what is not given comes from generation_config.json.
#[derive(Debug, clap::Args)]
struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", value_parser = parse_size)]
    top_k: Option<usize>,
    /// Keep the likeliest tokens with this much probability together; 0 keeps one
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens with at least this share of the likeliest token's probability
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Makes tokens that were there already less likely; 1 changes nothing
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
}

impl SamplingArgs {
    /// The flags over the model's defaults.
    fn options(&self, defaults: SamplingOptions) -> Result<SamplingOptions> {
        let restricts = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        // Asking for a choice among the likeliest tokens is asking for a choice.
        let greedy = defaults.temperature == 0.0;
        let temperature = if greedy && restricts { 1.0 } else { defaults.temperature };
        let options = SamplingOptions {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k.or(defaults.top_k).filter(|k| *k > 0),
            top_p: self.top_p.map_or(defaults.top_p, SamplingOptions::share),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            seed: defaults.seed,
            ..defaults
        };
        options.validate().map_err(|error| match error {
            moa_models::Error::Invalid { what, .. } => {
                Error::from(error).at(format!("--{}", what.replace('_', "-")))
            }
            error => error.into(),
        })?;
        Ok(options)
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    // `--load-state` may be the file that the conversation goes back to.
    Files::default()
        .reads([&args.model.model])
        .reads(&args.plan.plan)
        .reads(&args.style.template)
        .reads(args.speculate.files())
        .may_write("--save-state", args.save_state.as_deref())?;
    let prompts = read_prompts(args)?;
    if args.load_state.is_some() || args.save_state.is_some() {
        // Each rank holds a part of the keys and values.
        context.check_one_device("--device with --load-state or --save-state")?;
    }
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args, &prompts, model, context
    ))
}

fn with_model<D: Reopen>(
    args: &Args,
    prompts: &[NamedPrompt],
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    args.speculate.apply(&mut model, args.plan.any_weights, context)?;
    let chosen = model::choose_plan(&args.plan, &model, context)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens.or(model.generation.max_new_tokens).unwrap_or(256),
        sampling: args.sampling.options(model.generation.sampling(context.seed))?,
        stop: args.stop.clone(),
        stop_token_ids: stop_tokens(args, &model)?,
        ..GenerateOptions::default()
    };
    match args.prompts.chat {
        true => chat::run(
            &model,
            &chosen,
            &Conversation {
                options: &options,
                system: args.system.as_deref(),
                capacity: args.context,
                on_overflow: args.on_overflow.unwrap_or_default(),
                engine: EngineOptions {
                    speculation: args.speculate.speculation(),
                    ..Default::default()
                },
                load: args.load_state.as_deref(),
                save: args.save_state.as_deref(),
            },
            context,
        ),
        false => batch(args, prompts, &model, &chosen, &options, context),
    }
}

/// The ids of the tokens that end an answer.
fn stop_tokens<D: Math>(args: &Args, model: &Checkpoint<D>) -> Result<Vec<u32>> {
    let vocab_size = model.model.config().vocab_size;
    let id = |name: &String| {
        let by_number = || name.parse().ok().filter(|id: &u32| (*id as usize) < vocab_size);
        model.tokenizer.token_id(name).or_else(by_number).ok_or_else(|| {
            let expected = format!("a token of the model, or an id below {vocab_size}");
            Error::argument("--stop-token", expected, name)
        })
    };
    args.stop_token.iter().map(id).collect()
}

/// A prompt with its name.
struct NamedPrompt {
    name: String,
    text: String,
}

fn read_prompts(args: &Args) -> Result<Vec<NamedPrompt>> {
    let mut prompts: Vec<NamedPrompt> = Vec::new();
    prompts.extend(
        args.prompts
            .prompt
            .iter()
            .map(|text| NamedPrompt { name: "--prompt".into(), text: text.clone() }),
    );
    for path in &args.prompts.prompt_file {
        let text = match path.as_os_str() == "-" {
            true => io::read_to_string(io::stdin())
                .map_err(|source| Error::Stream { stream: "stdin".into(), source })?,
            false => read_text(path)?,
        };
        prompts.push(NamedPrompt { name: path.display().to_string(), text });
    }
    Ok(prompts)
}

fn tokens<D: Math>(args: &Args, model: &Checkpoint<D>, prompt: &NamedPrompt) -> Result<Vec<u32>> {
    let mut messages: Vec<Message> = args.system.iter().map(Message::system).collect();
    messages.push(Message::user(match model.prompt_style() {
        PromptStyle::Chat => prompt.text.trim(),
        PromptStyle::Raw => &prompt.text,
    }));
    Ok(model.prompt_tokens(&messages)?)
}

fn batch<D: Math>(
    args: &Args,
    prompts: &[NamedPrompt],
    model: &Checkpoint<D>,
    chosen: &ChosenPlan,
    options: &GenerateOptions,
    context: &Context,
) -> Result<()> {
    let limit = model.model.config().context_length();
    let speculation = args.speculate.speculation();
    let slack = speculation.draft_tokens();
    let mut engine = model.engine(EngineOptions { speculation, ..Default::default() });
    let (mut ids, mut lens, mut dense) = (Vec::new(), Vec::new(), 0);
    for (number, prompt) in (0..).zip(prompts) {
        let own = tokens(args, model, prompt).map_err(|e| e.at(prompt.name.clone()))?;
        let room = own.len().saturating_add(options.max_new_tokens).min(limit);
        if own.len() > limit {
            let error = moa_models::Error::ContextExceeded { asked: own.len(), limit };
            return Err(Error::from(error).at(prompt.name.clone()));
        }
        dense += model.model.dense_bytes(room)?;
        let seed = options.sampling.seed.wrapping_add(number);
        let sampling = SamplingOptions { seed, ..options.sampling.clone() };
        let options = GenerateOptions { sampling, ..options.clone() };
        lens.push(own.len());
        ids.push(engine.resume(model.model.open(&chosen.plan, room, slack)?, own, options));
    }
    if let [_, _, ..] = prompts {
        context.print(heading(&prompts[0].name))?;
    }
    let total = lens.iter().sum();
    let mut bar = Some(Progress::new(context, "prefill", total));
    let mut read = vec![0; ids.len()];
    let mut completions = BTreeMap::new();
    while let Some(event) = engine.step()? {
        match event {
            Event::Prefill { id, done, .. } => {
                if let (Some(bar), Some(of)) = (&bar, ids.iter().position(|own| *own == id)) {
                    read[of] = done;
                    bar.set(read.iter().sum(), total);
                }
            }
            // The bar and the text would write over each other.
            Event::Token { .. } => bar = None,
            Event::Text { id, piece } if id == ids[0] => context.stream(piece)?,
            Event::Done { id, completion } => drop(completions.insert(id, completion)),
            Event::Failed { error, .. } => return Err(error.into()),
            _ => {}
        }
    }
    drop(bar);
    context.print("")?;
    for (prompt, completion) in prompts.iter().zip(completions.values()).skip(1) {
        context.print(format_args!("\n{}\n{}", heading(&prompt.name), completion.text))?;
    }

    let sequences = ids.iter().filter_map(|id| engine.reclaim(*id));
    let kv_bytes: u64 = sequences.map(|sequence| model.model.kv_bytes(&sequence)).sum();
    let usage = engine.take_usage();
    context.note(format_args!(
        "{}: KV cache {} of {} dense ({}); prefill {} tokens, {} tok/s; decode {} tokens, {} tok/s",
        chosen.name,
        bytes(kv_bytes),
        bytes(dense),
        percent(kv_bytes as f64 / dense.max(1) as f64),
        usage.prompt_tokens,
        rate(usage.prompt_tokens, usage.prefill_tokens_per_second(), 0),
        usage.decoded_tokens,
        rate(usage.decoded_tokens, usage.decode_tokens_per_second(), 1),
    ));
    let each: Vec<_> = prompts
        .iter()
        .zip(completions.values())
        .zip(&lens)
        .map(|((prompt, completion), len)| {
            json!({
                "prompt": prompt.name,
                "text": completion.text,
                "finish": completion.finish.name(),
                "prompt_tokens": len,
                "new_tokens": completion.tokens.len(),
            })
        })
        .collect();
    context.json(&json!({
        "completions": each,
        "plan": chosen.name,
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": dense,
        "prompt_tokens": usage.prompt_tokens,
        "prefill_seconds": usage.prefill.as_secs_f64(),
        "prefill_tokens_per_second": usage.prefill_tokens_per_second(),
        "decoded_tokens": usage.decoded_tokens,
        "drafted_tokens": usage.drafted_tokens,
        "accepted_tokens": usage.accepted_tokens,
        "decode_seconds": usage.decode.as_secs_f64(),
        "decode_tokens_per_second": usage.decode_tokens_per_second(),
    }))
}

/// Tokens per second with so many decimals, where there were any.
fn rate(tokens: usize, per_second: f64, decimals: usize) -> String {
    if tokens == 0 { "-".to_string() } else { format!("{per_second:.decimals$}") }
}

fn heading(name: &str) -> String {
    format!("--- {name} ---")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: SamplingArgs = SamplingArgs {
        temperature: None,
        top_k: None,
        top_p: None,
        min_p: None,
        repetition_penalty: None,
    };

    #[test]
    fn flags_go_over_the_models_defaults() {
        let model = SamplingOptions { temperature: 0.6, top_p: 0.9, seed: 7, ..Default::default() };
        assert_eq!(NONE.options(model.clone()).unwrap(), model);
        let flags = SamplingArgs { temperature: Some(0.0), top_k: Some(0), ..NONE };
        let options = flags.options(model).unwrap();
        assert_eq!((options.temperature, options.top_k, options.top_p), (0.0, None, 0.9));
    }

    #[test]
    fn top_p_of_a_greedy_model_samples() {
        let flags = SamplingArgs { top_p: Some(0.9), ..NONE };
        assert_eq!(flags.options(SamplingOptions::default()).unwrap().temperature, 1.0);
        let flags = SamplingArgs { top_p: Some(0.0), ..NONE };
        assert_eq!(flags.options(SamplingOptions::default()).unwrap().top_p, f32::MIN_POSITIVE);
        let flags = SamplingArgs { top_p: Some(2.0), ..NONE };
        assert!(flags.options(SamplingOptions::default()).is_err());
    }
}
