//! Captured work: what it computes, and what is refused.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use cudarc::driver::sys;
use moa_backend_cuda::{Arena, Device, Dtype, Error, Indices, Operations, Tensor};
use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::ArgumentError;

use super::gpu;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        a_captured_step_computes_what_it_did_when_rehearsed,
        work_that_was_not_rehearsed_is_refused_and_the_stream_goes_on,
        a_capture_that_another_thread_ended_says_so_and_can_be_made_again,
        devices_come_and_go_while_another_one_captures,
    ]
}

/// Read by tests that capture, written by the one that waits for a whole GPU, which ends what others capture.
static WHOLE_GPU: RwLock<()> = RwLock::new(());

/// Nobody waits for a whole GPU meanwhile.
pub(crate) fn undisturbed() -> RwLockReadGuard<'static, ()> {
    WHOLE_GPU.read().unwrap_or_else(PoisonError::into_inner)
}

/// A device of the test's own: other threads must not use a stream that is being captured.
fn device() -> Result<Device, Stop> {
    gpu::device()?;
    Ok(Device::open(0)?)
}

fn a_captured_step_computes_what_it_did_when_rehearsed() -> Verdict {
    let _undisturbed = undisturbed();
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
    let _undisturbed = undisturbed();
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

/// Work on a device of its own that puts a row of a product, which `ids` choose, into `out`.
struct Chosen {
    device: Device,
    operations: Operations,
    weight: Tensor,
    norm: Tensor,
    ids: Indices,
    out: Tensor,
    arena: Arena,
}

impl Chosen {
    /// Rehearsed for the first row.
    fn new() -> Result<Self, Stop> {
        let device = device()?;
        let operations = Operations::new(&device, Dtype::Bf16)?;
        let weight = operations.random(&[64, 64], Dtype::Bf16, 0.2, 1)?;
        let norm = Tensor::from_f32(&device, &[1.0; 64], &[64], Dtype::F32)?;
        let ids = operations.indices([0].into_iter(), 64)?;
        let out = Tensor::zeros(&device, &[1, 64], Dtype::F32)?;
        let made = Self { device, operations, weight, norm, ids, out, arena: Arena::new() };
        made.arena.rehearse(|| made.work())?;
        Ok(made)
    }

    fn work(&self) -> Result<(), Error> {
        // SAFETY: the ids are below 64.
        let x = unsafe { self.operations.embed_at(&self.weight, &self.ids, 1.0) }?;
        let h = self.operations.rms_norm(&x, &self.norm, 1e-5)?;
        self.operations.linear_into(&h, &self.weight, &self.out)
    }

    fn choose(&self, row: usize) -> Result<(), Error> {
        self.operations.set_indices(&self.ids, [row].into_iter(), 64)
    }
}

fn a_capture_that_another_thread_ended_says_so_and_can_be_made_again() -> Verdict {
    let _alone = WHOLE_GPU.write().unwrap_or_else(PoisonError::into_inner);
    let chosen = Chosen::new()?;
    let first = chosen.out.to_f32()?;
    chosen.choose(5)?;
    let waits_for_all = || {
        // SAFETY: the context is the one of all devices of this process, which `chosen` keeps.
        let waits = || unsafe {
            let mut context = std::ptr::null_mut();
            sys::cuDevicePrimaryCtxRetain(&raw mut context, 0).result().unwrap();
            sys::cuCtxSetCurrent(context).result().unwrap();
            // Refused or not, it ends what others capture.
            let _ = sys::cuCtxSynchronize();
            sys::cuDevicePrimaryCtxRelease_v2(0).result().unwrap();
        };
        std::thread::scope(|scope| scope.spawn(waits).join()).unwrap();
        chosen.work()
    };
    // SAFETY: the work only launches and drops what it makes; everything else outlives the graph.
    let ended = unsafe { chosen.device.capture(&chosen.arena, waits_for_all) };
    assert!(matches!(ended, Err(Error::CaptureInvalidated)), "{ended:?}");
    assert_eq!(chosen.out.to_f32()?, first, "what was captured has run");
    // SAFETY: as above.
    let mut graph = unsafe { chosen.device.capture(&chosen.arena, || chosen.work()) }?;
    // SAFETY: as above.
    unsafe { graph.launch() }?;
    let got = chosen.out.to_f32()?;
    chosen.work()?;
    assert_eq!(got, chosen.out.to_f32()?);
    assert_ne!(got, first);
    Ok(())
}

/// What opens and drops devices of a GPU must not end what another one captures there, the libraries' handles above all.
fn devices_come_and_go_while_another_one_captures() -> Verdict {
    let _undisturbed = undisturbed();
    let chosen = Chosen::new()?;
    let during = |what: &str, act: &mut (dyn FnMut() + Send)| {
        let come_and_go = || {
            std::thread::scope(|scope| scope.spawn(act).join()).unwrap();
            chosen.work()
        };
        // SAFETY: the work only launches and drops what it makes; everything else outlives the graph.
        let captured = unsafe { chosen.device.capture(&chosen.arena, come_and_go) };
        captured.map(drop).unwrap_or_else(|error| panic!("{what}: {error}"));
    };
    for _ in 0..3 {
        let (mut device, mut operations) = (None, None);
        during("a device is opened", &mut || device = Some(Device::open(0).unwrap()));
        during("its operations are made", &mut || {
            operations =
                device.as_ref().map(|device| Operations::new(device, Dtype::Bf16).unwrap());
        });
        during("they are dropped", &mut || operations = None);
        during("the device is dropped", &mut || device = None);
    }
    Ok(())
}
