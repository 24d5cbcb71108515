//! Memory that runs out. What is large (weights, caches, activations) is an error; where something small has no room the
//! process ends, as Rust programs do, and its files are as after any other end.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use moa_backend_cpu::ops::{WeightData, WeightRef, linear, linear_backward_input, linears};
use moa_backend_cpu::{Cache, CpuBackend, Tensor};
use moa_core::{
    Append, BlockType, CacheType, Dtype, ElasticRule, ExtendInputs, InfluenceInputs, InfluenceSign,
    LayerLayout, Plan, Sharding, Span, SparseAttentionBackend,
};
use moa_models::{
    Checkpoint, Cpu, Decoder, Engine, EngineOptions, Error, GenerateOptions, LogitRows,
    ModelConfig, Shard, Speculation, ThreadRank, Weights, on_ranks,
};

use crate::failing::Failing;
use crate::world::{Random, alone, checkpoint, moa_tiny, write_model};

/// Least size that counts.
static LEAST: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Allocations of that size so far, and which of them fails.
static COUNT: AtomicU64 = AtomicU64::new(0);
static FAILS: AtomicU64 = AtomicU64::new(0);

/// One allocation of some least size fails.
fn fails(size: usize) -> bool {
    size >= LEAST.load(Relaxed) && COUNT.fetch_add(1, Relaxed) + 1 == FAILS.load(Relaxed)
}

#[global_allocator]
static ALLOCATOR: Failing = Failing(fails);

/// Runs with the `number`-th allocation of `least` bytes or more failing, of all threads.
fn with_failure<T>(least: usize, number: u64, run: impl FnOnce() -> T) -> T {
    COUNT.store(0, Relaxed);
    FAILS.store(number, Relaxed);
    LEAST.store(least, Relaxed);
    let result = run();
    LEAST.store(usize::MAX, Relaxed);
    result
}

/// Fails each allocation of `least` bytes in turn; returns how many failed, all with a typed error. Each time on a thread
/// that has kept no memory of earlier runs.
fn each_fails<T: Send>(what: &str, least: usize, run: impl Fn() -> Result<T, Error> + Sync) -> u64 {
    for number in 1..1000 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        match with_failure(least, number, || pool.install(&run)) {
            Ok(_) if COUNT.load(Relaxed) < number => return number - 1,
            Ok(_) => panic!("{what}: allocation {number} failed, and nobody said so"),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("memory"), "{what}: allocation {number}: {error}");
            }
        }
    }
    panic!("{what}: no end of allocations");
}

/// Large ones are errors, after which the model still answers.
#[test]
fn large_allocations_that_fail_are_errors() {
    let _alone = alone();
    let model = &checkpoint().model;
    let plan = Plan::full(model.shape()).unwrap();
    let tokens: Vec<u32> = (0..4000).map(|i| 3 + i % 500).collect();
    let opened = each_fails("open", 64 << 10, || model.open(&plan, 8000, 0));
    assert!(opened >= 2, "{opened}");
    let forward = || {
        let mut sequence = model.open(&plan, 4000, 0)?;
        model.forward(&mut [&mut sequence], &[&tokens], LogitRows::Last)
    };
    let run = each_fails("forward", 128 << 10, forward);
    assert!(run >= 1, "{run}");
    let mut sequence = model.open(&plan, 100, 0).unwrap();
    model.forward(&mut [&mut sequence], &[&tokens[..100]], LogitRows::Last).unwrap();
}

/// What grows with the tokens of a step, or with a model, is an error however small the step: 4 KiB is what one token
/// of a large model takes.
#[test]
fn every_allocation_of_a_step_is_an_error() {
    const TOKENS: usize = 300;
    let _alone = alone();
    let tensor = |shape: &[usize]| {
        let data = (0..shape.iter().product()).map(|i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0);
        Tensor::new(data.collect(), shape).unwrap()
    };
    let all = |what, run: &(dyn Fn() -> Result<(), moa_backend_cpu::Error> + Sync)| {
        let failed = each_fails(what, 4096, || Ok(run()?));
        println!("{what}: {failed} allocations failed");
        assert!(failed >= 1, "{what}");
    };

    // Few and many rows of activations, in blocks and not.
    let (rows, cols) = (64, 512);
    let blocks = vec![0x31; rows * cols / 32 * 18];
    let in_blocks =
        WeightRef::new(WeightData::Blocks(BlockType::Q4_0, &blocks), rows, cols).unwrap();
    let plain = vec![0.5; 600 * 510];
    let plain = WeightRef::new(WeightData::F32(&plain), 600, 510).unwrap();
    for tokens in [5, 100] {
        let x = tensor(&[tokens, cols]);
        all("blocks", &|| linear(&x, in_blocks, None).map(drop));
        all("joined blocks", &|| linears(&x, &[(in_blocks, None); 2]).map(drop));
        let x = tensor(&[tokens, 510]);
        all("floats", &|| linear(&x, plain, None).map(drop));
        let d_y = tensor(&[tokens, 600]);
        all("gradients", &|| linear_backward_input(&d_y, plain).map(drop));
    }

    // Attention and what it appends to, which stays as it was.
    let (q, kv) = (tensor(&[TOKENS, 4, 64]), tensor(&[TOKENS, 2, 64]));
    let spans = [Span::full(2 * TOKENS), Span::new(4, 60).unwrap()];
    let layout = LayerLayout::new(&spans, 2 * TOKENS, 0).unwrap();
    for cache_type in CacheType::ALL {
        let backend = CpuBackend::new(cache_type);
        let cache = Mutex::new(backend.open(&layout, 64).unwrap());
        let whole = |cache: &mut Cache| {
            cache.reset();
            let inputs = ExtendInputs::new(&q, &kv, &kv, 0.1);
            let result = backend.extend(&mut [Append { cache, tokens: TOKENS }], &inputs);
            let appended = if result.is_ok() { TOKENS } else { 0 };
            assert_eq!(cache.as_ref().len(), appended, "{cache_type}");
            Ok(result?.out.into_data())
        };
        let clean = whole(&mut cache.lock().unwrap()).unwrap();
        all("prompt", &|| whole(&mut cache.lock().unwrap()).map(drop));
        all("saved", &|| cache.lock().unwrap().to_bytes().map(drop));
        assert_eq!(whole(&mut cache.lock().unwrap()).unwrap(), clean, "{cache_type}");
    }

    let lse = tensor(&[TOKENS, 4]);
    let inputs = InfluenceInputs {
        q: &q,
        k: &kv,
        v: &kv,
        out: &q,
        lse: &lse,
        d_out: &q,
        window: 100,
        block: 8,
        sign: InfluenceSign::Signed,
        gradients: true,
    };
    let backend = CpuBackend::new(CacheType::F32);
    all("influence", &|| backend.influence(&inputs, 0.1).map(drop));

    let model = &checkpoint().model;
    let plan = Plan::full(model.shape()).unwrap();
    let tokens: Vec<u32> = (0..600).map(|i| 3 + i % 500).collect();
    let forward = || {
        let mut sequence = model.open(&plan, 600, 0)?;
        model.forward(&mut [&mut sequence], &[&tokens], LogitRows::Last)
    };
    assert!(each_fails("model", 8192, forward) >= 4);
}

/// Whichever rank has no memory, and in whichever place: all ranks give up the step, and answer the next request.
#[test]
fn ranks_give_up_a_step_together_and_go_on() {
    const LEAST_BYTES: usize = 8192;
    let _alone = alone();
    let config = ModelConfig::from_file(moa_tiny()).unwrap();
    let weights = Weights::open(moa_tiny()).unwrap();
    let plan = Plan::uniform(config.shape(), 8, ElasticRule::fixed(48)).unwrap();
    let sharding = Sharding::balanced(&plan, 400, 2).unwrap();
    let prompt: Vec<u32> = (0..300).map(|i| 3 + i % 7).collect();
    for speculation in [Speculation::Off, Speculation::Ngram { draft_tokens: 3, adaptive: false }] {
        let told = on_ranks(ThreadRank::group(2).unwrap(), |rank| {
            let shard = Shard::new(&sharding, rank)?;
            let device = Cpu::new(Dtype::F32);
            let model = Arc::new(Decoder::load_shard(device, config.clone(), &weights, shard)?);
            let options = EngineOptions { speculation, ..EngineOptions::default() };
            let mut engine = Engine::new(Arc::clone(&model), options);
            let mut answer = |number: u64| {
                // Threads that have kept no memory of earlier steps.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                let fail = |least: usize| {
                    COUNT.store(0, Relaxed);
                    FAILS.store(number, Relaxed);
                    LEAST.store(least, Relaxed);
                    Ok::<_, Error>(())
                };
                model.agree(|| fail(LEAST_BYTES))?;
                let answered = pool.install(|| {
                    let options = GenerateOptions { max_new_tokens: 8, ..Default::default() };
                    engine.submit(&prompt[..], &plan, options);
                    engine.complete_all()
                });
                let failed = COUNT.load(Relaxed) >= number;
                // All are through.
                let failed = !model.on_all_ranks(vec![!failed])?[0];
                model.agree(|| fail(usize::MAX))?;
                while engine.poll().is_some() {}
                assert!(engine.is_idle());
                Ok::<_, Error>((answered.map(|mut all| all.remove(0).tokens), failed))
            };
            let clean = answer(u64::MAX)?.0?;
            let mut told = Vec::new();
            for number in 1.. {
                match answer(number)? {
                    (Err(error), true) => told.push(error.to_string()),
                    (answered, failed) => {
                        assert_eq!(answered?, clean, "allocation {number}, {failed}");
                        if !failed {
                            break;
                        }
                        panic!("allocation {number} failed, and nobody said so");
                    }
                }
            }
            assert_eq!(answer(u64::MAX)?.0?, clean);
            Ok::<_, Error>(told)
        });
        let told = told.unwrap();
        assert_eq!(told[0], told[1]);
        println!("{speculation:?}: {} allocations failed", told[0].len());
        for rank in 0..2 {
            let own = told[0].iter().filter(|error| error.starts_with(&format!("rank {rank},")));
            assert!(own.count() >= 8, "{:?}", told[0]);
        }
        assert!(told[0].iter().all(|error| error.contains("memory")), "{:?}", told[0]);
    }
}

/// Exit code of a run that was told of a failure.
const TOLD: i32 = 3;

/// Loads a model, and answers questions to a log.
fn answers(folder: &Path) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(Cpu::default(), folder)?;
    let plan = Plan::full(checkpoint.model.shape())?;
    let log = folder.join("items.jsonl");
    crate::evaluating::evaluate_of(&checkpoint, &plan, &log)
}

/// The process that runs out of memory.
#[test]
#[ignore = "run by small_allocations_that_fail_end_the_process_at_worst"]
fn in_a_process_of_its_own() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let folder = PathBuf::from(variable("MOA_FOLDER"));
    let [least, number] = ["MOA_LEAST", "MOA_NUMBER"].map(|name| variable(name).parse().unwrap());
    let result = with_failure(least as usize, number, || answers(&folder));
    fs::write(folder.join("count"), COUNT.load(Relaxed).to_string()).unwrap();
    if let Err(error) = result {
        fs::write(folder.join("told"), error.to_string()).unwrap();
        std::process::exit(TOLD);
    }
}

/// Any allocation at all: the run is told, or it ends by the message of Rust's runtime; its log is whole, and the next run
/// goes on from there.
#[test]
fn small_allocations_that_fail_end_the_process_at_worst() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    let log = folder.join("items.jsonl");
    let run = |least: usize, number: u64| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "memory::in_a_process_of_its_own", "--ignored", "--nocapture"]);
        command.env("MOA_FOLDER", folder).env("RAYON_NUM_THREADS", "1");
        command.env("MOA_LEAST", least.to_string()).env("MOA_NUMBER", number.to_string());
        command.output().unwrap()
    };
    let count = || fs::read_to_string(folder.join("count")).unwrap().parse::<u64>().unwrap();
    let mut random = Random::new(3);
    let (mut told, mut ended) = (0, 0);
    for least in [1, 4096] {
        let _ = fs::remove_file(&log);
        assert!(run(least, u64::MAX).status.success());
        let (all, clean) = (count(), crate::evaluating::lines(&fs::read(&log).unwrap()));
        for _ in 0..10 {
            fs::remove_file(&log).unwrap();
            let number = 1 + random.below(all);
            let output = run(least, number);
            let stderr = String::from_utf8_lossy(&output.stderr);
            let place = || format!("allocation {number} of {least} bytes: {stderr}");
            match (output.status.code(), output.status.signal()) {
                (Some(0), _) => {}
                (Some(TOLD), _) => told += 1,
                (_, Some(libc::SIGABRT)) if stderr.contains("memory allocation of") => ended += 1,
                other => panic!("{other:?} {}", place()),
            }
            let left = crate::evaluating::lines(&fs::read(&log).unwrap_or_default());
            assert_eq!(left, clean[..left.len()], "{}", place());
            assert!(run(least, u64::MAX).status.success());
            assert_eq!(crate::evaluating::lines(&fs::read(&log).unwrap()), clean, "{}", place());
        }
    }
    println!("20 allocations that failed: {told} errors, {ended} ends of the process");
    assert!(ended + told > 0);
}
