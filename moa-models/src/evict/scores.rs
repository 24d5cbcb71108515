//! Scores of keys from queries, keys and log-sum-exps, on the host.

use std::ops::Range;

use moa_backend_cpu::Tensor;
use moa_backend_cpu::ops::{WeightData, WeightRef, linear};

use crate::{Result, memory};

/// What neighbouring keys make of a key's score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    /// The mean over so many, those beyond the ends counting as 0.
    Mean(usize),
    /// The most of so many.
    Most(usize),
}

impl Pool {
    fn of(self, sums: &[f32]) -> Vec<f32> {
        let (Self::Mean(width) | Self::Most(width)) = self;
        let pooled = |key: usize| {
            let around = key.saturating_sub(width / 2)..(key + width / 2 + 1).min(sums.len());
            match self {
                Self::Mean(_) => sums[around].iter().sum::<f32>() / width as f32,
                Self::Most(_) => sums[around].iter().copied().fold(f32::NEG_INFINITY, f32::max),
            }
        };
        (0..sums.len()).map(pooled).collect()
    }
}

/// Rows of products at once.
const BLOCK: usize = 1024;

/// Rows of heads, `[tokens, heads, dim]`.
pub(super) struct Rows {
    pub(super) data: Vec<f32>,
    pub(super) heads: usize,
    pub(super) dim: usize,
}

impl Rows {
    pub(super) fn tokens(&self) -> usize {
        self.data.len() / (self.heads * self.dim)
    }

    /// Rows of some heads of some tokens, `[tokens, heads, dim]`, times a factor.
    fn part(&self, tokens: Range<usize>, heads: Range<usize>, factor: f32) -> Vec<f32> {
        let row = |token: usize| {
            let first = (token * self.heads + heads.start) * self.dim;
            &self.data[first..first + heads.len() * self.dim]
        };
        tokens.flat_map(row).map(|x| factor * x).collect()
    }
}

/// What one layer attends with.
pub(super) struct Seen<'a> {
    /// Queries of some tokens.
    pub(super) q: &'a Rows,
    /// Log-sum-exp of all scores of each query, `[tokens, query heads]`.
    pub(super) lse: &'a [f32],
    /// Keys from the first position on.
    pub(super) k: &'a Rows,
    /// Factor of scores.
    pub(super) scale: f32,
}

impl Seen<'_> {
    /// Gives the scores that each query of a KV head has for some keys, which they all see, with the query's
    /// log-sum-exp: the logarithm of attention is their difference.
    fn scores(
        &self,
        head: usize,
        keys: Range<usize>,
        mut of_query: impl FnMut(&[f32], f32),
    ) -> Result<()> {
        let group = self.q.heads / self.k.heads;
        let (count, dim) = (keys.len(), self.k.dim);
        let k = self.k.part(keys, head..head + 1, 1.0);
        let weight = WeightRef::new(WeightData::F32(&k), count, dim)?;
        let queries = head * group..(head + 1) * group;
        let step = (BLOCK / group).max(1);
        for first in (0..self.q.tokens()).step_by(step) {
            let tokens = first..(first + step).min(self.q.tokens());
            let q = self.q.part(tokens.clone(), queries.clone(), self.scale);
            let q = Tensor::new(q, &[tokens.len() * group, dim])?;
            let scores = linear(&q, weight, None)?.into_data();
            let rows = tokens.flat_map(|t| queries.clone().map(move |h| (t, h)));
            for (row, (token, h)) in scores.chunks(count).zip(rows) {
                of_query(row, self.lse[token * self.q.heads + h]);
            }
        }
        Ok(())
    }

    /// SnapKV's scores of the first `keys` keys for each KV head; the queries are those of the window.
    pub(super) fn window_scores(&self, keys: usize, pool: Pool) -> Result<Vec<Vec<f32>>> {
        let group = (self.q.heads / self.k.heads) as f32;
        let mut scores = Vec::with_capacity(self.k.heads);
        for head in 0..self.k.heads {
            let mut sums = memory::filled(keys, 0.0, "scores of keys")?;
            if keys > 0 {
                self.scores(head, 0..keys, |row, lse| {
                    let attention = row.iter().map(|score| (score - lse).exp() / group);
                    sums.iter_mut().zip(attention).for_each(|(sum, attention)| *sum += attention);
                })?;
            }
            scores.push(pool.of(&sums));
        }
        Ok(scores)
    }

    /// KVzip's scores of some keys for each KV head, as logarithms, where they are higher than those in `scores`.
    pub(super) fn highest(&self, keys: Range<usize>, scores: &mut [Vec<f32>]) -> Result<()> {
        for (head, scores) in scores.iter_mut().enumerate() {
            let scores = &mut scores[keys.clone()];
            self.scores(head, keys.clone(), |row, lse| {
                let logs = row.iter().map(|score| score - lse);
                scores.iter_mut().zip(logs).for_each(|(best, log)| *best = best.max(log));
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_core::SplitMix64;

    const GROUP: usize = 2;
    const HEADS: usize = 2;
    const DIM: usize = 8;
    const LEN: usize = 70;

    fn rows(tokens: usize, heads: usize, rng: &mut SplitMix64) -> Rows {
        let mut number = || rng.below(2001) as f32 / 500.0 - 2.0;
        let data = (0..tokens * heads * DIM).map(|_| number()).collect();
        Rows { data, heads, dim: DIM }
    }

    /// Attention of query head `h` of the token at `position` to all keys up to it.
    fn naive(
        q: &Rows,
        token: usize,
        h: usize,
        k: &Rows,
        position: usize,
        scale: f64,
    ) -> (Vec<f64>, f64) {
        let at = |x: &Rows, token: usize, head: usize, i: usize| {
            f64::from(x.data[(token * x.heads + head) * DIM + i])
        };
        let score = |key| {
            scale * (0..DIM).map(|i| at(q, token, h, i) * at(k, key, h / GROUP, i)).sum::<f64>()
        };
        let scores: Vec<f64> = (0..=position).map(score).collect();
        let sum: f64 = scores.iter().map(|s| s.exp()).sum();
        (scores.iter().map(|s| s.exp() / sum).collect(), sum.ln())
    }

    #[test]
    fn scores_are_those_of_a_naive_computation() {
        let mut rng = SplitMix64::new(3);
        let (window, scale) = (6, 0.35f32);
        let (q, k) = (rows(window, GROUP * HEADS, &mut rng), rows(LEN, HEADS, &mut rng));
        let of = |token, h| naive(&q, token, h, &k, LEN - window + token, f64::from(scale));
        let lse: Vec<f32> = (0..window)
            .flat_map(|t| (0..GROUP * HEADS).map(move |h| (t, h)))
            .map(|(t, h)| of(t, h).1 as f32)
            .collect();
        let seen = Seen { q: &q, lse: &lse, k: &k, scale };
        let keys = LEN - window;
        let snap = seen.window_scores(keys, Pool::Mean(5)).unwrap();
        let ada = seen.window_scores(keys, Pool::Most(7)).unwrap();
        let mut zip = vec![vec![f32::NEG_INFINITY; keys]; HEADS];
        for part in [0..20, 20..keys] {
            seen.highest(part, &mut zip).unwrap();
        }
        for head in 0..HEADS {
            let (mut sums, mut most) = (vec![0.0; keys], vec![0.0f64; keys]);
            for token in 0..window {
                for h in head * GROUP..(head + 1) * GROUP {
                    let (attention, _) = of(token, h);
                    for key in 0..keys {
                        sums[key] += attention[key] / GROUP as f64;
                        most[key] = most[key].max(attention[key]);
                    }
                }
            }
            for key in 0..keys {
                let around = key.saturating_sub(2)..(key + 3).min(keys);
                let mean = sums[around].iter().sum::<f64>() / 5.0;
                let around = key.saturating_sub(3)..(key + 4).min(keys);
                let top = sums[around].iter().copied().fold(0.0, f64::max);
                let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-5 * expected;
                assert!(close(f64::from(snap[head][key]), mean), "{head} {key}");
                assert!(close(f64::from(ada[head][key]), top), "{head} {key}");
                assert!(close(f64::from(zip[head][key]).exp(), most[key]), "{head} {key}");
            }
        }
    }
}
