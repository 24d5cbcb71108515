//! One model on several ranks, which are threads here: what it computes does not depend on how many.

use std::fs;
use std::sync::{Arc, LazyLock};

use moa_core::{ElasticRule, HeadRule, Plan, Sharding};
use moa_models::{
    Communicator, Cpu, Decoder, Engine, EngineOptions, Error, Event, GenerateOptions, Item,
    LogitRows, ModelConfig, RandomTensors, Result, SamplingOptions, Shard, Speculation, ThreadRank,
    Weights, on_ranks,
};

use crate::{alternating, greedy, largest_difference, moa_tiny, text, tiny};

pub(super) type Model = Decoder<Cpu>;

/// A model folder.
pub(super) struct Folder {
    pub(super) config: ModelConfig,
    pub(super) weights: Weights,
}

impl Folder {
    fn whole(&self) -> Result<Model> {
        Decoder::load(Cpu::default(), self.config.clone(), &self.weights)
    }

    /// The part of a rank, dealt for `plan` at 200 tokens.
    pub(super) fn part(
        &self,
        plan: &Plan,
        communicator: impl Communicator<Cpu> + 'static,
    ) -> Result<Model> {
        let sharding = Sharding::balanced(plan, 200, communicator.ranks())?;
        let shard = Shard::new(&sharding, communicator)?;
        Decoder::load_shard(Cpu::default(), self.config.clone(), &self.weights, shard)
    }

    /// What `work` gives on each rank.
    pub(super) fn on<T: Send>(
        &self,
        ranks: usize,
        plan: &Plan,
        work: impl Fn(&Arc<Model>) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        on_ranks(ThreadRank::group(ranks)?, |rank: Arc<ThreadRank>| {
            work(&Arc::new(self.part(plan, rank)?))
        })
    }
}

pub(super) fn tiny_folder() -> Folder {
    let config = ModelConfig::from_file(moa_tiny()).unwrap();
    Folder { config, weights: Weights::open(moa_tiny()).unwrap() }
}

/// A model with 8 KV heads of 2 query heads each, biases everywhere, an output matrix of its own and a
/// vocabulary that no number of ranks divides.
pub(super) fn biased() -> &'static Folder {
    static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
        let config = ModelConfig::from_json(
            r#"{"vocab_size": 203, "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8,
                "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
                "attention_bias": true, "mlp_bias": true}"#,
        );
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("model.safetensors"), random_weights()).unwrap();
        Folder { config: config.unwrap(), weights: Weights::open(folder.path()).unwrap() }
    });
    &FOLDER
}

/// The file of [`biased`]'s weights.
fn random_weights() -> Vec<u8> {
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![203, 64]),
        ("lm_head.weight".into(), vec![203, 64]),
        ("model.norm.weight".into(), vec![64]),
    ];
    for layer in 0..3 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![64]));
        }
        for (part, out, input) in [
            ("self_attn.q_proj", 128, 64),
            ("self_attn.k_proj", 64, 64),
            ("self_attn.v_proj", 64, 64),
            ("self_attn.o_proj", 64, 128),
            ("mlp.gate_proj", 96, 64),
            ("mlp.up_proj", 96, 64),
            ("mlp.down_proj", 64, 96),
        ] {
            tensors.push((format!("model.layers.{layer}.{part}.weight"), vec![out, input]));
            tensors.push((format!("model.layers.{layer}.{part}.bias"), vec![out]));
        }
    }
    let (mut header, mut data) = (Vec::new(), Vec::<u8>::new());
    let mut state = 1u64;
    for (name, shape) in tensors {
        let begin = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let uniform = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            let value = if name.contains("norm") { 1.0 + 0.2 * uniform } else { 0.3 * uniform };
            data.extend(value.to_le_bytes());
        }
        let offsets = format!("[{begin},{}]", data.len());
        header.push(format!(
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":{offsets}}}"#
        ));
    }
    let header = format!("{{{}}}", header.join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// Spans of 12 to 200 keys, other ones in every layer: rings wrap, and ranks differ.
pub(super) fn uneven() -> Plan {
    let shape = biased().config.shape();
    let span = |place: usize| 12 + (place * place * 37 + place / 8 * 53) % 189;
    let rules = (0..24).map(|place| HeadRule::from(ElasticRule::fixed(span(place))));
    Plan::new(shape, 4, 5, rules.collect()).unwrap()
}

/// Logits of a ragged batch that reads prompts together, mixes them with decoding, and decodes.
fn ragged(model: &Model, plan: &Plan) -> Result<Vec<f32>> {
    let token = |i: usize| (i * 31 % 203) as u32;
    let tokens: Vec<u32> = (0..400).map(token).collect();
    let mut batch = (0..3).map(|i| model.open(plan, 200 - i, 0)).collect::<Result<Vec<_>>>()?;
    let mut at = [0, 40, 80];
    let mut all = Vec::new();
    for round in [[90, 1, 33], [1, 60, 1], [1, 1, 1], [30, 1, 2], [1, 1, 1]] {
        let parts: Vec<&[u32]> =
            round.iter().zip(&at).map(|(n, at)| &tokens[*at..at + n]).collect();
        let mut sequences: Vec<_> = batch.iter_mut().collect();
        all.extend(model.forward(&mut sequences, &parts, LogitRows::Last)?.into_data());
        at.iter_mut().zip(round).for_each(|(at, n)| *at += n);
    }
    Ok(all)
}

#[test]
fn the_number_of_ranks_does_not_change_logits() -> Result<()> {
    let folder = biased();
    for plan in [uneven(), Plan::full(folder.config.shape())?] {
        let whole = folder.whole()?;
        let expected = ragged(&whole, &plan)?;
        // Heads that divide evenly, and those that do not.
        for ranks in [1, 2, 3, 4, 8] {
            let got = folder.on(ranks, &plan, |model| ragged(model, &plan))?;
            let difference = largest_difference(&got[0], &expected);
            assert!(difference < 1e-4, "{ranks} ranks: {difference}");
            assert!(got.iter().all(|other| *other == got[0]), "{ranks} ranks do not agree");
            if ranks == 1 {
                assert_eq!(got[0], expected);
            }
        }
    }
    Ok(())
}

#[test]
fn a_plan_other_than_that_of_the_deal_gives_the_same_too() -> Result<()> {
    let folder = biased();
    let expected = ragged(&folder.whole()?, &uneven())?;
    let dense = Plan::full(folder.config.shape())?;
    let got = folder.on(4, &dense, |model| ragged(model, &uneven()))?;
    let difference = largest_difference(&got[3], &expected);
    assert!(difference < 1e-4, "{difference}");
    Ok(())
}

/// Bytes of one slot of an f32 cache.
fn f32_slot(plan: &Plan) -> u64 {
    moa_core::Dtype::F32.slot_bytes(plan.shape().head_dim)
}

#[test]
fn caches_of_all_ranks_are_those_of_the_plan() -> Result<()> {
    let folder = biased();
    let plan = uneven();
    for ranks in [2, 3, 4] {
        let bytes = folder.on(ranks, &plan, |model| {
            assert_eq!(model.shape(), folder.config.shape());
            let sequence = model.open(&plan, 200, 0)?;
            let fork = model.fork(&sequence)?;
            assert_eq!(model.kv_bytes(&fork), model.kv_bytes(&sequence));
            Ok(model.kv_bytes(&sequence))
        })?;
        assert_eq!(bytes.iter().sum::<u64>(), plan.kv_bytes(200, f32_slot(&plan)));
        // Of a head's 200 keys and values in f32.
        let head = 2 * 200 * 8 * 4;
        if ranks != 3 {
            assert!(bytes.iter().max().unwrap() - bytes.iter().min().unwrap() <= head, "{bytes:?}");
        }
    }
    Ok(())
}

#[test]
fn two_ranks_write_the_text_of_one() -> Result<()> {
    let folder = tiny_folder();
    let plan = alternating(folder.config.shape(), 8, 24, 48);
    let source = text(160);
    let prompts: [&[u32]; 3] = [&source[..33], &source[40..150], &source[9..80]];
    let warm = SamplingOptions { temperature: 0.9, top_p: 0.95, seed: 3, ..Default::default() };
    let penalty = SamplingOptions { repetition_penalty: 1.3, ..Default::default() };
    for sampling in [SamplingOptions::default(), warm, penalty] {
        let options = GenerateOptions { sampling, ..greedy(16) };
        let generate = |model: &Arc<Model>| {
            let mut engine = Engine::new(Arc::clone(model), EngineOptions::default());
            for prompt in prompts {
                engine.submit(prompt, &plan, options.clone());
            }
            engine.complete_all()
        };
        let expected = generate(tiny())?;
        assert_eq!(folder.on(2, &plan, generate)?, [expected.clone(), expected]);
    }
    Ok(())
}

#[test]
fn requests_that_come_and_go_get_the_tokens_of_one_rank() -> Result<()> {
    let folder = tiny_folder();
    let plan = alternating(folder.config.shape(), 8, 24, 48);
    let source = text(120);
    // Two at most run together, the fourth comes late, and the second is cancelled.
    let serve = |model: &Arc<Model>| {
        let options = EngineOptions { prefill_chunk: 16, max_batch: 2, ..Default::default() };
        let mut engine = Engine::new(Arc::clone(model), options);
        let submit = |engine: &mut Engine<Cpu>, id: usize| {
            let prompt = &source[id * 9..id * 9 + 20 + 25 * (id % 3)];
            engine.submit(prompt, &plan, greedy(4 + 3 * id))
        };
        let mut ids: Vec<_> = (0..3).map(|id| submit(&mut engine, id)).collect();
        let mut told = vec![Vec::new(); 4];
        while let Some(event) = engine.step()? {
            let of = ids.iter().position(|id| *id == event.id()).unwrap();
            if let Event::Token { token, .. } = event {
                told[of].push(token);
                match told[of].len() {
                    3 if of == 1 => drop(engine.cancel(ids[1])),
                    3 if of == 0 => ids.push(submit(&mut engine, 3)),
                    _ => {}
                }
            }
        }
        Ok(told)
    };
    let expected = serve(tiny())?;
    assert_eq!([0, 1, 2, 3].map(|id| expected[id].len()), [4, 3, 10, 13]);
    assert_eq!(folder.on(2, &plan, serve)?, [expected.clone(), expected]);
    Ok(())
}

#[test]
fn ranks_look_guesses_up_and_check_what_pays_on_the_first_one() -> Result<()> {
    let folder = tiny_folder();
    let plan = alternating(folder.config.shape(), 8, 24, 48);
    let source = text(60);
    // Texts that repeat themselves are guessed.
    let prompts = [source.repeat(2), source[7..40].repeat(3)];
    for adaptive in [false, true] {
        let speculation = Speculation::Ngram { draft_tokens: 4, adaptive };
        let generate = |model: &Arc<Model>| {
            let options = EngineOptions { speculation, ..EngineOptions::default() };
            let mut engine = Engine::new(Arc::clone(model), options);
            for prompt in &prompts {
                engine.submit(prompt.as_slice(), &plan, greedy(40));
            }
            let texts = engine.complete_all()?;
            Ok((texts, engine.take_usage()))
        };
        let (expected, alone) = generate(tiny())?;
        let both = folder.on(2, &plan, generate)?;
        let usage = both.iter().map(|(_, usage)| (usage.drafted_tokens, usage.accepted_tokens));
        let usage: Vec<_> = usage.collect();
        assert_eq!(usage[0], usage[1]);
        if !adaptive {
            assert_eq!(usage[0], (alone.drafted_tokens, alone.accepted_tokens));
            assert!(usage[0].1 > 10, "{usage:?}");
        }
        assert!(both.iter().all(|(texts, _)| *texts == expected), "adaptive: {adaptive}");
    }
    Ok(())
}

#[test]
fn what_one_rank_has_no_memory_for_no_rank_has() -> Result<()> {
    let (folder, plan) = (biased(), uneven());
    let sizes = folder.on(3, &plan, |model| {
        let short = |is_short: bool| match is_short {
            true => Err(Error::OutOfMemory { what: "a test", bytes: Some(7), free: None }),
            false => Ok(model.is_first()),
        };
        let rank = model.open(&plan, 200, 0).map(|own| model.kv_bytes(&own))?;
        let is_first = model.is_first();
        let refused = model.together(|| short(!is_first));
        let Err(Error::RankOutOfMemory { rank: 1, reason }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(reason, "a test: cannot allocate 7 bytes of memory");
        assert_eq!(model.together(|| short(false))?, is_first);
        // What is wrong with a request ends nobody.
        let wrong = model.together(|| model.open(&plan, 0, 0).map(drop));
        assert!(matches!(wrong, Err(Error::Invalid { .. } | Error::Core(_))), "{wrong:?}");
        assert_eq!(model.on_all_ranks(vec![true, is_first, false])?, [true, false, false]);
        Ok((rank, model.cache_bytes(&plan, 200, 0)?, model.has_rings(&plan, 200, 0)?))
    })?;
    let most = sizes.iter().map(|(own, ..)| *own).max().unwrap();
    assert!(sizes.iter().all(|(_, told, rings)| *told == most && *rings), "{sizes:?}");
    let dense = Plan::full(folder.config.shape())?;
    let whole = folder.whole()?;
    assert!(!whole.has_rings(&dense, 200, 0)?);
    // One head of one rank forgets keys: the others know it too. With slack for the rest it forgets none.
    let mut rules = dense.rules().to_vec();
    rules[13] = ElasticRule::fixed(150).into();
    let one = Plan::new(dense.shape(), 4, 5, rules)?;
    for (slack, forgets) in [(0, true), (49, true), (50, false)] {
        let told = folder.on(4, &dense, |model| model.has_rings(&one, 200, slack))?;
        assert_eq!(told, [forgets; 4], "{slack}");
    }
    Ok(())
}

#[test]
fn losses_and_perplexity_are_the_same() -> Result<()> {
    let folder = tiny_folder();
    let plan = alternating(folder.config.shape(), 8, 24, 48);
    let tokens = text(150);
    let items =
        [Item::new(&tokens[..60], &tokens[60..70])?, Item::new(&tokens[..60], &tokens[80..85])?];
    let measure = |model: &Arc<Model>| {
        let loss = model.response_loss(&items, &plan, 100)?;
        let windows = model.perplexity(&tokens, None, 64, 2, &plan, &mut ())?;
        Ok([loss, windows.perplexity])
    };
    let expected = measure(tiny())?;
    for got in folder.on(2, &plan, measure)? {
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-3 * expected, "{got}, expected {expected}");
        }
    }
    Ok(())
}

#[test]
fn parts_of_random_weights_can_be_measured() -> Result<()> {
    let config = ModelConfig { vocab_size: 208, ..biased().config.clone() };
    let weights = RandomTensors::new(&config, 1)?;
    let plan = uneven();
    let sharding = Sharding::balanced(&plan, 60, 4)?;
    let options =
        moa_models::BenchOptions { prompt: 50, new_tokens: 8, batch: 2, ..Default::default() };
    let reports = on_ranks(ThreadRank::group(4)?, |rank: Arc<ThreadRank>| {
        let shard = Shard::new(&sharding, rank)?;
        Decoder::load_shard(Cpu::default(), config.clone(), &weights, shard)?.bench(&plan, &options)
    })?;
    let bytes: u64 = reports.iter().map(|report| report.kv_bytes).sum();
    assert_eq!(bytes, 2 * plan.kv_bytes(58, f32_slot(&plan)));
    Ok(())
}
