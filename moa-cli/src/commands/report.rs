use std::path::PathBuf;

use moa_core::write_atomic;
use serde_json::json;

use crate::args::parse_count;
use crate::error::{Error, Result};
use crate::figure::{self, Bars, Figure};
use crate::files::{OutputFolder, check_file};
use crate::head_map::HeadMap;
use crate::items::Items;
use crate::output::{Context, bytes, percent};
use crate::page::{Page, Table};
use crate::plans::{self, PlanFile};
use crate::report;

/// Write plans and measurements into one HTML file that needs no network
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa report --plan plan.json --plans plans --items dense=dense.jsonl --items uniform=uniform.jsonl --items plan=plan.jsonl --out report.html"
)]
pub(crate) struct Args {
    /// Plan to draw, with a name for it if the file's is not good enough; repeat to compare
    #[arg(long, value_name = "[NAME=]FILE", required_unless_present_any = ["plans", "items"])]
    plan: Vec<String>,
    /// Folder of `moa search`, for the Pareto front
    #[arg(long, value_name = "DIR")]
    plans: Option<PathBuf>,
    /// Answers of `moa eval retrieval --items`; repeat for several caches side by side
    #[arg(long, value_name = "[NAME=]FILE.jsonl")]
    items: Vec<String>,
    /// Context lengths to look at [default: those of the plan's search]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    at: Vec<usize>,
    /// Heading of the page
    #[arg(long, default_value = "Attention spans", value_name = "TEXT")]
    title: String,
    /// Folder for each figure as an SVG file of its own
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Page to write
    #[arg(long, value_name = "FILE.html")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    check_file(&args.out)?;
    let plans: Vec<PlanFile> =
        args.plan.iter().map(|p| PlanFile::load(p)).collect::<Result<_>>()?;
    check_models(&plans)?;
    let searched = match &args.plans {
        Some(folder) => plans::load_folder(folder)?,
        None => Vec::new(),
    };
    let items: Vec<Items> = args.items.iter().map(|i| Items::load(i)).collect::<Result<_>>()?;
    let lengths = if args.at.is_empty() { lengths(&plans) } else { args.at.clone() };

    let mut figures = Vec::new();
    if !plans.is_empty() {
        figures.push(head_maps(&plans, &lengths));
    }
    if !items.is_empty() {
        figures.push(figure::retrieval(&items));
    }
    if !plans.is_empty() {
        figures.push(sizes(&plans, &lengths, context));
    }
    match figure::pareto(&searched, &plans) {
        Some(figure) => figures.push(figure),
        None if args.plans.is_some() => {
            context.note("no Pareto front: the plans do not say their predicted losses");
        }
        None => {}
    }
    match figure::trials(&plans) {
        Some(figure) => figures.push(figure),
        None if !plans.is_empty() => {
            context
                .note("no predicted against measured loss: no plan here was chosen by measurement");
        }
        None => {}
    }

    let page = Page {
        title: args.title.clone(),
        facts: facts(&plans),
        tables: tables(&plans, &items, &lengths, context),
        figures,
    };
    let mut files = Vec::new();
    if let Some(path) = &args.svg {
        let mut folder = OutputFolder::create(path)?;
        for figure in &page.figures {
            let name = format!("{}.svg", figure.id);
            files.push(folder.write(&name, figure.svg().as_bytes())?);
        }
        write_atomic(&args.out, page.html().as_bytes())?;
        folder.keep();
    } else {
        write_atomic(&args.out, page.html().as_bytes())?;
    }
    let titles: Vec<&str> = page.figures.iter().map(|f| f.title.as_str()).collect();
    context.print(format_args!("{}\n\nReport: {}", titles.join("\n"), args.out.display()))?;
    let ids: Vec<&str> = page.figures.iter().map(|f| f.id.as_str()).collect();
    context.json(&json!({ "out": args.out, "figures": ids, "svg": files }))
}

/// Plans of one report are for one model: bytes of dense caches are drawn once.
fn check_models(plans: &[PlanFile]) -> Result<()> {
    let Some(first) = plans.first() else { return Ok(()) };
    for file in plans {
        let check = file.plan.check_shape(&first.plan.shape());
        check.map_err(|e| Error::from(e).at(file.path.display().to_string()))?;
    }
    Ok(())
}

/// Lengths at which the plans were searched.
fn lengths(plans: &[PlanFile]) -> Vec<usize> {
    let mut lengths: Vec<usize> = plans.iter().flat_map(|f| report::lengths_of(&f.plan)).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

fn head_maps(plans: &[PlanFile], lengths: &[usize]) -> Figure {
    let maps = |file| (file_name(plans, file), report::maps(&file.plan, lengths));
    let maps: Vec<_> = plans.iter().map(maps).collect();
    match plans {
        [one] => figure::head_map(&format!("Span of each KV head: {}", one.label), &maps),
        _ => figure::head_map("Span of each KV head", &maps),
    }
}

/// A single plan needs no name on its panels.
fn file_name<'a>(plans: &[PlanFile], file: &'a PlanFile) -> &'a str {
    if plans.len() > 1 { &file.label } else { "" }
}

fn sizes(plans: &[PlanFile], lengths: &[usize], context: &Context) -> Figure {
    let slot_bytes = |plan: &moa_core::Plan| context.cache.slot_bytes(plan.shape().head_dim);
    let groups: Vec<Bars> = lengths
        .iter()
        .map(|&length| Bars {
            length,
            dense: report::dense_bytes(&plans[0].plan, length, slot_bytes(&plans[0].plan)),
            plans: plans
                .iter()
                .map(|f| (f.label.clone(), f.plan.kv_bytes(length, slot_bytes(&f.plan))))
                .collect(),
        })
        .collect();
    figure::kv_bytes(&groups, context.cache.name())
}

/// What plans say about themselves.
fn facts(plans: &[PlanFile]) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let Some(first) = plans.first() else { return facts };
    facts.push(("model".to_string(), first.plan.shape().to_string()));
    for file in plans {
        let from = &file.plan.provenance;
        let mut words: Vec<String> = [&from.method, &from.space, &from.objective, &from.data]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        words.push(format!("sink {}, smallest span {}", file.plan.sink(), file.plan.min_span()));
        facts.push((file.label.clone(), words.join("; ")));
        if !from.measured_losses.is_empty() {
            let loss = report::at_lengths(&from.measured_losses);
            facts.push((format!("{}, nats per response token", file.label), loss));
        }
    }
    facts
}

fn tables(plans: &[PlanFile], items: &[Items], lengths: &[usize], context: &Context) -> Vec<Table> {
    let owned = |words: &[&str]| words.iter().map(|w| (*w).to_string()).collect::<Vec<_>>();
    let mut tables = Vec::new();
    if !plans.is_empty() {
        let mut rows = Vec::new();
        for file in plans {
            let slot_bytes = context.cache.slot_bytes(file.plan.shape().head_dim);
            for &length in lengths {
                let map = HeadMap::new(&file.plan, length);
                let edge = |span: Option<&usize>| span.map_or(String::new(), usize::to_string);
                rows.push(vec![
                    file.label.clone(),
                    length.to_string(),
                    percent(file.plan.density(length)),
                    bytes(file.plan.kv_bytes(length, slot_bytes)),
                    bytes(report::dense_bytes(&file.plan, length, slot_bytes)),
                    edge(map.spans.iter().min()),
                    edge(map.spans.iter().max()),
                ]);
            }
        }
        let head = ["plan", "context", "density", "KV cache", "dense", "smallest span", "largest"];
        tables.push(Table { title: "Sizes".to_string(), head: owned(&head), rows });
    }
    if !items.is_empty() {
        let row = |file: &Items| {
            let right = file.asked.iter().filter(|a| a.right).count();
            vec![
                file.name.clone(),
                format!("{right}/{}", file.asked.len()),
                percent(file.accuracy()),
            ]
        };
        let head = owned(&["cache", "right", "accuracy"]);
        let rows = items.iter().map(row).collect();
        tables.push(Table { title: "Retrieval".to_string(), head, rows });
    }
    tables
}
