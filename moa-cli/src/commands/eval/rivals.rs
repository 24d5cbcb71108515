use std::path::PathBuf;

use clap::ValueEnum;
use moa_core::search::{Bound, Options};
use moa_core::{DEFAULT_SINK, ModelShape, Plan, PlanRequest, Profile, Space};

use crate::args::parse_density;
use crate::error::{Error, Result};
use crate::model;
use crate::output::Context;

/// Caches that a plan is compared with, at the bytes of the first plan.
#[derive(Debug, clap::Args)]
pub(super) struct RivalArgs {
    /// Rivals at the bytes of the first plan, or of --density: uniform window (StreamingLLM), fixed span
    /// per KV head, per layer, duo (retrieval and streaming heads); all but uniform are searched on
    /// --profile [default: uniform, with --profile all]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "KIND,..")]
    rivals: Option<Vec<Rival>>,
    /// Density of the rivals at the length that is asked at [default: that of the first plan]
    #[arg(long, value_name = "DENSITY", value_parser = parse_density)]
    density: Option<f64>,
    /// Profile that rivals are searched on
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

/// A kind of cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rival {
    None,
    Uniform,
    Fixed,
    PerLayer,
    Duo,
}

impl RivalArgs {
    /// The rivals with their names; none where neither a plan nor a density says how many bytes they have.
    pub(super) fn plans(
        &self,
        shape: ModelShape,
        plan: Option<&Plan>,
        length: usize,
        context: &Context,
    ) -> Result<Vec<(String, Plan)>> {
        let own = plan.map(|plan| plan.density(length));
        let Some(density) = self.density.or(own) else {
            return match self.rivals {
                None => Ok(Vec::new()),
                Some(_) => {
                    Err(Error::argument("--rivals", "given with --plan or --density", "neither"))
                }
            };
        };
        let profile = self.profile.as_ref().map(Profile::load).transpose()?;
        let usual = match profile {
            None => vec![Rival::Uniform],
            Some(_) => vec![Rival::Uniform, Rival::Fixed, Rival::PerLayer, Rival::Duo],
        };
        let sink = plan.map_or(DEFAULT_SINK, Plan::sink);
        let min_span = plan.map_or(DEFAULT_SINK + 16, Plan::min_span);
        let mut rivals = Vec::new();
        for rival in self.rivals.as_ref().unwrap_or(&usual) {
            let space = match rival {
                Rival::None => continue,
                Rival::Uniform => {
                    let name = format!("uniform {density:.3}");
                    rivals.push((name, model::uniform(shape, sink, density)?));
                    continue;
                }
                Rival::Fixed => Space::Fixed,
                Rival::PerLayer => Space::PerLayer,
                Rival::Duo => Space::Duo,
            };
            let missing = || Error::argument("--rivals", "uniform without --profile", space.name());
            let profile = profile.as_ref().ok_or_else(missing)?;
            if profile.shape != shape {
                let (expected, got) = (shape, profile.shape);
                let error = moa_core::Error::ShapeMismatch { what: "profile", expected, got };
                return Err(Error::from(error).at("--profile"));
            }
            let bound = Bound { length, max: density, min: None };
            let mut request = PlanRequest::bounded(vec![bound], sink, min_span)?;
            request.solver = Options { threads: context.threads, ..Options::default() };
            let request = request.with_space(space);
            let found = request.search_profile(profile, &request.objective_lengths(profile))?;
            let best = found.plans.into_iter().next();
            let best =
                best.ok_or_else(|| Error::argument("--profile", "one with plans", "none"))?;
            rivals.push((format!("{} {density:.3}", space.name()), best));
        }
        Ok(rivals)
    }
}
