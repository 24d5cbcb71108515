//! The model that comes with the repository, on a GPU: the same tokens as on the CPU.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_WGPU=1` they fail then. A software Vulkan driver
//! is a GPU.

#[allow(dead_code, reason = "the other tests of files use all of it")]
#[path = "loading/gguf/file.rs"]
mod file;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use moa_backend_wgpu::cubecl::future::block_on;
use moa_backend_wgpu::cubecl::wgpu::{WgpuSetup, wgpu};
use moa_backend_wgpu::{Device as Gpu, Error as WgpuError};
use moa_conformance::{Stop, Verdict, trials};
use moa_core::{CacheType, ElasticRule, HeadRule, Influence, ModelShape, Plan, Span};
use moa_models::{
    Backward, Checkpoint, Cpu, Decoder, Device, Dtype, EngineOptions, Error, Event,
    GenerateOptions, Item, LogitRows, Math, ModelConfig, Objective, Weights, Wgpu,
};

fn main() -> ExitCode {
    moa_conformance::run(trials![
        generation_and_logits_equal_those_of_the_cpu,
        heads_of_narrow_types_give_what_the_cpu_gives,
        cache_bytes_are_what_the_plan_promises,
        saved_and_offloaded_sequences_go_on_bit_for_bit,
        influence_equals_that_of_the_cpu,
        families_give_what_the_cpu_gives,
        recorded_steps_are_the_same_steps,
        blocks_give_what_the_cpu_gives,
        a_lost_gpu_fails_the_requests_that_run_and_all_later_ones,
    ])
}

fn moa_tiny() -> PathBuf {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let places = [built, "assets/moa-tiny"].map(Path::new);
    places.into_iter().find(|path| path.is_dir()).unwrap_or(places[0]).to_path_buf()
}

/// The GPU, for one trial at a time. Trials without it are ignored; with `MOA_REQUIRE_WGPU=1` they fail.
fn device() -> Result<(Gpu, Alone), Stop> {
    static ALONE: Mutex<()> = Mutex::new(());
    let lock = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Gpu::open() {
        Ok(device) => Ok((device.clone(), Alone { device, _lock: lock })),
        Err(error) => Err(Stop::unless_required("MOA_REQUIRE_WGPU", error)),
    }
}

/// No other trial has the GPU, nor does the process end, before what this one queued is done.
struct Alone {
    device: Gpu,
    _lock: MutexGuard<'static, ()>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
    }
}

/// Spans of 48 and 24 keys in turn: prompts of a hundred tokens wrap every ring.
fn narrow(shape: ModelShape) -> Plan {
    let heads = (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |h| layer + h));
    let span = |place| if place % 2 == 1 { 24 } else { 48 };
    let rules = heads.map(|place| HeadRule::from(ElasticRule::fixed(span(place))));
    Plan::new(shape, 8, 9, rules.collect()).unwrap()
}

const TEXT: &str = "The red box is in the garden. The key of the red box is 7142. A pilot who could \
    not see the coast still knew how fast the ship had sailed, for how many hours, and in which \
    direction; from these three figures he drew a line on paper and said that the harbour lay at \
    its end. When the line was wrong nobody came home to say so. What is the key of the red box?";

/// Tokens and logits of the step after the prompt, read in chunks of 50.
fn run<D: Math>(checkpoint: &Checkpoint<D>, narrow_spans: bool) -> (Vec<Vec<u32>>, Vec<f32>) {
    let shape = checkpoint.model.shape();
    run_plan(checkpoint, &if narrow_spans { narrow(shape) } else { Plan::full(shape).unwrap() })
}

fn run_plan<D: Math>(checkpoint: &Checkpoint<D>, plan: &Plan) -> (Vec<Vec<u32>>, Vec<f32>) {
    let model = &checkpoint.model;
    let long = checkpoint.tokenizer.encode(TEXT, true).unwrap();
    let short = &long[..9];
    let mut sequence = model.open(plan, long.len(), 0).unwrap();
    let mut logits = Vec::new();
    for chunk in long.chunks(50) {
        let rows: Vec<usize> = (0..chunk.len()).collect();
        let x = model.forward(&mut [&mut sequence], &[chunk], LogitRows::Rows(&rows)).unwrap();
        logits.extend(model.device().values(x).unwrap());
    }
    let eos_token_ids = Some(Vec::new());
    let options = GenerateOptions { max_new_tokens: 12, eos_token_ids, ..Default::default() };
    let mut engine = checkpoint.engine(EngineOptions::default());
    for prompt in [&long[..], short] {
        engine.submit(prompt, plan, options.clone());
    }
    (engine.complete_all().unwrap().into_iter().map(|made| made.tokens).collect(), logits)
}

fn generation_and_logits_equal_those_of_the_cpu() -> Verdict {
    let (device, _alone) = device()?;
    let cpu = Checkpoint::open(Cpu::new(Dtype::F32), moa_tiny()).unwrap();
    let gpu = Checkpoint::open(Wgpu::new(&device, Dtype::F32), moa_tiny()).unwrap();
    for narrow_spans in [false, true] {
        let (expected, expected_logits) = run(&cpu, narrow_spans);
        let (tokens, logits) = run(&gpu, narrow_spans);
        assert_eq!(tokens, expected);
        assert_eq!(logits.len(), expected_logits.len());
        let pairs = logits.iter().zip(&expected_logits);
        let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 2e-3, "narrow {narrow_spans}: logits differ by {largest}");
    }
    Ok(())
}

/// Layers whose heads have other types than the device, and one type for all. A code may turn out one larger where sums
/// before it differ by their last bit.
fn heads_of_narrow_types_give_what_the_cpu_gives() -> Verdict {
    let (device, _alone) = device()?;
    let cpu = Checkpoint::open(Cpu::new(CacheType::Int8), moa_tiny()).unwrap();
    let gpu = Checkpoint::open(Wgpu::new(&device, CacheType::Int8), moa_tiny()).unwrap();
    let plan = narrow(cpu.model.shape());
    let heads = plan.rules().len();
    let types = [None, Some(CacheType::K8V4), Some(CacheType::Bf16), Some(CacheType::Int8)];
    let types = (0..heads).map(|head| types[head % 4]).collect();
    let plan = plan.with_cache_types(types).unwrap();
    let (expected, expected_logits) = run_plan(&cpu, &plan);
    let (tokens, logits) = run_plan(&gpu, &plan);
    assert_eq!(tokens, expected);
    let pairs = logits.iter().zip(&expected_logits);
    let mean = pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() / logits.len() as f32;
    println!("logits differ by {mean} on average");
    assert!(mean < 5e-3, "logits differ by {mean} on average");
    Ok(())
}

/// Layers whose heads have several types, some with scales; rings that have wrapped, and slots never written.
fn saved_and_offloaded_sequences_go_on_bit_for_bit() -> Verdict {
    let (device, _alone) = device()?;
    let gpu = Checkpoint::open(Wgpu::new(&device, Dtype::F16), moa_tiny()).unwrap();
    let (model, text) = (&gpu.model, gpu.tokenizer.encode(TEXT, true).unwrap());
    let plan = narrow(model.shape());
    let types = [None, Some(CacheType::K8V4), Some(CacheType::Fp8), Some(CacheType::Int4)];
    let types = (0..plan.rules().len()).map(|head| types[head % 4]).collect();
    for (plan, held) in
        [(plan.clone(), 60), (plan.clone(), 20), (plan.with_cache_types(types).unwrap(), 60)]
    {
        let mut sequence = model.open(&plan, 300, 4).unwrap();
        model.prefill(&mut sequence, &text[..held], 64).unwrap();
        let bytes = model.save_sequence(&sequence, &text[..held]).unwrap();
        let (restored, tokens) = model.restore_sequence(&plan, &bytes).unwrap();
        assert_eq!(tokens, &text[..held]);
        let offloaded = model.offload(&sequence).unwrap();
        let expected = model.prefill(&mut sequence, &text[held..held + 9], 64).unwrap();
        for mut again in [restored, model.reload(&offloaded).unwrap()] {
            assert_eq!(model.kv_bytes(&again), model.kv_bytes(&sequence));
            assert!(offloaded.bytes() <= model.kv_bytes(&again));
            assert_eq!(model.prefill(&mut again, &text[held..held + 9], 64).unwrap(), expected);
        }
        let cut = &bytes[..bytes.len() - 1];
        assert!(model.restore_sequence(&plan, cut).is_err());
    }
    Ok(())
}

/// Blocks of 4 bits, and of 8 for what files keep better; the CPU rounds activations to 15 bits for them.
fn blocks_give_what_the_cpu_gives() -> Verdict {
    let (device, _alone) = device()?;
    let [mut four, eight] = [file::Q4_0, file::Q8_0].map(|kind| file::moa_tiny(&moa_tiny(), kind));
    for (tensor, other) in four.tensors.iter_mut().zip(eight.tensors) {
        if tensor.name.contains("attn_v") || tensor.name.contains("token_embd") {
            *tensor = other;
        }
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, four.bytes())?;
    let cpu = Checkpoint::open(Cpu::new(Dtype::F32), &path).unwrap();
    let gpu = Checkpoint::open(Wgpu::new(&device, Dtype::F32), &path).unwrap();
    let (expected, expected_logits) = run(&cpu, true);
    let (tokens, logits) = run(&gpu, true);
    assert_eq!(tokens.len(), expected.len());
    let pairs = logits.iter().zip(&expected_logits);
    let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "logits differ by {largest}, tokens {}",
        if tokens == expected { "do not" } else { "do" }
    );
    assert!(largest < 0.02, "logits differ by {largest}");
    Ok(())
}

fn cache_bytes_are_what_the_plan_promises() -> Verdict {
    let (device, _alone) = device()?;
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let gpu = Checkpoint::open(Wgpu::new(&device, dtype), moa_tiny()).unwrap().model;
        let plan = narrow(gpu.shape());
        let sequence = gpu.open(&plan, 1000, 0).unwrap();
        let slot_bytes = dtype.slot_bytes(gpu.shape().head_dim);
        assert_eq!(gpu.kv_bytes(&sequence), plan.kv_bytes(1000, slot_bytes));
    }
    Ok(())
}

/// A profile of one item: its loss, and what two spans of each head are predicted to cost.
fn profile<D: Backward>(checkpoint: &Checkpoint<D>) -> Vec<f64> {
    let model = &checkpoint.model;
    let tokens = checkpoint.tokenizer.encode(TEXT, true).unwrap();
    let item = Item::new(&tokens[..tokens.len() - 12], &tokens[tokens.len() - 12..]).unwrap();
    let mut influence = Influence::new(model.shape(), tokens.len(), 4).unwrap();
    let mut found = vec![model.profile(&item, Objective::CrossEntropy, &mut influence).unwrap()];
    let shape = model.shape();
    for (layer, head) in (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h))) {
        for (sink, window) in [(4, 16), (16, 48)] {
            found.push(influence.loss(layer, head, Span::new(sink, window).unwrap()));
        }
    }
    found
}

fn influence_equals_that_of_the_cpu() -> Verdict {
    let (device, _alone) = device()?;
    let cpu = Checkpoint::open(Cpu::new(Dtype::F32), moa_tiny()).unwrap();
    let gpu = Checkpoint::open(Wgpu::new(&device, Dtype::Bf16), moa_tiny()).unwrap();
    let (expected, found) = (profile(&cpu), profile(&gpu));
    let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-3 * largest, "{found} {expected} of {largest}");
    }
    assert!(expected[1..].iter().any(|x| x.abs() > 1e-4), "no influence to compare: {expected:?}");
    Ok(())
}

/// Logits of a prompt dense and with spans of 6 and 3 keys, and its influence.
fn family<D: Backward>(device: D, folder: &Path) -> [Vec<f64>; 3] {
    let config = ModelConfig::from_file(folder).unwrap();
    let model = Decoder::load(device, config, &Weights::open(folder).unwrap()).unwrap();
    let shape = model.shape();
    let tokens: Vec<u32> = (0..20).map(|i| i * i % 61).collect();
    let rules = (0..shape.total_kv_heads())
        .map(|place| HeadRule::from(ElasticRule::fixed(if place % 2 == 0 { 6 } else { 3 })));
    let narrow = Plan::new(shape, 2, 3, rules.collect()).unwrap();
    let [dense, narrow] = [Plan::full(shape).unwrap(), narrow].map(|plan| {
        let mut sequence = model.open(&plan, 20, 0).unwrap();
        let mut logits = Vec::new();
        for chunk in tokens.chunks(9) {
            let rows: Vec<usize> = (0..chunk.len()).collect();
            let x = model.forward(&mut [&mut sequence], &[chunk], LogitRows::Rows(&rows)).unwrap();
            logits.extend(model.device().values(x).unwrap().into_iter().map(f64::from));
        }
        logits
    });
    let item = Item::new(&tokens[..12], &tokens[12..]).unwrap();
    let mut influence = Influence::new(shape, 19, 2).unwrap();
    model.profile(&item, Objective::CrossEntropy, &mut influence).unwrap();
    let heads = (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h)));
    let influence = heads.flat_map(|(layer, head)| influence.head(layer, head).to_vec()).collect();
    [dense, narrow, influence]
}

fn families_give_what_the_cpu_gives() -> Verdict {
    let (device, _alone) = device()?;
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
    let Ok(folders) = folders.read_dir() else {
        return Err(Stop::ignored("the checkpoints of families are where the test was built"));
    };
    for folder in folders.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let expected = family(Cpu::new(Dtype::F32), &folder);
        let found = family(Wgpu::new(&device, Dtype::F32), &folder);
        for (found, expected) in found.iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let name = folder.display();
                assert!((found - expected).abs() <= 1e-3 * largest, "{name}: {found} {expected}");
            }
        }
    }
    Ok(())
}

/// Bit for bit, of one sequence, with others that are read and go on between its steps; a batch is not recorded.
fn recorded_steps_are_the_same_steps() -> Verdict {
    let (device, _alone) = device()?;
    for dtype in [Dtype::F32, Dtype::F16] {
        let own = Wgpu::new(&device, dtype);
        let gpu = Checkpoint::open(own, moa_tiny()).unwrap();
        let (model, text) = (&gpu.model, gpu.tokenizer.encode(TEXT, true).unwrap());
        for plan in [Plan::full(model.shape()).unwrap(), narrow(model.shape())] {
            let mut expected = model.open(&plan, 400, 8).unwrap();
            model.prefill(&mut expected, &text[..60], 64).unwrap();
            let copy = model.fork(&expected).unwrap();
            let mut session = model.session(vec![copy]).unwrap();
            let mut token = text[60];
            for round in 0..12 {
                let logits = model.forward(&mut [&mut expected], &[&[token]], LogitRows::Last);
                let logits = model.device().values(logits.unwrap()).unwrap();
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let likeliest = logits.iter().position(|x| *x == top).unwrap() as u32;
                match round % 3 {
                    0 => assert_eq!(session.step_greedy(model, &[token]).unwrap(), [likeliest]),
                    _ => assert!(session.step(model, &[token]).unwrap() == logits, "{round}"),
                }
                if round == 6 {
                    let len = expected.len() - 3;
                    model.truncate(&mut expected, len).unwrap();
                    session.truncate(model, 0, len).unwrap();
                }
                token = likeliest;
            }
            assert_eq!(session.recordings(), 1, "{dtype}");
            let mut own = session.into_sequences().swap_remove(0);
            let next = &text[60..80];
            let logits = model.prefill(&mut own, next, 64).unwrap();
            assert!(logits == model.prefill(&mut expected, next, 64).unwrap());
            let mut session = model.session(vec![own, expected]).unwrap();
            (0..5).for_each(|_| drop(session.step_greedy(model, &[1, 1]).unwrap()));
            assert_eq!(session.recordings(), 0);
        }
    }
    Ok(())
}

/// A GPU that nothing else uses, and wgpu's handle of it.
fn own_device() -> Result<(Gpu, wgpu::Device), Stop> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let wanted = wgpu::DeviceDescriptor {
        required_limits: adapter.limits(),
        // Kernels in SPIR-V need it.
        required_features: adapter.features() & wgpu::Features::PASSTHROUGH_SHADERS,
        // SAFETY: what is experimental of these features is that kernels are not checked again.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&wanted))?;
    let (backend, own) = (adapter.get_info().backend, device.clone());
    Ok((Gpu::from_setup(WgpuSetup { instance, adapter, device, queue, backend })?, own))
}

fn is_lost(error: &Error) -> bool {
    let Error::Backend(source) = error else { return false };
    matches!(source.downcast_ref(), Some(WgpuError::Lost { .. }))
}

/// No step panics, hangs or chooses tokens from what was never computed.
fn a_lost_gpu_fails_the_requests_that_run_and_all_later_ones() -> Verdict {
    // For the lock, and for the reason if there is none.
    let (_, _alone) = device()?;
    let (gpu, own) = own_device()?;
    let checkpoint = Checkpoint::open(Wgpu::new(&gpu, Dtype::F32), moa_tiny())?;
    let model = &checkpoint.model;
    let plan = Plan::full(model.shape())?;
    let mut sequence = model.open(&plan, 64, 0)?;
    // One token at a time: few kernels to compile.
    model.forward(&mut [&mut sequence], &[&[5]], LogitRows::Last)?;
    let eos_token_ids = Some(Vec::new());
    let options = GenerateOptions { max_new_tokens: 40, eos_token_ids, ..Default::default() };
    let mut engine = checkpoint.engine(EngineOptions::default());
    let first = engine.submit(vec![5], &plan, options.clone());
    while !matches!(engine.step()?, Some(Event::Text { .. })) {}

    own.destroy();
    let error = (0..40).find_map(|_| engine.step().err()).unwrap();
    assert!(is_lost(&error), "{error}");
    let failed = engine.step()?;
    assert!(matches!(failed, Some(Event::Failed { id, error: Error::Step { .. } }) if id == first));
    // One that comes later fails at once.
    engine.submit(vec![6], &plan, options);
    let error = match engine.step() {
        Err(error) | Ok(Some(Event::Failed { error, .. })) => error,
        other => panic!("{other:?}"),
    };
    assert!(is_lost(&error), "{error}");
    let len = sequence.len();
    for _ in 0..2 {
        let error = model.forward(&mut [&mut sequence], &[&[8]], LogitRows::Last).err().unwrap();
        assert!(is_lost(&error), "{error}");
        assert_eq!(sequence.len(), len);
    }
    assert!(is_lost(&model.offload(&sequence).unwrap_err()) && model.fork(&sequence).is_err());
    Ok(())
}
