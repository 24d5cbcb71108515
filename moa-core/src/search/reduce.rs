use super::{Options, Problem};

/// A problem without the candidates that need never be chosen, laid out for the solver.
pub(super) struct Core<'a> {
    pub(super) problem: &'a Problem,
    pub(super) layers: usize,
    /// Heads of each layer.
    pub(super) width: usize,
    /// Heads of the model.
    pub(super) heads: usize,
    /// Candidates left.
    pub(super) cands: usize,
    /// Their indices in the problem.
    pub(super) ids: Vec<usize>,
    /// `[length][head][candidate]`. A candidate that one head need not consider has an infinite loss
    /// at length 0: every objective weighs every length, so the sum is infinite too.
    pub(super) losses: Vec<Vec<f64>>,
    /// `[bound][layer][candidate]`.
    pub(super) sizes: Vec<Vec<f64>>,
    /// Distinct rules per layer, where that is a restriction at all.
    pub(super) limit: Option<usize>,
}

impl<'a> Core<'a> {
    /// A candidate goes where another one is no larger at any bound (equal where there is a lower
    /// bound) and loses no more at any length: for the head at hand, or, as a limit on distinct
    /// rules ties heads together, for all heads of the layer.
    pub(super) fn new(problem: &'a Problem, options: &Options) -> Self {
        let (layers, width) = (problem.layers(), problem.heads_per_layer());
        let (heads, all) = (problem.total_heads(), problem.candidates().len());
        let limit = options.max_rules_per_layer.filter(|&k| k < width.min(all));
        let lengths = problem.lengths().len();

        let mut barred = vec![false; heads * all];
        let group = if limit.is_some() { width } else { 1 };
        let mut smaller = Vec::new();
        for first in (0..heads).step_by(group) {
            if first % width == 0 {
                smaller = smaller_candidates(problem, first / width);
            }
            for (c, smaller) in smaller.iter().enumerate() {
                let beats = |&(d, strictly_smaller): &(usize, bool)| {
                    // Of two equal candidates the first stays.
                    let mut better = strictly_smaller || d < c;
                    for length in 0..lengths {
                        let losses = &problem.losses_at(length)[first * all..][..group * all];
                        for head in losses.chunks(all) {
                            if head[d] > head[c] {
                                return false;
                            }
                            better |= head[d] < head[c];
                        }
                    }
                    better
                };
                if smaller.iter().any(beats) {
                    (first..first + group).for_each(|head| barred[head * all + c] = true);
                }
            }
        }

        let ids: Vec<usize> =
            (0..all).filter(|c| (0..heads).any(|h| !barred[h * all + c])).collect();
        let losses = (0..lengths)
            .map(|length| {
                let from = problem.losses_at(length);
                let entry = |h: usize, c: usize| match barred[h * all + c] {
                    true if length == 0 => f64::INFINITY,
                    _ => from[h * all + c],
                };
                (0..heads)
                    .flat_map(|h| ids.iter().map(move |&c| (h, c)))
                    .map(|(h, c)| entry(h, c))
                    .collect()
            })
            .collect();
        let sizes = (0..problem.bounds().len())
            .map(|b| {
                let layers = problem.sizes_at(b).chunks(all);
                layers.flat_map(|sizes| ids.iter().map(|&c| sizes[c])).collect()
            })
            .collect();
        let limit = limit.filter(|&k| k < ids.len());
        Self { problem, layers, width, heads, cands: ids.len(), ids, losses, sizes, limit }
    }

    /// Indices of the problem's own candidates.
    pub(super) fn original(&self, choice: &[u16]) -> Vec<usize> {
        choice.iter().map(|&c| self.ids[usize::from(c)]).collect()
    }

    /// Whether no layer has more distinct rules than allowed.
    pub(super) fn within_limit(&self, choice: &[u16]) -> bool {
        let Some(limit) = self.limit else { return true };
        choice.chunks(self.width).all(|layer| distinct(layer).len() <= limit)
    }
}

/// The different entries, sorted.
pub(super) fn distinct(layer: &[u16]) -> Vec<u16> {
    let mut set = layer.to_vec();
    set.sort_unstable();
    set.dedup();
    set
}

/// For each candidate of a layer, those that are no larger at any bound and equal where there is a lower bound;
/// with whether they are smaller anywhere.
fn smaller_candidates(problem: &Problem, layer: usize) -> Vec<Vec<(usize, bool)>> {
    let compare = |c: usize, d: usize| {
        let mut strictly = false;
        for (b, bound) in problem.bounds().iter().enumerate() {
            let sizes = &problem.sizes_at(b)[layer * problem.candidates().len()..];
            let (own, other) = (sizes[c], sizes[d]);
            if other > own || (bound.min.is_some() && other < own) {
                return None;
            }
            strictly |= other < own;
        }
        Some((d, strictly))
    };
    let all = 0..problem.candidates().len();
    all.clone()
        .map(|c| all.clone().filter(|&d| d != c).filter_map(|d| compare(c, d)).collect())
        .collect()
}
