//! Naive attention and influence in f64, the specification that every backend is tested against.
//! Short enough to trust by reading; quadratic, for tests only.

use crate::{Position, Span};

/// Dimensions of one layer's heads.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// KV heads; query head `h` reads KV head `h / (query / kv)`.
    pub kv: usize,
    /// Elements per head.
    pub dim: usize,
}

impl Heads {
    fn row<'a>(&self, x: &'a [f64], heads: usize, token: usize, head: usize) -> &'a [f64] {
        &x[(token * heads + head) * self.dim..][..self.dim]
    }

    fn kv_of(&self, query_head: usize) -> usize {
        query_head / (self.query / self.kv)
    }
}

/// What scores are, and what takes part in the softmax beside them. From an `f64`: plain scores of this factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores<'a> {
    /// A score is `scale * q.k` ...
    pub scale: f64,
    /// ... and with a softcap `c` it is `c * tanh(scale * q.k / c)`.
    pub softcap: Option<f64>,
    /// A logit of each query head that is in the denominator and has no value.
    pub sinks: Option<&'a [f64]>,
}

impl From<f64> for Scores<'_> {
    fn from(scale: f64) -> Self {
        Self { scale, softcap: None, sinks: None }
    }
}

impl Scores<'_> {
    fn score(&self, product: f64) -> f64 {
        let score = self.scale * product;
        self.softcap.map_or(score, |cap| cap * (score / cap).tanh())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Attention probabilities of one query of one head over all keys up to its own, and the
/// log-sum-exp of the scores, the sink among them.
fn probabilities(
    h: Heads,
    q: &[f64],
    k: &[f64],
    span: Span,
    i: usize,
    head: usize,
    rule: Scores<'_>,
) -> (Vec<f64>, f64) {
    let scores: Vec<f64> = (0..=i)
        .map(|j| match span.attends(Position(i), Position(j)) {
            true => rule.score(dot(h.row(q, h.query, i, head), h.row(k, h.kv, j, h.kv_of(head)))),
            false => f64::NEG_INFINITY,
        })
        .collect();
    let sink = rule.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head]);
    let max = scores.iter().copied().fold(sink, f64::max);
    let sum: f64 = scores.iter().chain([&sink]).map(|s| (s - max).exp()).sum();
    (scores.iter().map(|s| (s - max).exp() / sum).collect(), max + sum.ln())
}

/// Attention outputs `[tokens, query heads, dim]` and log-sum-exps `[tokens, query heads]` of a
/// whole sequence; `q` is `[tokens, query heads, dim]`, `k` and `v` are `[tokens, kv heads, dim]`.
pub fn extend<'a>(
    h: Heads,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    spans: &[Span],
    scores: impl Into<Scores<'a>>,
) -> (Vec<f64>, Vec<f64>) {
    let scores = scores.into();
    let tokens = q.len() / (h.query * h.dim);
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for i in 0..tokens {
        for head in 0..h.query {
            let (p, lse) = probabilities(h, q, k, spans[h.kv_of(head)], i, head, scores);
            // What is hidden counts for nothing, whatever it holds: 0 times infinity is no number.
            let span = spans[h.kv_of(head)];
            let seen = (0..=i).filter(|&j| span.attends(Position(i), Position(j)));
            let values = |d: usize| {
                let value = |j: usize| p[j] * h.row(v, h.kv, j, h.kv_of(head))[d];
                seen.clone().map(value).sum::<f64>()
            };
            out.extend((0..h.dim).map(values));
            lses.push(lse);
        }
    }
    (out, lses)
}

/// Influence `E_ij = A_ij / (1 - A_ij) * (D_i - dO_i . V_j)` of every entry of one query head under
/// the mask of `span`, `[tokens, tokens]`; the diagonal, which no mask can hide, is 0, and so is what is
/// hidden already.
pub fn influence(
    h: Heads,
    [q, k, v]: [&[f64]; 3],
    d_out: &[f64],
    span: Span,
    head: usize,
    scale: f64,
) -> Vec<f64> {
    let tokens = q.len() / (h.query * h.dim);
    let mut e = vec![0.0; tokens * tokens];
    for i in 0..tokens {
        let (p, _) = probabilities(h, q, k, span, i, head, scale.into());
        let seen = (0..=i).filter(|&j| span.attends(Position(i), Position(j)));
        let g = |j: usize| dot(h.row(d_out, h.query, i, head), h.row(v, h.kv, j, h.kv_of(head)));
        let g: Vec<(usize, f64)> = seen.map(|j| (j, g(j))).collect();
        let d: f64 = g.iter().map(|&(j, g)| p[j] * g).sum();
        for (j, g) in g.into_iter().filter(|&(j, _)| j < i) {
            e[i * tokens + j] = p[j] / (1.0 - p[j]) * (d - g);
        }
    }
    e
}
