use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::bundle::{Maximum, Stop, maximise};
use super::labels::{self, Effort};
use super::lagrangian::{Lagrangian, Prices};
use super::solver::gap;
use super::stages::Stages;
use super::subproblem::{EQUAL, feasible};

/// When to stop branching.
pub(super) struct Limits {
    pub(super) target_gap: f64,
    pub(super) deadline: Instant,
    /// Above this value there is no feasible choice.
    pub(super) none: f64,
}

/// Reduced costs that may be computed in one tree, about a second. A count, not a time, so that a
/// tree is the same on every machine.
const WORK: f64 = 5e7;

/// Evaluations of the dual function at one node.
const ASCENT: usize = 40;

/// Searches over partial plans at the root, one after the other while a gap is left: each begins with
/// the plan and so the pruning of the one before.
const ROOT: [Effort; 3] = [
    Effort { width: 500, tries: 500_000 },
    Effort { width: 10_000, tries: 1_000_000 },
    Effort { width: 200_000, tries: 3_000_000 },
];
/// The same at other nodes.
const NODE: [Effort; 1] = [Effort { width: 1_000, tries: 200_000 }];
/// Most heads for which partial plans are searched; of more heads there are too many.
const HEADS: usize = 64;
/// Reduced costs that take as long as one extension of a partial plan.
const EXTENSION_WORK: f64 = 15.0;

/// A part of the tree: what each head may still choose.
struct Node {
    bound: f64,
    multipliers: Vec<f64>,
    step: f64,
    /// Bit `head * words * 64 + candidate` is set if the candidate is forbidden.
    forbidden: Vec<u64>,
    /// Order of creation, to break ties.
    number: u64,
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Node {}

impl PartialOrd for Node {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Node {
    /// The greatest has the lowest bound, and among those is the newest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.bound.total_cmp(&self.bound).then(self.number.cmp(&other.number))
    }
}

/// Best-first branch and bound from the root's maximum: improves `best` and returns a proven lower
/// bound, infinite if there is no feasible choice.
///
/// Every node maximises the dual function over what is left, forbids what the reduced costs show to
/// be no improvement, and searches the rest by partial plans; where that leaves a gap, it splits the
/// candidates of the head that the relaxation is least sure of.
pub(super) fn branch_and_bound(
    dual: &mut Lagrangian<'_>,
    root: &Maximum,
    best: &mut Option<(f64, Vec<u16>)>,
    limits: &Limits,
) -> f64 {
    let core = dual.sub.core;
    let words = core.cands.div_ceil(64);
    let mut forbidden = vec![0u64; core.heads * words];
    for (at, loss) in core.losses[0].iter().enumerate() {
        if !loss.is_finite() {
            forbid(&mut forbidden, words, at / core.cands, at % core.cands);
        }
    }
    let mut heap = BinaryHeap::new();
    let (multipliers, step) = (root.multipliers.clone(), root.step);
    heap.push(Node { bound: root.point.value, multipliers, step, forbidden, number: 0 });
    let mut number = 0;
    let start = dual.evaluations;
    let mut tried = 0;
    // Sets of rules cost about a tenth of all pairs; each step of the ascent has a cost of its own.
    let pairs = if core.limit.is_some() { 1.0 + core.cands as f64 / 10.0 } else { 1.0 };
    let work = (core.heads * core.cands) as f64 * pairs + 3000.0;

    while let Some(mut node) = heap.pop() {
        let cutoff = best.as_ref().map_or(limits.none, |(value, _)| value - EQUAL);
        // The lowest bound of all: the rest of the heap is no lower.
        if node.bound >= cutoff {
            break;
        }
        if gap(dual.sub, best.as_ref(), node.bound) <= limits.target_gap
            || (dual.evaluations - start) as f64 * work + tried as f64 * EXTENSION_WORK > WORK
            || Instant::now() >= limits.deadline
        {
            dual.mask = None;
            return node.bound;
        }
        dual.mask = Some(mask(&node.forbidden, words, core.heads, core.cands));
        let stop = Stop { evaluations: ASCENT, tolerance: 1e-5, enough: cutoff };
        let found = maximise(dual, &node.multipliers, node.step, &stop);
        node.bound = node.bound.max(found.point.value);
        if let Some((value, choice)) = &found.incumbent
            && best.as_ref().is_none_or(|(old, _)| value < old)
        {
            *best = Some((*value, choice.clone()));
        }
        let cutoff = best.as_ref().map_or(limits.none, |(value, _)| value - EQUAL);
        if node.bound >= cutoff {
            continue;
        }
        fix(dual, &found, cutoff, words, &mut node.forbidden);
        let efforts = match node.number {
            // Without a plan to beat, hardly anything is pruned.
            _ if core.heads > HEADS || best.is_none() => &[][..],
            // Losses lie on no lattice, and wide searches gain little under limits on them.
            0 if dual.sub.limits.iter().any(Option::is_some) => &ROOT[..2],
            0 => &ROOT,
            _ => &NODE,
        };
        let mut closed = false;
        for &effort in efforts {
            let cutoff = best.as_ref().map_or(limits.none, |(value, _)| value - EQUAL);
            let allowed = |head, c| !is_forbidden(&node.forbidden, words, head, c);
            let Some(stages) = Stages::new(dual, &found.multipliers, allowed, cutoff) else {
                break;
            };
            let rest = labels::search(dual.sub, &stages, effort, cutoff, best);
            tried += rest.tried;
            node.bound = node.bound.max(rest.bound);
            closed = best.as_ref().map_or(limits.none, |(value, _)| value - EQUAL) <= node.bound;
            if closed || gap(dual.sub, best.as_ref(), node.bound) <= limits.target_gap {
                break;
            }
        }
        if closed {
            continue;
        }
        if let Some((head, split)) = branching(dual, &found, words, &node.forbidden) {
            for side in [true, false] {
                let mut forbidden = node.forbidden.clone();
                for c in (0..core.cands).filter(|&c| split[c] == side) {
                    forbid(&mut forbidden, words, head, c);
                }
                number += 1;
                let multipliers = found.multipliers.clone();
                heap.push(Node {
                    bound: node.bound,
                    multipliers,
                    step: found.step,
                    forbidden,
                    number,
                });
            }
        } else {
            // A single choice is left.
            let choice = found.point.choice;
            let (value, uses) = dual.sub.measure(&choice);
            if feasible(&uses)
                && core.within_limit(&choice)
                && best.as_ref().is_none_or(|(old, _)| value < *old)
            {
                *best = Some((value, choice));
            }
        }
    }
    dual.mask = None;
    best.as_ref().map_or(f64::INFINITY, |(value, _)| value - EQUAL)
}

/// Forbids candidates that would lift the bound to `cutoff`. With a limit on distinct rules the
/// reduced costs of heads do not add up to the bound, and nothing is fixed.
fn fix(dual: &Lagrangian<'_>, found: &Maximum, cutoff: f64, words: usize, forbidden: &mut [u64]) {
    let core = dual.sub.core;
    if core.limit.is_some() {
        return;
    }
    let budget = (cutoff - found.point.value) * core.heads as f64;
    let prices = Prices::new(dual.sub, &found.multipliers);
    let mut costs = vec![0.0; core.width * core.cands];
    for layer in 0..core.layers {
        dual.layer_costs(layer, &prices, &mut costs);
        for (row, head) in costs.chunks(core.cands).zip(layer * core.width..) {
            let chosen = row[usize::from(found.point.choice[head])];
            for (c, &cost) in row.iter().enumerate() {
                if cost - chosen >= budget {
                    forbid(forbidden, words, head, c);
                }
            }
        }
    }
}

/// The head whose choice is least settled, and a split of its candidates that separates the ones
/// that the relaxation mixes. None if every head has one candidate left.
fn branching(
    dual: &Lagrangian<'_>,
    found: &Maximum,
    words: usize,
    forbidden: &[u64],
) -> Option<(usize, Vec<bool>)> {
    let core = dual.sub.core;
    let allowed =
        |head: usize| (0..core.cands).filter(move |&c| !is_forbidden(forbidden, words, head, c));
    let prices = Prices::new(dual.sub, &found.multipliers);
    let share = |head: usize| {
        let mut shares: Vec<(u16, f64)> = Vec::new();
        for (weight, choice) in &found.mixture {
            match shares.iter_mut().find(|(c, _)| *c == choice[head]) {
                Some((_, sum)) => *sum += weight,
                None => shares.push((choice[head], *weight)),
            }
        }
        shares.retain(|&(c, _)| !is_forbidden(forbidden, words, head, usize::from(c)));
        shares
    };
    let unsettled = |shares: &[(u16, f64)]| {
        let sum: f64 = shares.iter().map(|(_, s)| s).sum();
        sum - shares.iter().map(|(_, s)| *s).fold(0.0, f64::max)
    };
    let mut widest: Option<(f64, usize)> = None;
    for head in 0..core.heads {
        let open = unsettled(&share(head));
        if open > 1e-7 && widest.is_none_or(|(most, _)| open > most) {
            widest = Some((open, head));
        }
    }
    if let Some((_, head)) = widest {
        let mut shares = share(head);
        // By what the candidate costs in size, as neighbours in size are alike.
        let key = |c: u16| prices.candidates[usize::from(c)];
        shares.sort_by(|a, b| key(a.0).total_cmp(&key(b.0)).then(a.0.cmp(&b.0)));
        let total: f64 = shares.iter().map(|(_, s)| s).sum();
        let mut sum = 0.0;
        let mut last = shares[0].0;
        for &(c, share) in &shares[..shares.len() - 1] {
            sum += share;
            last = c;
            if sum >= 0.5 * total {
                break;
            }
        }
        let low = |c: usize| {
            let c = c as u16;
            key(c).total_cmp(&key(last)).then(c.cmp(&last)) != Ordering::Greater
        };
        return Some((head, (0..core.cands).map(low).collect()));
    }
    let head = (0..core.heads)
        .filter(|&head| allowed(head).count() > 1)
        .min_by_key(|&head| allowed(head).count())?;
    let chosen = usize::from(found.point.choice[head]);
    let alone =
        if is_forbidden(forbidden, words, head, chosen) { allowed(head).next()? } else { chosen };
    Some((head, (0..core.cands).map(|c| c == alone).collect()))
}

fn forbid(forbidden: &mut [u64], words: usize, head: usize, candidate: usize) {
    forbidden[head * words + candidate / 64] |= 1 << (candidate % 64);
}

fn is_forbidden(forbidden: &[u64], words: usize, head: usize, candidate: usize) -> bool {
    forbidden[head * words + candidate / 64] >> (candidate % 64) & 1 == 1
}

/// What to add to reduced costs.
fn mask(forbidden: &[u64], words: usize, heads: usize, cands: usize) -> Vec<f64> {
    let entry = |head: usize, c: usize| {
        if is_forbidden(forbidden, words, head, c) { f64::INFINITY } else { 0.0 }
    };
    (0..heads).flat_map(|head| (0..cands).map(move |c| entry(head, c))).collect()
}
