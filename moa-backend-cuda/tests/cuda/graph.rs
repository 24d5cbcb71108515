//! Captured work: what it computes, and what is refused.

use moa_backend_cuda::{Arena, Device, Dtype, Error, Operations, Tensor};
use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::ArgumentError;

use super::gpu;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        a_captured_step_computes_what_it_did_when_rehearsed,
        work_that_was_not_rehearsed_is_refused_and_the_stream_goes_on,
    ]
}

/// A device of the test's own: other threads must not use a stream that is being captured.
fn device() -> Result<Device, Stop> {
    gpu::device()?;
    Ok(Device::open(0)?)
}

fn a_captured_step_computes_what_it_did_when_rehearsed() -> Verdict {
    let device = &device()?;
    let operations = Operations::new(device, Dtype::Bf16).unwrap();
    let weight = operations.random(&[64, 64], Dtype::Bf16, 0.2, 1).unwrap();
    let norm = Tensor::from_f32(device, &[1.0; 64], &[64], Dtype::F32).unwrap();
    let ids = operations.indices([3, 5].into_iter(), 64).unwrap();
    let out = Tensor::zeros(device, &[2, 64], Dtype::F32).unwrap();
    let arena = Arena::new();
    let work = |layers: usize| -> Result<(), Error> {
        // SAFETY: the ids are below 64.
        let mut x = unsafe { operations.embed_at(&weight, &ids, 1.0) }?;
        for _ in 0..layers {
            let h = operations.rms_norm(&x, &norm, 1e-5)?;
            x = operations.linear_add(x, &h, &weight, None)?;
        }
        operations.linear_into(&operations.rms_norm(&x, &norm, 1e-5)?, &weight, &out)
    };
    work(3).unwrap();
    let plain = |at: [usize; 2]| {
        operations.set_indices(&ids, at.into_iter(), 64).unwrap();
        work(3).unwrap();
        out.to_f32().unwrap()
    };
    let expected = [[3, 5], [60, 1], [0, 0]].map(|at| (at, plain(at)));
    arena.rehearse(|| work(3)).unwrap();
    assert_eq!(out.to_f32().unwrap(), expected[2].1);
    // SAFETY: the work only launches and drops what it makes; everything else outlives the graph.
    let mut graph = unsafe { device.capture(&arena, || work(3)) }.unwrap();
    for (at, expected) in &expected {
        operations.set_indices(&ids, at.iter().copied(), 64).unwrap();
        // Tensors made meanwhile do not lie where the graph's do.
        let other = operations.random(&[2, 64], Dtype::F32, 1.0, 7).unwrap();
        let before = other.to_f32().unwrap();
        // SAFETY: as above.
        unsafe { graph.launch() }.unwrap();
        assert_eq!(&out.to_f32().unwrap(), expected);
        assert_eq!(other.to_f32().unwrap(), before);
    }
    Ok(())
}

fn work_that_was_not_rehearsed_is_refused_and_the_stream_goes_on() -> Verdict {
    let device = &device()?;
    let operations = Operations::new(device, Dtype::F16).unwrap();
    let x = Tensor::zeros(device, &[4, 64], Dtype::F32).unwrap();
    let add = || operations.add(x.clone(), &x).map(drop);
    // SAFETY: nothing is launched afterwards.
    let refused = unsafe { device.capture(&Arena::new(), add) };
    assert!(
        matches!(refused, Err(Error::Argument(ArgumentError { operation: "capture", .. }))),
        "{refused:?}"
    );
    // SAFETY: as above.
    let refused = unsafe { device.capture(&Arena::new(), || Ok::<_, Error>(())) };
    assert!(
        refused.is_ok()
            || matches!(refused, Err(Error::Argument(ArgumentError { operation: "capture", .. })))
    );
    assert_eq!(operations.add(x.clone(), &x).unwrap().to_f32().unwrap(), vec![0.0; 256]);
    Ok(())
}
