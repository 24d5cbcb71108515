use moa_backend_wgpu::Dtype;
use moa_core::{DEFAULT_SINK, ElasticRule, ModelShape, Plan};

use super::Result;

/// What the command line asks for.
pub(crate) struct Options {
    /// Prompt lengths of prefill.
    pub(crate) contexts: Vec<usize>,
    /// (sequences, tokens that each holds) of decode.
    pub(crate) decode: Vec<(usize, usize)>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtypes: Vec<Dtype>,
    /// Share of the context that every head keeps.
    pub(crate) uniform: f64,
    /// In its place, a layer of a plan: of ours, or as published with the original code.
    pub(crate) plan: Option<String>,
    pub(crate) layer: usize,
    /// Seconds for each measurement.
    pub(crate) seconds: f64,
    /// Bytes that the copy reads.
    pub(crate) copy_bytes: usize,
    /// Bytes of caches that decode takes turns on, so that none is left in the device's cache.
    pub(crate) turn_bytes: usize,
    /// Leave burn out.
    pub(crate) alone: bool,
    pub(crate) json: Option<String>,
}

const HELP: &str = "\
Options: --contexts 4096,8192 --decode 1x16384,8x16384 --heads 32 --kv-heads 8 --head-dim 128
--dtypes f32,f16,bf16 --uniform 0.5 | --plan FILE --layer 5; --seconds 1 --copy-mib 512 --turn-mib 256
--alone (no burn) --json FILE; --test for tiny sizes";

impl Options {
    pub(crate) fn parse() -> Result<Self> {
        let mut options = Self {
            contexts: vec![4096, 8192, 16384],
            decode: vec![(1, 16384), (8, 16384), (32, 8192)],
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            dtypes: vec![Dtype::F32, Dtype::F16],
            uniform: 0.5,
            plan: None,
            layer: 5,
            seconds: 1.0,
            copy_bytes: 512 << 20,
            turn_bytes: 256 << 20,
            alone: false,
            json: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            match name.as_str() {
                "--bench" => continue,
                "--alone" => options.alone = true,
                "--test" => {
                    options.contexts = vec![256];
                    options.decode = vec![(2, 300)];
                    (options.heads, options.kv_heads, options.head_dim) = (4, 2, 64);
                    (options.copy_bytes, options.turn_bytes) = (1 << 20, 1 << 20);
                    options.seconds = 0.0;
                }
                "--help" => {
                    println!("{HELP}");
                    std::process::exit(0);
                }
                _ => {
                    let value = arguments.next().ok_or(format!("{name} needs a value"))?;
                    options.set(&name, value)?;
                }
            }
        }
        if options.kv_heads == 0 || !options.heads.is_multiple_of(options.kv_heads) {
            return Err("--heads must be a multiple of --kv-heads".into());
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        match name {
            "--contexts" => {
                let items = value.split(',').filter(|item| !item.is_empty());
                self.contexts = items.map(str::parse).collect::<std::result::Result<_, _>>()?;
            }
            "--decode" => {
                let parse = |item: &str| -> Result<(usize, usize)> {
                    let (batch, tokens) = item.split_once('x').ok_or("--decode is BxN,..")?;
                    Ok((batch.parse()?, tokens.parse()?))
                };
                let items = value.split(',').filter(|item| !item.is_empty());
                self.decode = items.map(parse).collect::<Result<_>>()?;
            }
            "--dtypes" => {
                let parse = |name: &str| -> Result<Dtype> {
                    let all = [Dtype::F32, Dtype::F16, Dtype::Bf16];
                    let found = all.into_iter().find(|dtype| dtype.to_string() == name);
                    Ok(found.ok_or("--dtypes takes f32, f16 and bf16")?)
                };
                self.dtypes = value.split(',').map(parse).collect::<Result<_>>()?;
            }
            "--heads" => self.heads = value.parse()?,
            "--kv-heads" => self.kv_heads = value.parse()?,
            "--head-dim" => self.head_dim = value.parse()?,
            "--uniform" => self.uniform = value.parse()?,
            "--plan" => self.plan = Some(value),
            "--layer" => self.layer = value.parse()?,
            "--seconds" => self.seconds = value.parse()?,
            "--copy-mib" => self.copy_bytes = value.parse::<usize>()? << 20,
            "--turn-mib" => self.turn_bytes = value.parse::<usize>()? << 20,
            "--json" => self.json = Some(value),
            _ => return Err(format!("unknown option {name}\n{HELP}").into()),
        }
        Ok(())
    }

    /// The plan, and which of its layers is measured.
    pub(crate) fn plan(&self) -> Result<(Plan, usize)> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let shape = |layers| ModelShape { layers, query_heads: heads, kv_heads, head_dim };
        let Some(path) = &self.plan else {
            let rule = ElasticRule::new(0.0, self.uniform)?;
            return Ok((Plan::uniform(shape(1), DEFAULT_SINK, rule)?, 0));
        };
        let text = std::fs::read_to_string(path)?;
        let value: serde_json::Value = serde_json::from_str(&text)?;
        let plan = match value["alphas"].as_array() {
            Some(layers) => Plan::from_published_json(
                &text,
                shape(layers.len()),
                DEFAULT_SINK,
                2 * DEFAULT_SINK,
            )?,
            None => Plan::from_json(&text)?,
        };
        let found = plan.shape();
        if found != shape(found.layers) || self.layer >= found.layers {
            return Err(
                format!("{path} is for {found:?}, and layer {} is asked for", self.layer).into()
            );
        }
        Ok((plan, self.layer))
    }
}
