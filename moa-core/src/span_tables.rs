//! Spans of a plan at one context length as tables that other engines read.

use safetensors::tensor::{Dtype as Kind, TensorView};
use serde_json::json;

use crate::{Error, Plan, Result, Span};

impl Plan {
    /// The plan at one context length as JSON of plain tables `[layer][kv_head]`, for engines that know
    /// heads with a sink and a window (vLLM's and kvpress's kinds): `sink` and `window` in keys, `full`,
    /// and `compression_ratio`, the share of the context that the head drops.
    ///
    /// A query sees a key where `key <= query && (key < sink || query - key < window)`; the sink and the
    /// window of a full head make up the context.
    pub fn to_span_json(&self, context_length: usize) -> String {
        let shape = self.shape();
        let rows = |of: &dyn Fn(&Span) -> serde_json::Value| -> Vec<Vec<serde_json::Value>> {
            let spans = self.spans(context_length);
            spans.chunks(shape.kv_heads).map(|layer| layer.iter().map(of).collect()).collect()
        };
        let is_full = |span: &Span| span.total() >= context_length;
        let ratio = |span: &Span| 1.0 - span.total() as f64 / context_length as f64;
        let table = json!({
            "format": "moa-head-spans",
            "version": 1,
            "context_length": context_length,
            "num_layers": shape.layers,
            "num_attention_heads": shape.query_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "fingerprint": self.fingerprint(),
            "density": self.density(context_length),
            "mask": "key <= query && (key < sink || query - key < window)",
            "sink": rows(&|span| json!(span.sink())),
            "window": rows(&|span| json!(span.window())),
            "full": rows(&|span| json!(is_full(span))),
            "compression_ratio": rows(&|span| json!(ratio(span))),
        });
        format!("{table:#}\n")
    }

    /// The same tables as a safetensors file, which `safetensors.torch.load_file` reads as PyTorch tensors:
    /// `sink` and `window` (i64) and `full` (bool), each `[layers, kv_heads]`; the context length is in the
    /// metadata.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tables cannot be written.
    pub fn to_span_safetensors(&self, context_length: usize) -> Result<Vec<u8>> {
        let shape = vec![self.shape().layers, self.shape().kv_heads];
        let (mut sinks, mut windows, mut full) = (Vec::new(), Vec::new(), Vec::new());
        for span in self.spans(context_length) {
            sinks.extend((span.sink() as i64).to_le_bytes());
            windows.extend((span.window() as i64).to_le_bytes());
            full.push(u8::from(span.total() >= context_length));
        }
        let fault = |e: safetensors::SafeTensorError| Error::invalid("span tables", "tensors", e);
        let view = |kind, bytes| TensorView::new(kind, shape.clone(), bytes).map_err(fault);
        let tensors = [
            ("sink", view(Kind::I64, &sinks)?),
            ("window", view(Kind::I64, &windows)?),
            ("full", view(Kind::BOOL, &full)?),
        ];
        let metadata = [
            ("format".to_string(), "moa-head-spans".to_string()),
            ("version".to_string(), "1".to_string()),
            ("context_length".to_string(), context_length.to_string()),
        ];
        safetensors::serialize(tensors, Some(metadata.into_iter().collect())).map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelShape;
    use safetensors::SafeTensors;

    #[test]
    fn tables_are_the_mask_of_every_head() {
        let shape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };
        let plan = Plan::retrieval_heads(shape, 4, 12, &[(0, 1), (1, 0)]).unwrap();
        let json: serde_json::Value = serde_json::from_str(&plan.to_span_json(64)).unwrap();
        assert_eq!(json["sink"], json!([[4, 4], [4, 4]]));
        assert_eq!(json["window"], json!([[12, 60], [60, 12]]));
        assert_eq!(json["full"], json!([[false, true], [true, false]]));
        assert_eq!(json["compression_ratio"], json!([[0.75, 0.0], [0.0, 0.75]]));
        assert_eq!((&json["num_key_value_heads"], &json["density"]), (&json!(2), &json!(0.625)));

        let bytes = plan.to_span_safetensors(64).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let window = file.tensor("window").unwrap();
        assert_eq!((window.dtype(), window.shape()), (Kind::I64, &[2, 2][..]));
        let values: Vec<i64> =
            window.data().chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values, [12, 60, 60, 12]);
        assert_eq!(file.tensor("full").unwrap().data(), [0, 1, 1, 0]);
    }
}
