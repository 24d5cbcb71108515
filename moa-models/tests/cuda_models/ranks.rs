//! A model on several ranks. One GPU is enough: ranks are threads with a stream each that add up over the
//! host, and NCCL has one rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moa_backend_cuda::Error as CudaError;
use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::{Influence, Plan, Sharding};
use moa_models::{
    Communicator, Cuda, Decoder, Device, Dtype, Engine, EngineOptions, Error, Event,
    GenerateOptions, Item, LogitRows, ModelConfig, NcclRank, Objective, Rank, SamplingOptions,
    Shard, Speculation, ThreadRank, Weights, on_ranks,
};

use crate::{alternating, close, cpu, moa_tiny, open, plans, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        two_ranks_agree_with_the_cpu,
        two_ranks_of_8_bit_weights_agree_with_one,
        two_ranks_draw_the_same_tokens,
        a_rank_that_cannot_go_on_ends_the_other,
        a_group_of_one_over_nccl_is_the_whole_model,
        two_gpus_write_one_text_and_one_profile,
        a_gpu_that_hangs_or_fails_ends_the_other_within_seconds,
    ]
}

type Model = Decoder<Cuda>;

/// moa-tiny's part of one rank.
fn part(
    dtype: Dtype,
    plan: &Plan,
    communicator: impl Communicator<Cuda> + 'static,
) -> Result<Model, Error> {
    let sharding = Sharding::balanced(plan, 500, communicator.ranks())?;
    let shard = Shard::new(&sharding, communicator)?;
    let config = ModelConfig::from_file(moa_tiny())?;
    Decoder::load_shard(Cuda::new(0, dtype)?, config, &Weights::open(moa_tiny())?, shard)
}

/// What two ranks on the first GPU compute.
fn on_two<T: Send>(dtype: Dtype, plan: &Plan, work: impl Fn(&Arc<Model>) -> T + Sync) -> Vec<T> {
    let ranks = ThreadRank::group(2).unwrap();
    on_ranks(ranks, |rank: Arc<ThreadRank>| {
        Ok::<_, Error>(work(&Arc::new(part(dtype, plan, rank)?)))
    })
    .unwrap()
}

fn two_ranks_agree_with_the_cpu() -> Verdict {
    for (dtype, share) in [(Dtype::F16, 0.01), (Dtype::Bf16, 0.06)] {
        open(dtype)?;
        let tokens = prose(320);
        for plan in &plans(cpu().model.shape()) {
            let run = |gpu: &Arc<Model>| {
                let mut sequence = gpu.open(plan, 400, 0).unwrap();
                let mut logits = step(gpu, &mut sequence, &tokens[..300]).concat();
                for token in &tokens[300..] {
                    logits.extend(step(gpu, &mut sequence, &[*token]).concat());
                }
                (logits, gpu.kv_bytes(&sequence))
            };
            let got = on_two(dtype, plan, run);
            let model = &cpu().model;
            let mut sequence = model.open(plan, 400, 0).unwrap();
            let mut expected = step(model, &mut sequence, &tokens[..300]).concat();
            for token in &tokens[300..] {
                expected.extend(step(model, &mut sequence, &[*token]).concat());
            }
            close("two ranks, prefill of 300 and decode of 20", &got[0].0, &expected, share);
            assert!(got[0].0 == got[1].0, "ranks do not have the same logits");
            assert_eq!(
                got[0].1 + got[1].1,
                plan.kv_bytes(400, Dtype::F16.slot_bytes(plan.shape().head_dim))
            );
        }
    }
    Ok(())
}

/// Slices have factors of their own, but these are powers of two: all but the smallest weights are rounded
/// as in the whole.
fn two_ranks_of_8_bit_weights_agree_with_one() -> Verdict {
    let device = open(Dtype::F16)?;
    let config = ModelConfig::from_file(moa_tiny()).unwrap();
    let weights = Weights::open(moa_tiny()).unwrap();
    let tokens = prose(200);
    let [_, plan] = plans(cpu().model.shape());
    let sharding = Sharding::balanced(&plan, 500, 2).unwrap();
    let run = |gpu: &Model| {
        let mut sequence = gpu.open(&plan, 250, 0).unwrap();
        [&tokens[..190], &tokens[190..191], &tokens[191..]]
            .map(|part| step(gpu, &mut sequence, part).concat())
            .concat()
    };
    let whole = Decoder::load(device.with_fp8_weights(), config.clone(), &weights).unwrap();
    let expected = run(&whole);
    let parts = on_ranks(ThreadRank::group(2).unwrap(), |rank: Arc<ThreadRank>| {
        let device = Cuda::new(0, Dtype::F16)?.with_fp8_weights();
        let shard = Shard::new(&sharding, rank)?;
        Ok::<_, Error>(run(&Decoder::load_shard(device, config.clone(), &weights, shard)?))
    });
    close("8-bit weights on two ranks", &parts.unwrap()[0], &expected, 0.03);
    Ok(())
}

fn two_ranks_draw_the_same_tokens() -> Verdict {
    open(Dtype::F16)?;
    let text = prose(300);
    let prompts: [&[u32]; 2] = [&text[..70], &text[100..240]];
    let plan = alternating(cpu().model.shape(), 8, 24, 48);
    for temperature in [0.0, 0.8] {
        let sampling = SamplingOptions { temperature, seed: 5, ..Default::default() };
        let options = GenerateOptions {
            max_new_tokens: 24,
            sampling,
            eos_token_ids: Some(Vec::new()),
            ..Default::default()
        };
        let texts = on_two(Dtype::F16, &plan, |gpu| {
            let mut engine = Engine::new(Arc::clone(gpu), EngineOptions::default());
            for prompt in prompts {
                engine.submit(prompt, &plan, options.clone());
            }
            engine.complete_all().unwrap()
        });
        assert!(texts[0].iter().all(|made| made.tokens.len() == 24));
        assert_eq!(texts[0], texts[1], "temperature {temperature}");
    }
    Ok(())
}

fn a_rank_that_cannot_go_on_ends_the_other() -> Verdict {
    open(Dtype::F16)?;
    let [plan, _] = plans(cpu().model.shape());
    let ended = on_ranks(ThreadRank::group(2).unwrap(), |rank: Arc<ThreadRank>| {
        let number = rank.rank();
        let model = part(Dtype::F16, &plan, rank)?;
        let mut sequence = model.open(&plan, 40, 0)?;
        model.forward(&mut [&mut sequence], &[&[1, 2, 3]], LogitRows::Last)?;
        if number == 1 {
            return Err(Error::Cancelled);
        }
        model.forward(&mut [&mut sequence], &[&[4]], LogitRows::Last).map(drop)
    });
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    Ok(())
}

/// One rank: NCCL has nothing to add, but everything around it is as with many, the captured step
/// included.
fn a_group_of_one_over_nccl_is_the_whole_model() -> Verdict {
    for (dtype, share) in [(Dtype::F16, 0.01), (Dtype::Bf16, 0.06)] {
        open(dtype)?;
        let rank = match NcclRank::group(1) {
            Ok(mut ranks) => ranks.swap_remove(0),
            Err(error) => {
                let is_missing = matches!(
                    &error,
                    Error::Backend(source)
                        if matches!(source.downcast_ref(), Some(CudaError::NoNccl { .. }))
                );
                assert!(is_missing, "{error}");
                return Err(Stop::ignored(error));
            }
        };
        let tokens = prose(200);
        let [_, plan] = plans(cpu().model.shape());
        let part = part(dtype, &plan, rank).unwrap();
        let config = ModelConfig::from_file(moa_tiny()).unwrap();
        let weights = Weights::open(moa_tiny()).unwrap();
        let whole = Decoder::load(Cuda::new(0, dtype).unwrap(), config, &weights).unwrap();

        let [mut own, mut other] = [&part, &whole].map(|model| model.open(&plan, 300, 0).unwrap());
        let got = read(&part, &mut own, &tokens, 90);
        let expected = read(&whole, &mut other, &tokens, 90);
        close("prompt", &got, &expected, share);

        let mut plain = part.fork(&own).unwrap();
        let mut session = part.session(vec![own]).unwrap();
        let mut token = 5;
        for round in 0..12 {
            let logits = part.forward(&mut [&mut plain], &[&[token]], LogitRows::Last).unwrap();
            let expected = part.device().values(logits).unwrap();
            let best = crate::likeliest(&expected);
            match round % 2 {
                0 => assert!(session.step(&part, &[token]).unwrap() == expected, "round {round}"),
                _ => assert_eq!(
                    session.step_greedy(&part, &[token]).unwrap(),
                    [best],
                    "round {round}"
                ),
            }
            let alone = step(&whole, &mut other, &[token]).concat();
            close("step", &expected, &alone, share);
            token = best;
        }
    }
    Ok(())
}

/// What two GPUs add up by: NCCL alone, or by writing into each other's memory what is small, as all of moa-tiny is.
const PEER_BYTES: [usize; 2] = [0, usize::MAX];

/// The ranks of a group of two GPUs.
fn two_gpus(patience: Duration, peer_bytes: usize) -> Result<Vec<NcclRank>, Stop> {
    open(Dtype::F16)?;
    if let Err(error) = Cuda::new(1, Dtype::F16) {
        return Err(Stop::ignored(format!("one GPU alone: {error}")));
    }
    let ranks = NcclRank::group_with(2, patience).map_err(Stop::ignored)?;
    Ok(ranks.into_iter().map(|rank| rank.with_peer_bytes(peer_bytes)).collect())
}

/// moa-tiny's part of a rank, on the GPU of its number.
fn part_of_gpu(plan: &Plan, rank: Arc<NcclRank>) -> Result<Arc<Model>, Error> {
    let device = Cuda::new(rank.rank(), Dtype::F16)?;
    rank.connect(&device)?;
    let sharding = Sharding::balanced(plan, 500, 2)?;
    let shard = Shard::new(&sharding, rank)?;
    let config = ModelConfig::from_file(moa_tiny())?;
    let part = Decoder::load_shard(device, config, &Weights::open(moa_tiny())?, shard)?;
    part.all_loaded()?;
    Ok(Arc::new(part))
}

fn two_gpus_write_one_text_and_one_profile() -> Verdict {
    let text = prose(300);
    let [plan, _] = plans(cpu().model.shape());
    let item = Item::new(&text[..180], &text[180..200]).unwrap();
    let options = GenerateOptions {
        max_new_tokens: 40,
        eos_token_ids: Some(Vec::new()),
        ..Default::default()
    };
    let work = |gpu: &Arc<Model>| {
        let mut all = Vec::new();
        let mut sequence = gpu.open(&plan, 400, 0)?;
        let logits = read(gpu, &mut sequence, &text[..200], 90);
        let mut engine = Engine::new(Arc::clone(gpu), EngineOptions::default());
        for prompt in [&text[..70], &text[100..240]] {
            engine.submit(prompt, &plan, options.clone());
        }
        let tokens: Vec<_> = engine.complete_all()?.into_iter().map(|made| made.tokens).collect();
        // Steps that begin before the last one is told, where the first rank says so; and guesses, of a text that repeats
        // itself.
        for id in 0..2 {
            let speculation = if id == 0 { Speculation::Off } else { Speculation::ngram() };
            let mut engine =
                Engine::new(Arc::clone(gpu), EngineOptions { speculation, ..Default::default() });
            let repeated = text[..60].repeat(3);
            engine.submit(if id == 0 { &text[..70] } else { &repeated }, &plan, options.clone());
            let (mut made, mut asked) = (Vec::new(), 0);
            let mut goes_on = || {
                asked += 1;
                asked % 4 != 0
            };
            while let Some(event) = engine.step_ahead(&mut goes_on)? {
                if let Event::Token { token, .. } = event {
                    made.push(token);
                }
            }
            assert_eq!(asked > 20, gpu.is_first() && id == 0, "asked {asked} times");
            assert!(id == 1 || made == tokens[0], "{made:?} {tokens:?}");
            all.push(made);
        }
        let mut influence = Influence::new(gpu.shape(), 200, 64)?;
        gpu.profile(&item, Objective::Margin, &mut influence)?;
        let head: Vec<f32> = influence.head(0, 1).iter().map(|x| *x as f32).collect();
        all.extend(tokens);
        Ok::<_, Error>((logits, all, head))
    };
    let config = ModelConfig::from_file(moa_tiny()).unwrap();
    let weights = Weights::open(moa_tiny()).unwrap();
    let whole = Decoder::load(open(Dtype::F16)?, config, &weights).unwrap();
    let expected = work(&Arc::new(whole)).unwrap();
    for peer_bytes in PEER_BYTES {
        let ranks = two_gpus(Duration::from_secs(30), peer_bytes)?;
        let got = on_ranks(ranks, |rank: Arc<NcclRank>| work(&part_of_gpu(&plan, rank)?)).unwrap();
        assert!(got[0] == got[1], "ranks do not agree, {peer_bytes} bytes to peers");
        close("two GPUs", &got[0].0, &expected.0, 0.01);
        assert_eq!(got[0].1, expected.1, "greedy text, {peer_bytes} bytes to peers");
        close("a profile on two GPUs", &got[0].2, &expected.2, 0.05);
    }
    Ok(())
}

fn a_gpu_that_hangs_or_fails_ends_the_other_within_seconds() -> Verdict {
    const PATIENCE: Duration = Duration::from_secs(1);
    // A rank that gives another one up leaves it 2 s to end its own sums.
    const ENDS: Duration = Duration::from_secs(5);
    const SLEEP: Duration = Duration::from_secs(7);
    let [plan, _] = plans(cpu().model.shape());
    // Kernels are compiled the first time, which takes longer than this patience.
    on_ranks(two_gpus(60 * PATIENCE, usize::MAX)?, |rank: Arc<NcclRank>| {
        let model = part_of_gpu(&plan, rank)?;
        let mut session = model.session(vec![model.open(&plan, 100, 0)?])?;
        (0..9).try_for_each(|_| session.step_greedy(&model, &[7]).map(drop))
    })
    .unwrap();
    // In a prompt, after some single steps, and in captured ones.
    let cases = PEER_BYTES.into_iter().flat_map(|bytes| {
        [true, false]
            .into_iter()
            .flat_map(move |hangs| [1, 3, 9].map(|steps| (bytes, hangs, steps)))
    });
    for (peer_bytes, hangs, steps) in cases {
        let ended = on_ranks(two_gpus(PATIENCE, peer_bytes)?, |rank: Arc<NcclRank>| {
            let number = rank.rank();
            let model = part_of_gpu(&plan, rank)?;
            let mut sequence = model.open(&plan, 100, 0)?;
            model.prefill(&mut sequence, &[1, 2, 3], 100)?;
            let mut session = model.session(vec![sequence])?;
            for _ in 0..steps {
                session.step_greedy(&model, &[7])?;
            }
            let begin = Instant::now();
            if number == 1 {
                if !hangs {
                    return Err(Error::Cancelled);
                }
                std::thread::sleep(SLEEP);
            }
            let error = session.step_greedy(&model, &[7]).unwrap_err();
            println!("rank {number}, {steps} steps, {peer_bytes} bytes: {:?}", begin.elapsed());
            assert!(number == 1 || begin.elapsed() < ENDS, "{:?}", begin.elapsed());
            Err::<(), _>(error)
        });
        let is_expected = matches!(
            (&ended, hangs),
            (Err(Error::RankSilent { rank: 1, .. }), true) | (Err(Error::Cancelled), false)
        );
        assert!(is_expected, "hangs: {hangs}, {steps} steps, {peer_bytes} bytes: {ended:?}");
    }
    Ok(())
}
