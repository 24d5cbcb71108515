use crate::{ElasticRule, Error, Result};

/// Every pair of an `alpha` and a `beta`, without repetition, `beta` varying fastest.
///
/// # Errors
/// [`Error::Invalid`] if a coefficient is not one a rule can have, or there is none.
pub fn grid(alphas: &[f64], betas: &[f64]) -> Result<Vec<ElasticRule>> {
    let mut rules = Vec::with_capacity(alphas.len() * betas.len());
    for &alpha in alphas {
        for &beta in betas {
            let rule = ElasticRule::new(alpha, beta)?;
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
    }
    if rules.is_empty() {
        return Err(Error::invalid("grid", "at least one alpha and one beta", "none"));
    }
    Ok(rules)
}

/// The grid of the paper: 6 alphas uniform on [-2048, 8192], 9 betas uniform on [0, 1].
pub fn paper_grid() -> Vec<ElasticRule> {
    products(&uniform(-2048.0, 8192.0, 6), &uniform(0.0, 1.0, 9))
}

/// The 48 rules of the original code: alphas in steps of 1024, without the rules whose span would
/// exceed the context at 8k or 16k or be empty at 2k.
pub fn code_grid() -> Vec<ElasticRule> {
    let mut rules = products(&uniform(-2048.0, 8192.0, 11), &uniform(0.0, 1.0, 9));
    rules.retain(|rule| {
        let at = |n: f64| rule.alpha + rule.beta * n;
        at(8192.0) <= 8192.0 && at(16384.0) <= 16384.0 && at(2048.0) > 0.0
    });
    rules
}

/// 99 rules for models used up to `longest` tokens: 11 alphas uniform on
/// [-`longest`/4, `longest`], 9 betas uniform on [0, 1]. `longest` = 8192 gives the steps of the
/// original code.
pub fn scaled_grid(longest: usize) -> Vec<ElasticRule> {
    let longest = longest as f64;
    products(&uniform(-longest / 4.0, longest, 11), &uniform(0.0, 1.0, 9))
}

/// Spans that do not grow with the context: `steps` spans, uniform up to `longest`.
pub fn fixed_grid(longest: usize, steps: usize) -> Vec<ElasticRule> {
    let mut rules: Vec<_> =
        (1..=steps).map(|i| ElasticRule::fixed((longest * i / steps).max(1))).collect();
    rules.dedup();
    rules
}

fn products(alphas: &[f64], betas: &[f64]) -> Vec<ElasticRule> {
    alphas
        .iter()
        .flat_map(|&alpha| betas.iter().map(move |&beta| ElasticRule { alpha, beta }))
        .collect()
}

fn uniform(from: f64, to: f64, steps: usize) -> Vec<f64> {
    (0..steps).map(|i| from + (to - from) * i as f64 / (steps - 1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_have_the_published_sizes() {
        assert_eq!(paper_grid().len(), 54);
        assert_eq!(paper_grid()[0], ElasticRule { alpha: -2048.0, beta: 0.0 });
        assert_eq!(code_grid().len(), 48);
        assert_eq!(scaled_grid(8192).len(), 99);
        assert!(code_grid().iter().all(|rule| scaled_grid(8192).contains(rule)));
        assert_eq!(fixed_grid(1024, 4).iter().map(|r| r.alpha).sum::<f64>(), 2560.0);
        assert_eq!(fixed_grid(2, 8).len(), 2);
    }

    #[test]
    fn grid_drops_repetitions_and_refuses_nonsense() {
        assert_eq!(grid(&[0.0, 64.0, 0.0], &[0.5, 1.0]).unwrap().len(), 4);
        assert!(matches!(grid(&[0.0], &[]), Err(Error::Invalid { .. })));
        assert!(matches!(grid(&[f64::NAN], &[1.0]), Err(Error::Invalid { .. })));
    }
}
