use crate::decoder::logits::{check_logits, likeliest};
use crate::device::Draw;
use crate::error::{Error, Result};
use moa_core::SplitMix64;
use serde::{Deserialize, Serialize};

/// The options of choosing the next token from the logits. The default is greedy.
///
/// The steps and their order are transformers': repetition penalty, then those of presence and
/// frequency, bias, temperature, top-k, top-p, min-p, each on what the one before left. Greedy choice
/// applies penalties and bias only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; `None` or 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the fewest likeliest tokens with this much probability together; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already in the sequence
    /// (arXiv 1909.05858, section 4.1); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that were generated already; 0 changes nothing.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once for each time that it was generated; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; minus infinity, in JSON `null`, forbids one.
    #[serde(with = "bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds give equal choices.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks that every number is in its range.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first that is not.
    pub fn validate(&self) -> Result<()> {
        let check = |fine: bool, what, expected: &str, got: f32| {
            if fine { Ok(()) } else { Err(Error::invalid(what, expected, got)) }
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repetition_penalty);
        check(t.is_finite() && t >= 0.0, "temperature", "a finite number of at least 0", t)?;
        check(p > 0.0 && p <= 1.0, "top_p", "above 0 and at most 1", p)?;
        check((0.0..=1.0).contains(&m), "min_p", "from 0 to 1", m)?;
        check(r.is_finite() && r > 0.0, "repetition_penalty", "a finite number above 0", r)?;
        let (p, f) = (self.presence_penalty, self.frequency_penalty);
        check(p.is_finite(), "presence_penalty", "a finite number", p)?;
        check(f.is_finite(), "frequency_penalty", "a finite number", f)?;
        let is_bad = |bias: &f32| bias.is_nan() || *bias == f32::INFINITY;
        let bad = self.logit_bias.iter().find(|(_, bias)| is_bad(bias));
        check(bad.is_none(), "logit_bias", "finite or minus infinity", bad.map_or(0.0, |bad| bad.1))
    }

    /// The [`top_p`](Self::top_p) of a request that may say 0 for nothing but the likeliest token, as OpenAI's API has it.
    #[must_use]
    pub const fn share(asked: f32) -> f32 {
        if asked == 0.0 { f32::MIN_POSITIVE } else { asked }
    }

    /// Whether the logits are taken as they are: no penalty and no bias.
    pub(crate) fn is_plain(&self) -> bool {
        self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
    }
}

impl From<&SamplingOptions> for Draw {
    fn from(options: &SamplingOptions) -> Self {
        Self {
            temperature: options.temperature,
            top_k: options.top_k.unwrap_or(0),
            top_p: options.top_p,
            min_p: options.min_p,
        }
    }
}

/// Chooses tokens; holds the random numbers and the buffers of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: SplitMix64,
    candidates: Vec<Candidate>,
    seen: Vec<bool>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    /// Probability relative to the likeliest token's.
    weight: f64,
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] as [`SamplingOptions::validate`].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.validate()?;
        let random = SplitMix64::new(options.seed);
        Ok(Self { options, random, candidates: Vec::new(), seen: Vec::new() })
    }

    /// One that makes the next choices with the same random numbers.
    pub(crate) fn fork(&self) -> Self {
        let (options, random) = (self.options.clone(), self.random.clone());
        Self { options, random, candidates: Vec::new(), seen: Vec::new() }
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Chooses the next token from `logits`, `[vocabulary]`; `history` holds the tokens of the
    /// sequence so far, for the penalties, which are written into `logits` as the bias is.
    ///
    /// Among equal logits the lowest id counts as the likelier. A token at minus infinity is
    /// never chosen.
    ///
    /// # Errors
    /// [`Error::Logits`] when a logit is NaN or plus infinity or all are minus infinity,
    /// [`Error::Invalid`] when a token of `history` is not in the vocabulary. The sampler and
    /// the logits are then as before.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.sample_after(logits, history, 0)
    }

    /// [`sample`](Self::sample), where the first `prompt_len` tokens of `history` were not generated:
    /// only the repetition penalty counts them.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn sample_after(
        &mut self,
        logits: &mut [f32],
        history: &[u32],
        prompt_len: usize,
    ) -> Result<u32> {
        check_logits(logits)?;
        if !self.options.is_plain() {
            self.check_ids(logits, history)?;
            self.penalise(logits, history);
            self.lower_generated(logits, history.get(prompt_len..).unwrap_or_default());
            for (id, bias) in &self.options.logit_bias {
                logits[*id as usize] += bias;
            }
            // A bias may have forbidden all of them.
            check_logits(logits)?;
        }
        if self.options.temperature == 0.0 {
            return Ok(likeliest(logits).0);
        }
        self.weigh(logits);
        self.restrict();
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let mut left = self.unit() * total;
        let mut chosen = self.candidates[0].id;
        for candidate in &self.candidates {
            if candidate.weight > 0.0 {
                chosen = candidate.id;
                left -= candidate.weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        Ok(chosen)
    }

    /// Checks that every token which a penalty or a bias is about has a logit.
    fn check_ids(&self, logits: &[f32], history: &[u32]) -> Result<()> {
        let expected = || format!("below the number of logits ({})", logits.len());
        let beyond = |id: &&u32| **id as usize >= logits.len();
        if let Some(id) = history.iter().find(beyond) {
            return Err(Error::invalid("token of the history", expected(), id));
        }
        match self.options.logit_bias.iter().map(|(id, _)| id).find(beyond) {
            Some(id) => Err(Error::invalid("token of logit_bias", expected(), id)),
            None => Ok(()),
        }
    }

    /// Lowers the logits of generated tokens, by their presence and by how often they came.
    fn lower_generated(&self, logits: &mut [f32], generated: &[u32]) {
        let (presence, frequency) = (self.options.presence_penalty, self.options.frequency_penalty);
        if presence == 0.0 && frequency == 0.0 {
            return;
        }
        let mut counts = std::collections::BTreeMap::new();
        for id in generated {
            *counts.entry(*id as usize).or_insert(0u32) += 1;
        }
        for (id, count) in counts {
            logits[id] -= presence + frequency * count as f32;
        }
    }

    /// Applies the repetition penalty, once to each token however often it came.
    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        self.seen.clear();
        self.seen.resize(logits.len(), false);
        for &id in history {
            let id = id as usize;
            if !std::mem::replace(&mut self.seen[id], true) {
                let logit = logits[id];
                // Clamped, so that an extreme penalty leaves the logits finite.
                logits[id] = if logit < 0.0 { logit * penalty } else { logit / penalty };
                if logit.is_finite() {
                    logits[id] = logits[id].clamp(f32::MIN, f32::MAX);
                }
            }
        }
    }

    /// The next random number, uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        // The upper 53 bits.
        (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Makes every token a candidate, at the temperature.
    fn weigh(&mut self, logits: &[f32]) {
        let top = f64::from(likeliest(logits).1);
        let temperature = f64::from(self.options.temperature);
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&logit, id)| Candidate {
            id,
            weight: ((f64::from(logit) - top) / temperature).exp(),
        }));
    }

    /// Drops the candidates that top-k, top-p and min-p drop. At least the likeliest stays.
    fn restrict(&mut self) {
        let SamplingOptions { top_k, top_p, min_p, .. } = self.options;
        let all = self.candidates.len();
        let keep = top_k.filter(|k| *k > 0).unwrap_or(all).min(all);
        let by_weight =
            |a: &Candidate, b: &Candidate| b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id));
        if keep < all {
            self.candidates.select_nth_unstable_by(keep - 1, by_weight);
            self.candidates.truncate(keep);
        }
        if keep < all || top_p < 1.0 {
            self.candidates.sort_unstable_by(by_weight);
        }
        if top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
            let wanted = f64::from(top_p) * total;
            let mut sum = 0.0;
            let enough = self.candidates.iter().position(|candidate| {
                sum += candidate.weight;
                sum >= wanted
            });
            self.candidates.truncate(enough.map_or(keep, |last| last + 1));
        }
        if min_p > 0.0 {
            // The likeliest token's weight is 1.
            self.candidates.retain(|candidate| candidate.weight >= f64::from(min_p));
        }
    }
}

/// JSON has no infinity, and writes `null` for what is none of its numbers.
mod bias {
    use serde::ser::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(bias: &[(u32, f32)], to: S) -> Result<S::Ok, S::Error> {
        let written = |&(id, x): &(u32, f32)| match x {
            f32::NEG_INFINITY => Ok((id, None)),
            x if x.is_finite() => Ok((id, Some(x))),
            x => Err(S::Error::custom(format_args!(
                "logit_bias of token {id}: expected finite or minus infinity, got {x}"
            ))),
        };
        bias.iter().map(written).collect::<Result<Vec<_>, _>>()?.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(u32, f32)>, D::Error> {
        let bias = Vec::<(u32, Option<f32>)>::deserialize(from)?;
        Ok(bias.into_iter().map(|(id, x)| (id, x.unwrap_or(f32::NEG_INFINITY))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(options: SamplingOptions) -> Sampler {
        Sampler::new(options).unwrap()
    }

    /// Options that sample from everything.
    fn warm() -> SamplingOptions {
        SamplingOptions { temperature: 1.0, seed: 7, ..SamplingOptions::default() }
    }

    /// How often each token comes in `draws` draws.
    fn counts(options: SamplingOptions, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = sampler(options);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&mut logits.to_vec(), &[]).unwrap() as usize] += 1;
        }
        counts
    }

    /// Logits whose probabilities are `.5, .25, .125, .0625, .0625`.
    fn halves() -> [f32; 5] {
        [0.5f32, 0.25, 0.125, 0.0625, 0.0625].map(f32::ln)
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() -> Result<()> {
        let mut greedy = sampler(SamplingOptions::default());
        assert_eq!(greedy.sample(&mut [0.0, 3.0, 1.0, 3.0], &[])?, 1);
        assert_eq!(greedy.sample(&mut [f32::NEG_INFINITY, -5.0], &[])?, 1);
        Ok(())
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let got = counts(warm(), &halves(), 16_000);
        for (count, expected) in got.iter().zip([8000.0, 4000.0, 2000.0, 1000.0, 1000.0]) {
            // Four standard deviations of a binomial are below 4 * sqrt(expected).
            assert!((*count as f64 - expected).abs() < 4.0 * f64::sqrt(expected), "{got:?}");
        }
        let hot =
            counts(SamplingOptions { temperature: 0.5, ..warm() }, &[0.0, f32::ln(2.0)], 5000);
        assert!((hot[1] as f64 - 4000.0).abs() < 4.0 * 30.0, "squared odds, got {hot:?}");
    }

    #[test]
    fn restrictions_keep_what_they_say() {
        let kept = |options| {
            let counts = counts(options, &halves(), 4000);
            counts.iter().map(|count| *count > 0).collect::<Vec<_>>()
        };
        let first = |n| (0..5).map(|id| id < n).collect::<Vec<_>>();
        assert_eq!(kept(SamplingOptions { top_k: Some(2), ..warm() }), first(2));
        assert_eq!(kept(SamplingOptions { top_k: Some(0), ..warm() }), first(5));
        assert_eq!(kept(SamplingOptions { top_k: Some(9), ..warm() }), first(5));
        // The fourth and fifth are equal: the lower id counts as the likelier.
        assert_eq!(kept(SamplingOptions { top_k: Some(4), ..warm() }), first(4));
        assert_eq!(kept(SamplingOptions { top_p: 0.7, ..warm() }), first(2));
        assert_eq!(kept(SamplingOptions { top_p: 0.8, ..warm() }), first(3));
        assert_eq!(kept(SamplingOptions { top_p: 0.01, ..warm() }), first(1));
        assert_eq!(kept(SamplingOptions { min_p: 0.24, ..warm() }), first(3));
        assert_eq!(kept(SamplingOptions { min_p: 1.0, ..warm() }), first(1));
        // Top-p counts what top-k left: .5 of .75 is two thirds.
        assert_eq!(kept(SamplingOptions { top_k: Some(2), top_p: 0.6, ..warm() }), first(1));
    }

    #[test]
    fn penalty_counts_a_token_once_and_goes_away_from_it() -> Result<()> {
        let options = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::default() };
        let mut logits = [4.0, 3.0, -1.0, 0.0];
        assert_eq!(sampler(options).sample(&mut logits, &[0, 2, 0, 0])?, 1);
        assert_eq!(logits, [2.0, 3.0, -2.0, 0.0]);
        Ok(())
    }

    #[test]
    fn penalties_of_presence_and_frequency_count_what_was_generated() -> Result<()> {
        let options = SamplingOptions {
            presence_penalty: 0.5,
            frequency_penalty: 1.0,
            ..SamplingOptions::default()
        };
        let mut logits = [4.0, 3.0, -1.0, 0.0];
        // The first token is the prompt's.
        assert_eq!(sampler(options).sample_after(&mut logits, &[1, 0, 2, 0], 1)?, 1);
        assert_eq!(logits, [1.5, 3.0, -2.5, 0.0]);
        Ok(())
    }

    #[test]
    fn a_bias_forbids_and_forces() -> Result<()> {
        let with = |logit_bias| SamplingOptions { logit_bias, ..SamplingOptions::default() };
        let logits = [4.0, 3.0, -1.0];
        let mut forbid = sampler(with(vec![(0, f32::NEG_INFINITY)]));
        assert_eq!(forbid.sample(&mut logits.clone(), &[])?, 1);
        let mut force = sampler(with(vec![(2, 100.0)]));
        assert_eq!(force.sample(&mut logits.clone(), &[])?, 2);
        let mut none = sampler(with((0..3).map(|id| (id, f32::NEG_INFINITY)).collect()));
        assert!(matches!(none.sample(&mut logits.clone(), &[]), Err(Error::Logits { .. })));
        let mut beyond = sampler(with(vec![(3, 1.0)]));
        assert!(matches!(
            beyond.sample(&mut logits.clone(), &[]),
            Err(Error::Invalid { what: "token of logit_bias", .. })
        ));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(Sampler::new(with(vec![(0, bad)])).is_err());
        }
        Ok(())
    }

    #[test]
    fn equal_seeds_give_equal_choices() {
        let draw = |seed| {
            let mut sampler = sampler(SamplingOptions { seed, ..warm() });
            (0..50).map(|_| sampler.sample(&mut [0.0; 16], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn logits_that_cannot_be_sampled_are_errors() {
        let mut sampler = sampler(SamplingOptions { repetition_penalty: 2.0, ..warm() });
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = [1.0, bad, 2.0];
            let error = sampler.sample(&mut logits, &[0]).unwrap_err();
            assert!(matches!(&error, Error::Logits { got } if got.contains("token 1")), "{error}");
            assert_eq!(logits[0], 1.0, "a failed call changes nothing");
        }
        for all in [&mut [][..], &mut [f32::NEG_INFINITY; 3]] {
            assert!(matches!(sampler.sample(all, &[]), Err(Error::Logits { .. })));
        }
        assert!(matches!(
            sampler.sample(&mut [0.0; 3], &[3]),
            Err(Error::Invalid { what: "token of the history", .. })
        ));
    }

    #[test]
    fn options_out_of_range_are_errors() {
        let good = SamplingOptions::default;
        for (bad, name) in [
            (SamplingOptions { temperature: -1.0, ..good() }, "temperature"),
            (SamplingOptions { temperature: f32::NAN, ..good() }, "temperature"),
            (SamplingOptions { top_p: 0.0, ..good() }, "top_p"),
            (SamplingOptions { top_p: 1.5, ..good() }, "top_p"),
            (SamplingOptions { min_p: -0.1, ..good() }, "min_p"),
            (SamplingOptions { repetition_penalty: 0.0, ..good() }, "repetition_penalty"),
        ] {
            let error = Sampler::new(bad).unwrap_err();
            assert!(matches!(&error, Error::Invalid { what, .. } if *what == name), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_chosen_is_among_the_likeliest(
            logits in prop::collection::vec(-30f32..30.0, 1..40),
            temperature in 0.01f32..3.0,
            top_k in 0usize..6,
            top_p in 0.01f32..=1.0,
            min_p in 0.0f32..=1.0,
            seed: u64,
        ) {
            let options =
                SamplingOptions { temperature, top_k: Some(top_k), top_p, min_p, seed, ..warm() };
            let id = sampler(options).sample(&mut logits.clone(), &[]).unwrap() as usize;
            let better = logits.iter().filter(|logit| **logit > logits[id]).count();
            prop_assert!(top_k == 0 || better < top_k);
            let weight = |logit: f32| f64::from(logit / temperature).exp();
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            prop_assert!(weight(logits[id]) >= f64::from(min_p) * weight(best) * 0.999);
            // Each likelier token alone is less than top-p asks for.
            let total: f64 = logits.iter().map(|logit| weight(*logit)).sum();
            let above: f64 = logits.iter().filter(|l| **l > logits[id]).map(|l| weight(*l)).sum();
            prop_assert!(top_k != 0 || above <= f64::from(top_p) * total * 1.001);
        }
    }
}
