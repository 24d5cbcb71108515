//! burn's tensors in and out: the same numbers as with tensors of the crate.
//!
//! Without a GPU the trial is ignored; with `MOA_REQUIRE_WGPU=1` it fails then.

mod gpu;

use std::process::ExitCode;

use burn_backend::TensorData;
use burn_backend::ops::FloatTensorOps;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice, ops};
use moa_backend_wgpu::cubecl::wgpu::WgpuDevice;
use moa_backend_wgpu::{Device, Dtype, Error, Tensor, WgpuBackend};
use moa_conformance::{Verdict, run, trials};
use moa_core::{Append, ArgumentError, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

fn main() -> ExitCode {
    run(trials![burn_tensors_go_in_and_out])
}

fn numbers(n: usize, by: usize) -> Vec<f32> {
    (0..n).map(|i| (i * by % 199) as f32 / 99.0 - 1.0).collect()
}

fn host(tensor: CubeTensor) -> Vec<f32> {
    ops::into_data_sync(tensor).convert::<f32>().try_to_vec().unwrap()
}

fn burn_tensors_go_in_and_out() -> Verdict {
    let _alone = gpu::device()?;
    let burns = CubeDevice::Wgpu(WgpuDevice::default());
    let device = Device::from_burn(&burns);
    let backend = WgpuBackend::new(&device, Dtype::F32);
    let of_burn = |values: Vec<f32>, shape: [usize; 3]| -> CubeTensor {
        CubeBackend::float_from_data(TensorData::new(values, shape), &burns)
    };
    let layout = LayerLayout::new(&[Span::new(2, 20).unwrap()], 64, 0).unwrap();
    let (q, kv) = ([40, 2, 8], [40, 1, 8]);

    // What burn has queued is done before, and what it queues after sees the result.
    let doubled = |x: CubeTensor| CubeBackend::float_add(x.clone(), x);
    let query = doubled(of_burn(numbers(640, 31), q));
    let key = of_burn(numbers(320, 37), kv);
    let [query, key] = [query, key].map(|x| Tensor::from_burn(&x).unwrap());
    let mut cache = backend.open(&layout, 8).unwrap();
    let inputs = ExtendInputs { q: &query, k: &key, v: &key, scale: 0.3, lse: false };
    let run = backend.extend(&mut [Append { cache: &mut cache, tokens: 40 }], &inputs);
    let found = host(doubled(run.unwrap().out.into_burn(&burns).unwrap()));

    let query: Vec<f32> = numbers(640, 31).into_iter().map(|x| 2.0 * x).collect();
    let query = Tensor::new(&device, &query, &q).unwrap();
    let key = Tensor::new(&device, &numbers(320, 37), &kv).unwrap();
    let mut cache = backend.open(&layout, 8).unwrap();
    let inputs = ExtendInputs { q: &query, k: &key, v: &key, scale: 0.3, lse: false };
    let run = backend.extend(&mut [Append { cache: &mut cache, tokens: 40 }], &inputs);
    let expected = run.unwrap().out.to_vec().unwrap();
    assert!(expected.iter().any(|x| x.abs() > 0.1));
    assert_eq!(found, expected.into_iter().map(|x| 2.0 * x).collect::<Vec<_>>());

    let turned = CubeBackend::float_swap_dims(of_burn(numbers(640, 31), q), 0, 1);
    let error = Tensor::from_burn(&turned).unwrap_err();
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "strides", .. })), "{error}");
    Ok(())
}
