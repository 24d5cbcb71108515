use std::ops::Range;

use crate::decoder::config::QueryScaling;

/// Rotary position embedding of one sequence: the angle of every dimension pair at a position.
///
/// The layout is Hugging Face's half split (`rotate_half`): pair `i` is made of the dimensions
/// `i` and `i + head_dim / 2` of a head, and is turned by `position * inv_freq[i]`:
/// ```text
/// y[i]                = x[i] * cos - x[i + head_dim / 2] * sin
/// y[i + head_dim / 2] = x[i + head_dim / 2] * cos + x[i] * sin
/// ```
/// A pair of frequency 0 is left as it is: of a model that rotates only a part of each head.
///
/// Angles are computed in f64 from absolute positions and rounded once, so a table costs
/// `head_dim / 2` numbers however long the context is.
///
/// A table belongs to the context length a sequence is opened for. Only dynamic NTK and LongRoPE depend on
/// it. transformers changes their frequencies while the sequence grows, which makes keys cached early
/// disagree with keys cached late; here they are fixed when the sequence is opened, so the
/// output does not depend on how the sequence was cut into chunks.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    pub(crate) inv_freq: Vec<f64>,
    pub(crate) attention_scale: f64,
    pub(crate) context_length: usize,
    pub(crate) query_scaling: Option<QueryScaling>,
}

impl RopeTable {
    /// Cosine and sine of every pair at `position`, `head_dim / 2` of them, times
    /// [`attention_scale`](Self::attention_scale): those of a key.
    pub fn cos_sin(&self, position: usize) -> impl ExactSizeIterator<Item = (f32, f32)> + '_ {
        let position = position as f64;
        let scale = self.attention_scale;
        self.inv_freq.iter().map(move |frequency| {
            let (sin, cos) = (position * frequency).sin_cos();
            let scale = if *frequency == 0.0 { 1.0 } else { scale };
            ((cos * scale) as f32, (sin * scale) as f32)
        })
    }

    /// Radians per position of every pair, `[head_dim / 2]`; 0 for a pair that is left as it is.
    #[must_use]
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Factor on cosine and sine of pairs that turn: the temperature of YaRN and LongRoPE, 1 otherwise.
    /// Queries and keys both carry it, so attention scores carry its square. Queries of models that scale them by their
    /// position ([`QueryScaling`]) carry that factor too.
    #[must_use]
    pub fn attention_scale(&self) -> f64 {
        self.attention_scale
    }

    /// Whether a query before position `end` is scaled by its position.
    pub(crate) fn scales_queries(&self, end: usize) -> bool {
        self.query_scaling.is_some_and(|scaling| end > scaling.original)
    }

    /// Tables for queries at `positions`, each with the positions that it is for: one factor after the other.
    pub(crate) fn of_queries(&self, positions: Range<usize>) -> Vec<(Self, Range<usize>)> {
        let Some(QueryScaling { beta, original }) = self.query_scaling else {
            return vec![(self.clone(), positions)];
        };
        let mut parts = Vec::new();
        let mut begin = positions.start;
        while begin < positions.end {
            let turn = begin / original;
            let end = positions.end.min((turn + 1) * original);
            let factor = 1.0 + beta * (turn as f64).ln_1p();
            let attention_scale = self.attention_scale * factor;
            parts.push((Self { attention_scale, ..self.clone() }, begin..end));
            begin = end;
        }
        parts
    }

    /// Whether angles are those of `other`, whatever their lengths.
    pub(crate) fn turns_like(&self, other: &Self) -> bool {
        self.inv_freq == other.inv_freq && self.attention_scale == other.attention_scale
    }

    /// Tokens the table was made for.
    #[must_use]
    pub fn context_length(&self) -> usize {
        self.context_length
    }
}
