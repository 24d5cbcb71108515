//! Gradients of the operations and of attention, against central differences and the reference.

use moa_backend_cuda::{Dtype, Error, Tensor};
use moa_conformance::{Trial, Verdict, backward, distance, trials};
use moa_core::reference::{self, Heads};
use moa_core::{ArgumentError, Span};

use super::ops::{Ops, product};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        gradients_of_rows_equal_central_differences,
        gradients_of_products_and_places,
        influence_and_gradients_of_attention_equal_the_reference,
    ]
}

fn gradients_of_rows_equal_central_differences() -> Verdict {
    for ops in Ops::all()? {
        let (rows, cols) = (3, 64);
        let (x, xs) = ops.random(&[rows, cols], Dtype::F32, 1);
        let (w, ws) = ops.random(&[cols], Dtype::F32, 2);
        let (d_y, d_ys) = ops.random(&[rows, cols], Dtype::F32, 3);
        let norm = |xs: &[f64]| -> f64 {
            let rows = xs.chunks(cols).zip(d_ys.chunks(cols));
            rows.map(|(x, d)| {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                let scale = (mean + 1e-5).sqrt();
                x.iter().zip(d).zip(&ws).map(|((x, d), w)| x / scale * w * d).sum::<f64>()
            })
            .sum()
        };
        let gradient = |f: &dyn Fn(&[f64]) -> f64, x: &[f64]| -> Vec<f64> {
            let shifted = |at: usize, by: f64| {
                let mut x = x.to_vec();
                x[at] += by;
                f(&x)
            };
            (0..x.len()).map(|at| (shifted(at, 1e-5) - shifted(at, -1e-5)) / 2e-5).collect()
        };
        let got = ops.operations.rms_norm_backward(&x, &w, 1e-5, &d_y).unwrap();
        ops.close(&got, &gradient(&norm, &xs), 1e-5);

        let (gate, gates) = ops.random(&[rows, cols], ops.dtype(), 4);
        let (up, ups) = ops.random(&[rows, cols], ops.dtype(), 5);
        let swiglu = |gates: &[f64], ups: &[f64]| -> f64 {
            let terms = gates.iter().zip(ups).zip(&d_ys);
            terms.map(|((g, u), d)| g / (1.0 + (-g).exp()) * u * d).sum()
        };
        let both = ops.operations.swiglu_backward(&gate, &up, &d_y).unwrap();
        let by_gate = gradient(&|gates| swiglu(gates, &ups), &gates);
        let by_up = gradient(&|ups| swiglu(&gates, ups), &ups);
        ops.close(&both.columns(0..cols).unwrap(), &by_gate, 1e-4);
        ops.close(&both.columns(cols..2 * cols).unwrap(), &by_up, 1e-4);
    }
    Ok(())
}

fn gradients_of_products_and_places() -> Verdict {
    for ops in Ops::all()? {
        let (d_y, d_ys) = ops.random(&[5, 24], ops.dtype(), 1);
        let (w, ws) = ops.random(&[24, 40], ops.dtype(), 2);
        let transposed: Vec<f64> = (0..40 * 24).map(|at| ws[at % 24 * 40 + at / 24]).collect();
        let expected = product(&d_ys, &transposed, 24, 40);
        let d_x = ops.operations.linear_backward(&d_y, &w).unwrap();
        ops.close(&d_x, &expected, 1e-4);
        // The same from two halves, as joined layers have it.
        let part = |range: std::ops::Range<usize>| {
            (d_y.columns(range.clone()).unwrap(), w.rows(range).unwrap())
        };
        let ((d_a, w_a), (d_b, w_b)) = (part(0..8), part(8..24));
        let d_x = ops.operations.linear_backward(&d_a, &w_a).unwrap();
        let d_x = ops.operations.linear_backward_add(d_x, &d_b, &w_b).unwrap();
        ops.close(&d_x, &expected, 1e-4);
        let placed = ops.operations.place_rows(&d_x, 2..7, 9).unwrap();
        let values = d_x.to_f32().unwrap();
        let zeros = [0.0; 80];
        assert_eq!(placed.to_f32().unwrap(), [&zeros[..], &values, &zeros].concat());
        assert!(ops.operations.place_rows(&d_x, 5..10, 9).is_err());
    }
    Ok(())
}

/// Tighter than the suite's: nothing is read that attention has rounded.
fn influence_and_gradients_of_attention_equal_the_reference() -> Verdict {
    for ops in Ops::all()? {
        let tolerance = if ops.dtype() == Dtype::F16 { 2e-3 } else { 1.5e-2 };
        let full = usize::MAX;
        for (query, kv, dim, tokens, window, sharp) in [
            (4, 2, 64, 130, full, 1.0),
            (3, 1, 128, 700, full, 1.0),
            (2, 2, 64, 200, full, 8.0),
            (4, 2, 64, 130, 1, 1.0),
            (3, 1, 64, 700, 150, 1.0),
        ] {
            let heads = Heads { query, kv, dim };
            let (q, qs) = ops.random(&[tokens, query, dim], ops.dtype(), 1);
            let (k, ks) = ops.random(&[tokens, kv, dim], ops.dtype(), 2);
            let (v, vs) = ops.random(&[tokens, kv, dim], ops.dtype(), 3);
            let (d_out, d_outs) = ops.random(&[tokens, query, dim], ops.dtype(), 4);
            // Sharp: `1 - A` comes down to 1e-8, of which f32 holds nothing. Below 1e-16 the reference
            // itself could not tell.
            let scale = sharp / (dim as f32).sqrt();
            let tensors = [&q, &k, &v, &d_out];
            let found = ops.operations.attention_backward(tensors, scale, window, 64, true, true);
            let found = found.unwrap();
            let span = Span::full(tokens.min(window));
            let side = tokens.div_ceil(64);
            let mut blocks = vec![0.0; kv * side * side];
            for head in 0..query {
                let all =
                    reference::influence(heads, [&qs, &ks, &vs], &d_outs, span, head, scale.into());
                for (at, e) in all.iter().enumerate() {
                    let (i, j) = (at / tokens / 64, at % tokens / 64);
                    blocks[(head / (query / kv) * side + i) * side + j] += e.abs();
                }
            }
            for (at, (got, expected)) in
                found.blocks.to_f32().unwrap().iter().zip(&blocks).enumerate()
            {
                let error = (f64::from(*got) - expected).abs();
                assert!(error <= 1e-3 * (1.0 + expected), "block {at}: {got}, not {expected}");
            }
            let expected = backward(heads, [&qs, &ks, &vs], &d_outs, span, scale.into());
            for (got, expected) in found.by_inputs.unwrap().iter().zip(&expected) {
                let size = expected.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                // A window of one key has no gradient by queries and keys.
                let error = distance(&got.to_f32().unwrap(), expected) / size.max(1e-3);
                assert!(error <= tolerance, "gradient differs by {error} of its largest");
            }
            let plain = ops.operations.attention_backward(tensors, scale, full, 128, false, false);
            assert!(plain.unwrap().by_inputs.is_none());
        }
        let zeros = |shape: &[usize]| Tensor::zeros(ops.device, shape, ops.dtype()).unwrap();
        let q = zeros(&[8, 4, 64]);
        for (kv_heads, block, argument) in [(3, 64, "k"), (2, 7, "block")] {
            let k = zeros(&[8, kv_heads, 64]);
            let tensors = [&q, &k, &k, &q];
            let refused = ops.operations.attention_backward(tensors, 1.0, full, block, true, true);
            let Err(Error::Argument(ArgumentError { argument: named, .. })) = refused else {
                panic!("{argument} was not refused");
            };
            assert_eq!(named, argument);
        }
    }
    Ok(())
}
