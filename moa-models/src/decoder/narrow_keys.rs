//! Keys of 4 bits are stored less their mean, and their codes make up for one another.
//!
//! A query's scores change by one number, `q . m`, if a vector `m` is subtracted from every key of its KV head, and
//! softmax does not see it: attention's output stays what it was. But the step of a rounded row is a share of its
//! largest element, and keys of a head have much in common: less their mean they are shorter, and so is the error. How
//! much of that scores feel depends on the queries, whose second moments say which errors cancel
//! ([`moa_core::key_feedback`]).
//!
//! Both are those of [`TOKENS`] tokens of running text, [`Decoder::set_sample`], of which the first is left out, as it is
//! unlike the others; of tokens that are drawn at random where a model has none. They are found when a sequence first needs
//! them, by one step of the model. Its queries and keys are turned as if they stood at [places](spread) all over the model's
//! context: those of the first thousand positions tell little of what later ones have in common. Log-sum-exps of rows
//! would be off by `q . m`, so that who asks for them gets keys as they are.

use std::ops::Range;

use moa_core::{
    Append, CacheState, CacheType, ExtendInputs, LayerLayout, Plan, RowType,
    SparseAttentionBackend, SplitMix64, key_feedback,
};
use rayon::prelude::*;

use crate::Result;
use crate::checkpoint::fingerprint::fingerprint;
use crate::decoder::block::Cache;
use crate::decoder::model::Decoder;
use crate::device::{Device, Math};

/// Tokens that are looked at.
pub(crate) const TOKENS: usize = 1024;

/// Tokens that stay together where they are [spread].
const STRETCH: usize = 16;

/// What becomes of rotated keys before they go into caches, and as they do.
pub(crate) struct NarrowKeys<D: Device> {
    pub(crate) layers: Vec<LayerKeys<D>>,
    fingerprint: String,
}

/// The same of one layer.
pub(crate) struct LayerKeys<D: Device> {
    /// `[2, kv_heads, head_dim]`: zeros, and the mean keys' negatives.
    pub(crate) shifts: D::Tensor,
    /// [`ExtendInputs::key_feedback`].
    pub(crate) feedback: D::Tensor,
}

impl<D: Math> Decoder<D> {
    /// Tokens of running text, by which keys of 4 bits are prepared.
    pub(crate) fn set_sample(&mut self, tokens: Vec<u32>) {
        self.sample = tokens;
    }

    /// Whether keys of a layer with this layout are prepared. Ranks of a model would have to look at the text together,
    /// and do not.
    fn has_narrow_keys(&self, layout: &LayerLayout) -> bool {
        let Some(default) = self.device.default_cache_type() else { return false };
        let mut types = layout.heads().iter().map(|head| head.cache_type().unwrap_or(default));
        self.shard.is_none() && types.any(|own| own.keys() == RowType::Int4)
    }

    /// Looks at the text, if one of these layouts needs it.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory) or [`Backend`](crate::Error::Backend) if the device fails.
    pub(crate) fn prepare_narrow_keys(&self, layouts: &[LayerLayout]) -> Result<()> {
        match layouts.iter().any(|layout| self.has_narrow_keys(layout)) {
            true => self.all_narrow_keys().map(|_| ()),
            false => Ok(()),
        }
    }

    /// Fingerprint of means and feedback, if one of these caches needs them.
    pub(crate) fn narrow_keys_of<'a>(
        &self,
        mut caches: impl Iterator<Item = &'a CacheState>,
    ) -> Result<Option<String>> {
        match caches.any(|cache| self.has_narrow_keys(cache.layout())) {
            true => Ok(Some(self.all_narrow_keys()?.fingerprint.clone())),
            false => Ok(None),
        }
    }

    /// What becomes of the rotated keys of a layer in which these caches take part, and for each cache its row of the
    /// shifts; `None` if none has keys of 4 bits.
    pub(crate) fn narrow_keys<'a>(
        &self,
        index: usize,
        caches: impl Iterator<Item = &'a Cache<D>>,
    ) -> Result<Option<(&LayerKeys<D>, Vec<usize>)>>
    where
        D: 'a,
    {
        let of = |cache: &Cache<D>| usize::from(self.has_narrow_keys(cache.as_ref().layout()));
        let places: Vec<usize> = caches.map(of).collect();
        match places.contains(&1) {
            true => Ok(Some((&self.all_narrow_keys()?.layers[index], places))),
            false => Ok(None),
        }
    }

    fn all_narrow_keys(&self) -> Result<&NarrowKeys<D>> {
        if let Some(keys) = self.narrow_keys.get() {
            return Ok(keys);
        }
        // Of two that find them at once one is kept; they are equal.
        let found = self.find_narrow_keys()?;
        Ok(self.narrow_keys.get_or_init(|| found))
    }

    /// One step of the model over the text, whose caches hold keys as they are.
    fn find_narrow_keys(&self) -> Result<NarrowKeys<D>> {
        let c = &self.config;
        let random = random_tokens(TOKENS, c.vocab_size);
        let ids = if self.sample.is_empty() { &random } else { &self.sample };
        let ids = &ids[..ids.len().min(c.context_length())];
        let (tokens, device) = (ids.len(), &self.device);
        let plan = Plan::full(self.shape())?;
        let has = |own: &CacheType| device.attention().has_cache_type(*own);
        let wide = CacheType::ALL.into_iter().find(has);
        let (heads, dim) = (self.local.kv_heads, c.head_dim);
        let table = self.rope(tokens)?;
        let rotations = self.rotations(&[(&table, 0..tokens)])?;
        let far = self.rope(c.context_length())?;
        let places: Vec<_> =
            spread(tokens, c.context_length()).map(|place| (&far, place)).collect();
        let places = self.rotations(&places)?;
        // The first token is left out, if it is not the only one.
        let left_out = usize::from(tokens > 1);
        let mut all = Vec::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        self.blocks(self.embed(ids)?, |index, [q, k, v]| {
            let layer = &self.layers[index];
            let [queries, keys] = self.rotated(layer, q.clone(), k.clone(), &places)?;
            let (queries, keys) = (device.values(queries)?, device.values(keys)?);
            let [q, k] = self.rotated(layer, q, k, &rotations)?;
            let width = queries.len() / tokens;
            let shifts = shifts_of(&keys[left_out * heads * dim..], heads * dim);
            let feedback: Vec<f32> = (0..heads)
                .into_par_iter()
                .flat_map_iter(|head| {
                    let own = width / heads;
                    let rows = queries.chunks_exact(width).skip(left_out);
                    let rows = rows.flat_map(|row| row[head * own..][..own].chunks_exact(dim));
                    key_feedback(&moments(rows, dim), dim)
                })
                .collect();
            all.extend(shifts.iter().chain(&feedback).flat_map(|x| x.to_le_bytes()));
            layers.push(LayerKeys {
                shifts: device.tensor(shifts, &[2, heads, dim])?,
                feedback: device.tensor(feedback, &[heads, dim, dim])?,
            });
            let layout = plan.layout(index, tokens, 0)?.with_cache_types(&vec![wide; heads])?;
            let mut cache = self.open_cache(&layout)?;
            let mut batch = [Append { cache: &mut cache, tokens }];
            let inputs = ExtendInputs::new(&q, &k, &v, self.scale());
            Ok(device.attention().extend(&mut batch, &inputs).map_err(Into::into)?.out)
        })?;
        Ok(NarrowKeys { layers, fingerprint: fingerprint(&all) })
    }
}

/// Places of so many tokens in a context, in stretches: by the cube of their number, so that short sequences count as
/// well as long ones.
fn spread(tokens: usize, context: usize) -> impl Iterator<Item = Range<usize>> {
    let stretches = tokens.div_ceil(STRETCH);
    (0..stretches).map(move |stretch| {
        let len = STRETCH.min(tokens - stretch * STRETCH);
        let share = stretch as f64 / stretches as f64;
        let start = ((share * share * share * context as f64) as usize).min(context - len);
        start..start + len
    })
}

/// Zeros, and the negatives of the rows' mean.
fn shifts_of(keys: &[f32], width: usize) -> Vec<f32> {
    let mut mean = vec![0.0; width];
    for row in keys.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let count = (keys.len() / width) as f64;
    let mut shifts = vec![0.0; 2 * width];
    for (to, sum) in shifts[width..].iter_mut().zip(&mean) {
        let shift = (-sum / count) as f32;
        // What overflows for these tokens need not do so for others.
        *to = if shift.is_finite() { shift } else { 0.0 };
    }
    shifts
}

/// Sums of products of each two elements of the rows.
fn moments<'a>(rows: impl Iterator<Item = &'a [f32]>, dim: usize) -> Vec<f64> {
    let mut sums = vec![0.0; dim * dim];
    for row in rows {
        for (i, (sums, x)) in sums.chunks_exact_mut(dim).zip(row).enumerate() {
            let x = f64::from(*x);
            sums[..=i].iter_mut().zip(row).for_each(|(sum, y)| *sum += x * f64::from(*y));
        }
    }
    for i in 0..dim {
        (0..i).for_each(|j| sums[j * dim + i] = sums[i * dim + j]);
    }
    sums
}

/// Tokens of the whole vocabulary, the same ones always.
fn random_tokens(count: usize, vocab_size: usize) -> Vec<u32> {
    let mut random = SplitMix64::new(0);
    (0..count).map(|_| random.below(vocab_size) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_spread_over_all_of_the_context() {
        for (tokens, context) in [(1, 1), (16, 16), (100, 128), (1024, 1024), (1024, 131_072)] {
            let places: Vec<Range<usize>> = spread(tokens, context).collect();
            assert_eq!(places.iter().map(Range::len).sum::<usize>(), tokens);
            assert!(places.is_sorted_by_key(|place| place.start));
            assert_eq!(places[0].start, 0);
            assert!(places.iter().all(|place| place.end <= context));
            let last = &places[places.len() - 1];
            assert!(tokens < 1024 || last.end > context / 10 * 9);
        }
    }

    #[test]
    fn moments_are_sums_of_products() {
        let rows = [[1.0, 2.0], [3.0, -1.0]];
        let found = moments(rows.iter().map(|row| &row[..]), 2);
        assert_eq!(found, [10.0, -1.0, -1.0, 5.0]);
    }
}
