use std::path::PathBuf;

use clap::ValueEnum;
use moa_core::search::{Bound, Options};
use moa_core::{DEFAULT_SINK, ModelShape, Plan, PlanRequest, Profile, Space};
use moa_models::{CacheTypes, Eviction, EvictionKind};

use super::evicting;

use crate::args::{distinct, parse_density};
use crate::error::{Error, Result};
use crate::model;
use crate::output::Context;

/// Caches that a plan is compared with, at the bytes of the first plan.
#[derive(Debug, clap::Args)]
pub(super) struct RivalArgs {
    /// Rivals at the bytes of the first plan, or of --density, or as near below as their kind comes, named by what they keep: uniform window (StreamingLLM); fixed span
    /// per KV head, per layer and duo (retrieval and streaming heads), searched on --profile; snapkv, adakv
    /// and kvzip, which evict keys after a dense prefill [default: all that can be had]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "KIND,..")]
    rivals: Option<Vec<Rival>>,
    /// Density of the rivals at the length that is asked at [default: as many bytes as the first plan has, in its
    /// type where all of its heads have one; snapkv, adakv and kvzip in the type of the dense cache]
    #[arg(long, value_name = "DENSITY", value_parser = parse_density)]
    density: Option<f64>,
    /// Profile that rivals are searched on
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// snapkv, adakv and kvzip evict before the last line of the message is read, which asks: kept keys have to
    /// serve any question
    #[arg(long)]
    before_question: bool,
}

/// A cache that a set of tasks is asked of.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    pub(super) name: String,
    pub(super) plan: Plan,
    /// Keys are evicted after dense attention, the plan, has read a prompt.
    pub(super) eviction: Option<Eviction>,
    /// That it keeps clearly less than a rival might, and so looks worse than it needs to.
    pub(super) warning: Option<String>,
}

/// A rival that keeps so much less than it might, as a share of that, is warned of.
const SHORT: f64 = 0.03;

impl Cache {
    pub(super) fn of_plan(name: String, plan: Plan) -> Self {
        Self { name, plan, eviction: None, warning: None }
    }
}

/// A kind of cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rival {
    None,
    Uniform,
    Fixed,
    PerLayer,
    Duo,
    #[value(name = "snapkv")]
    SnapKv,
    #[value(name = "adakv")]
    AdaKv,
    #[value(name = "kvzip")]
    KvZip,
}

impl Rival {
    /// Whether the rival is searched on a profile.
    fn is_searched(self) -> bool {
        matches!(self, Self::Fixed | Self::PerLayer | Self::Duo)
    }

    /// What the rival evicts by, if it has no plan.
    fn eviction(self) -> Option<EvictionKind> {
        match self {
            Self::SnapKv => Some(EvictionKind::SnapKv),
            Self::AdaKv => Some(EvictionKind::AdaKv),
            Self::KvZip => Some(EvictionKind::KvZip),
            Self::None | Self::Uniform | Self::Fixed | Self::PerLayer | Self::Duo => None,
        }
    }
}

/// How many keys rivals hold, and in which type, so that they have the bytes of a plan.
struct Size {
    density: f64,
    types: CacheTypes,
    /// Density of those that evict: of caches in the device's type.
    evicting: f64,
}

impl Size {
    /// As many keys, in the device's type.
    fn of_keys(density: f64) -> Self {
        Self { density, types: CacheTypes::Device, evicting: density }
    }

    fn of(plan: &Plan, length: usize, slot_bytes: u64) -> Self {
        let dense = plan.shape().kv_bytes(length, slot_bytes);
        let share = (plan.kv_bytes(length, slot_bytes) as f64 / dense as f64).min(1.0);
        match CacheTypes::of(plan) {
            Ok(types) => Self { density: plan.density(length), types, evicting: share },
            Err(_) => Self::of_keys(share),
        }
    }
}

impl RivalArgs {
    /// Whether rivals were asked for by name.
    pub(super) fn is_given(&self) -> bool {
        self.rivals.is_some()
    }

    /// What is read for rivals.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.profile.iter()
    }

    /// Checks that no option is without effect.
    pub(super) fn check(&self, has_plan: bool) -> Result<()> {
        let given = self.rivals.as_deref();
        if given.is_some_and(|own| own.len() > 1 && own.contains(&Rival::None)) {
            return Err(Error::argument("--rivals", "none alone, or other kinds", "both"));
        }
        let has_size = has_plan || self.density.is_some();
        let has = |of: fn(Rival) -> bool| match given {
            Some(own) => own.iter().any(|rival| of(*rival)),
            None => has_size,
        };
        let (evicting, searched) = (|rival: Rival| rival.eviction().is_some(), Rival::is_searched);
        if self.before_question && !has(evicting) {
            let expected = "given with snapkv, adakv or kvzip among the rivals";
            return Err(Error::argument("--before-question", expected, "none of them"));
        }
        if self.profile.is_some() && !has(searched) {
            let expected = "given with fixed, per-layer or duo among the rivals";
            return Err(Error::argument("--profile", expected, "none of them"));
        }
        if self.density.is_some() && !has(|rival| rival != Rival::None) {
            return Err(Error::argument("--density", "given with rivals", "none"));
        }
        Ok(())
    }

    /// The rivals; none where neither a plan nor a density says how many bytes they have.
    pub(super) fn caches(
        &self,
        shape: ModelShape,
        plan: Option<&Plan>,
        length: usize,
        context: &Context,
    ) -> Result<Vec<Cache>> {
        let slot_bytes = context.cache.slot_bytes(shape.head_dim);
        let own = plan.map(|plan| Size::of(plan, length, slot_bytes));
        let given = self.density.map(Size::of_keys);
        let Some(Size { density, types, evicting }) = given.or(own) else {
            return match self.rivals {
                None => Ok(Vec::new()),
                Some(_) => {
                    Err(Error::argument("--rivals", "given with --plan or --density", "neither"))
                }
            };
        };
        let profile = self.profile.as_ref().map(Profile::load).transpose()?;
        let mut usual = vec![Rival::Uniform];
        if profile.is_some() {
            usual.extend([Rival::Fixed, Rival::PerLayer, Rival::Duo]);
        }
        usual.extend([Rival::SnapKv, Rival::AdaKv, Rival::KvZip]);
        let sink = plan.map_or(DEFAULT_SINK, Plan::sink);
        let min_span = plan.map_or(DEFAULT_SINK + 16, Plan::min_span);
        // Named by what the plan keeps, which may be less than it might.
        let named = |kind: &str, plan: Plan| -> Result<Cache> {
            let kept = plan.density(length);
            let warning = (kept < (1.0 - SHORT) * density).then(|| {
                format!(
                    "{kind} keeps {kept:.3} of the keys at {length} tokens, where {density:.3} are allowed: no plan of this \
                     kind that was found comes nearer"
                )
            });
            let name = match types.first() {
                Some(own) => format!("{kind} {kept:.3} {own}"),
                None => format!("{kind} {kept:.3}"),
            };
            Ok(Cache { warning, ..Cache::of_plan(name, types.first_of(&plan)?) })
        };
        let mut rivals = Vec::new();
        for rival in distinct(self.rivals.as_ref().unwrap_or(&usual)) {
            if let Some(kind) = rival.eviction() {
                let before_question = self.before_question;
                let eviction = Eviction { kind, density: evicting, before_question };
                let name = evicting::name(&eviction, &format!("{evicting:.3}"));
                let dense = Cache::of_plan(name, Plan::full(shape)?);
                rivals.push(Cache { eviction: Some(eviction), ..dense });
                continue;
            }
            let space = match rival {
                Rival::Uniform => {
                    rivals.push(named("uniform", model::uniform(shape, sink, density)?)?);
                    continue;
                }
                Rival::Fixed => Space::Fixed,
                Rival::PerLayer => Space::PerLayer,
                Rival::Duo => Space::Duo,
                _ => continue,
            };
            let missing = || Error::argument("--rivals", "uniform without --profile", space.name());
            let profile = profile.as_ref().ok_or_else(missing)?;
            if profile.shape() != shape {
                let (expected, got) = (shape, profile.shape());
                let error = moa_core::Error::ShapeMismatch { what: "profile", expected, got };
                return Err(Error::from(error).at("--profile"));
            }
            let bound = Bound { length, max: density, min: None };
            let mut request = PlanRequest::bounded(vec![bound], sink, min_span)?;
            request.solver = Options { threads: context.threads, ..Options::default() };
            let best = fullest(request.with_space(space), profile)?;
            rivals.push(named(space.name(), best)?);
        }
        Ok(rivals)
    }
}

/// The best plan of those that use nearly all of an upper bound. A search by itself leaves keys out that have no
/// influence on a profile, such as those that are farther away than its items are long.
fn fullest(mut request: PlanRequest, profile: &Profile) -> Result<Plan> {
    let lengths = request.objective_lengths(profile);
    // Heads of duo plans are as many as fit by themselves.
    let shares: &[f64] = match request.space {
        Space::Duo => &[],
        _ => &[0.99, 0.97, 0.93, 0.85, 0.7],
    };
    for least in shares.iter().copied().map(Some).chain([None]) {
        for bound in &mut request.bounds {
            bound.min = least.map(|share| share * bound.max);
        }
        let found = match request.search_profile(profile, &lengths) {
            Err(moa_core::Error::Infeasible { .. }) if least.is_some() => continue,
            found => found?,
        };
        if let Some(best) = found.plans.into_iter().next() {
            return Ok(best);
        }
    }
    Err(Error::argument("--profile", "one with plans", "none"))
}
