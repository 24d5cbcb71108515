//! The loop turn by turn, on a device that fails when it is told to.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use moa_core::{ElasticRule, Sharding};
use moa_models::{Brought, Communicator, Cpu, Device, Dtype, Rank, Shard, Wait};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

/// How sums over ranks go, of which there is one.
#[derive(Clone, Default)]
struct Sums(Arc<AtomicUsize>);

const WELL: usize = 0;
const NO_MEMORY: usize = 1;
const BROKEN: usize = 2;

impl Rank for Sums {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn fail(&self) {}

    fn failed(&self) -> Option<usize> {
        None
    }

    fn gather(&self, own: Brought, _: Wait) -> Result<Arc<[Brought]>, Error> {
        Ok(Arc::new([own]))
    }
}

impl Communicator<Cpu> for Sums {
    fn all_reduce(&self, _: &Cpu, _: &mut <Cpu as Device>::Tensor) -> Result<(), Error> {
        match self.0.load(Relaxed) {
            WELL => Ok(()),
            NO_MEMORY => Err(Error::OutOfMemory { what: "sum", bytes: None, free: None }),
            _ => Err(Error::Backend("broken".into())),
        }
    }
}

/// A loop whose commands the test sends.
struct Loop {
    worker: Worker<Cpu>,
    commands: mpsc::Sender<Command>,
    sums: Sums,
}

impl Loop {
    fn new(options: ServerOptions) -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
        let shape = Checkpoint::open(Cpu::new(Dtype::F32), folder).unwrap().model.shape();
        let plan = Plan::uniform(shape, 8, ElasticRule::fixed(48)).unwrap();
        let sums = Sums::default();
        let shard = Shard::new(&Sharding::balanced(&plan, 512, 1).unwrap(), sums.clone()).unwrap();
        let part = Checkpoint::open_shard(Cpu::new(Dtype::F32), folder, shard).unwrap();
        let (commands, jobs) = mpsc::channel();
        Self { worker: Worker::new(part, plan, options, Arc::default(), jobs), commands, sums }
    }

    /// Sends a request for so many tokens; what it is told.
    fn send(&self, tokens: usize) -> UnboundedReceiver<Update> {
        let (out, updates) = unbounded_channel();
        let (came, options) = (Instant::now(), GenerateOptions::default());
        let job = Job {
            prompt: (5..25).collect(),
            shared: None,
            first_choice: 0,
            choices: 1,
            options: GenerateOptions {
                max_new_tokens: tokens,
                eos_token_ids: Some(Vec::new()),
                ..options
            },
            grammar: None,
            priority: 0,
            came,
            deadline: came + Duration::from_secs(600),
            out,
        };
        self.worker.metrics.queued.fetch_add(1, Relaxed);
        self.commands.send(Command::Job(Box::new(job))).unwrap();
        updates
    }

    /// Takes turns until nothing is left to do.
    fn run_all(&mut self) -> Result<(), Error> {
        self.worker.run_turn()?;
        while !self.worker.active.is_empty() || !self.worker.queue.is_empty() {
            self.worker.run_turn()?;
        }
        Ok(())
    }

    /// Takes turns with a device that does so.
    fn run_all_while(&mut self, how: usize) -> Result<(), Error> {
        self.sums.0.store(how, Relaxed);
        let ran = self.run_all();
        self.sums.0.store(WELL, Relaxed);
        ran
    }
}

/// The last thing that a request was told.
fn last(updates: &mut UnboundedReceiver<Update>) -> Update {
    let told = std::iter::from_fn(|| updates.try_recv().ok());
    told.last().expect("an update")
}

#[test]
fn a_client_that_leaves_ends_its_request_within_a_step() {
    let mut own = Loop::new(ServerOptions::default());
    let (stays, leaves) = (own.send(40), own.send(40));
    for _ in 0..5 {
        assert!(own.worker.run_turn().unwrap());
    }
    assert_eq!(own.worker.active.len(), 2);
    let before = own.worker.metrics.generated_tokens.load(Relaxed);
    drop(leaves);
    assert!(own.worker.run_turn().unwrap());
    // The step after that is of the other one alone.
    assert_eq!(own.worker.metrics.generated_tokens.load(Relaxed), before + 1);
    assert_eq!((own.worker.active.len(), own.worker.engine.running()), (1, 1));
    assert_eq!(own.worker.metrics.cancelled.load(Relaxed), 1);
    drop(stays);
    own.commands.send(Command::Stop).unwrap();
    assert!(own.worker.run_turn().unwrap());
    assert!(!own.worker.run_turn().unwrap(), "nothing is left to do");
    assert_eq!((own.worker.bytes, own.worker.engine.running()), (0, 0));
}

#[test]
fn fewer_requests_run_for_a_while_after_a_step_without_memory() {
    let mut own = Loop::new(ServerOptions::default());
    // More often than a device may fail.
    for _ in 0..2 * MOST_FAILURES {
        let mut all = [own.send(3), own.send(3), own.send(3), own.send(3)];
        own.run_all_while(NO_MEMORY).unwrap();
        for updates in &mut all {
            let Update::Failed(error) = last(updates) else { panic!("no failure") };
            assert_eq!((error.status.as_u16(), error.retry_after), (503, Some(1)));
        }
    }
    let mut own = Loop::new(ServerOptions::default());
    let failed: Vec<_> = (0..4).map(|_| own.send(3)).collect();
    own.sums.0.store(NO_MEMORY, Relaxed);
    own.worker.run_turn().unwrap();
    own.sums.0.store(WELL, Relaxed);
    drop(failed);
    let mut all: Vec<_> = (0..8).map(|_| own.send(3)).collect();
    own.worker.run_turn().unwrap();
    assert_eq!((own.worker.active.len(), own.worker.queue.len()), (2, 6));
    own.run_all().unwrap();
    for updates in &mut all {
        assert!(matches!(last(updates), Update::Done { tokens: 3, .. }));
    }
    // Those that have ended make room for as many more.
    let all: Vec<_> = (0..8).map(|_| own.send(3)).collect();
    own.worker.run_turn().unwrap();
    assert_eq!(own.worker.active.len(), 8);
    drop(all);
}

#[test]
fn only_failures_in_a_row_end_the_loop() {
    let mut own = Loop::new(ServerOptions::default());
    for _ in 0..2 * MOST_FAILURES {
        let mut fails = own.send(1);
        own.run_all_while(BROKEN).unwrap();
        let Update::Failed(error) = last(&mut fails) else { panic!("no failure") };
        assert_eq!((error.status.as_u16(), error.retry_after), (500, None));
        // Its one step reads the prompt, of which it tells before it tells of the token.
        let mut works = own.send(1);
        own.run_all().unwrap();
        assert!(matches!(last(&mut works), Update::Done { tokens: 1, .. }));
    }
    for _ in 1..MOST_FAILURES {
        let _updates = own.send(1);
        own.run_all_while(BROKEN).unwrap();
    }
    let _updates = own.send(1);
    assert!(matches!(own.run_all_while(BROKEN), Err(Error::Backend(_))));
}
