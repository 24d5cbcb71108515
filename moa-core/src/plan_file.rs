//! Plan files: our own versioned JSON, and the `{"alphas", "betas"}` of the original code.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::{read, write_atomic};
use crate::{ElasticRule, Error, HeadRule, ModelShape, Plan, Provenance, Result};

const FORMAT: &str = "moa-plan";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    format: String,
    version: u32,
    model: Model,
    sink: usize,
    min_span: usize,
    rules: Vec<Vec<HeadRule>>,
    #[serde(default)]
    provenance: Provenance,
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

impl Plan {
    /// The plan as JSON text, one line per layer.
    pub fn to_json(&self) -> String {
        let shape = self.shape();
        let file = PlanFile {
            format: FORMAT.into(),
            version: VERSION,
            model: Model {
                layers: shape.layers,
                query_heads: shape.query_heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                fingerprint: self.fingerprint().map(str::to_string),
            },
            sink: self.sink(),
            min_span: self.min_span(),
            rules: self.rules().chunks(shape.kv_heads).map(<[_]>::to_vec).collect(),
            provenance: self.provenance.clone(),
        };
        // Strings, numbers and lists only: this cannot fail.
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
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
        if head.format.as_deref() != Some(FORMAT) {
            return Err(Error::invalid(
                "format",
                format!("{FORMAT:?} (published alphas/betas files go through `moa plan import`)"),
                head.format.map_or("no such field".into(), |f| format!("{f:?}")),
            ));
        }
        if head.version != Some(VERSION) {
            return Err(Error::invalid(
                "version",
                VERSION.to_string(),
                head.version.map_or("no such field".into(), |v| v.to_string()),
            ));
        }
        let file: PlanFile = serde_json::from_str(text).map_err(json)?;
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
        plan.provenance = file.provenance;
        Ok(plan)
    }

    /// Writes the plan file; see [`Plan::to_json`].
    ///
    /// # Errors
    /// [`Error::Io`]; an older file of that name is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_atomic(path.as_ref(), self.to_json().as_bytes())
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
    /// published plan shows.
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

fn text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?)
        .map_err(|e| Error::Format { path: path.to_path_buf(), reason: format!("not UTF-8: {e}") })
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
