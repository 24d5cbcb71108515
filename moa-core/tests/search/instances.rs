//! Problems to solve, and what every solution must satisfy.

use moa_core::search::{Bound, Options, ParetoSet, Problem, density_sizes, fixed_grid};
use moa_core::{ElasticRule, SplitMix64};

/// Raw material of a problem, kept by the tests because a `Problem` does not give its losses back.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) candidates: Vec<ElasticRule>,
    pub(crate) lengths: Vec<usize>,
    pub(crate) losses: Vec<f64>,
    pub(crate) bounds: Vec<Bound>,
    pub(crate) sizes: Vec<f64>,
}

impl Instance {
    pub(crate) fn problem(&self) -> Problem {
        Problem::new(
            self.layers,
            self.heads,
            self.candidates.clone(),
            self.lengths.clone(),
            self.losses.clone(),
            self.bounds.clone(),
            self.sizes.clone(),
        )
        .unwrap()
    }

    pub(crate) fn total(&self) -> usize {
        self.layers * self.heads
    }

    pub(crate) fn losses_of(&self, choice: &[usize]) -> Vec<f64> {
        let n = self.candidates.len();
        let size = self.total() * n;
        let at = |l: usize| {
            choice.iter().enumerate().map(|(h, c)| self.losses[l * size + h * n + c]).sum()
        };
        (0..self.lengths.len()).map(at).collect()
    }

    pub(crate) fn sizes_of(&self, choice: &[usize]) -> Vec<f64> {
        let n = self.candidates.len();
        let mean = |b: usize| choice.iter().map(|c| self.sizes[b * n + c]).sum::<f64>();
        (0..self.bounds.len()).map(|b| mean(b) / self.total() as f64).collect()
    }

    fn allowed(&self, choice: &[usize], limit: Option<usize>) -> bool {
        let sizes = self.sizes_of(choice);
        let within = self.bounds.iter().zip(sizes).all(|(bound, size)| {
            size <= bound.max + 1e-9 && bound.min.is_none_or(|min| size >= min - 1e-9)
        });
        within
            && choice.chunks(self.heads).all(|layer| {
                let mut set = layer.to_vec();
                set.sort_unstable();
                set.dedup();
                set.len() <= limit.unwrap_or(usize::MAX)
            })
    }

    /// Losses of every allowed choice.
    pub(crate) fn everything(&self, limit: Option<usize>) -> Vec<Vec<f64>> {
        let n = self.candidates.len();
        let mut choice = vec![0; self.total()];
        let mut all = Vec::new();
        loop {
            if self.allowed(&choice, limit) {
                all.push(self.losses_of(&choice));
            }
            let Some(head) = choice.iter().position(|&c| c + 1 < n) else { return all };
            choice[..head].fill(0);
            choice[head] += 1;
        }
    }

    /// What every solution must satisfy, whatever the options.
    pub(crate) fn check(&self, found: &ParetoSet, limit: Option<usize>) {
        assert!(!found.solutions.is_empty());
        for (i, s) in found.solutions.iter().enumerate() {
            assert!(self.allowed(&s.choice, limit), "{:?} breaks {:?}", s.sizes, self.bounds);
            assert_eq!(s.losses, self.losses_of(&s.choice));
            assert_eq!(s.sizes, self.sizes_of(&s.choice));
            let value: f64 = s.losses.iter().zip(&s.gap.weights).map(|(l, w)| l * w).sum();
            assert!((value - s.gap.value).abs() <= 1e-9 * value.abs());
            assert!(s.gap.bound <= s.gap.value && (0.0..=1.0).contains(&s.gap.relative));
            assert!(s.gap.relative <= found.worst_gap);
            for (loss, limit) in s.losses.iter().zip(&s.gap.limits) {
                assert!(limit.is_none_or(|limit| *loss <= limit + 1e-6 * limit.abs().max(1.0)));
            }
            for t in &found.solutions[i + 1..] {
                assert!(!dominates(&s.losses, &t.losses) && !dominates(&t.losses, &s.losses));
            }
        }
    }
}

pub(crate) fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(x, y)| x <= y)
}

/// A positive number, log-normal: most are small and some are large.
fn heavy(r: &mut SplitMix64) -> f64 {
    (1.8 * ((0..12).map(|_| r.unit()).sum::<f64>() - 6.0)).exp()
}

/// Unstructured losses and sizes, some negative.
pub(crate) fn wild(
    seed: u64,
    layers: usize,
    heads: usize,
    n: usize,
    lengths: usize,
    min: bool,
) -> Instance {
    let mut r = SplitMix64::new(seed);
    let lengths: Vec<usize> = (1..=lengths).map(|l| 1024 * l).collect();
    let losses =
        (0..lengths.len() * layers * heads * n).map(|_| heavy(&mut r) * (r.unit() - 0.2)).collect();
    let bounds = [1000, 2000]
        .map(|length| {
            let max = 0.3 + 0.3 * r.unit();
            Bound { length, max, min: min.then_some(max - 0.1) }
        })
        .to_vec();
    let sizes = (0..2 * n).map(|_| r.below(9) as f64 / 8.0).collect();
    Instance { layers, heads, candidates: fixed_grid(4096, n), lengths, losses, bounds, sizes }
}

/// Losses that fall with the span, heavy-tailed over heads, with noise; sizes are densities.
pub(crate) fn lifelike(
    seed: u64,
    layers: usize,
    heads: usize,
    candidates: Vec<ElasticRule>,
    lengths: &[usize],
    bounds: Vec<Bound>,
) -> Instance {
    let mut r = SplitMix64::new(seed);
    let traits: Vec<[f64; 3]> = (0..layers * heads)
        .map(|_| [heavy(&mut r), 0.5 + 6.0 * r.unit(), 0.5 * r.unit()])
        .collect();
    let mut losses = Vec::new();
    for (l, &length) in lengths.iter().enumerate() {
        for &[weight, shape, growth] in &traits {
            for rule in &candidates {
                let hidden = 1.0 - rule.span(length, 128) as f64 / length as f64;
                let noise = 0.05 * (r.unit() - 0.5) * hidden;
                losses.push(weight * (1.0 + growth * l as f64) * (hidden.powf(shape) + noise));
            }
        }
    }
    let sizes = density_sizes(&candidates, &bounds, 128);
    Instance { layers, heads, candidates, lengths: lengths.to_vec(), losses, bounds, sizes }
}

pub(crate) fn limited(limit: Option<usize>) -> Options {
    Options { max_rules_per_layer: limit, ..Options::default() }
}

pub(crate) fn quarter(lengths: &[usize]) -> Vec<Bound> {
    lengths.iter().map(|&length| Bound { length, max: 0.25, min: None }).collect()
}
