use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Storage, Tensor};
use moa_backend_cpu::CpuBackend;
use moa_core::{Append, ExtendInputs, Extended, Scores, SparseAttentionBackend};

#[cfg(feature = "cuda")]
use crate::elsewhere;
use crate::{LayerCache, Store};

/// See [`crate::SparseAttention::extend`]; `q`, `k` and `v` are `[batch, heads, tokens, head_dim]`, and hold the tokens of
/// all sequences in this order.
pub(crate) fn extend(
    backend: &CpuBackend,
    batch: &mut [Append<'_, LayerCache>],
    [q, k, v]: [&Tensor; 3],
    scores: Scores<'_, Tensor>,
    lse: bool,
    key_feedback: Option<&Tensor>,
) -> Result<Extended<Tensor>> {
    let mut own = Vec::with_capacity(batch.len());
    for Append { cache, tokens } in batch {
        match &mut cache.0 {
            Store::Cpu(cache) => own.push(Append { cache, tokens: *tokens }),
            #[cfg(feature = "cuda")]
            Store::Cuda(_) => return Err(elsewhere()),
        }
    }
    let dtype = q.dtype();
    let (q, k, v) = (packed(q)?, packed(k)?, packed(v)?);
    let sinks = scores.sinks.map(whole).transpose()?;
    let feedback = key_feedback.map(whole).transpose()?;
    let Scores { scale, softcap, .. } = scores;
    let scores = Scores { scale, softcap, sinks: sinks.as_ref() };
    let key_feedback = feedback.as_ref();
    let inputs = ExtendInputs { lse, key_feedback, ..ExtendInputs::new(&q, &k, &v, scores) };
    let Extended { out, lse } = backend.extend(&mut own, &inputs).map_err(Error::wrap)?;
    let lifted = |x: moa_backend_cpu::Tensor| {
        let shape = x.shape().to_vec();
        Tensor::from_vec(x.into_data(), shape, &Device::Cpu)
    };
    let out = lifted(out)?;
    let out = if dtype == DType::F32 { out } else { out.to_dtype(dtype)? };
    Ok(Extended { out, lse: lse.map(lifted).transpose()? })
}

/// `[batch, heads, tokens, head_dim]` in the order of moa's kernels, `[batch * tokens, heads, head_dim]`: the
/// one copy.
fn packed(tensor: &Tensor) -> Result<moa_backend_cpu::Tensor> {
    let (batch, heads, tokens, dim) = tensor.dims4()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!(
            "q, k, v: expected tensors on the CPU, got {:?}",
            tensor.device().location()
        );
    };
    let mut out = Vec::with_capacity(batch * heads * tokens * dim);
    match storage {
        // Whole rows at once.
        CpuStorage::F32(data) if layout.stride()[3] == 1 => {
            rows(layout, |at| out.extend_from_slice(&data[at..at + dim]))
        }
        CpuStorage::F32(data) => elements(layout, |at| out.push(data[at])),
        CpuStorage::F16(data) => elements(layout, |at| out.push(data[at].to_f32())),
        CpuStorage::BF16(data) => elements(layout, |at| out.push(data[at].to_f32())),
        _ => candle_core::bail!("q, k, v: expected f32, f16 or bf16, got {:?}", tensor.dtype()),
    }
    moa_backend_cpu::Tensor::new(out, &[batch * tokens, heads, dim]).map_err(Error::wrap)
}

/// Learned sinks or feedback, in f32.
fn whole(tensor: &Tensor) -> Result<moa_backend_cpu::Tensor> {
    let data = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    moa_backend_cpu::Tensor::new(data, tensor.dims()).map_err(Error::wrap)
}

/// Calls `each` with the index of every row's first element, heads innermost.
fn rows(layout: &Layout, mut each: impl FnMut(usize)) {
    let (&[batch, heads, tokens, _], &[of_batch, of_head, of_token, _]) =
        (layout.dims(), layout.stride())
    else {
        return;
    };
    for sequence in 0..batch {
        for token in 0..tokens {
            let first = layout.start_offset() + sequence * of_batch + token * of_token;
            (0..heads).for_each(|head| each(first + head * of_head));
        }
    }
}

fn elements(layout: &Layout, mut each: impl FnMut(usize)) {
    let (dim, step) = (layout.dims()[3], layout.stride()[3]);
    rows(layout, |row| (0..dim).for_each(|i| each(row + i * step)));
}
