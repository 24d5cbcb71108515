//! Bounds of a search that come from elsewhere than a budget of bytes.

use moa_core::{CostBound, CostCurve, ModelShape, PlanRequest, Space};

use crate::device::Math;
use crate::{Error, Result};

/// Adds the smallest share of the context that any head keeps, or the one that is used by default: a
/// quarter of the smallest density bound for elastic plans, nothing for others.
///
/// # Errors
/// As [`PlanRequest::with_min_share`].
pub fn with_min_share(request: PlanRequest, share: Option<f64>) -> moa_core::Result<PlanRequest> {
    let least = request.bounds.iter().map(|b| b.max).fold(1.0, f64::min);
    let usual = if request.space == Space::Elastic { least / 4.0 } else { 0.0 };
    request.with_min_share(share.unwrap_or(usual))
}

/// Bounds the decode time of a search by measurements on the backend.
///
/// # Errors
/// [`Error::Invalid`] if the share is not above 0, [`Error::Core`] with
/// [`Unsupported`](moa_core::Error::Unsupported) if the backend does not measure.
pub fn bound_decode_time<D: Math>(
    request: &mut PlanRequest,
    device: &D,
    shape: ModelShape,
    share: f64,
) -> Result<()> {
    if !(share > 0.0 && share.is_finite()) {
        return Err(Error::invalid("decode time", "a share above 0", share));
    }
    let longest = request.bounds.iter().map(|b| b.length).max().unwrap_or(1);
    let shortest = request.min_span.min(longest);
    let curve = CostCurve::measure(device.attention(), shape, shortest, longest);
    request.decode_time = Some(CostBound { share, curve: curve.map_err(Into::into)? });
    Ok(())
}
