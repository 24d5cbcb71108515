/// How likely a token was to the model, before penalties, bias, temperature and restrictions.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The likeliest tokens in its place with theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The logits of a step as natural logarithms of probabilities.
pub(crate) struct Logprobs {
    top: Vec<(u32, f32)>,
    logits: Vec<f32>,
    /// What is taken from a logit.
    normaliser: f64,
}

impl Logprobs {
    /// Those of `logits`, with the `most` likeliest tokens.
    pub(crate) fn of(logits: &[f32], most: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|z| f64::from(z - largest).exp()).sum();
        let normaliser = f64::from(largest) + sum.ln();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let most = most.min(order.len());
        if most > 0 && most < order.len() {
            order.select_nth_unstable_by(most - 1, likelier);
        }
        order.truncate(most);
        order.sort_unstable_by(likelier);
        let mut all = Self { top: Vec::new(), logits: logits.to_vec(), normaliser };
        all.top = order.into_iter().map(|id| (id, all.of_token(id))).collect();
        all
    }

    /// With the token that was chosen.
    pub(crate) fn of_choice(self, token: u32) -> TokenLogprobs {
        TokenLogprobs { logprob: self.of_token(token), top: self.top }
    }

    fn of_token(&self, id: u32) -> f32 {
        let logit = self.logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        (f64::from(logit) - self.normaliser) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_the_likeliest_come_first() {
        let logits = [0.5f32, 0.125, 0.25, 0.125].map(|p| p.ln() + 3.0);
        let told = Logprobs::of(&logits, 3).of_choice(3);
        assert!((told.logprob - 0.125f32.ln()).abs() < 1e-6);
        let (ids, logprobs): (Vec<u32>, Vec<f32>) = told.top.into_iter().unzip();
        // Of equals the lowest id.
        assert_eq!(ids, [0, 2, 1]);
        assert!((logprobs[0] - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(Logprobs::of(&logits, 9).of_choice(0).top.len(), 4);
        assert!(Logprobs::of(&logits, 0).of_choice(0).top.is_empty());
    }
}
