//! KV memory is measured, not only computed: a sequence holds the bytes that its plan promises.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;

use moa_conformance::{Stop, Verdict, run, trials};
use moa_core::{ElasticRule, Plan};
use moa_models::{
    CacheType, Cpu, Decoder, Engine, EngineOptions, GenerateOptions, ModelConfig, Result, Weights,
};

fn main() -> ExitCode {
    run(trials![
        sequences_hold_the_bytes_that_their_plan_promises,
        those_of_a_longer_context_do_too,
    ])
}

/// The system's allocator, with a count of the live bytes.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size, Relaxed);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[track_caller]
fn within_2_percent(got: usize, expected: u64, what: &str) {
    let ratio = got as f64 / expected as f64;
    assert!((0.98..=1.02).contains(&ratio), "{what}: {got} bytes, not {expected}");
}

/// Generates in a sequence of `capacity` tokens, which the prompt nearly fills. Returns by how much
/// the heap has grown then, all intermediate results dropped.
fn holds_what_it_promises(
    model: &Arc<Decoder<Cpu>>,
    plan: &Plan,
    capacity: usize,
    cache: CacheType,
) -> Result<usize> {
    let vocab = model.config().vocab_size as u32;
    let eos_token_ids = Some(Vec::new());
    let options = GenerateOptions { max_new_tokens: 8, eos_token_ids, ..Default::default() };
    let prompt: Vec<u32> = (0..capacity as u32 - 8).map(|i| i * 7919 % vocab).collect();
    let promised = plan.kv_bytes(capacity, cache.slot_bytes(plan.shape().head_dim));

    let before = LIVE.load(Relaxed);
    let mut engine = Engine::new(Arc::clone(model), EngineOptions::default());
    let id = engine.resume(model.open(plan, capacity, 0)?, prompt, options);
    assert_eq!(engine.complete_all()?[0].tokens.len(), 8);
    let sequence = engine.reclaim(id).expect("it was resumed");
    drop(engine);
    assert_eq!(model.kv_bytes(&sequence), promised);
    let held = LIVE.load(Relaxed);
    drop(sequence);
    let after = LIVE.load(Relaxed);
    within_2_percent(held - after, promised, "freed with the sequence");
    Ok(held - before)
}

fn load(folder: &Path, cache: CacheType) -> Result<Arc<Decoder<Cpu>>> {
    let (config, weights) = (ModelConfig::from_file(folder)?, Weights::open(folder)?);
    Decoder::load(Cpu::new(cache), config, &weights).map(Arc::new)
}

fn quarter(model: &Decoder<Cpu>) -> Result<Plan> {
    let plan = Plan::uniform(model.shape(), 64, ElasticRule::new(0.0, 0.25)?)?;
    // Heads differ, the mean stays: one keeps everything for what three others leave out.
    let rule = |beta| ElasticRule::new(0.0, beta).map(Into::into);
    let plan = plan.with_rule(1, 0, rule(0.625)?)?;
    (0..3).try_fold(plan, |plan, layer| Ok(plan.with_rule(layer, 1, rule(0.125)?)?))
}

/// One at a time: another one would be counted with it. In a thread of its own, which gives back the buffers that it
/// keeps when it ends: here, and not in the middle of the next.
fn alone<E: Send>(body: impl FnOnce() -> Result<(), E> + Send) -> Result<(), E> {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ended = thread::scope(|scope| scope.spawn(body).join());
    ended.unwrap_or_else(|panic| resume_unwind(panic))
}

fn sequences_hold_the_bytes_that_their_plan_promises() -> Result<()> {
    alone(caches_of_moa_tiny)
}

fn caches_of_moa_tiny() -> Result<()> {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
    for cache in [CacheType::F32, CacheType::Bf16, CacheType::Int4] {
        let model = load(&tiny, cache)?;
        let (dense, plan) = (Plan::full(model.shape())?, quarter(&model)?);
        let slot_bytes = cache.slot_bytes(model.shape().head_dim);
        assert_eq!(plan.kv_bytes(2048, slot_bytes) * 4, dense.kv_bytes(2048, slot_bytes));
        // What is called dense has 16 bits at least.
        let told = slot_bytes.max(CacheType::Bf16.slot_bytes(model.shape().head_dim));
        assert_eq!(dense.kv_bytes(2048, told), model.dense_bytes(2048)?);
        // The first run also leaves each thread the buffers that its next run reuses.
        holds_what_it_promises(&model, &dense, 2048, cache)?;
        let promised = plan.kv_bytes(2048, slot_bytes);
        let mut grown = usize::MAX;
        // A thread that got no work in the runs before makes its buffers in this one.
        for _ in 0..4 {
            grown = grown.min(holds_what_it_promises(&model, &plan, 2048, cache)?);
            if grown as f64 <= 1.02 * promised as f64 {
                break;
            }
        }
        within_2_percent(grown, promised, "grown by the sequence");
    }
    Ok(())
}

fn those_of_a_longer_context_do_too() -> Verdict {
    let Some(data) = std::env::var_os("MOA_TEST_DATA") else {
        return Err(Stop::ignored("MOA_TEST_DATA does not name the folder of real models"));
    };
    let of_moa_small = || -> Result<()> {
        let model = load(&Path::new(&data).join("models/moa-small"), CacheType::F32)?;
        let plan = quarter(&model)?;
        let slot_bytes = CacheType::F32.slot_bytes(model.shape().head_dim);
        assert_eq!(plan.kv_bytes(8192, slot_bytes) * 4, model.dense_bytes(8192)?);
        holds_what_it_promises(&model, &plan, 8192, CacheType::F32)?;
        Ok(())
    };
    Ok(alone(of_moa_small)?)
}
