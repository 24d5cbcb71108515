use crate::search::{Bound, Options, ParetoSet, Problem, density_sizes, solve};
use crate::{
    AtLength, CostBound, ElasticRule, Error, HeadRule, ModelShape, Plan, Profile, Provenance,
    Result, Space, Span,
};

/// The bounds, the space of rules and the defaults of one search for plans.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRequest {
    /// Bounds on the mean density, each at one length.
    pub bounds: Vec<Bound>,
    /// Bound on decode time, at the lengths of `bounds`.
    pub decode_time: Option<CostBound>,
    /// Sink positions of every head.
    pub sink: usize,
    /// Smallest span of any head; more than `sink`.
    pub min_span: usize,
    /// Smallest share of the context that any head keeps at the lengths of `bounds`;
    /// [`PlanRequest::with_min_share`] sets it with what depends on it.
    pub min_share: f64,
    /// What kind of plan; [`PlanRequest::with_space`] sets it with what depends on it.
    pub space: Space,
    /// Rules to choose from.
    pub candidates: Vec<ElasticRule>,
    /// Limits of the solver.
    pub solver: Options,
    /// Most recent keys that the model's layers themselves see, one entry for each layer, or none; what lies
    /// beyond is not charged ([`Plan::within`]).
    pub windows: Vec<Option<usize>>,
}

impl PlanRequest {
    /// Plans of a mean density of at most `density` at each of `lengths`; see
    /// [`PlanRequest::bounded`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the density is not in (0, 1], there is no length, or `min_span` does not
    /// exceed `sink`.
    pub fn density(density: f64, lengths: &[usize], sink: usize, min_span: usize) -> Result<Self> {
        let bounds = lengths.iter().map(|&length| Bound { length, max: density, min: None });
        Self::bounded(bounds.collect(), sink, min_span)
    }

    /// Plans within bounds on density, from a grid of 99 elastic rules scaled to the longest of their
    /// lengths, with `sink` sinks and spans of at least `min_span`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a density is not in (0, 1], there is no bound, or `min_span` does not
    /// exceed `sink`.
    pub fn bounded(bounds: Vec<Bound>, sink: usize, min_span: usize) -> Result<Self> {
        let Some(longest) = bounds.iter().map(|b| b.length).max() else {
            return Err(Error::invalid("bound lengths", "at least one length", "none"));
        };
        for Bound { length, max, min } in &bounds {
            if *length == 0 {
                return Err(Error::invalid("bound length", "at least 1 token", 0));
            }
            if !(*max > 0.0 && *max <= 1.0) {
                return Err(Error::invalid("density", "more than 0 and at most 1", max));
            }
            if let Some(min) = min.filter(|min| !(0.0..=*max).contains(min)) {
                let expected = format!("at least 0 and at most the upper bound, {max}");
                return Err(Error::invalid("smallest density", expected, min));
            }
        }
        if min_span <= sink {
            return Err(Error::invalid("min_span", format!("more than sink ({sink})"), min_span));
        }
        let (space, solver) = (Space::default(), Options::default());
        let candidates = space.candidates(longest, min_span);
        let (decode_time, min_share) = (None, 0.0);
        let windows = Vec::new();
        Ok(Self {
            bounds,
            decode_time,
            sink,
            min_span,
            min_share,
            space,
            candidates,
            solver,
            windows,
        })
    }

    /// The search that a plan says it came out of, but for the decode time that it bounded, which only
    /// measurements can; `None` if the plan says no bounds.
    ///
    /// # Errors
    /// [`Error::Invalid`] if what the plan says is out of range.
    pub fn from_plan(plan: &Plan) -> Result<Option<Self>> {
        let from = &plan.provenance;
        if from.density_bounds.is_empty() {
            return Ok(None);
        }
        let bound = |b: &AtLength| {
            let min = from.density_floors.iter().find(|f| f.length == b.length).map(|f| f.value);
            Bound { length: b.length, max: b.value, min }
        };
        let bounds = from.density_bounds.iter().map(bound).collect();
        // Plans of before there was a choice say nothing.
        let space = from.space.as_deref().map_or(Ok(Space::default()), str::parse)?;
        let request = Self::bounded(bounds, plan.sink(), plan.min_span())?.with_space(space);
        let mut request = request.with_windows(plan.windows().to_vec());
        if let Some(most) = from.max_rules_per_layer {
            request.solver.max_rules_per_layer = Some(most);
            request.solver.validate()?;
        }
        request.with_min_share(from.min_share.unwrap_or(0.0)).map(Some)
    }

    /// The same request for plans of another kind.
    #[must_use]
    pub fn with_space(mut self, space: Space) -> Self {
        let longest = self.bounds.iter().map(|b| b.length).max().unwrap_or(1);
        self.candidates = space.candidates(longest, self.min_span);
        if space == Space::PerLayer {
            self.solver.max_rules_per_layer = Some(1);
        }
        self.space = space;
        self
    }

    /// The same request for a model whose layers have sliding windows, one entry for each layer.
    #[must_use]
    pub fn with_windows(mut self, windows: Vec<Option<usize>>) -> Self {
        self.windows = windows;
        self
    }

    /// What a rule keeps in a layer, in a sequence opened for `length` tokens. A layer that the model does not
    /// have has no window.
    pub fn span(&self, layer: usize, rule: &HeadRule, length: usize) -> Span {
        let span = rule.span(length, self.sink, self.min_span);
        match self.windows.get(layer).copied().flatten() {
            Some(window) => span.within(window, length),
            None => span,
        }
    }

    /// Mean share of the context that a plan keeps at a length, in the windows of the model's layers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not one window for each layer.
    pub fn density_of(&self, plan: &Plan, length: usize) -> Result<f64> {
        match self.windows.is_empty() {
            true => Ok(plan.density(length)),
            false => Ok(plan.clone().within(self.windows.clone())?.density(length)),
        }
    }

    /// Whether a plan is within the bounds on density, and has no more distinct rules in a layer than the solver may
    /// choose ([`Options::max_rules_per_layer`]).
    ///
    /// # Errors
    /// As [`density_of`](Self::density_of).
    pub fn allows(&self, plan: &Plan) -> Result<bool> {
        if !self.allows_rules(plan) {
            return Ok(false);
        }
        for bound in &self.bounds {
            let density = self.density_of(plan, bound.length)?;
            if density > bound.max + 1e-9 || bound.min.is_some_and(|min| density < min) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The part of [`allows`](Self::allows) that does not count keys: distinct rules in each layer.
    pub fn allows_rules(&self, plan: &Plan) -> bool {
        let Some(most) = self.solver.max_rules_per_layer else { return true };
        plan.rules().chunks(plan.shape().kv_heads).all(|layer| {
            let is_new = |(at, rule): &(usize, &HeadRule)| !layer[..*at].contains(rule);
            layer.iter().enumerate().filter(is_new).count() <= most
        })
    }

    /// The same request for plans whose heads keep at least `share` of the context at the lengths of
    /// the bounds. Calibration tells which heads its answers need, not what the others do for text that
    /// it does not hold. Set the space first.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the share is negative or above an upper bound, or the space is not
    /// elastic: others have spans that do not grow.
    pub fn with_min_share(mut self, share: f64) -> Result<Self> {
        let most = self.bounds.iter().map(|b| b.max).fold(1.0, f64::min);
        if !(0.0..=most).contains(&share) {
            let expected = format!("at least 0 and at most the density, {most}");
            return Err(Error::invalid("smallest share", expected, share));
        }
        if share > 0.0 {
            if self.space != Space::Elastic {
                return Err(Error::invalid("smallest share", "0 but for elastic plans", share));
            }
            let floor = ElasticRule::new(0.0, share)?;
            let span = |rule: &ElasticRule, b: &Bound| rule.span(b.length, self.min_span);
            let wide = |rule: &ElasticRule| {
                *rule != floor && self.bounds.iter().all(|b| span(rule, b) >= span(&floor, b))
            };
            let mut candidates = vec![floor];
            candidates.extend(self.candidates.iter().filter(|rule| wide(rule)));
            self.candidates = candidates;
        }
        self.min_share = share;
        Ok(self)
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
        let shape = profile.shape();
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
                        let span = self.span(layer, &(*rule).into(), length);
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
        let problem = self.problem(shape, lengths, losses)?;
        let set = solve(&problem, &self.solver)?;
        let bounded = self.bounds.iter().map(|bound| bound.length);
        let shortest = lengths.iter().copied().chain(bounded).min().unwrap_or(0);
        let at = |lengths: &[usize], values: &[f64]| {
            lengths.iter().zip(values).map(|(&length, &value)| AtLength { length, value }).collect()
        };
        let plans = set.solutions.iter().map(|solution| {
            let rule = |&c: &usize| self.kept_below(shortest, self.candidates[c]);
            let rules = solution.choice.iter().map(rule).collect::<Result<_>>()?;
            let mut plan = Plan::new(shape, self.sink, self.min_span, rules)?;
            let values = |of: &dyn Fn(&Bound) -> Option<f64>| {
                let at = |b| of(b).map(|value| AtLength { length: b.length, value });
                self.bounds.iter().filter_map(at).collect()
            };
            plan.provenance = Provenance {
                space: Some(self.space.name().to_string()),
                density_bounds: values(&|b| Some(b.max)),
                decode_time: self.decode_time.as_ref().map(|bound| bound.share),
                density_floors: values(&|b| b.min),
                min_share: Some(self.min_share).filter(|share| *share > 0.0),
                max_rules_per_layer: self.solver.max_rules_per_layer,
                predicted_losses: at(lengths, &solution.losses),
                profile_lengths: lengths.to_vec(),
                ..Provenance::default()
            };
            Ok(plan)
        });
        Ok(FoundPlans { plans: plans.collect::<Result<_>>()?, set })
    }

    /// Checks that each bound can be met by itself, for which nothing has to be profiled: what is too small for
    /// the smallest spans of a model of this shape, or larger than what rules reach, is known before.
    ///
    /// # Errors
    /// [`Error::Infeasible`] with what rules reach; [`Error::Invalid`] if there is not one window for each layer.
    pub fn reachable(&self, shape: ModelShape) -> Result<()> {
        let losses = vec![0.0; shape.total_kv_heads() * self.candidates.len()];
        self.problem(shape, &[1], losses).map(|_| ())
    }

    /// What [`search`](Self::search) solves.
    fn problem(&self, shape: ModelShape, lengths: &[usize], losses: Vec<f64>) -> Result<Problem> {
        let mut sizes = density_sizes(&self.candidates, &self.bounds, self.min_span);
        let mut bounds = self.bounds.clone();
        if let Some(CostBound { share, curve }) = &self.decode_time {
            for Bound { length, .. } in &self.bounds {
                let cost = |rule: &ElasticRule| curve.at(rule.span(*length, self.min_span));
                sizes.extend(self.candidates.iter().map(|r| cost(r) / curve.at(*length)));
                bounds.push(Bound { length: *length, max: *share, min: None });
            }
        }
        // Windows make heads of different sizes, so that no number of them fills the bound.
        if self.space == Space::Duo && self.windows.iter().all(Option::is_none) {
            fill(&mut bounds, &sizes, shape.total_kv_heads());
        }
        let problem = Problem::new(
            shape.layers,
            shape.kv_heads,
            self.candidates.clone(),
            lengths.to_vec(),
            losses,
            bounds,
            sizes,
        )?;
        let problem = match self.windows.is_empty() {
            true => problem,
            false => problem.with_layer_sizes(self.layer_sizes(shape.layers)?)?,
        };
        // The first bounds are those on density.
        let kind = |at| match at < self.bounds.len() {
            true => "mean density",
            false => "mean share of dense attention's decode time",
        };
        let cause = format!(
            ", that of heads of the smallest size ({} keys, {} of them sink)",
            self.min_span, self.sink
        );
        problem.check_reach(kind, &cause)?;
        Ok(problem)
    }

    /// Sizes of the bounds on density, then of those on decode time, `[bound][layer][candidate]`.
    fn layer_sizes(&self, layers: usize) -> Result<Vec<f64>> {
        if self.windows.len() != layers {
            let expected = format!("one for each of {layers} layers");
            return Err(Error::invalid("sliding windows", expected, self.windows.len()));
        }
        let mut sizes = Vec::new();
        let curves = std::iter::once(None).chain(self.decode_time.as_ref().map(Some));
        for (curve, bound) in curves.flat_map(|curve| self.bounds.iter().map(move |b| (curve, b))) {
            for layer in 0..layers {
                sizes.extend(self.candidates.iter().map(|rule| {
                    let kept = self.span(layer, &(*rule).into(), bound.length).total();
                    match curve {
                        None => kept as f64 / bound.length.max(1) as f64,
                        Some(CostBound { curve, .. }) => curve.at(kept) / curve.at(bound.length),
                    }
                }));
            }
        }
        Ok(sizes)
    }

    /// A rule that below `shortest` tokens, the shortest length at which losses or bounds say anything,
    /// keeps the span it has there, and so no more bytes than there. What a head needs does not shrink
    /// in proportion: lines that go on below that length lose retrieval there.
    fn kept_below(&self, shortest: usize, rule: ElasticRule) -> Result<HeadRule> {
        let span = rule.span(shortest, self.min_span);
        let shrinks =
            rule.beta > 0.0 && span > self.min_span && (span < shortest || rule.alpha < 0.0);
        HeadRule::union(std::iter::once(rule).chain(shrinks.then(|| ElasticRule::fixed(span))))
    }

    /// Searches on a profile: [`PlanRequest::predicted_losses`], then [`PlanRequest::search`].
    /// `lengths` are usually [`PlanRequest::objective_lengths`].
    ///
    /// # Errors
    /// The errors of [`PlanRequest::predicted_losses`] and of [`PlanRequest::search`].
    pub fn search_profile(&self, profile: &Profile, lengths: &[usize]) -> Result<FoundPlans> {
        let losses = self.predicted_losses(profile, lengths)?;
        let mut found = self.search(profile.shape(), lengths, losses)?;
        for plan in &mut found.plans {
            *plan = plan.clone().with_fingerprint(profile.info.fingerprint.clone());
            plan.provenance.objective = Some(profile.info.objective.clone());
            plan.provenance.data = Some(profile.info.data.clone());
            // Losses beyond the longest are extended from it.
            plan.provenance.profile_lengths.retain(|&length| profile.at(length).is_ok());
        }
        Ok(found)
    }
}

/// With a narrow and a wide candidate, asks for as many wide heads as fit the upper bounds: a
/// ranking says which heads come first, not when to stop. `sizes` is `[bound][candidate]`.
fn fill(bounds: &mut [Bound], sizes: &[f64], heads: usize) {
    let sizes: Vec<(f64, f64)> = sizes.chunks(2).map(|pair| (pair[0], pair[1])).collect();
    let fit = |(bound, &(narrow, wide)): (&Bound, &(f64, f64))| {
        if wide <= narrow {
            return heads as f64;
        }
        // 1e-9 absorbs the rounding of a bound that a whole number of heads meets exactly.
        let room = (bound.max - narrow) / (wide - narrow) * heads as f64;
        (room + 1e-9).floor().clamp(0.0, heads as f64)
    };
    let count = bounds.iter().zip(&sizes).map(fit).fold(heads as f64, f64::min);
    for (bound, (narrow, wide)) in bounds.iter_mut().zip(sizes) {
        let filled = narrow + (wide - narrow) * count / heads as f64 - 1e-9;
        // Where even narrow heads are too many, the search says so.
        if filled <= bound.max {
            bound.min = Some(bound.min.unwrap_or(0.0).max(filled));
        }
    }
}

/// The plans that [`PlanRequest::search`] found: a Pareto set, in which no plan is at least as good
/// as another one at every length.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundPlans {
    /// The plans.
    pub plans: Vec<Plan>,
    /// The solutions of the search that the plans were made of, in the same order.
    pub set: ParetoSet,
}
