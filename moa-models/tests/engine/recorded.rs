//! Steps that a device records until its memory is short, tokens that it draws itself, and logits that are no numbers:
//! nobody else is to notice.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};

use moa_core::{Sharding, SparseAttentionBackend as _};
use moa_models::{
    Brought, Checkpoint, Communicator, Cpu, Decoder, Device, Draw, Engine, EngineOptions, Error,
    Event, GenerateOptions, LinearWeights, Load, LogitRows, MappedTensor, Math, ModelConfig, Rank,
    Recordings, Replay, ReplayBatch, Result, RopeTable, SamplingOptions, Sequence, Shard,
    ThreadRank, Wait, Weights, on_ranks,
};

use crate::{full, greedy, moa_tiny, narrow, text};

type Tensor = <Cpu as Device>::Tensor;
type Matrix = <Cpu as Device>::Matrix;
type Vector = <Cpu as Device>::Vector;
type Joined = <Cpu as Device>::Joined;
type Rotations = <Cpu as Device>::Rotations;
type Cache = <<Cpu as Device>::Attention as moa_core::SparseAttentionBackend>::Cache;

/// A CPU that offers to record steps.
struct Recorder {
    cpu: Cpu,
    /// Recorded steps that there is memory to prepare.
    room: AtomicUsize,
    /// Layers that such a step has memory for.
    layers: usize,
    /// How often it was asked for one.
    asked: AtomicUsize,
    /// Whether steps are run that compute nothing.
    idles: AtomicBool,
    /// A token whose embedding is no number.
    poison: AtomicU32,
    /// Whether it draws tokens.
    samples: bool,
    /// Numbers that were brought to the host.
    brought: AtomicUsize,
}

impl Recorder {
    fn model(room: usize) -> Arc<Decoder<Self>> {
        Self::open(room, false)
    }

    fn open(room: usize, samples: bool) -> Arc<Decoder<Self>> {
        Checkpoint::open(Self::new(room, 1, samples), moa_tiny()).unwrap().model
    }

    fn new(room: usize, layers: usize, samples: bool) -> Self {
        let (room, asked, poison) = (room.into(), 0.into(), u32::MAX.into());
        let (cpu, idles, brought) = (Cpu::default(), false.into(), 0.into());
        Self { cpu, room, layers, asked, idles, poison, samples, brought }
    }
}

fn short<T>() -> Result<T> {
    Err(Error::OutOfMemory { what: "a recorded step", bytes: None, free: None })
}

/// A step whose memory ends behind its first layers.
struct Half {
    tokens: Vec<u32>,
    layers: AtomicUsize,
    logits: Tensor,
}

impl Replay<Recorder> for Half {
    fn run(
        &mut self,
        _: &Recorder,
        tokens: &[u32],
        _: &[usize],
        step: &dyn Fn(&dyn Replay<Recorder>) -> Result<()>,
    ) -> Result<()> {
        self.tokens = tokens.to_vec();
        step(self)
    }

    fn embed(&self, device: &Recorder, table: &Matrix, factor: f32) -> Result<Tensor> {
        device.embed(table, &self.tokens, factor)
    }

    fn attend(&self, device: &Recorder, _: usize, [q, ..]: [Tensor; 3]) -> Result<Tensor> {
        if self.layers.fetch_add(1, SeqCst) < device.layers { Ok(q) } else { short() }
    }

    fn write_logits(&self, _: &Recorder, _: &Tensor, _: &Matrix, _: Range<usize>) -> Result<()> {
        unreachable!("the second layer fails")
    }

    fn finish(&self, _: &Recorder) -> Result<()> {
        unreachable!("the second layer fails")
    }

    fn logits(&self) -> &Tensor {
        &self.logits
    }

    fn sample(&self, _: &Recorder, _: &[Draw], _: &[f64]) -> Result<()> {
        unreachable!("no step was run")
    }

    fn chosen(&self) -> Result<Vec<Option<u32>>> {
        unreachable!("no step was run")
    }

    fn advance(&self, _: &mut Cache) -> Result<()> {
        unreachable!("no step was run")
    }
}

/// Steps of batches of up to 1, 2, 4 and 8 sequences that give the token 0, and zeros as keys and values.
struct Idle {
    /// The one that runs is the last one.
    sizes: Vec<usize>,
    logits: Tensor,
}

impl Replay<Recorder> for Idle {
    unsafe fn replace(
        &mut self,
        device: &Recorder,
        batch: &ReplayBatch<'_, Recorder>,
        prepares: bool,
    ) -> Result<bool> {
        assert!(batch.changes && batch.tokens == 1);
        let sequences = batch.caches[0].len();
        let size = sequences.next_power_of_two();
        match self.sizes.iter().position(|own| *own == size) {
            Some(at) => drop(self.sizes.remove(at)),
            None if !prepares => return Ok(false),
            None => {}
        }
        self.sizes.push(size);
        let shape = [sequences, batch.vocab_size];
        self.logits = device.tensor(vec![0.0; shape.iter().product()], &shape)?;
        Ok(true)
    }

    fn recordings(&self) -> usize {
        self.sizes.len()
    }

    fn run(
        &mut self,
        device: &Recorder,
        tokens: &[u32],
        lens: &[usize],
        _: &dyn Fn(&dyn Replay<Recorder>) -> Result<()>,
    ) -> Result<()> {
        let rows = device.shape(&self.logits)[0];
        assert_eq!((tokens.len(), lens.len()), (rows, rows), "of the batch that came last");
        Ok(())
    }

    fn embed(&self, _: &Recorder, _: &Matrix, _: f32) -> Result<Tensor> {
        unreachable!("nothing is described")
    }

    fn attend(&self, _: &Recorder, _: usize, _: [Tensor; 3]) -> Result<Tensor> {
        unreachable!("nothing is described")
    }

    fn write_logits(&self, _: &Recorder, _: &Tensor, _: &Matrix, _: Range<usize>) -> Result<()> {
        unreachable!("nothing is described")
    }

    fn finish(&self, _: &Recorder) -> Result<()> {
        unreachable!("nothing is described")
    }

    fn sample(&self, _: &Recorder, _: &[Draw], _: &[f64]) -> Result<()> {
        unreachable!("nothing is drawn")
    }

    fn logits(&self) -> &Tensor {
        &self.logits
    }

    fn chosen(&self) -> Result<Vec<Option<u32>>> {
        let rows = Cpu::default().shape(&self.logits)[0];
        Ok(vec![Some(0); rows])
    }

    fn advance(&self, cache: &mut Cache) -> Result<()> {
        let (heads, dim) = {
            let state: &moa_core::CacheState = (*cache).as_ref();
            (state.layout().heads().len(), state.head_dim())
        };
        let cpu = Cpu::default();
        let zeros = cpu.tensor(vec![0.0; heads * dim], &[1, heads, dim])?;
        let inputs = moa_core::ExtendInputs::new(&zeros, &zeros, &zeros, 1.0);
        let batch = &mut [moa_core::Append { cache, tokens: 1 }];
        cpu.attention().extend(batch, &inputs)?;
        Ok(())
    }
}

impl Device for Recorder {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vector;
    type Joined = Joined;
    type Rotations = Rotations;
    type Attention = <Cpu as Device>::Attention;

    fn attention(&self) -> &Self::Attention {
        self.cpu.attention()
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        self.cpu.shape(x)
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        self.cpu.tensor(values, shape)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        let values = self.cpu.values(x)?;
        self.brought.fetch_add(values.len(), SeqCst);
        Ok(values)
    }

    fn can_sample(&self) -> bool {
        self.samples
    }

    /// One of the likeliest by its number, as good as any other.
    fn sample(&self, logits: &Tensor, draws: &[Draw], units: &[f64]) -> Result<Vec<Option<u32>>> {
        let (vocab, values) = (self.shape(logits)[1], self.cpu.values(logits.clone())?);
        assert_eq!(values.len(), vocab * draws.len());
        let choose = |((row, draw), unit): ((&[f32], &Draw), &f64)| {
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            let most = if draw.top_k == 0 { 50 } else { draw.top_k };
            let at = if draw.temperature == 0.0 { 0.0 } else { unit * most as f64 };
            let by_logit =
                |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            Some(*order.select_nth_unstable_by(at as usize, by_logit).1)
        };
        Ok(values.chunks(vocab).zip(draws).zip(units).map(choose).collect())
    }

    fn replayed_tokens(&self, _: usize) -> usize {
        4
    }

    unsafe fn replay(
        &self,
        batch: &ReplayBatch<'_, Self>,
    ) -> Result<Option<Box<dyn Replay<Self>>>> {
        self.asked.fetch_add(1, SeqCst);
        if self.idles.load(SeqCst) {
            let mut idle = Idle { sizes: Vec::new(), logits: self.tensor(vec![0.0], &[1, 1])? };
            // SAFETY: it uses no cache.
            unsafe { idle.replace(self, batch, true) }?;
            return Ok(Some(Box::new(idle)));
        }
        match self.room.fetch_update(SeqCst, SeqCst, |room| room.checked_sub(1)) {
            Ok(_) => Ok(Some(Box::new(Half {
                tokens: Vec::new(),
                layers: 0.into(),
                logits: self.tensor(vec![0.0], &[1, 1])?,
            }))),
            Err(_) => short(),
        }
    }
}

impl Load for Recorder {
    fn matrix(&self, tensor: MappedTensor) -> Result<Matrix> {
        self.cpu.matrix(tensor)
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Vector> {
        self.cpu.vector(tensor)
    }

    fn join(&self, parts: Vec<LinearWeights>) -> Result<Joined> {
        self.cpu.join(parts)
    }
}

impl Math for Recorder {
    fn embed(&self, table: &Matrix, ids: &[u32], factor: f32) -> Result<Tensor> {
        let rows = self.cpu.embed(table, ids, factor)?;
        let (shape, mut values) = (self.shape(&rows), self.cpu.values(rows)?);
        for (row, id) in values.chunks_mut(shape[1]).zip(ids) {
            if *id == self.poison.load(SeqCst) {
                row.fill(f32::NAN);
            }
        }
        self.tensor(values, &shape)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor> {
        self.cpu.rms_norm(x, weight, eps)
    }

    fn linears(&self, x: &Tensor, joined: &Joined) -> Result<Vec<Tensor>> {
        self.cpu.linears(x, joined)
    }

    fn linear_add(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &Matrix,
        bias: Option<&Vector>,
    ) -> Result<Tensor> {
        self.cpu.linear_add(x, y, weight, bias)
    }

    fn logits(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        self.cpu.logits(x, weight)
    }

    fn rotations(&self, sequences: &[(&RopeTable, Range<usize>)]) -> Result<Rotations> {
        self.cpu.rotations(sequences)
    }

    fn rope(&self, x: Tensor, head_dim: usize, by: &Rotations, inverse: bool) -> Result<Tensor> {
        self.cpu.rope(x, head_dim, by, inverse)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        self.cpu.reshape(x, shape)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.cpu.swiglu(gate, up)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.cpu.add(x, y)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        self.cpu.rows(x, rows)
    }
}

#[test]
fn a_step_that_memory_is_short_to_record_is_run_without() {
    let tokens = text(200);
    for plan in [full(), narrow()] {
        // None is prepared; or all are, and fail half-way.
        for room in [0, 8] {
            let model = Recorder::model(room);
            let open = || {
                let mut sequence = model.open(&plan, 200, 8).unwrap();
                model.prefill(&mut sequence, &tokens[..100], 200).unwrap();
                sequence
            };
            let (mut plain, mut session) = (open(), model.session(vec![open()]).unwrap());
            assert_eq!(session.wide(7), Some(4));
            let mut at = 100;
            for new in [1, 1, 1, 1, 4, 4, 1, 1] {
                let part = &tokens[at..at + new];
                at += new;
                let rows: Vec<usize> = (0..new).collect();
                let expected = model.forward(&mut [&mut plain], &[part], LogitRows::Rows(&rows));
                let got = match new {
                    1 => session.step(&model, part),
                    _ => session.check(&model, &[part.to_vec()]),
                };
                assert_eq!(got.unwrap(), model.device().values(expected.unwrap()).unwrap(), "{at}");
            }
            // Neither is tried again.
            assert_eq!(model.device().asked.load(SeqCst), 2);
            assert_eq!(session.wide(7), None);
        }
    }
}

/// What was recorded goes from session to session, and is run from the first step on where it fits.
#[test]
fn sequences_that_join_and_leave_run_what_was_recorded_of_others() {
    let model = Recorder::model(0);
    model.device().idles.store(true, SeqCst);
    let mut kept = Recordings::default();
    let mut sequences = Vec::new();
    for (many, recorded_before) in [(1, 0), (2, 1), (3, 2), (4, 3), (2, 3), (1, 3), (3, 3)] {
        sequences.truncate(many);
        sequences.resize_with(many, || model.open(&full(), 100, 0).unwrap());
        let lens: Vec<usize> = sequences.iter().map(Sequence::len).collect();
        let mut session = model.session_with(sequences, kept).unwrap();
        assert_eq!(session.recordings(), recorded_before);
        let is_new = recorded_before < 3;
        for step in 0..4 {
            let next = session.step_greedy(&model, &vec![5; many]).unwrap();
            // The first steps of a size that is new are plain.
            let is_idle = next.iter().all(|token| *token == 0);
            assert_eq!(is_idle, !is_new || step >= 2, "{many} sequences, step {step}");
        }
        (sequences, kept) = session.into_parts();
        assert!(sequences.iter().zip(lens).all(|(sequence, len)| sequence.len() == len + 4));
    }
    assert_eq!((kept.count(), model.device().asked.load(SeqCst)), (3, 1));
    let other = Recorder::model(0);
    let sequence = other.open(&full(), 100, 0).unwrap();
    let error = other.session_with(vec![sequence], kept).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

/// One engine hands what was recorded of its requests to another one, whose first steps are launched; no other model takes it.
#[test]
fn an_engine_runs_what_another_one_had_recorded() {
    let model = Recorder::model(0);
    model.device().idles.store(true, SeqCst);
    let run = |engine: &mut Engine<Recorder>| {
        engine.submit(vec![5; 20], &full(), greedy(8));
        let [completion] = &engine.complete_all().unwrap()[..] else { panic!("one request") };
        completion.tokens.iter().filter(|token| **token == 0).count()
    };
    let mut engines = [0, 1].map(|_| Engine::new(Arc::clone(&model), EngineOptions::default()));
    // Steps that idle choose token 0.
    let late = run(&mut engines[0]);
    assert_eq!((engines[0].recordings(), engines[1].recordings()), (1, 0));
    let recordings = engines[0].take_recordings();
    assert_eq!((engines[0].recordings(), recordings.count()), (0, 1));
    engines[1].set_recordings(recordings).unwrap();
    assert_eq!(run(&mut engines[1]), late + 2, "the first two steps are launched as well");
    assert_eq!((engines[1].recordings(), model.device().asked.load(SeqCst)), (1, 1));
    let mut other = Engine::new(Recorder::model(0), EngineOptions::default());
    let error = other.set_recordings(engines[1].take_recordings()).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    // The first engine has to have them recorded anew.
    assert_eq!((run(&mut engines[0]), model.device().asked.load(SeqCst)), (late, 2));
}

/// Sums over the host that are said to be launched, so that steps are recorded.
struct Launched(Arc<ThreadRank>);

impl Rank for Launched {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn fail(&self) {
        self.0.fail();
    }

    fn failed(&self) -> Option<usize> {
        self.0.failed()
    }

    fn gather(&self, own: Brought, wait: Wait) -> Result<Arc<[Brought]>> {
        self.0.gather(own, wait)
    }
}

impl Communicator<Recorder> for Launched {
    fn all_reduce(&self, device: &Recorder, x: &mut Tensor) -> Result<()> {
        self.0.all_reduce(device, x)
    }

    fn only_launches(&self) -> bool {
        true
    }
}

#[test]
fn a_step_that_one_rank_has_no_memory_to_record_is_run_without_on_all() -> Result<()> {
    let (tokens, plan) = (text(120), narrow());
    let config = ModelConfig::from_file(moa_tiny())?;
    let (weights, sharding) =
        (Weights::open(moa_tiny())?, Sharding::balanced(&plan, 200, 2).unwrap());
    // The second one has no memory to prepare it, or in its second layer.
    for (room, layers) in [(0, 0), (8, 1)] {
        on_ranks(ThreadRank::group(2)?, |rank| {
            let device = match rank.rank() {
                0 => Recorder::new(8, usize::MAX, false),
                _ => Recorder::new(room, layers, false),
            };
            let shard = Shard::new(&sharding, Launched(rank))?;
            let model = Decoder::load_shard(device, config.clone(), &weights, shard)?;
            let open = || {
                let mut sequence = model.open(&plan, 200, 8)?;
                model.prefill(&mut sequence, &tokens[..100], 200)?;
                Ok::<_, Error>(sequence)
            };
            let (mut plain, mut session) = (open()?, model.session(vec![open()?])?);
            let mut at = 100;
            for new in [1, 1, 1, 1, 4, 4, 1, 1] {
                let part = &tokens[at..at + new];
                at += new;
                let rows: Vec<usize> = (0..new).collect();
                let expected = model.forward(&mut [&mut plain], &[part], LogitRows::Rows(&rows))?;
                let got = match new {
                    1 => session.step(&model, part)?,
                    _ => session.check(&model, &[part.to_vec()])?,
                };
                assert_eq!(got, model.device().values(expected)?, "{at}");
            }
            assert_eq!(model.device().asked.load(SeqCst), 2);
            Ok::<_, Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn a_session_that_was_asked_for_few_tokens_has_more_later() {
    let model = Recorder::model(0);
    let mut session = model.session(vec![model.open(&full(), 50, 0).unwrap()]).unwrap();
    assert_eq!(
        [1, 3, 0, 9, 2].map(|most| session.wide(most)),
        [None, Some(3), None, Some(4), Some(2)]
    );
}

/// Mixed requests get what they get alone, and the host sees the logits of those alone that look at them.
#[test]
fn each_request_is_drawn_by_its_own_options() {
    let words = text(200);
    let warm = SamplingOptions { temperature: 0.8, ..Default::default() };
    let by_device = [
        SamplingOptions::default(),
        warm.clone(),
        SamplingOptions { top_k: Some(5), ..warm.clone() },
        SamplingOptions { temperature: 1.5, top_k: Some(9), ..warm.clone() },
    ];
    let with = |(seed, sampling): (u64, SamplingOptions)| {
        let sampling = SamplingOptions { seed, ..sampling };
        GenerateOptions { sampling, ..greedy(16) }
    };
    let mut ways: Vec<GenerateOptions> = (3..).zip(by_device).map(with).collect();
    let drawn = ways.len();
    ways.push(with((7, SamplingOptions { repetition_penalty: 1.2, ..warm })));
    ways.push(GenerateOptions { logprobs: Some(2), ..greedy(16) });
    for speculation in [moa_models::Speculation::Off, moa_models::Speculation::ngram()] {
        let model = Recorder::open(0, true);
        let brought = |ways: &[usize], all: &[GenerateOptions]| {
            let options = EngineOptions { speculation, ..EngineOptions::default() };
            let mut engine = Engine::new(Arc::clone(&model), options);
            for way in ways {
                let prompt = &words[way * 20..way * 20 + 40];
                engine.submit(prompt, &full(), all[*way].clone());
            }
            model.device().brought.store(0, SeqCst);
            let texts: Vec<_> =
                engine.complete_all().unwrap().into_iter().map(|made| made.tokens).collect();
            (texts, model.device().brought.load(SeqCst))
        };
        let all: Vec<usize> = (0..ways.len()).collect();
        let (mixed, seen) = brought(&all, &ways);
        let (_, unseen) = brought(&all[..drawn], &ways);
        assert_eq!(unseen, 0, "nobody looks at these");
        let vocab = model.config().vocab_size;
        assert_eq!(seen % vocab, 0);
        if speculation == moa_models::Speculation::Off {
            assert_eq!(seen, 16 * 2 * vocab, "two rows a step, and no others");
        }
        for way in all {
            assert_eq!(mixed[way], brought(&[way], &ways).0[0], "{way} with {speculation:?}");
        }
    }
}

#[test]
fn logits_that_are_no_numbers_end_the_request_that_they_are_of() {
    let model = Recorder::model(0);
    let options = EngineOptions::default();
    let run = |prompts: &[&[u32]]| {
        let mut engine = Engine::new(Arc::clone(&model), options);
        let submit = |prompt: &&[u32]| engine.submit(*prompt, &full(), greedy(12));
        let ids: Vec<_> = prompts.iter().map(submit).collect();
        let (mut texts, mut failures) = (vec![Vec::new(); prompts.len()], Vec::new());
        while let Some(event) = engine.step().unwrap() {
            let number = ids.iter().position(|id| *id == event.id()).unwrap();
            match event {
                Event::Done { completion, .. } => texts[number] = completion.tokens,
                Event::Failed { error, .. } => failures.push((number, error)),
                _ => {}
            }
        }
        (texts, failures)
    };
    let words = text(120);
    let prompts = [&words[..40], &words[70..120]];
    let (texts, failures) = run(&prompts);
    assert!(failures.is_empty(), "{failures:?}");
    let is_own = |token: &&u32| !texts[1].contains(token) && !words.contains(token);
    let poison = *texts[0][..10].iter().find(is_own).expect("a token that the other has not");
    model.device().poison.store(poison, SeqCst);
    let (others, failures) = run(&prompts);
    assert_eq!(others, [Vec::new(), texts[1].clone()]);
    assert!(matches!(&failures[..], [(0, Error::Logits { .. })]), "{failures:?}");
    // A guess that is wrong is nothing to anybody.
    let mut sequence = model.open(&full(), 100, 8).unwrap();
    let logits = model.prefill(&mut sequence, prompts[1], 100).unwrap();
    let mut session = model.session(vec![sequence]).unwrap();
    let next = crate::likeliest(&logits);
    let chosen = session.check_greedy(&model, &[vec![next, poison, 1]]).unwrap();
    assert_eq!(chosen, [Some(texts[1][1]), None, None]);
}
