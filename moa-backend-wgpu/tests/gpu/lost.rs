//! A device that is lost: reset by its driver, unplugged, destroyed.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use moa_backend_wgpu::cubecl::future::block_on;
use moa_backend_wgpu::cubecl::wgpu::{WgpuSetup, wgpu};
use moa_backend_wgpu::{Device, Dtype, Error, Matrix, Result, Tensor, WgpuBackend, ops};
use moa_conformance::{Stop, Verdict};
use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

use crate::gpu;

/// A device that nothing else uses, asked for these of the features that its adapter offers, and wgpu's handle of it.
fn own_setup(features: wgpu::Features) -> Result<WgpuSetup, Stop> {
    let lacks = |error: String| Stop::unless_required("MOA_REQUIRE_WGPU", error);
    let description = wgpu::InstanceDescriptor::new_without_display_handle();
    let instance = wgpu::Instance::new(description);
    let adapter = block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
        .map_err(|error| lacks(error.to_string()))?;
    let (device, queue) = block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_limits: adapter.limits(),
        required_features: adapter.features() & features,
        // SAFETY: what is experimental of the features asked for here is that kernels are not checked again.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }))
    .map_err(|error| lacks(error.to_string()))?;
    let backend = adapter.get_info().backend;
    Ok(WgpuSetup { instance, adapter, device, queue, backend })
}

/// A device that takes kernels in SPIR-V where its adapter does, and wgpu's handle of it.
fn own_device() -> Result<(Device, wgpu::Device), Stop> {
    let setup = own_setup(wgpu::Features::PASSTHROUGH_SHADERS)?;
    let own = setup.device.clone();
    let lacks = |error: Error| Stop::unless_required("MOA_REQUIRE_WGPU", error);
    Ok((Device::from_setup(setup).map_err(lacks)?, own))
}

/// The first call would fail otherwise.
pub(crate) fn a_device_that_takes_no_spirv_is_refused() -> Verdict {
    let (device, _alone) = gpu::device()?;
    if device.client().name() != "wgpu<spirv>" {
        return Err(Stop::ignored("kernels are not SPIR-V here"));
    }
    let refused = Device::from_setup(own_setup(wgpu::Features::empty())?);
    let Err(Error::NoDevice { message }) = refused else { panic!("it is taken") };
    assert!(message.contains("PASSTHROUGH_SHADERS"), "{message}");
    Ok(())
}

/// The first call that waits for the device says so, whether CubeCL has been told or not, and every call after it;
/// none panics, none hangs, none returns numbers.
pub(crate) fn a_lost_device_is_an_error() -> Verdict {
    // For the lock: the Vulkan loader bears no instances that come and go on several threads at once.
    let (_, _alone) = gpu::device()?;
    for told in [true, false] {
        let (device, own) = own_device()?;
        let (done, ended) = mpsc::channel();
        let calls = thread::spawn(move || {
            calls_on_a_lost_device(&device, &own, told);
            let _ = done.send(());
        });
        let waited = ended.recv_timeout(Duration::from_secs(60));
        assert!(waited != Err(mpsc::RecvTimeoutError::Timeout), "a call hangs");
        assert!(calls.join().is_ok(), "see above");
    }
    Ok(())
}

fn calls_on_a_lost_device(device: &Device, own: &wgpu::Device, told: bool) {
    let attention = WgpuBackend::new(device, Dtype::F32);
    let layout = LayerLayout::new(&[Span::full(64)], 64, 0).unwrap();
    let mut cache = attention.open(&layout, 8).unwrap();
    let x = Tensor::new(device, &[0.5; 24], &[3, 1, 8]).unwrap();
    let flat = x.clone().reshape(&[3, 8]).unwrap();
    let weight = || Matrix::new(device, &[0; 256], 8, 8, Dtype::F32);
    let matrix = weight().unwrap();
    let state = cache.as_ref().clone();
    let extend = |cache: &mut _| {
        let inputs = ExtendInputs::new(&x, &x, &x, 1.0);
        Ok(attention.extend(&mut [Append { cache, tokens: 3 }], &inputs)?.out)
    };
    let out = extend(&mut cache).unwrap();
    device.synchronize().unwrap();
    assert_eq!(out.to_vec().unwrap(), [0.5; 24]);

    own.destroy();
    if told {
        let _ = own.poll(wgpu::PollType::wait_indefinitely());
    }
    // Queued, or refused.
    let after = extend(&mut cache).or_else(|_: Error| extend(&mut cache)).unwrap_or(out);
    let len = cache.as_ref().len();
    let lost = |name: &str, result: Result<()>| {
        assert!(matches!(result, Err(Error::Lost { .. })), "{name}: {result:?}");
    };
    lost("the first call that waits", after.to_vec().map(drop));
    lost("to_vec", after.to_vec().map(drop));
    lost("synchronize", device.synchronize());
    lost("to_bytes", cache.to_bytes().map(drop));
    lost("extend", extend(&mut cache).map(drop));
    assert_eq!(cache.as_ref().len(), len, "a refused call changes nothing");
    lost("tensor", Tensor::new(device, &[0.5; 24], &[3, 8]).map(drop));
    lost("matrix", weight().map(drop));
    lost("linear", ops::linear(&flat, &matrix, None).map(drop));
    lost("open", attention.open(&layout, 8).map(drop));
    lost("fork", attention.fork(&cache).map(drop));
    lost("restore", attention.restore(state, &[]).map(drop));
    lost("seconds", attention.decode_seconds(64, 1, 8).map(drop));
    lost("a clone of the device", Tensor::new(&device.clone(), &[0.5], &[1]).map(drop));
}
