//! moa's attention on burn's tensors against the conformance suite and burn's own attention.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_WGPU=1` they fail then. A software Vulkan driver is a GPU.
//! Built with the feature `cuda`, `MOA_BURN_CUDA=1` runs them on the first CUDA device.

#[path = "../examples/llama_block/block.rs"]
mod block;

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{Block, dense};
use burn::backend::{DispatchTensor, TensorMetadata};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use moa_burn::{Error, SparseAttention};
use moa_conformance::{Stop, Subject, Verdict, run, suite, trials};
use moa_core::{
    Append, ElasticRule, ExtendInputs, ModelShape, Plan, Scores, SparseAttentionBackend,
};

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 6, kv_heads: 2, head_dim: 16 };
const TOKENS: usize = 60;

struct Burn {
    attention: SparseAttention,
    device: Device,
    _alone: MutexGuard<'static, ()>,
}

fn main() -> ExitCode {
    let own = trials![
        chunks_of_queued_tensors_are_burns_masked_attention,
        a_llama_block_with_a_dense_plan_is_burns_own,
        sixteen_bits_come_and_go,
        softcaps_and_sinks_come_with_the_scores,
        what_does_not_fit_is_refused_at_the_call,
        a_cache_goes_to_another_thread,
        what_burn_writes_in_place_is_read_after_that,
    ];
    run(suite("burn", Burn::open).into_iter().chain(own))
}

/// The process does not end, nor another trial begin, before what was queued is done.
impl Drop for Burn {
    fn drop(&mut self) {
        let _ = self.device.sync();
    }
}

impl Burn {
    /// Trials run one at a time: a software driver uses all cores itself.
    fn open() -> Result<Self, Stop> {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let device = device()?;
        let attention = SparseAttention::new(&device, DType::F32).unwrap();
        Ok(Self { attention, device, _alone })
    }

    fn numbers<const D: usize>(&self, shape: [usize; D], by: usize) -> Tensor<D> {
        let all = shape.iter().product::<usize>();
        let numbers = (0..all).map(|i| (i * by % 1999) as f32 / 999. - 1.).collect();
        Tensor::from_data(TensorData::new::<f32, _>(numbers, shape), &self.device)
    }

    /// Queries, keys and values that burn has queued and not computed, one of them with strides.
    fn inputs(&self, batch: usize) -> [Tensor<4>; 3] {
        self.inputs_of(SHAPE, batch)
    }

    fn inputs_of(&self, shape: ModelShape, batch: usize) -> [Tensor<4>; 3] {
        let [q, k, v] = [(6, 31), (2, 37), (2, 41)]
            .map(|(heads, by)| self.numbers([batch, TOKENS, heads, shape.head_dim], by) * 2. + 0.1);
        [q.swap_dims(1, 2), k.swap_dims(1, 2), v.swap_dims(1, 2)]
    }
}

impl Subject for Burn {
    type Backend = SparseAttention;
    type Tensor = DispatchTensor;

    fn backend(&self) -> &SparseAttention {
        &self.attention
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> DispatchTensor {
        let data = TensorData::new(data.to_vec(), shape.to_vec());
        match shape.len() {
            1 => Tensor::<1>::from_data(data, &self.device).into_dispatch(),
            2 => Tensor::<2>::from_data(data, &self.device).into_dispatch(),
            _ => Tensor::<3>::from_data(data, &self.device).into_dispatch(),
        }
    }

    fn host(&self, tensor: &DispatchTensor) -> Vec<f32> {
        let data = match tensor.shape().num_dims() {
            2 => Tensor::<2>::from_dispatch(tensor.clone()).into_data(),
            _ => Tensor::<3>::from_dispatch(tensor.clone()).into_data(),
        };
        data.try_to_vec().unwrap()
    }

    fn round(&self, x: f32) -> f32 {
        x
    }

    // Every size is a set of kernels to compile.
    fn dims(&self) -> &'static [usize] {
        &[7, 72]
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Attention(moa_backend_wgpu::Error::Core(error)) => Some(error),
            _ => None,
        }
    }
}

fn is_cuda() -> bool {
    cfg!(feature = "cuda") && std::env::var_os("MOA_BURN_CUDA").is_some()
}

fn device() -> Result<Device, Stop> {
    #[cfg(feature = "cuda")]
    if is_cuda() {
        return Ok(Device::cuda(0));
    }
    // It says what is missing, where burn panics.
    moa_backend_wgpu::Device::open()
        .map_err(|error| Stop::unless_required("MOA_REQUIRE_WGPU", error))?;
    Ok(Device::wgpu(Default::default()))
}

fn worst<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    (a - b).abs().max().into_scalar()
}

/// burn's softmax with the plan's mask added to the scores. Sums of products, as burn's matmul rounds f32 on tensor cores.
fn masked(t: &Burn, plan: &Plan, layer: usize, [q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    let [batch, heads, tokens, dim] = q.dims();
    let mask = plan.additive_mask(layer, TOKENS, 0..tokens).unwrap();
    let mask = mask.into_iter().map(|x| x.max(-1e9)).collect();
    let mask = TensorData::new::<f32, _>(mask, [1, SHAPE.kv_heads, 1, tokens, tokens]);
    let mask = Tensor::<5>::from_data(mask, &t.device).repeat_dim(2, SHAPE.group());
    let repeat = |x: Tensor<4>| {
        let x = x.reshape([batch, SHAPE.kv_heads, 1, tokens, dim]).repeat_dim(2, SHAPE.group());
        x.reshape([batch, heads, 1, tokens, dim])
    };
    let scores = (q.reshape([batch, heads, tokens, 1, dim]) * repeat(k)).sum_dim(4) * 0.25;
    let scores = scores.reshape([batch, heads, tokens, tokens]);
    let scores = scores + mask.reshape([1, heads, tokens, tokens]);
    let weights = burn::tensor::activation::softmax(scores, 3);
    let sums = (weights.reshape([batch, heads, tokens, tokens, 1]) * repeat(v)).sum_dim(3);
    sums.reshape([batch, heads, tokens, dim])
}

/// Chunks after the first depend on nothing that burn sees: its queue must not put them in another order.
fn chunks_of_queued_tensors_are_burns_masked_attention() -> Verdict {
    let t = Burn::open()?;
    let plan = Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1), (1, 0)]).unwrap();
    let inputs = t.inputs(2);
    let mut sequences: Vec<_> = (0..2).map(|_| t.attention.open(&plan, TOKENS).unwrap()).collect();
    for layer in 0..SHAPE.layers {
        let (mut outputs, mut at) = (Vec::new(), 0);
        for chunk in [40, 15].into_iter().chain([1; 5]) {
            let [q, k, v] = inputs.clone().map(|x| x.narrow(2, at, chunk));
            let mut caches: Vec<_> = sequences.iter_mut().map(|s| &mut s[layer]).collect();
            outputs.push(t.attention.forward(&mut caches, q, k, v, 0.25).unwrap() * 3.);
            at += chunk;
        }
        let expected = masked(&t, &plan, layer, inputs.clone()) * 3.;
        let worst = worst(Tensor::cat(outputs, 2), expected);
        assert!(worst < 1e-4, "{worst}");
    }
    Ok(())
}

fn a_llama_block_with_a_dense_plan_is_burns_own() -> Verdict {
    let t = Burn::open()?;
    let shape = ModelShape { layers: 1, ..SHAPE };
    let block = Block::new(shape, TOKENS, &t.device);
    let x = t.numbers([2, TOKENS, 96], 29);
    let expected = block.forward(x.clone(), 0, |qkv| Ok::<_, Error>(dense(qkv))).unwrap();
    let quarter = Plan::uniform(shape, 4, ElasticRule::new(0.0, 0.25).unwrap()).unwrap();
    let with = |plan: &Plan| {
        let mut first = t.attention.open(plan, TOKENS).unwrap();
        let mut second = t.attention.open(plan, TOKENS).unwrap();
        let mut outputs = Vec::new();
        for (at, chunk) in [(0, TOKENS - 1), (TOKENS - 1, 1)] {
            let attend = |[q, k, v]: [Tensor<4>; 3]| {
                t.attention.forward(&mut [&mut first[0], &mut second[0]], q, k, v, 0.25)
            };
            outputs.push(block.forward(x.clone().narrow(1, at, chunk), at, attend).unwrap());
        }
        worst(Tensor::cat(outputs, 1), expected.clone())
    };
    let (dense, quarter) = (with(&Plan::full(shape).unwrap()), with(&quarter));
    // burn's own attention and linear layers round f32 on tensor cores.
    assert!(dense < if is_cuda() { 5e-3 } else { 1e-4 }, "{dense}");
    assert!(quarter > 10. * dense.max(1e-6), "{quarter}");
    Ok(())
}

fn sixteen_bits_come_and_go() -> Verdict {
    let t = Burn::open()?;
    if !t.device.supports_dtype(DType::F16) {
        return Err(Stop::ignored("this device has no f16"));
    }
    let attention = SparseAttention::new(&t.device, DType::F16).unwrap();
    // Matrix units, which software drivers lack and take a minute to do without, are for these.
    let head_dims = if is_cuda() { vec![16, 64, 96, 128] } else { vec![16] };
    for head_dim in head_dims {
        let shape = ModelShape { head_dim, ..SHAPE };
        let plan = Plan::retrieval_heads(shape, 3, 17, &[(0, 1)]).unwrap();
        let inputs = t.inputs_of(shape, 1);
        let mut caches = attention.open(&plan, TOKENS).unwrap();
        let (mut outputs, mut at) = (Vec::new(), 0);
        for chunk in [36, 20].into_iter().chain([1; 4]) {
            let [q, k, v] = inputs.clone().map(|x| x.narrow(2, at, chunk).cast(FloatDType::F16));
            let out = attention.forward(&mut [&mut caches[0]], q, k, v, 0.25).unwrap();
            assert_eq!(out.dtype(), DType::F16);
            outputs.push(out.cast(FloatDType::F32));
            at += chunk;
        }
        let worst = worst(Tensor::cat(outputs, 2), masked(&t, &plan, 0, inputs));
        assert!(worst < 0.05, "{head_dim}: {worst}");
    }
    Ok(())
}

fn softcaps_and_sinks_come_with_the_scores() -> Verdict {
    let t = Burn::open()?;
    let plan = Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1)]).unwrap();
    let [q, k, v] = t.inputs(1);
    let run = |scores: Scores<'_, Tensor<1>>| {
        let mut caches = t.attention.open(&plan, TOKENS).unwrap();
        t.attention.forward(&mut [&mut caches[0]], q.clone(), k.clone(), v.clone(), scores)
    };
    let plain = run(0.25.into()).unwrap();
    let capped = run(Scores { softcap: Some(0.1), ..Scores::from(0.25) }).unwrap();
    assert!(worst(capped, plain.clone()) > 1e-3);
    let sinks = Tensor::<1>::full([6], 1e4, &t.device);
    let none = run(Scores { sinks: Some(&sinks), ..Scores::from(0.25) }).unwrap();
    assert!(worst(none, plain.zeros_like()) < 1e-6);
    let few = sinks.narrow(0, 0, 5);
    let error = run(Scores { sinks: Some(&few), ..Scores::from(0.25) }).unwrap_err();
    assert!(error.to_string().contains("sinks"), "{error}");
    Ok(())
}

fn what_does_not_fit_is_refused_at_the_call() -> Verdict {
    let t = Burn::open()?;
    let plan = Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1)]).unwrap();
    let mut caches = t.attention.open(&plan, TOKENS).unwrap();
    let cache = &mut caches[0];
    let [q, k, v] = t.inputs(1);
    let mut refused = |q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, words: &str| {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let error = t.attention.forward(&mut [&mut *cache], q, k, v, 0.25).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(cache.state().len(), 0);
        error
    };
    refused(&q, &k.clone().narrow(2, 0, 9), &v, "k");
    refused(&q.clone().narrow(1, 0, 5), &k, &v, "q");
    let twice = |x: &Tensor<4>| Tensor::cat(vec![x.clone(), x.clone()], 2);
    refused(&twice(&q), &twice(&k), &twice(&v), "do not fit");
    refused(&twice(&q), &k, &v, "k");
    // Also where nothing is tracked.
    let tracked = Tensor::from_data(k.clone().into_data(), &t.device.clone().autodiff());
    let error = refused(&q, &tracked, &v, "autodiff");
    assert!(matches!(error, Error::Gradients { argument: "k" }), "{error}");
    refused(&tracked.clone().require_grad(), &k, &v, "q: expected");

    let of_gradients = SparseAttention::new(&t.device.clone().autodiff(), DType::F32).unwrap();
    let out = of_gradients.forward(&mut [&mut *cache], q, tracked.inner(), v, 0.25).unwrap();
    assert_eq!(out.dims(), [1, 6, TOKENS, 16]);
    assert!(t.attention.truncate(cache, 30).unwrap_err().to_string().contains("evicted"));

    let error = SparseAttention::new(&t.device, DType::F64).unwrap_err();
    assert!(
        matches!(error, Error::Elements { argument: "caches", got: DType::F64, .. }),
        "{error}"
    );
    let whole = Tensor::<3, Int>::zeros([1, 2, 16], &t.device).into_dispatch();
    let inputs = ExtendInputs::new(&whole, &whole, &whole, 0.25);
    let batch = &mut [Append { cache: &mut caches[1], tokens: 1 }];
    let error = t.attention.extend(batch, &inputs).unwrap_err();
    assert!(matches!(error, Error::Elements { argument: "q", .. }), "{error}");
    Ok(())
}

/// burn keeps a queue for each thread.
fn a_cache_goes_to_another_thread() -> Verdict {
    let t = Burn::open()?;
    let plan = Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1)]).unwrap();
    let inputs = t.inputs(1);
    let mut caches = t.attention.open(&plan, TOKENS).unwrap();
    let mut outputs = Vec::new();
    for (at, chunk) in [(0, 30), (30, 20), (50, 10)] {
        let chunk = inputs.clone().map(|x| x.narrow(2, at, chunk));
        let (attention, cache) = (&t.attention, &mut caches[0]);
        outputs.push(std::thread::scope(|scope| {
            let run = move || {
                let [q, k, v] = chunk;
                attention.forward(&mut [cache], q, k, v, 0.25).unwrap()
            };
            scope.spawn(run).join().unwrap()
        }));
    }
    let worst = worst(Tensor::cat(outputs, 2), masked(&t, &plan, 0, inputs));
    assert!(worst < 1e-4, "{worst}");
    Ok(())
}

/// burn may write to an output of moa's in place, on the stream of the thread that asks for it.
fn what_burn_writes_in_place_is_read_after_that() -> Verdict {
    let t = Burn::open()?;
    let plan = Plan::retrieval_heads(SHAPE, 3, 17, &[(0, 1)]).unwrap();
    let packed = |heads, by| t.numbers([TOKENS, heads, 16], by);
    let run = |through_host: bool| {
        let mut caches = t.attention.open(&plan, TOKENS).unwrap();
        let mut q = packed(6, 31);
        for cache in &mut caches {
            let batch = &mut [Append { cache, tokens: TOKENS }];
            let out = t.attention.forward_packed(batch, q, packed(2, 37), packed(2, 41), 0.25);
            q = out.unwrap() * 3.;
            if through_host {
                q = Tensor::from_data(q.into_data(), &t.device);
            }
        }
        q
    };
    let spawned = std::thread::scope(|scope| scope.spawn(|| run(false)).join().unwrap());
    let worst = worst(spawned, run(true));
    assert!(worst < 1e-5, "{worst}");
    Ok(())
}
