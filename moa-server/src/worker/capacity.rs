//! How many tokens sequences have room for.

/// The capacity of a sequence for so many tokens: the next of four sizes in each power of two, so that
/// sequences of about the same length have the same spans and can go on from one another.
pub(super) fn rounded(length: usize, limit: usize) -> usize {
    let step = (length.next_power_of_two() / 8).max(64);
    length.div_ceil(step).saturating_mul(step).min(limit).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_are_few_and_not_much_larger() {
        for length in 1..20_000 {
            let capacity = rounded(length, 16_384);
            assert!(capacity >= length.min(16_384));
            assert!(capacity <= (length + length / 4 + 64).min(16_384), "{length} {capacity}");
            assert_eq!(rounded(capacity, 16_384), capacity);
        }
        let all: std::collections::BTreeSet<_> = (1..=16_384).map(|n| rounded(n, 16_384)).collect();
        assert!(all.len() < 40, "{}", all.len());
    }
}
