//! The specification as a backend: `moa_core::reference` for arithmetic, `Vec`s for storage. It can be
//! broken in ways that backends were found to be.

use std::ops::Range;
use std::sync::Arc;

use moa_conformance::{Subject, backward, f64s};
use moa_core::reference::{self, Heads, Scores};
use moa_core::{
    Append, AttentionShape, CacheState, CacheType, Dtype, Error, ExtendInputs, Extended, Gradients,
    InfluenceInputs, InfluenceOutput, InfluenceSign, LayerLayout, Result, Span,
    SparseAttentionBackend, check_extend, check_influence,
};

/// What is wrong with a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Defect {
    #[default]
    None,
    /// A query sees one key more than its window.
    WindowBesideTheQuery,
    /// New keys are in the ring before the chunk's queries have looked.
    AppendsBeforeItAttends,
    /// A sequence that goes back stays as long as it was.
    StaysWhenTruncated,
    /// The memory is that of dense caches.
    DenseMemory,
    /// Every sequence is taken to be as long as the last.
    LengthOfTheLast,
    /// Sums are split by how many sequences there are.
    DependsOnTheBatch,
    /// Sequences are appended to one by one until one has no room.
    ChecksTooLate,
    /// Arguments are not looked at.
    ChecksNothing,
    /// The chunk's queries see its keys as they were before they were rounded.
    RoundsAfterItAttends,
    /// All heads have the type of the first.
    TypeOfTheFirst,
    /// Values are rounded in steps twice as wide.
    CoarseScale,
    /// Keys of 4 bits are rounded without feedback.
    NoFeedback,
    /// What is hidden is multiplied by 0.
    MultipliesByZero,
    /// Scores that are no numbers weigh nothing.
    PassesOverNone,
    /// Scores have no bound.
    NoSoftcap,
    /// Sinks take no part.
    NoSinks,
    /// Sinks are in the weights, but not in their log-sum-exp.
    LseWithoutSinks,
    /// Influence leaves out the division by `1 - A`.
    InfluenceOfWeights,
    /// Influence is of signed values where absolute ones are asked for.
    AlwaysSigned,
    /// Influence has the keys that a sliding window hides.
    InfluenceOfHiddenKeys,
    /// Gradients lack the factor of the scores.
    GradientsWithoutScale,
}

/// The backend, with or without a defect.
pub(crate) struct Reference(pub(crate) Defect);

pub(crate) struct Tensor {
    data: Vec<f32>,
    shape: Vec<usize>,
}

impl Tensor {
    fn new(data: impl IntoIterator<Item = f64>, shape: &[usize]) -> Self {
        Self { data: data.into_iter().map(|x| x as f32).collect(), shape: shape.into() }
    }
}

/// Keys and values, `[slots, head_dim]` each.
#[derive(Clone)]
pub(crate) struct Cache {
    state: CacheState,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// Cached rows by position, `[len, kv_heads, head_dim]`, and then the new ones. Rows that no
    /// query sees any more stay 0.
    fn rows(&self, cached: &[f32], new: &[f32]) -> Vec<f64> {
        let (len, dim) = (self.state.len(), self.state.head_dim());
        let heads = self.state.layout().heads();
        let mut rows = vec![0.0; len * heads.len() * dim];
        for (h, head) in heads.iter().enumerate() {
            for run in head.cached_keys(len, len..len + 1).into_iter().flat_map(|r| head.runs(r)) {
                for i in 0..run.len {
                    let from = &cached[(run.slot.0 + i) * dim..][..dim];
                    let to = &mut rows[((run.position.0 + i) * heads.len() + h) * dim..][..dim];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = f64::from(*from));
                }
            }
        }
        rows.extend(f64s(new));
        rows
    }

    fn write(&mut self, k: &[f32], v: &[f32], tokens: usize) {
        let (len, dim) = (self.state.len(), self.state.head_dim());
        let heads = self.state.layout().heads();
        for (h, head) in heads.iter().enumerate() {
            for run in head.append(len, tokens) {
                for i in 0..run.len {
                    let from = ((run.position.0 - len + i) * heads.len() + h) * dim;
                    let to = (run.slot.0 + i) * dim;
                    self.keys[to..to + dim].copy_from_slice(&k[from..from + dim]);
                    self.values[to..to + dim].copy_from_slice(&v[from..from + dim]);
                }
            }
        }
    }
}

impl SparseAttentionBackend for Reference {
    type Tensor = Tensor;
    type Cache = Cache;
    type Error = Error;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn slot_bytes(&self, head_dim: usize) -> u64 {
        Dtype::F32.slot_bytes(head_dim)
    }

    fn has_cache_type(&self, cache_type: CacheType) -> bool {
        TYPES.contains(&cache_type)
    }

    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
        if self.0 != Defect::ChecksNothing {
            layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
        }
        let empty = vec![0.0; layout.slots() * head_dim];
        let state = CacheState::new(Arc::new(layout.clone()), head_dim);
        Ok(Cache { state, keys: empty.clone(), values: empty })
    }

    fn extend(
        &self,
        batch: &mut [Append<'_, Cache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        let shape = match self.0 {
            Defect::ChecksTooLate | Defect::ChecksNothing => unchecked(inputs),
            _ => check_extend(batch, inputs, |tensor| &tensor.shape[..])?,
        };
        let heads = Heads { query: shape.query_heads, kv: shape.kv_heads, dim: shape.head_dim };
        let sequences = batch.len();
        let last_len = batch.last().map_or(0, |append| append.cache.state.len());
        let (mut out, mut lse, mut first) = (Vec::new(), Vec::new(), 0);
        for Append { cache, tokens } in batch {
            let tokens = *tokens;
            if self.0 == Defect::ChecksTooLate {
                cache.state.check_append(tokens)?;
            }
            let part = |heads_of: usize| -> Range<usize> {
                let row = heads_of * heads.dim;
                first * row..(first + tokens) * row
            };
            let (k, v) = (&inputs.k.data[part(heads.kv)], &inputs.v.data[part(heads.kv)]);
            let feedback = inputs.key_feedback.filter(|_| self.0 != Defect::NoFeedback);
            let feedback = feedback.map(|tensor| &tensor.data[..]);
            let held = [
                self.rounded(&cache.state, k, false, feedback),
                self.rounded(&cache.state, v, true, None),
            ];
            let (k, v) = match self.0 {
                Defect::RoundsAfterItAttends => (k, v),
                _ => (&held[0][..], &held[1][..]),
            };
            if self.0 == Defect::AppendsBeforeItAttends {
                cache.write(k, v, tokens);
            }
            // The reference starts at position 0: queries of old tokens do not matter.
            let len = cache.state.len();
            let mut q = vec![0.0; len * heads.query * heads.dim];
            q.extend(f64s(&inputs.q.data[part(heads.query)]));
            let (mut keys, mut values) = (cache.rows(&cache.keys, k), cache.rows(&cache.values, v));
            if self.0 == Defect::LengthOfTheLast {
                let hidden = len.saturating_sub(last_len) * heads.kv * heads.dim;
                keys[..hidden].fill(0.0);
                values[..hidden].fill(0.0);
            }
            let spans = cache.state.layout().heads().iter().map(|head| match self.0 {
                Defect::WindowBesideTheQuery => {
                    Span::new(head.span().sink(), head.span().window() + 1)
                }
                _ => Ok(head.span()),
            });
            let spans = spans.collect::<Result<Vec<Span>>>()?;
            if self.0 == Defect::PassesOverNone {
                keys.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = -1e3);
            }
            let sinks = inputs.scores.sinks.map(|sinks| f64s(&sinks.data));
            let scores = Scores {
                scale: inputs.scores.scale.into(),
                softcap: inputs
                    .scores
                    .softcap
                    .filter(|_| self.0 != Defect::NoSoftcap)
                    .map(f64::from),
                sinks: sinks.as_deref().filter(|_| self.0 != Defect::NoSinks),
            };
            let (all, sums) = reference::extend(heads, &q, &keys, &values, &spans, scores);
            out.extend(all[len * heads.query * heads.dim..].iter().map(|x| match self.0 {
                Defect::DependsOnTheBatch => x * (1.0 + 1e-6 * sequences as f64),
                _ => *x,
            }));
            if self.0 == Defect::MultipliesByZero && values.iter().any(|x| !x.is_finite()) {
                out.iter_mut().for_each(|x| *x = f64::NAN);
            }
            let sums = match self.0 {
                Defect::LseWithoutSinks => {
                    let scores = Scores { sinks: None, ..scores };
                    reference::extend(heads, &q, &keys, &values, &spans, scores).1
                }
                _ => sums,
            };
            lse.extend_from_slice(&sums[len * heads.query..]);
            cache.write(&held[0], &held[1], tokens);
            cache.state.append(tokens)?;
            first += tokens;
        }
        Ok(Extended {
            out: Tensor::new(out, &inputs.q.shape),
            lse: inputs.lse.then(|| Tensor::new(lse, &inputs.q.shape[..2])),
        })
    }

    fn fork(&self, cache: &Cache) -> Result<Cache> {
        Ok(cache.clone())
    }

    fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        match self.0 {
            Defect::StaysWhenTruncated => cache.state.clone().truncate(len),
            _ => cache.state.truncate(len),
        }
    }

    fn bytes(&self, cache: &Cache) -> u64 {
        let (layout, dim) = (cache.state.layout(), cache.state.head_dim());
        match self.0 {
            Defect::DenseMemory => {
                (layout.heads().len() * layout.capacity()) as u64 * self.slot_bytes(dim)
            }
            _ => layout.bytes(dim, self.slot_bytes(dim)),
        }
    }

    fn influence(
        &self,
        inputs: &InfluenceInputs<'_, Tensor>,
        scale: f32,
    ) -> Result<InfluenceOutput<Tensor>> {
        let shape = check_influence(inputs, |tensor| &tensor.shape[..])?;
        let AttentionShape { tokens, query_heads, kv_heads, head_dim } = shape;
        let heads = Heads { query: query_heads, kv: kv_heads, dim: head_dim };
        let [q, k, v, d_out] =
            [inputs.q, inputs.k, inputs.v, inputs.d_out].map(|tensor| f64s(&tensor.data));
        let span = match self.0 {
            Defect::InfluenceOfHiddenKeys => Span::full(tokens),
            _ => Span::full(tokens.min(inputs.window)),
        };
        let side = tokens.div_ceil(inputs.block);
        let mut blocks = vec![0.0; kv_heads * side * side];
        for head in 0..query_heads {
            let entries =
                reference::influence(heads, [&q, &k, &v], &d_out, span, head, scale.into());
            for (at, e) in entries.iter().enumerate() {
                let (i, j) = (at / tokens / inputs.block, at % tokens / inputs.block);
                let e = match (inputs.sign, self.0) {
                    (_, Defect::InfluenceOfWeights) => e / 2.0,
                    (InfluenceSign::Absolute, defect) if defect != Defect::AlwaysSigned => e.abs(),
                    _ => *e,
                };
                blocks[(head / shape.group() * side + i) * side + j] += e;
            }
        }
        let gradients = inputs.gradients.then(|| {
            let [d_q, d_k, d_v] = backward(heads, [&q, &k, &v], &d_out, span, scale.into());
            let factor = match self.0 {
                Defect::GradientsWithoutScale => 1.0 / f64::from(scale),
                Defect::MultipliesByZero if q.iter().any(|x| !x.is_finite()) => f64::NAN,
                _ => 1.0,
            };
            Gradients {
                d_q: Tensor::new(d_q.into_iter().map(|d| d * factor), &inputs.q.shape),
                d_k: Tensor::new(d_k.into_iter().map(|d| d * factor), &inputs.k.shape),
                d_v: Tensor::new(d_v, &inputs.v.shape),
            }
        });
        let is_none = k.iter().chain(&v).any(|x| !x.is_finite());
        if self.0 == Defect::MultipliesByZero && is_none {
            blocks.fill(f64::NAN);
        }
        Ok(InfluenceOutput { blocks, gradients })
    }
}

/// Types that a layout may ask for: all but one, so that there is one to refuse.
const TYPES: &[CacheType] =
    &[CacheType::F16, CacheType::Bf16, CacheType::Int8, CacheType::Fp8, CacheType::Int4];

impl Reference {
    /// Keys or values as their heads hold them; keys with their heads' feedback, where there is one.
    fn rounded(
        &self,
        state: &CacheState,
        x: &[f32],
        values: bool,
        feedback: Option<&[f32]>,
    ) -> Vec<f32> {
        let heads = state.layout().heads();
        let square = state.head_dim() * state.head_dim();
        let rows = x.chunks(state.head_dim()).enumerate();
        rows.flat_map(|(i, row)| {
            let head = if self.0 == Defect::TypeOfTheFirst { 0 } else { i % heads.len() };
            let Some(own) = heads[head].cache_type() else { return row.to_vec() };
            let rows = if values { own.values() } else { own.keys() };
            let exact = row.iter().map(|x| f64::from(*x));
            let feedback = feedback.map(|all| &all[i % heads.len() * square..][..square]);
            let stored = rows.round_with(feedback, row).into_iter().zip(exact);
            let stored = stored.map(|(stored, exact)| match self.0 {
                Defect::CoarseScale if values => exact + 3.0 * (stored - exact),
                _ => stored,
            });
            stored.map(|x| x as f32).collect()
        })
        .collect()
    }
}

/// What a backend makes of arguments that it does not check.
fn unchecked(inputs: &ExtendInputs<'_, Tensor>) -> AttentionShape {
    let at = |tensor: &Tensor, axis: usize| tensor.shape.get(axis).copied().unwrap_or(1);
    AttentionShape {
        tokens: at(inputs.q, 0),
        query_heads: at(inputs.q, 1),
        kv_heads: at(inputs.k, 1),
        head_dim: at(inputs.q, 2),
    }
}

impl Subject for Reference {
    type Backend = Self;
    type Tensor = Tensor;

    fn backend(&self) -> &Self {
        self
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor { data: data.into(), shape: shape.into() }
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.data.clone()
    }

    fn round(&self, x: f32) -> f32 {
        x
    }

    fn cache_types(&self) -> &'static [CacheType] {
        TYPES
    }

    fn tolerance(&self) -> f64 {
        1e-6
    }
}
