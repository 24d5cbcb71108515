use crate::search::Bound;
use crate::{CacheType, Error, ModelShape, Result, SparseAttentionBackend};

/// What one KV head costs by its span, in any unit: straight lines between measured points.
#[derive(Clone, Debug, PartialEq)]
pub struct CostCurve {
    /// Spans, ascending, with their costs, never falling.
    points: Vec<(usize, f64)>,
}

impl CostCurve {
    /// A curve through `(span, cost)` points, spans ascending. Where a cost is lower than that of
    /// a shorter span, which is noise of the measurement, it is raised to that.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no point, spans do not ascend, or a cost is not positive.
    pub fn new(mut points: Vec<(usize, f64)>) -> Result<Self> {
        if points.is_empty() || !points.is_sorted_by(|a, b| a.0 < b.0) {
            let got = format!("{:?}", points.iter().map(|p| p.0).collect::<Vec<_>>());
            return Err(Error::invalid("spans", "one or more, ascending", got));
        }
        if let Some((_, cost)) = points.iter().find(|p| !(p.1 > 0.0 && p.1.is_finite())) {
            return Err(Error::invalid("cost", "a positive number", cost));
        }
        let mut highest = 0.0f64;
        for (_, cost) in &mut points {
            highest = highest.max(*cost);
            *cost = highest;
        }
        Ok(Self { points })
    }

    /// Seconds of one decode step of one KV head, measured on a backend at spans from `min_span` to
    /// `longest` in factors of 2.
    ///
    /// # Errors
    /// Those of [`SparseAttentionBackend::decode_seconds`], and [`Error::Invalid`] if `min_span` is
    /// not between 1 and `longest`.
    pub fn measure<B: SparseAttentionBackend>(
        backend: &B,
        shape: ModelShape,
        min_span: usize,
        longest: usize,
    ) -> Result<Self, B::Error> {
        if !(1..=longest).contains(&min_span) {
            return Err(Error::invalid("min_span", format!("1 to {longest}"), min_span).into());
        }
        let mut points = Vec::new();
        let doubled = std::iter::successors(Some(min_span), |span| span.checked_mul(2));
        for span in doubled.take_while(|span| *span < longest).chain([longest]) {
            points.push((span, backend.decode_seconds(span, shape.group(), shape.head_dim)?));
        }
        Ok(Self::new(points)?)
    }

    /// Cost of a head of that span. Below the first point and beyond the last it is theirs.
    pub fn at(&self, span: usize) -> f64 {
        let after = self.points.partition_point(|p| p.0 < span);
        match (after.checked_sub(1).map(|i| self.points[i]), self.points.get(after)) {
            (Some((x0, y0)), Some(&(x1, y1))) => {
                y0 + (y1 - y0) * (span - x0) as f64 / (x1 - x0) as f64
            }
            (Some((_, y)), None) | (None, Some(&(_, y))) => y,
            (None, None) => 0.0,
        }
    }
}

/// A bound on cost as a share of that of dense attention, at every length that density is bounded at.
#[derive(Clone, Debug, PartialEq)]
pub struct CostBound {
    /// Largest mean cost over heads / cost of a head that keeps everything.
    pub share: f64,
    /// Cost by span.
    pub curve: CostCurve,
}

impl ModelShape {
    /// Bytes of keys and values that one sequence of `length` tokens holds in a dense cache whose slots,
    /// key and value together, take `slot_bytes` bytes each.
    pub const fn kv_bytes(&self, length: usize, slot_bytes: u64) -> u64 {
        let slots = (self.total_kv_heads() as u64).saturating_mul(length as u64);
        slots.saturating_mul(slot_bytes)
    }

    /// Bytes of a slot of the dense cache that sizes are told as a share of: `slot_bytes`, but not less than 16-bit keys and
    /// values take, whatever narrower type a cache has.
    pub const fn dense_slot_bytes(&self, slot_bytes: u64) -> u64 {
        let plain = CacheType::F16.slot_bytes(self.head_dim);
        if slot_bytes < plain { plain } else { slot_bytes }
    }
}

impl Bound {
    /// The density that `bytes` of keys and values are for one sequence of `length` tokens, as an upper
    /// bound; 1 where they hold everything. `slot_bytes` are those of one slot
    /// ([`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes)).
    ///
    /// # Errors
    /// [`Error::Invalid`] if `length`, `bytes`, `slot_bytes` or a dimension is 0.
    pub fn kv_bytes(length: usize, bytes: u64, shape: ModelShape, slot_bytes: u64) -> Result<Self> {
        shape.validate()?;
        for (what, n) in
            [("bound length", length as u64), ("KV bytes", bytes), ("bytes per slot", slot_bytes)]
        {
            if n == 0 {
                return Err(Error::invalid(what, "at least 1", n));
            }
        }
        let max = (bytes as f64 / shape.kv_bytes(length, slot_bytes) as f64).min(1.0);
        Ok(Self { length, max, min: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    #[test]
    fn cost_is_linear_between_points_and_never_falls() {
        let curve = CostCurve::new(vec![(64, 2.0), (128, 4.0), (256, 3.0)]).unwrap();
        let costs = [1, 64, 96, 128, 200, 256, 9999].map(|span| curve.at(span));
        assert_eq!(costs, [2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0]);
        for points in [vec![], vec![(2, 1.0), (2, 1.0)], vec![(1, 0.0)], vec![(1, f64::NAN)]] {
            assert!(matches!(CostCurve::new(points), Err(Error::Invalid { .. })));
        }
    }

    #[test]
    fn a_full_plan_uses_the_bytes_of_density_one() {
        let shape = ModelShape { layers: 3, query_heads: 4, kv_heads: 2, head_dim: 64 };
        let dense = shape.kv_bytes(1000, 256);
        assert_eq!(dense, Plan::full(shape).unwrap().kv_bytes(1000, 256));
        assert_eq!(Bound::kv_bytes(1000, dense, shape, 256).unwrap().max, 1.0);
        assert_eq!(Bound::kv_bytes(1000, dense / 4, shape, 256).unwrap().max, 0.25);
        assert_eq!(Bound::kv_bytes(1000, 9 * dense, shape, 256).unwrap().max, 1.0);
        assert!(matches!(Bound::kv_bytes(0, 1, shape, 256), Err(Error::Invalid { .. })));
        assert!(matches!(Bound::kv_bytes(1, 0, shape, 256), Err(Error::Invalid { .. })));
    }
}
