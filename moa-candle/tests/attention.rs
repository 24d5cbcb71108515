//! moa's attention on candle's tensors against candle's own, with the plan's mask added to the scores.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use moa_candle::SparseAttention;
use moa_core::{ModelShape, Plan, Scores};

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 6, kv_heads: 2, head_dim: 16 };
const TOKENS: usize = 90;

fn plan() -> Plan {
    Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1), (1, 0)]).unwrap()
}

/// Queries, keys and values, `[batch, heads, tokens, head_dim]`; every other one a view with strides.
fn inputs(batch: usize) -> Result<[Tensor; 3]> {
    let random = |heads| Tensor::randn(0f32, 1., (batch, TOKENS, heads, 16), &Device::Cpu);
    Ok([
        random(6)?.transpose(1, 2)?,
        random(2)?.transpose(1, 2)?.contiguous()?,
        random(2)?.transpose(1, 2)?.transpose(2, 3)?.contiguous()?.transpose(2, 3)?,
    ])
}

fn expected(qkv: &[Tensor; 3], layer: usize) -> Result<Tensor> {
    expected_of(qkv, layer, Scores::from(0.25))
}

fn expected_of(
    [q, k, v]: &[Tensor; 3],
    layer: usize,
    Scores { scale, softcap, sinks }: Scores<'_, Tensor>,
) -> Result<Tensor> {
    let (batch, heads, tokens, dim) = q.dims4()?;
    let group = SHAPE.group();
    let mask = plan().additive_mask(layer, TOKENS, 0..tokens).unwrap();
    let mask = Tensor::from_vec(mask, (1, SHAPE.kv_heads, 1, tokens, tokens), &Device::Cpu)?;
    let repeat = |x: &Tensor| {
        let shape = (batch, SHAPE.kv_heads, group, tokens, dim);
        x.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?.reshape((batch, heads, tokens, dim))
    };
    let scores = (q.contiguous()?.matmul(&repeat(k)?.t()?.contiguous()?)? * f64::from(scale))?;
    let scores = match softcap.map(f64::from) {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = scores.reshape((batch, SHAPE.kv_heads, group, tokens, tokens))?;
    // A column of the sinks, whose weights are dropped.
    let none = Tensor::full(f32::NEG_INFINITY, SHAPE.query_heads, &Device::Cpu)?;
    let sinks = sinks.unwrap_or(&none).reshape((1, SHAPE.kv_heads, group, 1, 1))?;
    let sinks = sinks.broadcast_as((batch, SHAPE.kv_heads, group, tokens, 1))?;
    let scores = Tensor::cat(&[&scores.broadcast_add(&mask)?, &sinks.contiguous()?], D::Minus1)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
    let weights = weights.narrow(D::Minus1, 0, tokens)?.contiguous()?;
    weights.reshape((batch, heads, tokens, tokens))?.matmul(&repeat(v)?)
}

fn worst(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

#[test]
fn chunks_and_batches_are_candles_masked_attention() -> Result<()> {
    let attention = SparseAttention::new(&Device::Cpu, DType::F32)?;
    for batch in [1, 2] {
        let inputs = inputs(batch)?;
        let mut sequences: Vec<_> =
            (0..batch).map(|_| attention.open(&plan(), TOKENS)).collect::<Result<_>>()?;
        for layer in 0..SHAPE.layers {
            let (mut outputs, mut at) = (Vec::new(), 0);
            for chunk in [50, 30].into_iter().chain([1; 10]) {
                let [q, k, v] = [0, 1, 2].map(|i| inputs[i].narrow(2, at, chunk));
                let mut caches: Vec<_> = sequences.iter_mut().map(|s| &mut s[layer]).collect();
                outputs.push(attention.forward(&mut caches, &q?, &k?, &v?, 0.25)?);
                at += chunk;
            }
            assert!(worst(&Tensor::cat(&outputs, 2)?, &expected(&inputs, layer)?)? < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn softcaps_and_sinks_are_candles() -> Result<()> {
    let attention = SparseAttention::new(&Device::Cpu, DType::F32)?;
    let inputs = inputs(2)?;
    let sinks = Tensor::randn(0f32, 1., SHAPE.query_heads, &Device::Cpu)?;
    let scores = Scores { scale: 0.25, softcap: Some(0.5), sinks: Some(&sinks) };
    let (mut first, mut second) =
        (attention.open(&plan(), TOKENS)?, attention.open(&plan(), TOKENS)?);
    let [q, k, v] = &inputs;
    let out = attention.forward(&mut [&mut first[0], &mut second[0]], q, k, v, scores)?;
    assert!(worst(&out, &expected_of(&inputs, 0, scores)?)? < 1e-5);
    assert!(worst(&out, &expected(&inputs, 0)?)? > 1e-2);

    let few = sinks.narrow(0, 1, 2)?;
    let wrong = Scores { sinks: Some(&few), ..scores };
    let mut cache = attention.open(&plan(), TOKENS)?;
    let [q, k, v] = [0, 1, 2].map(|i| inputs[i].narrow(0, 0, 1));
    let error = attention.forward(&mut [&mut cache[0]], &q?, &k?, &v?, wrong).unwrap_err();
    assert!(error.to_string().contains("sinks"), "{error}");
    Ok(())
}

#[test]
fn sixteen_bits_come_and_go() -> Result<()> {
    let attention = SparseAttention::new(&Device::Cpu, DType::BF16)?;
    let inputs = inputs(1)?;
    let [q, k, v] = [0, 1, 2].map(|i| inputs[i].to_dtype(DType::BF16));
    let mut caches = attention.open(&plan(), TOKENS)?;
    let out = attention.forward(&mut [&mut caches[1]], &q?, &k?, &v?, 0.25)?;
    assert_eq!(out.dtype(), DType::BF16);
    assert!(worst(&out.to_dtype(DType::F32)?, &expected(&inputs, 1)?)? < 0.05);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() -> Result<()> {
    let attention = SparseAttention::new(&Device::Cpu, DType::F32)?;
    let [q, k, v] = inputs(1)?;
    let mut caches = attention.open(&plan(), TOKENS)?;
    let cache = &mut caches[0];
    let mut refused = |q: &Tensor, k: &Tensor, v: &Tensor, words: &str| {
        let error = attention.forward(&mut [&mut *cache], q, k, v, 0.25).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(cache.state().len(), 0);
    };
    refused(&q, &k.narrow(2, 0, 9)?, &v, "forward: k: expected [1, heads, 90, head_dim]");
    refused(&q.narrow(1, 0, 5)?, &k, &v, "q: expected [90, a multiple of 2, 16]");
    let none = [&q, &k, &v].map(|x| x.narrow(2, 0, 0));
    let [none_q, none_k, none_v] = none;
    refused(&none_q?, &none_k?, &none_v?, "at least 1 per sequence");
    let tracked = Var::from_tensor(&q.contiguous()?)?;
    refused(&tracked, &k, &v, "without gradients");
    let long = Tensor::cat(&[&q, &q], 2)?;
    let (long_k, long_v) = (Tensor::cat(&[&k, &k], 2)?, Tensor::cat(&[&v, &v], 2)?);
    refused(&long, &long_k, &long_v, "do not fit");
    refused(&q.to_dtype(DType::F64)?, &k, &v, "f32, f16 or bf16");
    assert!(SparseAttention::new(&Device::Cpu, DType::F64).is_err());

    // A fork is its own sequence; what a ring has lost cannot be asked for again.
    attention.forward(&mut [&mut *cache], &q, &k, &v, 0.25)?;
    let mut fork = attention.fork(cache)?;
    attention.truncate(&mut fork, 89)?;
    assert_eq!((fork.state().len(), cache.state().len()), (89, 90));
    assert!(attention.truncate(cache, 40).unwrap_err().to_string().contains("evicted"));
    Ok(())
}
