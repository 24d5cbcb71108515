use std::cmp::Reverse;

use crate::{Error, ModelShape, Plan, Result};

/// Which KV heads each of several devices owns, layer by layer, where they share one model (tensor
/// parallelism): a rank keeps whole KV caches and computes all query heads of their groups.
///
/// Ranks wait for each other in every layer, so each layer is dealt evenly by spans, which is what a
/// decode step reads; and memory is the sum over layers, so a layer's largest share goes to the rank
/// that has least so far. A rank has the same number of heads in every layer, as weights are split
/// with them.
///
/// Heads of a layer are sorted by span and dealt in rounds of one head each, the widest one to the rank
/// with the fewest keys; then single heads change places while that makes the fuller of the two ranks
/// emptier. Where every rank has equally many heads, this holds by construction:
/// * in a layer, the keys of two ranks differ by no more than its widest and narrowest head do;
/// * over all layers, by no more than that of the worst layer.
///
/// ```
/// use moa_core::{ElasticRule, ModelShape, Plan, Sharding};
/// let shape = ModelShape { layers: 1, query_heads: 8, kv_heads: 4, head_dim: 64 };
/// // Heads 0 and 1 see everything: each of two ranks gets one of them.
/// let plan = Plan::retrieval_heads(shape, 4, 60, &[(0, 0), (0, 1)])?;
/// let sharding = Sharding::balanced(&plan, 8192, 2)?;
/// assert_eq!(sharding.heads(0, 0), [0, 2]);
/// assert_eq!(sharding.heads(0, 1), [1, 3]);
/// assert_eq!(sharding.plan(&plan, 1)?.kv_bytes(8192, 256), plan.kv_bytes(8192, 256) / 2);
/// # Ok::<(), moa_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharding {
    shape: ModelShape,
    ranks: usize,
    /// `owned[layer][rank]`: ascending, and never empty.
    owned: Vec<Vec<Vec<usize>>>,
}

/// Heads of one layer that go to the same rank.
#[derive(Clone, Default)]
struct Hand {
    heads: Vec<usize>,
    keys: usize,
}

impl Sharding {
    /// Deals heads so that the caches of sequences of `context_length` tokens under `plan` are even.
    /// Where heads do not divide evenly, the first ranks have one more than the others.
    ///
    /// Sequences of other plans and lengths run on it as well, though less evenly.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no rank, or there are more ranks than KV heads.
    pub fn balanced(plan: &Plan, context_length: usize, ranks: usize) -> Result<Self> {
        let shape = plan.shape();
        if !(1..=shape.kv_heads).contains(&ranks) {
            let expected = format!("1 to {} (KV heads)", shape.kv_heads);
            return Err(Error::invalid("ranks", expected, ranks));
        }
        let mut totals = vec![0; ranks];
        let mut owned = Vec::with_capacity(shape.layers);
        for layer in 0..shape.layers {
            let spans = plan.layer_spans(layer, context_length);
            let keys: Vec<usize> = spans.iter().map(|s| s.total().min(context_length)).collect();
            let mut hands = deal(&keys, ranks);
            exchange(&mut hands, &keys);
            // The fullest hand first, to the rank with least among those of as many heads.
            hands.sort_by_key(|hand| Reverse(hand.keys));
            let mut layer: Vec<Option<Hand>> = vec![None; ranks];
            for hand in hands {
                let fits = |rank: &usize| {
                    layer[*rank].is_none()
                        && count(shape.kv_heads, ranks, *rank) == hand.heads.len()
                };
                let rank = (0..ranks).filter(fits).min_by_key(|rank| totals[*rank]);
                // There are as many hands of each size as ranks.
                if let Some(rank) = rank {
                    totals[rank] += hand.keys;
                    layer[rank] = Some(hand);
                }
            }
            let sorted = |hand: Hand| {
                let mut heads = hand.heads;
                heads.sort_unstable();
                heads
            };
            owned.push(layer.into_iter().flatten().map(sorted).collect());
        }
        Ok(Self { shape, ranks, owned })
    }

    /// Dimensions of the whole model.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Devices that share it.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// KV heads of a layer that a rank owns, ascending.
    ///
    /// # Panics
    /// If the layer or rank does not exist.
    pub fn heads(&self, layer: usize, rank: usize) -> &[usize] {
        &self.owned[layer][rank]
    }

    /// Dimensions of a rank's part.
    ///
    /// # Panics
    /// If the rank does not exist.
    pub fn rank_shape(&self, rank: usize) -> ModelShape {
        let kv_heads = self.owned.first().map_or(0, |layer| layer[rank].len());
        ModelShape { query_heads: kv_heads * self.shape.group(), kv_heads, ..self.shape }
    }

    /// The part of a plan that is about a rank's heads, in the order of [`heads`](Self::heads).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the plan is for another model, [`Error::Invalid`] if the rank does
    /// not exist.
    pub fn plan(&self, plan: &Plan, rank: usize) -> Result<Plan> {
        plan.check_shape(&self.shape)?;
        if rank >= self.ranks {
            return Err(Error::invalid("rank", format!("below {}", self.ranks), rank));
        }
        let heads = self.owned.iter().enumerate().flat_map(|(layer, hands)| {
            hands[rank].iter().map(move |head| layer * self.shape.kv_heads + head)
        });
        let heads: Vec<usize> = heads.collect();
        let rules = heads.iter().map(|&place| plan.rules()[place].clone()).collect();
        let own = Plan::new(self.rank_shape(rank), plan.sink(), plan.min_span(), rules)?;
        let own = match plan.cache_types() {
            [] => own,
            types => own.with_cache_types(heads.iter().map(|&place| types[place]).collect())?,
        };
        let own = match plan.windows() {
            [] => own,
            windows => own.within(windows.to_vec())?,
        };
        Ok(own.with_fingerprint(plan.fingerprint().map(str::to_owned)))
    }
}

/// Heads of a rank in every layer.
fn count(heads: usize, ranks: usize, rank: usize) -> usize {
    heads / ranks + usize::from(rank < heads % ranks)
}

/// Deals heads in rounds of one for each hand, the widest to the hand with the fewest keys.
///
/// A round changes the difference of two hands by that of two heads the other way round, so it never
/// exceeds the largest difference of two heads in one round.
fn deal(keys: &[usize], ranks: usize) -> Vec<Hand> {
    let mut widest: Vec<usize> = (0..keys.len()).collect();
    widest.sort_by_key(|head| Reverse(keys[*head]));
    let mut hands = vec![Hand::default(); ranks];
    for round in widest.chunks(ranks) {
        hands.sort_by_key(|hand| hand.keys);
        for (hand, &head) in hands.iter_mut().zip(round) {
            hand.heads.push(head);
            hand.keys += keys[head];
        }
    }
    hands
}

/// Exchanges single heads of the fullest hand for narrower ones of others while the fuller hand of the
/// two becomes emptier.
fn exchange(hands: &mut [Hand], keys: &[usize]) {
    // Every exchange lowers the sum of squares; this only bounds the time.
    for _ in 0..keys.len() * keys.len() {
        let fullest =
            |best: usize, i: usize| if hands[i].keys > hands[best].keys { i } else { best };
        let from = (0..hands.len()).fold(0, fullest);
        let mut best: Option<(usize, usize, (usize, usize, usize))> = None;
        for to in (0..hands.len()).filter(|to| *to != from) {
            let gap = hands[from].keys - hands[to].keys;
            for (i, &own) in hands[from].heads.iter().enumerate() {
                for (j, &other) in hands[to].heads.iter().enumerate() {
                    let moved = keys[own].saturating_sub(keys[other]);
                    if moved == 0 || moved >= gap {
                        continue;
                    }
                    let fuller = (hands[from].keys - moved).max(hands[to].keys + moved);
                    if best.is_none_or(|(least, ..)| fuller < least) {
                        best = Some((fuller, moved, (to, i, j)));
                    }
                }
            }
        }
        let Some((_, moved, (to, i, j))) = best else { return };
        let (own, other) = (hands[from].heads[i], hands[to].heads[j]);
        hands[from].heads[i] = other;
        hands[to].heads[j] = own;
        hands[from].keys -= moved;
        hands[to].keys += moved;
    }
}
