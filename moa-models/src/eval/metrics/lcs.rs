/// Lengths of the longest common subsequences of all prefixes, `[x.len() + 1, y.len() + 1]`.
pub(super) fn table<T: PartialEq>(x: &[T], y: &[T]) -> Vec<Vec<usize>> {
    let mut table = vec![vec![0; y.len() + 1]; x.len() + 1];
    for i in 1..=x.len() {
        for j in 1..=y.len() {
            table[i][j] = match x[i - 1] == y[j - 1] {
                true => table[i - 1][j - 1] + 1,
                false => table[i - 1][j].max(table[i][j - 1]),
            };
        }
    }
    table
}

/// Length of the longest common subsequence, with memory for one row.
pub(super) fn length<T: PartialEq>(x: &[T], y: &[T]) -> usize {
    let mut row = vec![0; y.len() + 1];
    for a in x {
        let mut diagonal = 0;
        for (j, b) in y.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if a == b { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[y.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_agree() {
        for (x, y, expected) in [("ABCBDAB", "BDCABA", 4), ("", "A", 0), ("AAAA", "AA", 2)] {
            assert_eq!(length(x.as_bytes(), y.as_bytes()), expected);
            assert_eq!(table(x.as_bytes(), y.as_bytes())[x.len()][y.len()], expected);
        }
    }
}
