use moa_backend_cuda::Dtype;
use moa_core::{CacheType, Span};
use serde_json::Value;

use super::Result;

const SINK: usize = 64;

/// What the command line asks for.
pub(crate) struct Options {
    pub(crate) plan: Option<String>,
    pub(crate) layer: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: Dtype,
    /// Of caches, if not that of tensors.
    pub(crate) cache_type: Option<CacheType>,
    pub(crate) prefill: Vec<usize>,
    /// (batch, tokens held)
    pub(crate) decode: Vec<(usize, usize)>,
    pub(crate) history: usize,
    pub(crate) chunks: Vec<usize>,
    pub(crate) influence: Vec<usize>,
    pub(crate) json: Option<String>,
    /// Milliseconds to repeat a measurement for.
    pub(crate) repeat_ms: f32,
}

impl Options {
    pub(crate) fn parse() -> Result<Self> {
        let mut options = Self {
            plan: None,
            layer: 5,
            heads: 32,
            kv_heads: 32,
            head_dim: 128,
            dtype: Dtype::Bf16,
            cache_type: None,
            prefill: vec![4096, 8192, 16384, 32768],
            decode: vec![(1, 16384), (8, 16384), (32, 8192), (1, 65536)],
            history: 32768,
            chunks: vec![512, 2048],
            influence: vec![8192, 65536],
            json: None,
            repeat_ms: 200.0,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            if name == "--bench" {
                continue;
            }
            if name == "--test" {
                (options.prefill, options.decode) = (vec![512], vec![(2, 700)]);
                (options.history, options.chunks, options.repeat_ms) = (1024, vec![256], 0.0);
                options.influence = vec![300];
                continue;
            }
            let value = arguments.next().ok_or(format!("{name} needs a value"))?;
            let numbers =
                || value.split(',').map(str::parse).collect::<std::result::Result<_, _>>();
            match name.as_str() {
                "--plan" => options.plan = Some(value),
                "--json" => options.json = Some(value),
                "--layer" => options.layer = value.parse()?,
                "--heads" => options.heads = value.parse()?,
                "--kv-heads" => options.kv_heads = value.parse()?,
                "--head-dim" => options.head_dim = value.parse()?,
                "--history" => options.history = value.parse()?,
                "--prefill" => options.prefill = numbers()?,
                "--chunks" => options.chunks = numbers()?,
                "--influence" => options.influence = numbers()?,
                "--dtype" => {
                    options.dtype = if value == "float16" { Dtype::F16 } else { Dtype::Bf16 }
                }
                "--cache-dtype" => options.cache_type = Some(value.parse()?),
                "--decode" => {
                    let parse = |item: &str| -> Result<(usize, usize)> {
                        let (batch, tokens) = item.split_once('x').ok_or("--decode is BxN,...")?;
                        Ok((batch.parse()?, tokens.parse()?))
                    };
                    options.decode = value.split(',').map(parse).collect::<Result<_>>()?;
                }
                _ => return Err(format!("unknown option {name}").into()),
            }
        }
        Ok(options)
    }

    /// Spans of the plan's KV heads at a length: the largest of each query group. Without a plan, an
    /// eighth, a quarter, a half and all of the tokens in turn.
    pub(crate) fn spans(&self, tokens: usize) -> Result<Vec<Span>> {
        let group = self.heads / self.kv_heads;
        let total = |alpha: f64, beta: f64| {
            let n = tokens as f64;
            ((alpha + beta * n).min(n).max(128.0) / 64.0).ceil() as usize * 64
        };
        let totals: Vec<usize> = match &self.plan {
            Some(path) => {
                let plan: Value = serde_json::from_slice(&std::fs::read(path)?)?;
                let line = |name: &str, head: usize| plan[name][self.layer][head].as_f64();
                (0..self.heads)
                    .map(|head| Some(total(line("alphas", head)?, line("betas", head)?)))
                    .collect::<Option<_>>()
                    .ok_or("the plan has fewer layers or heads")?
            }
            None => (0..self.heads)
                .map(|head| total(0.0, [0.125, 0.25, 0.5, 1.0][head / group % 4]))
                .collect(),
        };
        let widest = |group: &[usize]| group.iter().copied().max().unwrap_or(128);
        Ok(totals
            .chunks(group)
            .map(|group| Span::new(SINK, widest(group) - SINK))
            .collect::<std::result::Result<_, _>>()?)
    }
}
