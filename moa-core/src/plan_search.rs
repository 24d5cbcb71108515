use crate::search::{Bound, Options, ParetoSet, Problem, density_sizes, scaled_grid, solve};
use crate::{
    AtLength, ElasticRule, Error, HeadRule, ModelShape, Plan, Profile, Provenance, Result,
};

/// What plans to search for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRequest {
    /// Largest mean density at each length.
    pub bounds: Vec<Bound>,
    /// Sink positions of every head.
    pub sink: usize,
    /// Smallest span of any head; more than `sink`.
    pub min_span: usize,
    /// Rules to choose from.
    pub candidates: Vec<ElasticRule>,
    /// How to search.
    pub solver: Options,
}

impl PlanRequest {
    /// Plans of a mean density of at most `density` at each of `lengths`, from a grid of 99 rules
    /// scaled to the longest of them, with `sink` sinks and spans of at least `min_span`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the density is not in (0, 1], there is no length, or `min_span` does not
    /// exceed `sink`.
    pub fn density(density: f64, lengths: &[usize], sink: usize, min_span: usize) -> Result<Self> {
        if !(density > 0.0 && density <= 1.0) {
            return Err(Error::invalid("density", "more than 0 and at most 1", density));
        }
        let Some(&longest) = lengths.iter().max() else {
            return Err(Error::invalid("bound lengths", "at least one length", "none"));
        };
        if min_span <= sink {
            return Err(Error::invalid("min_span", format!("more than sink ({sink})"), min_span));
        }
        let bounds = lengths.iter().map(|&length| Bound { length, max: density, min: None });
        Ok(Self {
            bounds: bounds.collect(),
            sink,
            min_span,
            candidates: scaled_grid(longest),
            solver: Options::default(),
        })
    }

    /// The lengths to minimise losses at: those profiled and, if it is longer, the longest bound
    /// length. Without that one, a head that needs everything at the profile lengths would get the
    /// same predicted loss from a rule that grows and from one that stops growing there.
    pub fn objective_lengths(&self, profile: &Profile) -> Vec<usize> {
        let mut lengths = profile.lengths();
        let longest = self.bounds.iter().map(|b| b.length).max();
        lengths.extend(longest.filter(|l| lengths.last().is_some_and(|last| l > last)));
        lengths
    }

    /// Losses that a profile predicts for every candidate, `[length][layer][head][candidate]`. A
    /// length beyond the profile's longest is predicted from that one, distances stretched in
    /// proportion.
    ///
    /// # Errors
    /// [`Error::UnknownLength`] if the profile lacks a shorter length.
    pub fn predicted_losses(&self, profile: &Profile, lengths: &[usize]) -> Result<Vec<f64>> {
        let shape = profile.shape;
        let longest = profile.lengths().last().copied().unwrap_or(0);
        let mut losses =
            Vec::with_capacity(lengths.len() * shape.total_kv_heads() * self.candidates.len());
        for &length in lengths {
            let known = if length > longest && longest > 0 { longest } else { length };
            let influence = profile.at(known)?;
            for layer in 0..shape.layers {
                for head in 0..shape.kv_heads {
                    let by_distance = influence.by_distance(layer, head, self.sink);
                    losses.extend(self.candidates.iter().map(|rule| {
                        let span = HeadRule::from(*rule).span(length, self.sink, self.min_span);
                        by_distance.loss(span.window() * known / length)
                    }));
                }
            }
        }
        Ok(losses)
    }

    /// The Pareto set of plans for given losses, `[length][layer][head][candidate]`.
    ///
    /// # Errors
    /// [`Error::Infeasible`] if a bound cannot be met, [`Error::Invalid`] if the losses do not fit.
    pub fn search(
        &self,
        shape: ModelShape,
        lengths: &[usize],
        losses: Vec<f64>,
    ) -> Result<FoundPlans> {
        let sizes = density_sizes(&self.candidates, &self.bounds, self.min_span);
        let problem = Problem::new(
            shape.layers,
            shape.kv_heads,
            self.candidates.clone(),
            lengths.to_vec(),
            losses,
            self.bounds.clone(),
            sizes,
        )?;
        let set = solve(&problem, &self.solver)?;
        let at = |lengths: &[usize], values: &[f64]| {
            lengths.iter().zip(values).map(|(&length, &value)| AtLength { length, value }).collect()
        };
        let plans = set.solutions.iter().map(|solution| {
            let rules = solution.choice.iter().map(|&c| self.candidates[c].into()).collect();
            let mut plan = Plan::new(shape, self.sink, self.min_span, rules)?;
            plan.provenance = Provenance {
                density_bounds: self
                    .bounds
                    .iter()
                    .map(|b| AtLength { length: b.length, value: b.max })
                    .collect(),
                predicted_losses: at(lengths, &solution.losses),
                profile_lengths: lengths.to_vec(),
                ..Provenance::default()
            };
            Ok(plan)
        });
        Ok(FoundPlans { plans: plans.collect::<Result<_>>()?, set })
    }

    /// Searches on a profile: [`PlanRequest::predicted_losses`], then [`PlanRequest::search`].
    /// `lengths` are usually [`PlanRequest::objective_lengths`].
    ///
    /// # Errors
    /// As those.
    pub fn search_profile(&self, profile: &Profile, lengths: &[usize]) -> Result<FoundPlans> {
        let losses = self.predicted_losses(profile, lengths)?;
        let mut found = self.search(profile.shape, lengths, losses)?;
        for plan in &mut found.plans {
            *plan = plan.clone().with_fingerprint(profile.info.fingerprint.clone());
            plan.provenance.objective = Some(profile.info.objective.clone());
            plan.provenance.data = Some(profile.info.data.clone());
        }
        Ok(found)
    }
}

/// Plans of which none is at least as good as another at every length.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundPlans {
    /// The plans.
    pub plans: Vec<Plan>,
    /// What the search found, in the same order.
    pub set: ParetoSet,
}
