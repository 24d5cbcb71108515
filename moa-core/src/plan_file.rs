//! Plan files: our own versioned JSON, and the `{"alphas", "betas"}` of the original code.

use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::file::{text, write_atomic};
use crate::{CacheType, ElasticRule, Error, HeadRule, ModelShape, Plan, Provenance, Result};

const FORMAT: &str = "moa-plan";
const VERSION: u32 = 1;

/// A [`Plan`] in its file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlanFile {
    format: String,
    version: u32,
    model: Model,
    sink: usize,
    min_span: usize,
    #[serde(deserialize_with = "rules")]
    rules: Vec<Vec<HeadRule>>,
    /// The type of each head's keys and values, or null; absent where the plan says none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cache_types: Option<Vec<Vec<Option<CacheType>>>>,
    #[serde(default)]
    provenance: Provenance,
}

/// A table of rules, of which the first that is none is named.
fn rules<'de, D: Deserializer<'de>>(file: D) -> Result<Vec<Vec<HeadRule>>, D::Error> {
    let rule = |layer: usize, head: usize, value: &Value| {
        let fault = |e| D::Error::custom(format_args!("rules[{layer}][{head}]: {e}"));
        HeadRule::deserialize(value).map_err(fault)
    };
    let row = |(layer, row): (usize, &Vec<Value>)| {
        row.iter().enumerate().map(|(head, value)| rule(layer, head, value)).collect()
    };
    Vec::<Vec<Value>>::deserialize(file)?.iter().enumerate().map(row).collect()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    layers: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fingerprint: Option<String>,
}

/// The original code's plan: one alpha and beta per layer and *query* head.
#[derive(Serialize, Deserialize)]
struct Published {
    alphas: Vec<Vec<f64>>,
    betas: Vec<Vec<f64>>,
}

impl From<Plan> for PlanFile {
    fn from(plan: Plan) -> Self {
        let shape = plan.shape();
        Self {
            format: FORMAT.into(),
            version: VERSION,
            model: Model {
                layers: shape.layers,
                query_heads: shape.query_heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                fingerprint: plan.fingerprint().map(str::to_string),
            },
            sink: plan.sink(),
            min_span: plan.min_span(),
            rules: plan.rules().chunks(shape.kv_heads).map(<[_]>::to_vec).collect(),
            cache_types: match plan.cache_types() {
                [] => None,
                types => Some(types.chunks(shape.kv_heads).map(<[_]>::to_vec).collect()),
            },
            provenance: plan.provenance,
        }
    }
}

impl TryFrom<PlanFile> for Plan {
    type Error = Error;

    fn try_from(file: PlanFile) -> Result<Self> {
        check_format(Some(&file.format), Some(file.version))?;
        let shape = ModelShape {
            layers: file.model.layers,
            query_heads: file.model.query_heads,
            kv_heads: file.model.kv_heads,
            head_dim: file.model.head_dim,
        };
        shape.validate()?;
        check_table("rules", &file.rules, shape.layers, shape.kv_heads)?;
        let rules = file.rules.into_iter().flatten().collect();
        let mut plan = Self::new(shape, file.sink, file.min_span, rules)?
            .with_fingerprint(file.model.fingerprint);
        if let Some(types) = file.cache_types {
            check_table("cache_types", &types, shape.layers, shape.kv_heads)?;
            plan = plan.with_cache_types(types.into_iter().flatten().collect())?;
        }
        plan.provenance = file.provenance;
        Ok(plan)
    }
}

fn check_format(format: Option<&str>, version: Option<u32>) -> Result<()> {
    if format != Some(FORMAT) {
        return Err(Error::invalid(
            "format",
            format!("{FORMAT:?} (published alphas/betas files go through `moa plan import`)"),
            format.map_or("no such field".into(), |f| format!("{f:?}")),
        ));
    }
    if version != Some(VERSION) {
        return Err(Error::invalid(
            "version",
            VERSION.to_string(),
            version.map_or("no such field".into(), |v| v.to_string()),
        ));
    }
    Ok(())
}

impl Plan {
    /// The plan as JSON text, one line per layer.
    pub fn to_json(&self) -> String {
        // Strings, numbers and lists only: this cannot fail.
        serde_json::to_string_pretty(&PlanFile::from(self.clone())).unwrap_or_default() + "\n"
    }

    /// Reads what [`Plan::to_json`] wrote.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying what is wrong with the text or with a value.
    pub fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: Option<String>,
            version: Option<u32>,
        }
        let json = |e: serde_json::Error| Error::invalid("plan file", "a moa-plan JSON object", e);
        let head: Head = serde_json::from_str(text).map_err(json)?;
        check_format(head.format.as_deref(), head.version)?;
        let file: PlanFile = serde_json::from_str(text).map_err(json)?;
        Self::try_from(file)
    }

    /// [`Plan::to_json`], if [`Plan::from_json`] takes it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not: a measured or predicted loss of [`Plan::provenance`] is infinite or no
    /// number.
    pub fn to_file_json(&self) -> Result<String> {
        self.provenance.check_finite()?;
        let text = self.to_json();
        Self::from_json(&text)?;
        Ok(text)
    }

    /// Writes the plan file; see [`Plan::to_json`].
    ///
    /// # Errors
    /// [`Error::Io`], or as [`Plan::to_file_json`]; an older file of that name is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_atomic(path.as_ref(), self.to_file_json()?.as_bytes())
    }

    /// Reads a plan file.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`], with the path.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        in_file(path, Self::from_json(&text(path)?))
    }

    /// Reads the original code's `{"alphas": [layer][query head], "betas": ...}`.
    ///
    /// The original expands GQA models to one KV head per query head; here a KV head gets the
    /// union (the largest span at every length) of its query group, which hides nothing that the
    /// published plan shows. **The file does not say how many query heads share a KV head**, so that a wrong
    /// `shape.kv_heads` gives another plan and no error: take the shape from the model's
    /// `config.json` ([`ModelShape::from_config_json`]).
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text is not such an object or its table is not
    /// `layers x query_heads`.
    pub fn from_published_json(
        text: &str,
        shape: ModelShape,
        sink: usize,
        min_span: usize,
    ) -> Result<Self> {
        shape.validate()?;
        let file: Published = serde_json::from_str(text).map_err(|e| {
            Error::invalid(
                "published plan",
                "{\"alphas\": [layer][head], \"betas\": [layer][head]}",
                e,
            )
        })?;
        check_table("alphas", &file.alphas, shape.layers, shape.query_heads)?;
        check_table("betas", &file.betas, shape.layers, shape.query_heads)?;
        let mut rules = Vec::with_capacity(shape.total_kv_heads());
        for (alphas, betas) in file.alphas.iter().zip(&file.betas) {
            let group = shape.group();
            for (a, b) in alphas.chunks(group).zip(betas.chunks(group)) {
                rules.push(HeadRule::union(
                    a.iter().zip(b).map(|(&alpha, &beta)| ElasticRule { alpha, beta }),
                )?);
            }
        }
        Self::new(shape, sink, min_span, rules)
    }

    /// Writes the original code's format, one rule per query head.
    ///
    /// The lines of a KV head's rule are dealt out over its query group, so that importing the
    /// text again gives the same rules.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a rule has more lines than its group has query heads.
    pub fn to_published_json(&self) -> Result<String> {
        let shape = self.shape();
        let group = shape.group();
        let mut file = Published { alphas: Vec::new(), betas: Vec::new() };
        for (layer, rules) in self.rules().chunks(shape.kv_heads).enumerate() {
            let (mut alphas, mut betas) = (Vec::new(), Vec::new());
            for (head, rule) in rules.iter().enumerate() {
                let lines = rule.lines();
                if lines.len() > group {
                    return Err(Error::invalid(
                        format!("rule of layer {layer}, KV head {head}"),
                        format!("at most {group} lines, one per query head of its group"),
                        lines.len(),
                    ));
                }
                for query in 0..group {
                    let line = lines[query.min(lines.len() - 1)];
                    alphas.push(line.alpha);
                    betas.push(line.beta);
                }
            }
            file.alphas.push(alphas);
            file.betas.push(betas);
        }
        Ok(serde_json::to_string(&file).unwrap_or_default() + "\n")
    }

    /// [`Plan::from_published_json`] from a file.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`], with the path.
    pub fn load_published(
        path: impl AsRef<Path>,
        shape: ModelShape,
        sink: usize,
        min_span: usize,
    ) -> Result<Self> {
        let path = path.as_ref();
        in_file(path, Self::from_published_json(&text(path)?, shape, sink, min_span))
    }
}

fn in_file<T>(path: &Path, result: Result<T>) -> Result<T> {
    result.map_err(|e| match e {
        Error::Invalid { .. } => Error::Format { path: path.to_path_buf(), reason: e.to_string() },
        other => other,
    })
}

fn check_table<T>(name: &str, rows: &[Vec<T>], layers: usize, heads: usize) -> Result<()> {
    if rows.len() != layers {
        return Err(Error::invalid(
            name,
            format!("{layers} layers"),
            format!("{} layers", rows.len()),
        ));
    }
    for (layer, row) in rows.iter().enumerate() {
        if row.len() != heads {
            return Err(Error::invalid(
                format!("{name}[{layer}]"),
                format!("{heads} heads"),
                format!("{} heads", row.len()),
            ));
        }
    }
    Ok(())
}
