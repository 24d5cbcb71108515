//! What a user did wrong or a machine lacks is named, with numbers.

use std::error::Error as _;

use moa_backend_cuda::Error as CudaError;
use moa_conformance::{Trial, Verdict, trials};
use moa_models::{Cuda, Device, Dtype, Error, Load, LogitRows};

use crate::{cuda, plans};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        a_device_that_is_not_there_is_named,
        memory_is_asked_for_before_it_is_taken,
        a_refused_step_changes_nothing,
    ]
}

/// The backend's error in one of this crate's.
fn cause(error: &Error) -> Option<&CudaError> {
    match error {
        Error::Backend(source) => source.downcast_ref(),
        other => other.source()?.downcast_ref(),
    }
}

fn a_device_that_is_not_there_is_named() {
    let error = Cuda::new(99, Dtype::Bf16).unwrap_err();
    let named = matches!(
        cause(&error),
        Some(CudaError::NoDevice { ordinal: 99, .. } | CudaError::NoDriver { .. })
    );
    assert!(named, "{error}");
}

fn memory_is_asked_for_before_it_is_taken() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let device = checkpoint.model.device();
        let error = device.check_room("weights", u64::MAX).unwrap_err();
        let Error::OutOfMemory { what, bytes: Some(bytes), free: Some(free) } = error else {
            panic!("{error}")
        };
        assert_eq!((what, bytes), ("weights", u64::MAX));
        assert!(free > 0 && error.to_string().contains(&free.to_string()), "{error}");
        device.check_room("weights", 1 << 20).unwrap();
        // 2 bytes for each of the 6.5 million weights.
        let bytes = device.weight_bytes(checkpoint.model.config().parameters());
        assert!((12_000_000..14_500_000).contains(&bytes), "{bytes}");
    }
    Ok(())
}

fn a_refused_step_changes_nothing() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let plan = &plans(model.shape())[1];
        let mut sequence = model.open(plan, 10, 0).unwrap();
        model.forward(&mut [&mut sequence], &[&[1, 2, 3]], LogitRows::None).unwrap();
        let vocab = model.config().vocab_size as u32;
        for tokens in [&[vocab][..], &[1; 8], &[]] {
            let refused = model.forward(&mut [&mut sequence], &[tokens], LogitRows::Last);
            assert!(refused.is_err(), "{tokens:?}");
            assert_eq!(sequence.len(), 3);
        }
        model.forward(&mut [&mut sequence], &[&[4; 7]], LogitRows::Last).unwrap();
    }
    Ok(())
}
