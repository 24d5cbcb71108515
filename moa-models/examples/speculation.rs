//! What guesses gain: decoded tokens a second with them over without, by kind of answer. Rounds take turns, so that
//! what else the machine does falls on all alike.
//!
//! ```sh
//! cargo run --release -p moa-models --example speculation -- [options] assets/moa-tiny [plan.json]
//! ```
//! With a plan the model also guesses for itself, dense attention checking what the plan guesses. `--cuda` runs on a GPU
//! (feature `cuda`), `--random` makes weights up, `--uniform 0.25` sees a share of the context, `--rounds 9` says how often.

mod measured;

use measured::{Measure, Model};
use moa_core::{Plan, SplitMix64};
use moa_models::{
    Checkpoint, Decoder, EngineOptions, GenerateOptions, Math, Message, Prompt, Result,
    SamplingOptions, Speculation, Usage,
};

/// What is measured.
struct Options {
    rounds: usize,
    model: Model,
    plan: Option<String>,
}

/// A record of so many lines in LongEval's wording, and a question about one of them.
fn record(lines: usize, seed: u64) -> String {
    const FIRST: [&str; 8] =
        ["torpid", "frail", "brave", "minor", "supreme", "fluffy", "eatable", "callous"];
    const SECOND: [&str; 8] = ["kid", "lamb", "purr", "bull", "hash", "lemon", "spouse", "rhythm"];
    let mut random = SplitMix64::new(seed);
    let mut draw = |below: usize| (random.next_u64() % below as u64) as usize;
    let mut text = "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and \
        contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its \
        corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding \
        <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        .to_owned();
    let start = draw(64);
    let key = |line: usize| {
        let of = (start + 37 * line) % 512;
        format!("{}-{}-{}", FIRST[of % 8], SECOND[of / 8 % 8], of / 64)
    };
    for line in 0..lines {
        text += &format!("line {}: REGISTER_CONTENT is <{}>\n", key(line), 1000 + draw(50_000));
    }
    let asked = key(draw(lines));
    text + &format!(
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {asked}? I need the number. "
    )
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options { rounds: 9, model: Model::default(), plan: None };
    let mut named = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|number| number.parse::<f64>().ok());
        match argument.as_str() {
            "--rounds" => options.rounds = number().unwrap_or(9.0) as usize,
            _ if options.model.takes(&argument, &mut number) => {}
            _ => named.push(argument),
        }
    }
    let mut named = named.into_iter();
    let folder = named.next().unwrap_or("assets/moa-tiny".into());
    options.plan = named.next();
    options.model.measure(&folder, &options)
}

impl Measure for Options {
    fn measure<D: Math>(&self, checkpoint: Checkpoint<D>) -> Result<()> {
        measure(checkpoint, self)
    }
}

/// What a step that checks guesses takes, in plain steps, where a device records such steps.
fn check_cost<D: Math>(model: &Decoder<D>, plan: &Plan) -> Result<()> {
    const STEPS: usize = 40;
    for held in [1024, 4096] {
        let most = Speculation::ngram().draft_tokens();
        let mut sequence = model.open(plan, held + 16 * STEPS, most)?;
        let vocab = model.config().vocab_size as u64;
        let mut random = SplitMix64::new(1);
        let mut tokens = |n: usize| (0..n).map(|_| (random.next_u64() % vocab) as u32).collect();
        let prompt: Vec<u32> = tokens(held);
        model.prefill(&mut sequence, &prompt, 2048)?;
        let mut session = model.session(vec![sequence])?;
        let Some(wide) = session.wide(most + 1) else { return Ok(()) };
        let mut seconds = [Vec::new(), Vec::new()];
        for step in 0..STEPS {
            let begin = std::time::Instant::now();
            session.step_greedy(model, &tokens(1))?;
            let plain = begin.elapsed().as_secs_f64();
            let (begin, len) = (std::time::Instant::now(), session.sequences()[0].len());
            session.check_greedy(model, &[tokens(wide)])?;
            let checked = begin.elapsed().as_secs_f64();
            session.truncate(model, 0, len + 1)?;
            if step >= 8 {
                seconds[0].push(plain);
                seconds[1].push(checked);
            }
        }
        let [plain, checked] = seconds.map(|mut all| {
            all.sort_by(f64::total_cmp);
            1e3 * all[all.len() / 2]
        });
        println!(
            "after {held} tokens a step of {wide} takes {checked:.3} ms, of 1 {plain:.3} ms: {:.2}x",
            checked / plain
        );
    }
    Ok(())
}

fn measure<D: Math>(mut checkpoint: Checkpoint<D>, options: &Options) -> Result<()> {
    let dense = options.model.plan(checkpoint.model.shape())?;
    let mut modes = vec![("off", Speculation::Off), ("ngram", Speculation::ngram())];
    if let Some(path) = &options.plan {
        let itself = checkpoint.clone();
        checkpoint.set_draft(&itself, &Plan::load(path)?)?;
        modes.push(("plan", Speculation::draft()));
    }
    check_cost(&checkpoint.model, &dense)?;
    if options.rounds == 0 {
        return Ok(());
    }
    let prose = "The history of navigation is the history of people who trusted numbers more than the evidence of \
        their eyes. A pilot who could not see the coast still knew how fast the ship had sailed, for how many \
        hours, and in which direction; ";
    let quoted = checkpoint.tokenizer.encode(&prose.repeat(3), true)?;
    let asked =
        |lines| (0..4).map(|seed| Prompt::chat(&[Message::user(record(lines, seed))])).collect();
    let until = |new| GenerateOptions { max_new_tokens: new, ..GenerateOptions::default() };
    let endless = |new| GenerateOptions { eos_token_ids: Some(Vec::new()), ..until(new) };
    let warm = SamplingOptions { temperature: 1.0, seed: 1, ..SamplingOptions::default() };
    let long = vec![Prompt::chat(&[Message::user(record(250, 1))])];
    let kinds: Vec<(&str, Vec<Prompt>, GenerateOptions)> = vec![
        ("record of 40 lines, answers", asked(40), until(64)),
        ("record of 150 lines, answers", asked(150), until(64)),
        ("quotation, 192 tokens", vec![Prompt::Tokens(quoted)], endless(192)),
        ("prose, 192 tokens", vec![Prompt::from(prose)], endless(192)),
        (
            "prose, drawn, 192 tokens",
            vec![Prompt::from(prose)],
            GenerateOptions { sampling: warm, ..endless(192) },
        ),
        ("after 250 lines, 192 tokens", long, endless(192)),
    ];
    for (kind, prompts, how) in &kinds {
        let mut seconds = vec![Vec::new(); modes.len()];
        let (mut told, mut counts) = (None::<String>, vec![Usage::default(); modes.len()]);
        let mut others = 0;
        for _ in 0..options.rounds {
            for (at, (_, speculation)) in modes.iter().enumerate() {
                let speculation = *speculation;
                let mut engine =
                    checkpoint.engine(EngineOptions { speculation, ..EngineOptions::default() });
                let mut text = String::new();
                // One after the other: batches of one.
                for prompt in prompts {
                    engine.submit(prompt.clone(), &dense, how.clone());
                    engine.complete_all()?.iter().for_each(|one| text += &one.text);
                }
                let own: &String = told.get_or_insert_with(|| text.clone());
                // A GPU sums in another order where it checks several tokens at once.
                others += usize::from(*own != text);
                counts[at] = engine.take_usage();
                seconds[at].push(counts[at].decode.as_secs_f64());
            }
        }
        println!(
            "{kind}{}",
            if others > 0 { format!(", {others} other texts") } else { String::new() }
        );
        let median = |all: &mut Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let plain = median(&mut seconds[0]);
        for (((mode, _), seconds), usage) in modes.iter().zip(&mut seconds).zip(&counts) {
            let own = median(seconds);
            println!(
                "  {mode:6} {:7.0} tokens/s  {:.2}x  {} of {} guesses right, {} tokens",
                usage.decoded_tokens as f64 / own,
                plain / own,
                usage.accepted_tokens,
                usage.drafted_tokens,
                usage.decoded_tokens,
            );
        }
    }
    Ok(())
}
