use clap::ValueEnum;
use moa_models::{Eviction, EvictionKind};

use crate::args::parse_density;
use crate::model::ChosenPlan;

/// Flags of plans, in whose place a rival is. All of a rival's conflict with them: that they require `--rival`, clap
/// would forget beside these.
const OF_PLANS: [&str; 3] = ["plan", "uniform", "any_weights"];

/// A rival of plans that evicts keys after dense attention has read a prompt.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct EvictingArgs {
    /// Evict keys after the prompt instead of following a plan: snapkv (attention of the last 32 queries), adakv
    /// (the same, budgets shared by the heads of a layer), kvzip (attention while the model repeats its context)
    #[arg(long, value_enum, value_name = "KIND", requires = "density", conflicts_with_all = OF_PLANS)]
    rival: Option<Evicting>,
    /// Slots of the rival's caches as a share of the context: of kept keys and of the answer
    #[arg(long, requires = "rival", value_name = "DENSITY", conflicts_with_all = OF_PLANS, value_parser = parse_density)]
    density: Option<f64>,
    /// Evict before the last line of the message is read, which asks: kept keys have to serve any question
    #[arg(long, requires = "rival", conflicts_with_all = OF_PLANS)]
    before_question: bool,
}

/// The kinds as values of flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub(super) enum Evicting {
    SnapKv,
    AdaKv,
    KvZip,
}

impl From<Evicting> for EvictionKind {
    fn from(kind: Evicting) -> Self {
        match kind {
            Evicting::SnapKv => Self::SnapKv,
            Evicting::AdaKv => Self::AdaKv,
            Evicting::KvZip => Self::KvZip,
        }
    }
}

impl EvictingArgs {
    /// The plan of a run, or dense attention with the rival's eviction and name.
    pub(super) fn over(&self, plan: ChosenPlan) -> ChosenPlan {
        let (Some(kind), Some(density)) = (self.rival, self.density) else { return plan };
        let (kind, before_question) = (kind.into(), self.before_question);
        let eviction = Eviction { kind, density, before_question };
        ChosenPlan { name: name(&eviction, &density.to_string()), eviction: Some(eviction), ..plan }
    }
}

/// What tables call an eviction.
pub(super) fn name(eviction: &Eviction, density: &str) -> String {
    let when = if eviction.before_question { " before the question" } else { "" };
    format!("{} {density}{when}", eviction.kind.name())
}

/// Tokens at the end of a window of text that rivals are compared on: an eighth, or less where an eviction leaves
/// slots for few tokens, as many of which then hold keys of the text before.
pub(super) fn continuation(window: usize, density: f64) -> usize {
    ((density / 2.0).min(0.125) * window as f64).max(1.0) as usize
}
