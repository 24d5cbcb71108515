use moa_core::reference::{self, Heads};
use moa_core::{Position, Span};

/// Gradients by q, k and v of `sum(d_out * out)` under the mask of `span`.
///
/// What [`moa_core::reference`] lacks: the gradients that an influence is continued by.
pub fn backward(
    h: Heads,
    [q, k, v]: [&[f64]; 3],
    d_out: &[f64],
    span: Span,
    scale: f64,
) -> [Vec<f64>; 3] {
    let tokens = q.len() / (h.query * h.dim);
    let spans = vec![span; h.kv];
    let (out, lse) = reference::extend(h, q, k, v, &spans, scale);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let mut d = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    for i in 0..tokens {
        for head in 0..h.query {
            let qi = (i * h.query + head) * h.dim;
            let qi = qi..qi + h.dim;
            let big_d = dot(&d_out[qi.clone()], &out[qi.clone()]);
            for j in (0..=i).filter(|&j| span.attends(Position(i), Position(j))) {
                let kj = (j * h.kv + head / (h.query / h.kv)) * h.dim;
                let kj = kj..kj + h.dim;
                let score = scale * dot(&q[qi.clone()], &k[kj.clone()]);
                let p = (score - lse[i * h.query + head]).exp();
                let d_score = scale * p * (dot(&d_out[qi.clone()], &v[kj.clone()]) - big_d);
                for e in 0..h.dim {
                    d[0][qi.start + e] += d_score * k[kj.start + e];
                    d[1][kj.start + e] += d_score * q[qi.start + e];
                    d[2][kj.start + e] += p * d_out[qi.start + e];
                }
            }
        }
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::{f64s, normal};

    #[test]
    fn backward_equals_central_differences_of_the_reference() {
        let h = Heads { query: 4, kv: 2, dim: 3 };
        let normal = |n, seed| f64s(&normal(n, seed));
        let inputs = [normal(7 * 12, 1), normal(7 * 6, 2), normal(7 * 6, 3)];
        let d_out = normal(7 * 12, 4);
        let span = Span::full(4);
        let objective = |x: &[Vec<f64>; 3]| -> f64 {
            let (out, _) = reference::extend(h, &x[0], &x[1], &x[2], &[span; 2], 0.6);
            out.iter().zip(&d_out).map(|(o, d)| o * d).sum()
        };
        let gradients = backward(h, [&inputs[0], &inputs[1], &inputs[2]], &d_out, span, 0.6);
        for (which, gradient) in gradients.iter().enumerate() {
            for (at, gradient) in gradient.iter().enumerate() {
                let shifted = |by: f64| {
                    let mut x = inputs.clone();
                    x[which][at] += by;
                    objective(&x)
                };
                let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
                assert!(
                    (numeric - gradient).abs() < 1e-7,
                    "input {which}[{at}]: {numeric} {gradient}"
                );
            }
        }
    }
}
