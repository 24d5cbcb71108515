use crate::{ElasticRule, Error, Result};

/// Limits on the mean size over all heads, at one context length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Context length that the bound is about; it names the bound in errors.
    pub length: usize,
    /// Largest mean size.
    pub max: f64,
    /// Smallest mean size, if there is such a bound (the original code asks for 0.9 x `max`).
    pub min: Option<f64>,
}

/// One search problem: candidate rules for every KV head, the loss and size of each, and bounds on
/// the mean size.
///
/// Every KV head of every layer takes one candidate. Invariants: losses and sizes are finite and
/// complete, no list but `bounds` is empty, lengths are distinct.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    layers: usize,
    heads_per_layer: usize,
    candidates: Vec<ElasticRule>,
    lengths: Vec<usize>,
    losses: Vec<f64>,
    bounds: Vec<Bound>,
    /// `[bound][layer][candidate]`.
    sizes: Vec<f64>,
}

impl Problem {
    /// A problem of `layers` x `heads_per_layer` KV heads.
    ///
    /// - `lengths`: objective lengths; `losses`: `[length][layer][head][candidate]`, the loss that
    ///   the candidate adds at that length. Signed, any unit; only differences matter.
    /// - `bounds`, `sizes`: `[bound][candidate]`, the size of one head with that candidate, in the
    ///   unit of the bound: density ([`density_sizes`]), bytes, measured time.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a list has another number of entries, a number is not finite or absurd, a length
    /// occurs twice, or there are no heads, candidates or lengths.
    pub fn new(
        layers: usize,
        heads_per_layer: usize,
        candidates: Vec<ElasticRule>,
        lengths: Vec<usize>,
        losses: Vec<f64>,
        bounds: Vec<Bound>,
        sizes: Vec<f64>,
    ) -> Result<Self> {
        for (what, n) in [
            ("layers", layers),
            ("heads_per_layer", heads_per_layer),
            ("candidates", candidates.len()),
            ("lengths", lengths.len()),
        ] {
            if n == 0 || n > usize::from(u16::MAX) {
                return Err(Error::invalid(what, "between 1 and 65535", n));
            }
        }
        for (i, length) in lengths.iter().enumerate() {
            if lengths[..i].contains(length) {
                return Err(Error::invalid(
                    "lengths",
                    "distinct lengths",
                    format!("{length} twice"),
                ));
            }
        }
        let wanted = [lengths.len(), layers, heads_per_layer, candidates.len()]
            .iter()
            .try_fold(1usize, |n, &m| n.checked_mul(m));
        if wanted != Some(losses.len()) {
            return Err(Error::invalid(
                "losses",
                format!(
                    "{} lengths x {layers} layers x {heads_per_layer} heads x {} candidates",
                    lengths.len(),
                    candidates.len()
                ),
                format!("{} entries", losses.len()),
            ));
        }
        if sizes.len() != bounds.len() * candidates.len() {
            return Err(Error::invalid(
                "sizes",
                format!("{} bounds x {} candidates", bounds.len(), candidates.len()),
                format!("{} entries", sizes.len()),
            ));
        }
        if let Some(x) = losses.iter().find(|x| !is_sane(x)) {
            return Err(Error::invalid("losses", "numbers of at most 1e100 in size", x));
        }
        if let Some(x) = sizes.iter().find(|x| !is_sane(x)) {
            return Err(Error::invalid("sizes", "numbers of at most 1e100 in size", x));
        }
        for bound in &bounds {
            if !bound.max.is_finite() {
                return Err(Error::invalid("bound max", "a finite number", bound.max));
            }
            if let Some(min) = bound.min
                && (!min.is_finite() || min > bound.max)
            {
                let expected = format!("a finite number of at most the max, {}", bound.max);
                return Err(Error::invalid("bound min", expected, min));
            }
        }
        let rows = sizes.chunks(candidates.len());
        let sizes =
            rows.flat_map(|row| std::iter::repeat_n(row, layers)).flatten().copied().collect();
        Ok(Self { layers, heads_per_layer, candidates, lengths, losses, bounds, sizes })
    }

    /// The same problem where a candidate's size depends on the layer, as where layers have windows of their
    /// own: `[bound][layer][candidate]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are other than these, or one is not finite or absurd.
    pub fn with_layer_sizes(mut self, sizes: Vec<f64>) -> Result<Self> {
        if sizes.len() != self.sizes.len() {
            let expected = format!("{} entries", self.sizes.len());
            return Err(Error::invalid("sizes", expected, sizes.len()));
        }
        if let Some(x) = sizes.iter().find(|x| !is_sane(x)) {
            return Err(Error::invalid("sizes", "numbers of at most 1e100 in size", x));
        }
        self.sizes = sizes;
        Ok(self)
    }

    /// Whether each bound can be met by itself, which losses have no part in.
    ///
    /// # Errors
    /// [`Error::Infeasible`] with what candidates reach.
    pub fn reachable(&self) -> Result<()> {
        self.check_reach(|_| "mean size that the candidates reach", "")
    }

    /// [`reachable`](Self::reachable) in other words: what the bound of each number is on, and what the smallest size comes of.
    pub(crate) fn check_reach(
        &self,
        kind: impl Fn(usize) -> &'static str,
        cause: &str,
    ) -> Result<()> {
        for (b, bound) in self.bounds.iter().enumerate() {
            let (sizes, kind) = (self.sizes_at(b), kind(b));
            let layers = || sizes.chunks(self.candidates.len());
            let mean = |of: fn(f64, f64) -> f64, from: f64| {
                let each = layers().map(|sizes| sizes.iter().copied().fold(from, of));
                each.sum::<f64>() / self.layers as f64
            };
            let (least, most) = (mean(f64::min, f64::INFINITY), mean(f64::max, f64::NEG_INFINITY));
            let reason = if least > bound.max {
                let (least, max) = (rounded(least), rounded(bound.max));
                format!("the smallest {kind} is {least}{cause}, at most {max} is allowed")
            } else if let Some(min) = bound.min.filter(|&min| most < min) {
                let (most, min) = (rounded(most), rounded(min));
                format!("the largest {kind} is {most}, at least {min} is asked for")
            } else {
                continue;
            };
            return Err(Error::Infeasible { length: bound.length, reason });
        }
        Ok(())
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// KV heads of each layer.
    pub fn heads_per_layer(&self) -> usize {
        self.heads_per_layer
    }

    /// KV heads of the whole model.
    pub fn total_heads(&self) -> usize {
        self.layers * self.heads_per_layer
    }

    /// The rules that [`crate::search::Solution::choice`] counts.
    pub fn candidates(&self) -> &[ElasticRule] {
        &self.candidates
    }

    /// Objective lengths.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Bounds on the mean size.
    pub fn bounds(&self) -> &[Bound] {
        &self.bounds
    }

    /// Loss of every head and candidate at the objective length of that index,
    /// `[layer][head][candidate]`.
    pub(super) fn losses_at(&self, length: usize) -> &[f64] {
        let size = self.total_heads() * self.candidates.len();
        &self.losses[length * size..][..size]
    }

    /// Size of every candidate at the bound of that index, `[layer][candidate]`.
    pub(super) fn sizes_at(&self, bound: usize) -> &[f64] {
        let size = self.layers * self.candidates.len();
        &self.sizes[bound * size..][..size]
    }

    /// Losses of a choice, per objective length, summed over heads.
    pub(super) fn losses_of(&self, choice: &[usize]) -> Vec<f64> {
        let sum = |losses: &[f64]| {
            losses.chunks(self.candidates.len()).zip(choice).map(|(head, &c)| head[c]).sum()
        };
        (0..self.lengths.len()).map(|i| sum(self.losses_at(i))).collect()
    }

    /// Mean sizes of a choice, per bound.
    pub(super) fn sizes_of(&self, choice: &[usize]) -> Vec<f64> {
        let mean = |sizes: &[f64]| {
            let layers =
                sizes.chunks(self.candidates.len()).zip(choice.chunks(self.heads_per_layer));
            let sum =
                layers.flat_map(|(sizes, choice)| choice.iter().map(|&c| sizes[c])).sum::<f64>();
            sum / self.total_heads() as f64
        };
        (0..self.bounds.len()).map(|b| mean(self.sizes_at(b))).collect()
    }
}

/// So that no sum of them overflows.
fn is_sane(x: &f64) -> bool {
    x.abs() <= 1e100
}

/// A size to three digits, or to three places where it is not small.
fn rounded(size: f64) -> String {
    let digits = if size > 0.0 && size < 0.1 { 2 - size.log10().floor() as i32 } else { 3 };
    let text = format!("{size:.0$}", digits.clamp(3, 340) as usize);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Sizes for bounds on density: the share of the context that each candidate keeps at the length of
/// each bound, when a head keeps at least `min_span` keys. `[bound][candidate]`.
pub fn density_sizes(candidates: &[ElasticRule], bounds: &[Bound], min_span: usize) -> Vec<f64> {
    bounds
        .iter()
        .flat_map(|bound| {
            let share = |rule: &ElasticRule| {
                rule.span(bound.length, min_span) as f64 / bound.length.max(1) as f64
            };
            candidates.iter().map(share)
        })
        .collect()
}
