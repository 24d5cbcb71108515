use moa_core::Scores;
use pulp::Simd;

use crate::Tensor;
use crate::simd::exp2::tanh_half;

/// How products of queries and keys become weights. Kernels keep scores as logarithms to the base 2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule<'a> {
    /// What queries are multiplied by.
    pub(crate) factor: f32,
    /// The largest score, if there is a softcap. Products of queries and keys are arguments of [`tanh_half`] then.
    cap: Option<f32>,
    /// By query head.
    sinks: Option<&'a [f32]>,
}

/// What the sum of a row's weights comes to in the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Total {
    /// What is left of weights that were relative to the row's maximum.
    pub(crate) share: f32,
    /// The denominator.
    pub(crate) sum: f32,
    /// Log-sum-exp.
    pub(crate) lse: f32,
}

impl<'a> Rule<'a> {
    pub(crate) fn new(scores: &Scores<'a, Tensor>) -> Self {
        let bits = scores.scale * std::f32::consts::LOG2_E;
        Self {
            factor: scores.softcap.map_or(bits, |cap| bits * 2.0 / cap),
            cap: scores.softcap.map(|cap| cap * std::f32::consts::LOG2_E),
            sinks: scores.sinks.map(Tensor::data),
        }
    }

    pub(crate) fn is_capped(&self) -> bool {
        self.cap.is_some()
    }

    /// Turns products into scores, whole vectors of them.
    #[inline(always)]
    pub(crate) fn cap<S: Simd>(&self, simd: S, products: &mut [f32]) {
        let Some(cap) = self.cap else { return };
        let cap = simd.splat_f32s(cap);
        for product in S::as_mut_simd_f32s(products).0 {
            *product = simd.mul_f32s(cap, tanh_half(simd, *product));
        }
    }

    /// Brings the sink to the maximum and the sum of a row of scores.
    pub(crate) fn total(&self, query_head: usize, max: f32, sum: f32) -> Total {
        use std::f32::consts::{LN_2, LOG2_E};
        let Some(sinks) = self.sinks else {
            return Total { share: 1.0, sum, lse: max * LN_2 + sum.ln() };
        };
        let sink = sinks[query_head] * LOG2_E;
        let top = max.max(sink);
        let share = (max - top).exp2();
        let sum = sum * share + (sink - top).exp2();
        Total { share, sum, lse: top * LN_2 + sum.ln() }
    }
}
