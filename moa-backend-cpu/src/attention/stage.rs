//! New keys and values on their way into the cache.

use moa_core::{Append, AttentionShape, ExtendInputs};

use crate::cache::{Cache, Rows, with_store};
use crate::element::RowElement;
use crate::pool::{self, SharedMut};
use crate::workspace::Workspace;
use crate::{Result, Tensor};

/// Bytes that a head may keep for staging between calls, so that decoding does not allocate.
const KEPT_BYTES: usize = 1 << 10;

/// Rounds the new keys and values to what their heads hold. Attention reads them from there, so that a key is
/// the same number whether a query sees it in its own chunk or later.
pub(super) fn stage(
    batch: &mut [Append<'_, Cache>],
    shape: &AttentionShape,
    inputs: &ExtendInputs<'_, Tensor>,
) -> Result<()> {
    let (k, v) = (inputs.k.data(), inputs.v.data());
    let square = shape.head_dim * shape.head_dim;
    let mut row = 0;
    for Append { cache, tokens } in batch {
        let tokens = *tokens;
        let start = row * shape.kv_heads * shape.head_dim;
        let work = (tokens * shape.kv_heads * shape.head_dim) as u64;
        let heads = SharedMut::new(&mut cache.heads);
        pool::try_for_each(shape.kv_heads, work, |head| {
            // SAFETY: each task has a head of its own.
            let store = unsafe { &mut heads.slice(head, 1)[0] };
            let first = start + head * shape.head_dim;
            let feedback = inputs.key_feedback.map(|all| &all.data()[head * square..][..square]);
            with_store!(store, pair => {
                narrow(tokens, shape, &k[first..], feedback, &mut pair.keys)?;
                narrow(tokens, shape, &v[first..], None, &mut pair.values)?;
            });
            Ok(())
        })?;
        row += tokens;
    }
    Ok(())
}

fn narrow<E: RowElement>(
    tokens: usize,
    shape: &AttentionShape,
    from: &[f32],
    feedback: Option<&[f32]>,
    to: &mut Rows<E>,
) -> Result<()> {
    let &AttentionShape { kv_heads, head_dim, .. } = shape;
    let staged = to.stage(tokens, head_dim)?;
    let from = from.chunks(kv_heads * head_dim);
    let rows = staged.codes.chunks_exact_mut(E::units(head_dim)).zip(from).enumerate();
    Workspace::with(|workspace| {
        let [row] = workspace.parts([head_dim])?;
        for (i, (to, from)) in rows {
            row.copy_from_slice(&from[..head_dim]);
            let scale = E::narrow(feedback, row, to);
            if let Some(to) = staged.scales.get_mut(i) {
                *to = scale;
            }
        }
        Ok(())
    })
}

/// Appends what was staged to caches that have room for it.
pub(super) fn commit(batch: &mut [Append<'_, Cache>]) -> Result<()> {
    for Append { cache, tokens } in batch {
        let Cache { state, heads } = &mut **cache;
        let (len, dim) = (state.len(), state.head_dim());
        for (store, head) in heads.iter_mut().zip(state.layout().heads()) {
            with_store!(store, pair => {
                for run in head.append(len, *tokens) {
                    let first = run.slot.0 - head.offset().0;
                    let (token, slots) = (run.position.0 - len, first..first + run.len);
                    pair.keys.commit(token, slots.clone(), dim);
                    pair.values.commit(token, slots, dim);
                }
                pair.keys.release(KEPT_BYTES);
                pair.values.release(KEPT_BYTES);
            });
        }
        state.append(*tokens)?;
    }
    Ok(())
}
