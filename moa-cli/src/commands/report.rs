use std::fmt;
use std::path::{Path, PathBuf};

use moa_core::write_atomic;
use moa_report::{Answers, NamedPlan, Report};
use serde::Serialize;

use crate::args::{distinct, parse_count};
use crate::error::{Error, Result};
use crate::files::{Files, OutputFolder};
use crate::output::{Context, shown};
use crate::plans::{self, PlanFile};

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
    let plans: Vec<PlanFile> =
        args.plan.iter().map(|p| PlanFile::load(p)).collect::<Result<_>>()?;
    let paths: Vec<PathBuf> = plans.iter().map(|file| file.path.clone()).collect();
    let searched = match &args.plans {
        Some(folder) => plans::load_folder(folder)?,
        None => Vec::new(),
    };
    let others: Vec<PathBuf> = searched.iter().map(|file| file.path.clone()).collect();
    let items: Vec<PathBuf> = args.items.iter().map(|of| plans::labelled(of).1).collect();
    let mut written =
        Files::default().reads(&paths).reads(&others).reads(&items).writes("--out", &args.out)?;
    let answers = |argument: &String| {
        let (name, path) = plans::labelled(argument);
        Answers::load(name, &path)
    };
    let report = Report {
        title: args.title.clone(),
        plans: plans.into_iter().map(|f| NamedPlan { name: f.label, plan: f.plan }).collect(),
        searched: searched
            .into_iter()
            .map(|f| NamedPlan { name: f.name(), plan: f.plan })
            .collect(),
        answers: args.items.iter().map(answers).collect::<Result<_, _>>()?,
        lengths: distinct(&args.at),
        cache: context.cache,
    };
    let page = report.page().map_err(|error| match error {
        moa_report::Error::OtherModel { index, source, .. } => {
            Error::from(source).at(paths[index].display().to_string())
        }
        other => other.into(),
    })?;

    let mut files = Vec::new();
    if let Some(path) = &args.svg {
        let mut folder = OutputFolder::create(path)?;
        for figure in &page.figures {
            let name = format!("{}.svg", figure.id);
            if path.join(&name).exists() {
                written = written.writes("--svg", &path.join(&name))?;
            }
            files.push(folder.add(&name, figure.svg().into_bytes()));
        }
        folder.write(|_| Ok(Vec::new()))?;
    }
    write_atomic(&args.out, page.html().as_bytes())?;
    let ids: Vec<&str> = page.figures.iter().map(|f| f.id.as_str()).collect();
    if args.plans.is_some() && !ids.contains(&"pareto") {
        context.note("no Pareto front: the plans do not say their predicted losses");
    }
    if !report.plans.is_empty() && !ids.contains(&"predicted-measured") {
        context.note("no predicted against measured loss: no plan here was chosen by measurement");
    }
    let titles = page.figures.iter().map(|f| f.title.as_str()).collect();
    context.result(&Outcome {
        out: &args.out,
        figures: ids,
        svg: files.iter().map(|file| file.display().to_string()).collect(),
        titles,
    })
}

/// The page that was written.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    /// Ids of the figures.
    figures: Vec<&'a str>,
    /// Files of the figures, if they were asked for.
    svg: Vec<String>,
    #[serde(skip)]
    titles: Vec<&'a str>,
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n\nReport: {}", self.titles.join("\n"), self.out.display())
    }
}
