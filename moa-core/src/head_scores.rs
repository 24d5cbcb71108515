use std::path::Path;

use crate::file::text;
use crate::plan::check_length;
use crate::{Error, ModelShape, Plan, Result, Span};

/// How much each KV head needs the whole context, as another method found it: gates of DuoAttention, a
/// learned mask as of PruLong, scores of retrieval heads. Larger means more.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadScores {
    shape: ModelShape,
    /// Layer-major.
    scores: Vec<f64>,
}

/// Which heads of [`HeadScores`] see everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FullHeads {
    /// Those of at least this score.
    Threshold(f64),
    /// All but this share of them, the lowest ones: DuoAttention's sparsity.
    Sparsity(f64),
    /// As many of the highest as the mean density allows at a length, whose rest widens the windows of the
    /// others.
    Density {
        /// Largest mean over heads of keys kept / `length`.
        max: f64,
        /// Context length, in tokens.
        length: usize,
    },
}

impl HeadScores {
    /// Scores from text, in one of two forms. A table has a line for each layer and a number for each KV
    /// head or each query head, with tabs, commas or blanks between (DuoAttention's
    /// `full_attention_heads.tsv`, masks of 0 and 1). A list has a line `layer,head,score` for each head.
    /// Lines that begin with `#` and a line of names at the top are passed over.
    ///
    /// Of query heads, the highest score of a group is its KV head's.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the line that is wrong, or where the text has not one score for each head.
    pub fn from_text(text: &str, shape: ModelShape) -> Result<Self> {
        shape.validate()?;
        let mut rows: Vec<(usize, Vec<f64>)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let cells = line.split([',', '\t', ' ', ';']).filter(|cell| !cell.is_empty());
            let row: Result<Vec<f64>, &str> =
                cells.map(|cell| cell.parse().map_err(|_| cell)).collect();
            match row {
                Ok(row) if row.iter().all(|score| score.is_finite()) => rows.push((index + 1, row)),
                Ok(_) => return Err(fault(index + 1, "finite numbers", line)),
                Err(_) if rows.is_empty() && !line.starts_with(|c: char| c.is_ascii_digit()) => {}
                Err(cell) => return Err(fault(index + 1, "numbers", cell)),
            }
        }
        let ModelShape { layers, query_heads, kv_heads, .. } = shape;
        let is_list =
            !rows.is_empty() && rows.len() != layers && rows.iter().all(|(_, row)| row.len() == 3);
        let scores = match is_list {
            true => Self::listed(&rows, shape)?,
            false if rows.len() == layers => {
                let width = rows[0].1.len();
                let expected = format!("{kv_heads} KV heads or {query_heads} query heads");
                if width != kv_heads && width != query_heads {
                    return Err(fault(rows[0].0, expected, format!("{width} numbers")));
                }
                if let Some((line, row)) = rows.iter().find(|(_, row)| row.len() != width) {
                    let got = format!("{} numbers", row.len());
                    return Err(fault(*line, format!("{width} numbers as before"), got));
                }
                rows.into_iter().flat_map(|(_, row)| row).collect()
            }
            false => {
                let expected = format!("a line for each of {layers} layers, or layer,head,score");
                return Err(Error::invalid(
                    "head scores",
                    expected,
                    format!("{} lines", rows.len()),
                ));
            }
        };
        let group = scores.len() / shape.total_kv_heads();
        let highest = |of: &[f64]| of.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Ok(Self { shape, scores: scores.chunks(group).map(highest).collect() })
    }

    /// `layer,head,score` of all KV heads, or of all query heads.
    fn listed(rows: &[(usize, Vec<f64>)], shape: ModelShape) -> Result<Vec<f64>> {
        let heads = match rows.len() / shape.layers {
            queries if queries == shape.query_heads => queries,
            _ => shape.kv_heads,
        };
        let mut scores = vec![None; shape.layers * heads];
        for (line, row) in rows {
            let place = |value: f64, below: usize| {
                let index = value as usize;
                (index as f64 == value && index < below).then_some(index)
            };
            let (layer, head) = (place(row[0], shape.layers), place(row[1], heads));
            let (Some(layer), Some(head)) = (layer, head) else {
                let expected = format!("layer < {} and head < {heads}", shape.layers);
                return Err(fault(*line, expected, format!("{}, {}", row[0], row[1])));
            };
            if scores[layer * heads + head].replace(row[2]).is_some() {
                return Err(fault(*line, "each head once", format!("{layer}, {head} again")));
            }
        }
        let missing = scores.iter().position(Option::is_none);
        scores.into_iter().collect::<Option<Vec<f64>>>().ok_or_else(|| {
            let place = missing.unwrap_or(0);
            let got = format!("none for layer {}, head {}", place / heads, place % heads);
            Error::invalid("head scores", "a score for each head", got)
        })
    }

    /// [`from_text`](Self::from_text) of a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] with the path and the line.
    pub fn load(path: impl AsRef<Path>, shape: ModelShape) -> Result<Self> {
        let path = path.as_ref();
        let format = |reason: String| Error::Format { path: path.to_path_buf(), reason };
        Self::from_text(&text(path)?, shape).map_err(|e| match e {
            Error::Invalid { .. } => format(e.to_string()),
            other => other,
        })
    }

    /// The scores, layer-major.
    pub fn scores(&self) -> &[f64] {
        &self.scores
    }

    /// The plan in which some heads see everything and the others `sink + window` keys. Of heads of equal
    /// score the lower layers come first.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a share is not from 0 to 1, `window` is 0, or the density at the length is
    /// less than every head's `sink + window`.
    pub fn plan(&self, sink: usize, window: usize, full: FullHeads) -> Result<Plan> {
        let total = self.scores.len();
        check_length("sink", sink)?;
        check_length("window", window)?;
        let share = |what: &str, value: f64| match (0.0..=1.0).contains(&value) {
            true => Ok(value),
            false => Err(Error::invalid(what, "a share from 0 to 1", value)),
        };
        let (count, window) = match full {
            FullHeads::Threshold(least) => {
                (self.scores.iter().filter(|score| **score >= least).count(), window)
            }
            FullHeads::Sparsity(sparsity) => {
                let few = (share("sparsity", sparsity)? * total as f64).round() as usize;
                (total - few, window)
            }
            FullHeads::Density { max, length } => {
                check_length("length", length)?;
                // Keys of all heads together; 1e-6 absorbs the rounding of a product such as .1 * 10.
                let keys = (share("density", max)? * (total * length) as f64 + 1e-6) as usize;
                let narrow = (sink + window).min(length);
                if window == 0 || narrow * total > keys {
                    let least = narrow as f64 / length.max(1) as f64;
                    return Err(Error::invalid("density", format!("at least {least:.4}"), max));
                }
                let count = (keys - narrow * total) / (length - narrow).max(1);
                let count = count.min(total);
                let wider = (keys - count * length) / (total - count).max(1);
                (count, wider.min(length).saturating_sub(sink).max(window))
            }
        };
        let mut order: Vec<usize> = (0..total).collect();
        order.sort_by(|a, b| self.scores[*b].total_cmp(&self.scores[*a]));
        let heads = self.shape.kv_heads;
        let full: Vec<_> = order[..count].iter().map(|i| (i / heads, i % heads)).collect();
        Plan::retrieval_heads(self.shape, sink, window, &full)
    }
}

fn fault(line: usize, expected: impl Into<String>, got: impl std::fmt::Display) -> Error {
    Error::invalid(format!("head scores, line {line}"), expected, got)
}

impl Plan {
    /// Scores that [`HeadScores::from_text`] reads, and DuoAttention's loaders: for each head keys kept /
    /// `context_length`, 1 where it keeps everything; a line for each layer, tabs between heads.
    pub fn to_head_scores(&self, context_length: usize) -> String {
        let share = |span: &Span| span.total() as f64 / context_length.max(1) as f64;
        let mut text = String::new();
        for layer in self.spans(context_length).chunks(self.shape().kv_heads) {
            let row: Vec<_> = layer.iter().map(|span| share(span).to_string()).collect();
            text.push_str(&row.join("\t"));
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ElasticRule;

    const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };

    fn scores(text: &str) -> Result<Vec<f64>> {
        HeadScores::from_text(text, SHAPE).map(|s| s.scores)
    }

    #[test]
    fn tables_and_lists_of_kv_heads_and_query_heads_are_read() {
        let expected = vec![0.5, 0.125, 1.0, 0.0];
        for text in [
            "0.5\t0.125\n1\t0\n",
            "# of a run\nhead_0,head_1\n0.5, 0.125\n1.0,0e0\n",
            "0.25 0.5 0.125 -1\n1 1 0 0",
            "layer,head,score\n1,0,1\n0,1,0.125\n0,0,0.5\n1,1,0\n",
        ] {
            assert_eq!(scores(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, part) in [
            ("", "0 lines"),
            ("1\t0\n", "1 lines"),
            ("1\t0\t1\n0\t1\t0\n", "line 1"),
            ("1\t0\n0\n", "line 2"),
            ("1\t0\n0\tx\n", "line 2"),
            ("1\t0\n0\tNaN\n", "line 2"),
            ("0,0,1\n0,1,1\n1,0,1\n", "layer 1, head 1"),
            ("0,0,1\n0,1,1\n1,0,1\n1,0,1\n", "line 4"),
            ("0,0,1\n0,1,1\n1,0,1\n1,2,1\n", "line 4"),
            ("0,0,1\n0,1,1\n1,0,1\n1,0.5,1\n", "line 4"),
        ] {
            let error = scores(text).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{text}");
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn heads_are_chosen_by_threshold_sparsity_or_bytes() {
        let scores = HeadScores::from_text("0.5\t0.125\n1\t0\n", SHAPE).unwrap();
        let spans = |full| -> Vec<usize> {
            let plan = scores.plan(4, 12, full).unwrap();
            plan.spans(100).iter().map(|s| s.total()).collect()
        };
        assert_eq!(spans(FullHeads::Threshold(0.5)), [100, 16, 100, 16]);
        assert_eq!(spans(FullHeads::Sparsity(0.75)), [16, 16, 100, 16]);
        assert_eq!(spans(FullHeads::Sparsity(0.0)), [100; 4]);
        // 200 keys of 400: one whole head, and 33 for each other.
        assert_eq!(spans(FullHeads::Density { max: 0.5, length: 100 }), [33, 33, 100, 33]);
        assert_eq!(spans(FullHeads::Density { max: 1.0, length: 100 }), [100; 4]);
        assert_eq!(spans(FullHeads::Density { max: 0.16, length: 100 }), [16; 4]);
        for full in [
            FullHeads::Sparsity(1.5),
            FullHeads::Density { max: 0.1, length: 100 },
            FullHeads::Density { max: f64::NAN, length: 100 },
        ] {
            assert!(matches!(scores.plan(4, 12, full), Err(Error::Invalid { .. })), "{full:?}");
        }
    }

    #[test]
    fn a_plan_of_full_and_streaming_heads_comes_back() {
        let plan = Plan::retrieval_heads(SHAPE, 4, 12, &[(0, 1), (1, 0)]).unwrap();
        let text = plan.to_head_scores(100);
        assert_eq!(text, "0.16\t1\n1\t0.16\n");
        let scores = HeadScores::from_text(&text, SHAPE).unwrap();
        assert_eq!(scores.plan(4, 12, FullHeads::Threshold(0.5)).unwrap(), plan);
        let full = plan.rules().iter().filter(|r| r.lines() == [ElasticRule::FULL]).count();
        assert_eq!(full, 2);
    }
}
