use crate::engine::sampling::SamplingOptions;

/// Who chooses the tokens of requests that decode together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Choice<'a> {
    /// The device: the likeliest token of each.
    Likeliest,
    /// The device draws each token by these options, with a random number of each request's own.
    Drawn(&'a SamplingOptions),
    /// The host, from the logits of all.
    Host,
}

impl<'a> Choice<'a> {
    /// The fastest choice that gives each request what its own options ask for: a device chooses for
    /// a whole batch in one way, and knows no tokens of the past, which a penalty asks for.
    pub(crate) fn of<I>(requests: I, can_sample: bool) -> Self
    where
        I: IntoIterator<Item = &'a SamplingOptions>,
    {
        let mut requests = requests.into_iter();
        let Some(first) = requests.next() else { return Self::Host };
        let is_alike = |options: &SamplingOptions| match first.temperature == 0.0 {
            true => options.temperature == 0.0,
            false => draws(first) == draws(options),
        };
        if !first.is_plain() || !requests.all(|other| other.is_plain() && is_alike(other)) {
            return Self::Host;
        }
        match (first.temperature == 0.0, can_sample) {
            (true, _) => Self::Likeliest,
            (false, true) => Self::Drawn(first),
            (false, false) => Self::Host,
        }
    }
}

/// What decides a draw beside the random number.
fn draws(options: &SamplingOptions) -> (f32, usize, f32, f32) {
    let SamplingOptions { temperature, top_k, top_p, min_p, .. } = *options;
    (temperature, top_k.unwrap_or(0), top_p, min_p)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warm(temperature: f32, seed: u64) -> SamplingOptions {
        SamplingOptions { temperature, seed, ..SamplingOptions::default() }
    }

    #[test]
    fn the_device_chooses_where_all_requests_agree() {
        let greedy = SamplingOptions::default();
        // What only a draw looks at does not keep a greedy request from the others.
        let also_greedy = SamplingOptions { top_k: Some(3), seed: 9, ..greedy.clone() };
        for can_sample in [false, true] {
            assert_eq!(Choice::of([&greedy, &also_greedy], can_sample), Choice::Likeliest);
        }
        let (one, other) = (warm(0.7, 1), SamplingOptions { top_k: Some(0), ..warm(0.7, 2) });
        assert_eq!(Choice::of([&one, &other], true), Choice::Drawn(&one));
        assert_eq!(Choice::of([&one, &other], false), Choice::Host);
    }

    #[test]
    fn the_host_chooses_where_they_differ_or_look_back() {
        let (greedy, warm) = (SamplingOptions::default(), warm(0.7, 1));
        let penalty = SamplingOptions { repetition_penalty: 1.1, ..greedy.clone() };
        let others = [
            SamplingOptions { temperature: 0.8, ..warm.clone() },
            SamplingOptions { top_k: Some(5), ..warm.clone() },
            SamplingOptions { top_p: 0.9, ..warm.clone() },
            SamplingOptions { min_p: 0.1, ..warm.clone() },
            SamplingOptions { repetition_penalty: 1.1, ..warm.clone() },
            SamplingOptions { presence_penalty: 0.1, ..warm.clone() },
            SamplingOptions { frequency_penalty: 0.1, ..warm.clone() },
            SamplingOptions { logit_bias: vec![(0, 1.0)], ..warm.clone() },
            greedy.clone(),
        ];
        for other in &others {
            assert_eq!(Choice::of([&warm, other], true), Choice::Host, "{other:?}");
            assert_eq!(Choice::of([other, &warm], true), Choice::Host, "{other:?}");
        }
        assert_eq!(Choice::of([&penalty], true), Choice::Host);
        assert_eq!(Choice::of([&greedy, &penalty], true), Choice::Host);
        assert_eq!(Choice::of([], true), Choice::Host);
    }
}
