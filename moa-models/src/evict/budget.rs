//! Which keys are kept, from their scores. Of equal scores the earlier key is kept.

/// Positions that each head keeps, ascending.
pub(super) type Kept = Vec<Vec<usize>>;

/// The share of Ada-KV's budget that every head gets alike.
const FLOOR: f64 = 0.2;

/// Every head keeps its `kept - window` best keys and the `window` keys after all scored ones.
pub(super) fn equal(scores: &[Vec<f32>], kept: usize, window: usize) -> Kept {
    each(scores, &vec![kept - window; scores.len()], window)
}

/// Heads of a layer share `kept - window` keys each by how many of the layer's best keys are theirs, but for the
/// [`FLOOR`]; and keep the `window` keys after all scored ones.
pub(super) fn adaptive(scores: &[Vec<f32>], kept: usize, window: usize) -> Kept {
    let (heads, base) = (scores.len(), kept - window);
    let mut counts = vec![0usize; heads];
    for (head, _) in best_of_all(scores, base * heads) {
        counts[head] += 1;
    }
    let share = |count: usize| (1.0 - FLOOR) * count as f64 + FLOOR * base as f64;
    let mut budgets: Vec<usize> = counts.iter().map(|count| share(*count) as usize).collect();
    // What rounding down has left goes where it took most.
    let mut order: Vec<usize> = (0..heads).collect();
    let lost = |head: usize| share(counts[head]).fract();
    order.sort_by(|a, b| lost(*b).total_cmp(&lost(*a)));
    let left = (base * heads).saturating_sub(budgets.iter().sum());
    for head in order.into_iter().cycle().take(left) {
        budgets[head] += 1;
    }
    each(scores, &budgets, window)
}

/// The `total` best keys of all heads.
pub(super) fn global(scores: &[Vec<f32>], total: usize) -> Kept {
    let mut kept = vec![Vec::new(); scores.len()];
    for (head, key) in best_of_all(scores, total) {
        kept[head].push(key);
    }
    kept.iter_mut().for_each(|keys| keys.sort_unstable());
    kept
}

fn each(scores: &[Vec<f32>], budgets: &[usize], window: usize) -> Kept {
    let head = |(scores, &budget): (&Vec<f32>, &usize)| {
        let mut keys: Vec<usize> =
            best_of_all(std::slice::from_ref(scores), budget).map(|(_, key)| key).collect();
        keys.sort_unstable();
        keys.extend(scores.len()..scores.len() + window);
        keys
    };
    scores.iter().zip(budgets).map(head).collect()
}

/// The places (head, key) of the best scores, in no order.
fn best_of_all(scores: &[Vec<f32>], count: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let places = scores.iter().enumerate();
    let mut all: Vec<(f32, usize, usize)> = places
        .flat_map(|(head, keys)| {
            keys.iter().enumerate().map(move |(key, score)| (*score, head, key))
        })
        .collect();
    let count = count.min(all.len());
    if count > 0 && count < all.len() {
        all.select_nth_unstable_by(count - 1, |a, b| {
            b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2)))
        });
    }
    all.truncate(count);
    all.into_iter().map(|(_, head, key)| (head, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores() -> Vec<Vec<f32>> {
        // The first head has all the good keys.
        let score =
            |head: usize, key: usize| (key * 7 % 20) as f32 + 100.0 * (head == 0) as u8 as f32;
        (0..3).map(|head| (0..20).map(|key| score(head, key)).collect()).collect()
    }

    #[test]
    fn budgets_sum_to_the_budget() {
        for (kept, window) in [(7, 3), (10, 0), (23, 3), (4, 2)] {
            for keep in [equal, adaptive] {
                let kept_keys = keep(&scores(), kept, window);
                assert_eq!(kept_keys.iter().map(Vec::len).sum::<usize>(), 3 * kept);
                for keys in &kept_keys {
                    assert!(keys.is_sorted() && keys.windows(2).all(|pair| pair[0] < pair[1]));
                    assert!((20..20 + window).all(|key| keys.contains(&key)));
                }
            }
            let all = global(&scores(), 3 * kept.min(20));
            assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 3 * kept.min(20));
        }
    }

    #[test]
    fn adaptive_budgets_follow_the_best_keys_down_to_a_floor() {
        // Of 15 best keys all are the first head's: it gets 0.8 * 15 + 0.2 * 5, the others the floor.
        let kept = adaptive(&scores(), 5, 0);
        assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), [13, 1, 1]);
        assert_eq!(global(&scores(), 15).iter().map(Vec::len).collect::<Vec<_>>(), [15, 0, 0]);
    }

    #[test]
    fn the_best_keys_are_kept_and_of_equal_ones_the_first() {
        let kept = equal(&[vec![1.0, 5.0, 1.0, 3.0, 1.0]], 3, 0);
        assert_eq!(kept, [[0, 1, 3]]);
        assert_eq!(equal(&[vec![0.0; 4]], 3, 1), [[0, 1, 4]]);
    }
}
