//! Ranks that fail or leave, and splits that cannot be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moa_core::{Plan, Sharding};
use moa_models::{
    Communicator, Cpu, Decoder, Error, LogitRows, ModelConfig, Rank, Result, Shard, ThreadRank,
    on_ranks,
};

use crate::shard::{Model, biased, uneven};
use crate::tiny;

/// A rank that breaks down at its `n`th sum.
struct Failing {
    rank: Arc<ThreadRank>,
    left: AtomicUsize,
}

impl Rank for Failing {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn ranks(&self) -> usize {
        self.rank.ranks()
    }

    fn fail(&self) {
        self.rank.fail();
    }

    fn failed(&self) -> Option<usize> {
        self.rank.failed()
    }
}

impl Communicator<Cpu> for Failing {
    fn all_reduce(&self, device: &Cpu, x: &mut moa_backend_cpu::Tensor) -> Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(Error::Cancelled),
            _ => self.rank.all_reduce(device, x),
        }
    }
}

#[test]
fn a_rank_that_fails_takes_the_others_with_it() -> Result<()> {
    let (folder, plan) = (biased(), uneven());
    // In the first layer, in the last, in the logits, and in a later step.
    for at in [0, 5, 6, 9] {
        let mut results = Vec::new();
        let error = on_ranks(ThreadRank::group(3)?, |rank: Arc<ThreadRank>| {
            let left = AtomicUsize::new(if rank.rank() == 1 { at } else { usize::MAX });
            let model = folder.part(&plan, Failing { rank, left })?;
            let mut sequence = model.open(&plan, 200, 0)?;
            for _ in 0..3 {
                let step = model.forward(&mut [&mut sequence], &[&[1, 2, 3]], LogitRows::Last);
                if let Err(error) = step {
                    // The sequence says so too.
                    let again = model.forward(&mut [&mut sequence], &[&[1]], LogitRows::Last);
                    assert!(again.is_err());
                    return Err(error);
                }
            }
            Ok(())
        })
        .map(|done: Vec<()>| results = done)
        .unwrap_err();
        assert!(matches!(error, Error::Cancelled), "at {at}: {error}");
        assert!(results.is_empty());
    }
    Ok(())
}

#[test]
fn who_waits_for_a_rank_that_failed_or_left_is_told_which() -> Result<()> {
    let (folder, plan) = (biased(), uneven());
    let step = |model: &Model| -> Result<()> {
        let mut sequence = model.open(&plan, 200, 0)?;
        model.forward(&mut [&mut sequence], &[&[1, 2, 3]], LogitRows::Last).map(drop)
    };
    // It is dropped before it has taken part; it has been told to fail; it brings another shape.
    for case in 0..3 {
        let mut ranks = ThreadRank::group(2)?;
        let (other, own) = (ranks.remove(1), ranks.remove(0));
        let model = folder.part(&plan, own)?;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| step(&model));
            let kept = match case {
                0 => {
                    drop(other);
                    None
                }
                1 => {
                    other.fail();
                    Some(folder.part(&plan, other).unwrap())
                }
                _ => {
                    let model = folder.part(&plan, other).unwrap();
                    let mut sequence = model.open(&plan, 200, 0).unwrap();
                    let wrong = model.forward(&mut [&mut sequence], &[&[1]], LogitRows::Last);
                    assert!(wrong.is_err());
                    Some(model)
                }
            };
            let error = waiting.join().unwrap().unwrap_err();
            let is_told = match &error {
                Error::Rank { rank } => *rank == 1,
                // Whoever comes second sees that the shapes differ.
                Error::Invalid { what, .. } => case == 2 && *what == "sum over ranks",
                _ => false,
            };
            assert!(is_told, "case {case}: {error}");
            drop(kept);
        });
        assert!(step(&model).is_err(), "the group stays broken");
    }
    Ok(())
}

#[test]
fn a_panic_does_not_leave_the_others_waiting() {
    let (folder, plan) = (biased(), uneven());
    let arrived = AtomicUsize::new(0);
    let work = |model: &Arc<Model>| {
        let mut sequence = model.open(&plan, 200, 0)?;
        assert_eq!(arrived.fetch_add(1, Ordering::Relaxed), 0, "as planned");
        model.forward(&mut [&mut sequence], &[&[1]], LogitRows::Last).map(drop)
    };
    let run = std::panic::AssertUnwindSafe(|| folder.on(2, &plan, work));
    let panic = std::panic::catch_unwind(run);
    assert!(panic.is_err());
}

#[test]
fn impossible_splits_are_refused() -> Result<()> {
    let folder = biased();
    let plan = uneven();
    let ranks = || ThreadRank::group(5).map(|mut ranks| ranks.swap_remove(0));
    let inner = folder.part(&plan, ranks()?).unwrap_err();
    let expected = "ranks must be a divisor of intermediate_size (96), got 5";
    assert_eq!(inner.to_string(), expected);

    let other = Sharding::balanced(&plan, 200, 2)?;
    let error = Shard::<Cpu>::new(&other, ranks()?).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "communicator", .. }), "{error}");

    let foreign = Sharding::balanced(&Plan::full(tiny().shape())?, 200, 2)?;
    let rank = ThreadRank::group(2)?.swap_remove(0);
    let shard = Shard::new(&foreign, rank)?;
    let error = Decoder::load_shard(Cpu::default(), folder.config.clone(), &folder.weights, shard);
    assert!(matches!(error, Err(Error::Core(moa_core::Error::ShapeMismatch { .. }))));

    let few = ModelConfig { vocab_size: 15, ..folder.config.clone() };
    let rank = ThreadRank::group(2)?.swap_remove(0);
    let shard = Shard::new(&other, rank)?;
    let error = Decoder::load_shard(Cpu::default(), few, &folder.weights, shard).unwrap_err();
    assert!(error.to_string().contains("vocab_size (15)"), "{error}");
    assert!(matches!(ThreadRank::group(0), Err(Error::Invalid { what: "ranks", .. })));
    Ok(())
}

#[test]
fn a_part_refuses_foreign_plans_and_values_of_other_processes() -> Result<()> {
    let (folder, plan) = (biased(), uneven());
    folder.on(2, &plan, |model| {
        let foreign = Plan::full(tiny().shape())?;
        let error = model.open(&foreign, 20, 0).unwrap_err();
        let is_mismatch = matches!(error, Error::Core(moa_core::Error::ShapeMismatch { .. }));
        assert!(is_mismatch, "{error}");
        Ok(())
    })?;
    // Such as a rank that is alone in its process.
    let rank = ThreadRank::group(2)?.swap_remove(0);
    let model = folder.part(&plan, Failing { rank: Arc::new(rank), left: 0.into() })?;
    let error = model.agree(|| Ok::<_, Error>(())).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "ranks", .. }), "{error}");
    Ok(())
}
