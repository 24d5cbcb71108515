//! The cache type of each KV head, beside its span: precision as the second axis of a plan.
//!
//! Spans are found with every head in int8, under the density that a budget of bytes comes to in int8. Then heads
//! change types and spans under the budget itself, in bytes.
//!
//! What a type costs is measured of one head at a time, around the plan at hand, as spans are. Single measurements
//! may be added for this reason: a rounding error has a mean of about 0 and those of two heads have nothing to do
//! with each other. To second order the divergence is `d' F d / 2`, `d` being the sum of the heads' errors as they
//! arrive at the predictions, and its mixed terms vanish in the mean: what is left is one term a head. The gradient
//! of the loss, which the influence of keys is made of, says nothing here: its term is of first order in `d`, and so
//! 0 in the mean. Hence a measured improvement by fewer bits alone is noise, and counts as none.

use moa_core::{CacheType, Plan, PlanRequest};

use crate::device::Math;
use crate::find_plan::exchange::{Budget, exchange, filled, is_elastic};
use crate::find_plan::measure::{Best, Measure};
use crate::{Error, Result};

/// In which types the heads of a plan that is searched for hold keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheTypes {
    /// In that of the device; the plan says nothing of it.
    #[default]
    Device,
    /// All in one, which the plan says.
    All(CacheType),
    /// Each in its own, chosen by measured loss under a budget of bytes. Densities are those that the same bytes
    /// come to in [`PER_HEAD`]'s first.
    PerHead,
}

/// The types that are chosen from, the widest first: fp8 takes as many bytes as int8 and loses more.
pub const PER_HEAD: [CacheType; 3] = [CacheType::Int8, CacheType::K8V4, CacheType::Int4];

impl CacheTypes {
    /// The type of all heads while spans are found.
    pub const fn first(self) -> Option<CacheType> {
        match self {
            Self::Device => None,
            Self::All(cache_type) => Some(cache_type),
            Self::PerHead => Some(PER_HEAD[0]),
        }
    }

    /// The density of plans whose heads, all in [`first`](Self::first) or else in 16 bits, take `share` of the bytes
    /// of a dense cache of 16 bits; 1 at most.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the share is not above 0.
    pub fn density(self, share: f64, head_dim: usize) -> Result<f64> {
        if !(share > 0.0 && share.is_finite()) {
            return Err(Error::invalid("share of the dense cache's bytes", "above 0", share));
        }
        let dense = CacheType::F16.slot_bytes(head_dim) as f64;
        let slot = self.first().unwrap_or(CacheType::F16).slot_bytes(head_dim) as f64;
        Ok((share * dense / slot).min(1.0))
    }

    /// A plan with all heads in [`first`](Self::first), unless it says types of its own.
    ///
    /// # Errors
    /// None: there is one type for each head.
    pub fn first_of(self, plan: &Plan) -> Result<Plan> {
        typed(plan, self.first())
    }

    /// The type that all heads of a plan have, or the device's where it says none.
    ///
    /// # Errors
    /// [`Error::Invalid`] if heads differ.
    pub fn of(plan: &Plan) -> Result<Self> {
        match plan.cache_types() {
            [] => Ok(Self::Device),
            [Some(first), others @ ..] if others.iter().all(|own| *own == Some(*first)) => {
                Ok(Self::All(*first))
            }
            _ => Err(Error::invalid("cache types of a plan", "one for all heads", "several")),
        }
    }

    /// All the types that heads may come to have.
    pub(super) fn all(self) -> Vec<CacheType> {
        match self {
            Self::Device => Vec::new(),
            Self::All(cache_type) => vec![cache_type],
            Self::PerHead => PER_HEAD.to_vec(),
        }
    }
}

/// The plan with all heads of one type, if it says none.
pub(super) fn typed(plan: &Plan, cache_type: Option<CacheType>) -> Result<Plan> {
    match cache_type {
        Some(own) if plan.cache_types().is_empty() => {
            Ok(plan.clone().with_cache_types(vec![Some(own); plan.rules().len()])?)
        }
        _ => Ok(plan.clone()),
    }
}

/// What a plan's bytes come to as the density of one whose heads are all in the first type.
pub(super) fn density(request: &PlanRequest, plan: &Plan, length: usize) -> Result<f64> {
    let first = PER_HEAD[0].slot_bytes(plan.shape().head_dim);
    let slots = plan.rules().len() as f64 * length.max(1) as f64;
    let bytes = match request.windows.is_empty() {
        true => plan.kv_bytes(length, first),
        false => plan.clone().within(request.windows.clone())?.kv_bytes(length, first),
    };
    Ok(bytes as f64 / first as f64 / slots)
}

/// Whether a plan keeps to the budget, in bytes, and to the limit of rules in a layer.
pub(super) fn fits(request: &PlanRequest, plan: &Plan) -> Result<bool> {
    if !request.allows_rules(plan) {
        return Ok(false);
    }
    for bound in &request.bounds {
        if density(request, plan, bound.length)? > bound.max + 1e-9 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bytes of a head's keys and values of a type, or of the first one, as a multiple of those of the first.
pub(super) fn relative(plan: &Plan, cache_type: Option<CacheType>) -> f64 {
    let bytes = |cache_type: CacheType| cache_type.slot_bytes(plan.shape().head_dim) as f64;
    bytes(cache_type.unwrap_or(PER_HEAD[0])) / bytes(PER_HEAD[0])
}

/// The types that a head may change to.
pub(super) fn others(own: Option<CacheType>) -> impl Iterator<Item = CacheType> {
    PER_HEAD.into_iter().filter(move |other| *other != own.unwrap_or(PER_HEAD[0]))
}

/// Improves on `best`, a plan with its loss whose heads have types, until the budget of measurements is spent or
/// nothing helps.
pub(super) fn choose<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    mut best: (f64, Plan),
) -> Result<(f64, Plan)> {
    if !is_elastic(request) {
        return Ok(best);
    }
    let mut uniform = Vec::new();
    for cache_type in &PER_HEAD[1..] {
        let types = vec![Some(*cache_type); best.1.rules().len()];
        let plan = best.1.clone().with_cache_types(types)?;
        uniform.push(filled(Budget::Bytes, request, &plan)?);
    }
    if let Some(Best { plan, loss: Some(loss) }) = measure.best(0, uniform, Some(&best))?
        && loss < best.0
    {
        best = (loss, plan);
    }
    exchange(measure, request, best, Budget::Bytes)
}

#[cfg(test)]
mod tests {
    use moa_core::ModelShape;

    use super::*;

    #[test]
    fn plans_say_the_type_that_all_heads_have() {
        let shape = ModelShape { layers: 1, query_heads: 2, kv_heads: 2, head_dim: 64 };
        let wide = Plan::full(shape).unwrap();
        let int8 = CacheTypes::All(CacheType::Int8);
        let narrow = int8.first_of(&wide).unwrap();
        assert_eq!(CacheTypes::of(&wide).unwrap(), CacheTypes::Device);
        assert_eq!(CacheTypes::of(&narrow).unwrap(), int8);
        // A plan's own types stay.
        assert_eq!(CacheTypes::All(CacheType::Int4).first_of(&narrow).unwrap(), narrow);
        let mixed = wide.with_cache_types(vec![Some(CacheType::Int8), None]).unwrap();
        assert!(CacheTypes::of(&mixed).unwrap_err().to_string().contains("one for all heads"));
    }

    #[test]
    fn a_share_of_bytes_is_a_density_with_scales_counted() {
        let density = |types: CacheTypes| types.density(0.09, 64).unwrap();
        assert_eq!(density(CacheTypes::Device), 0.09);
        assert_eq!(density(CacheTypes::PerHead), 0.09 * 256.0 / 132.0);
        assert_eq!(density(CacheTypes::All(CacheType::Int4)), 0.09 * 256.0 / 68.0);
        assert_eq!(CacheTypes::All(CacheType::Int4).density(0.5, 64).unwrap(), 1.0);
        assert!(CacheTypes::Device.density(0.0, 64).is_err());
    }
}
