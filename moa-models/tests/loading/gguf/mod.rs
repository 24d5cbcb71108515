//! GGUF files, good ones and bad ones.

mod architectures;
mod bad;
pub(crate) mod file;
mod quantize;
mod vocabularies;

use std::path::PathBuf;

use file::{BF16, F32, File, Q8_0, Value};
use moa_core::Plan;
use moa_models::{
    BlockType, Checkpoint, Cpu, Dtype, Error, Gguf, LogitRows, Message, ModelConfig, QueryScaling,
    RopeScaling, Tensors as _, Tokenizer, open_tensors,
};
use tempfile::TempDir;

use crate::moa_tiny;

/// A file of these bytes in a folder of its own.
fn written(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    Gguf::open(written(bytes).1)
}

/// Logits of a model for a text's tokens, all rows.
fn logits(checkpoint: &Checkpoint<Cpu>, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let model = &checkpoint.model;
    let plan = Plan::full(model.shape())?;
    let mut sequence = model.open(&plan, tokens.len(), 0)?;
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = model.forward(&mut [&mut sequence], &[tokens], LogitRows::Rows(&rows))?;
    Ok(logits.into_data())
}

const TEXT: &str = "The quick brown fox of 1234 don't jump  over\n\nthe lazy dogs.";

#[test]
fn a_file_of_the_same_numbers_is_the_same_model() -> Result<(), Error> {
    let folder = Checkpoint::open(Cpu::default(), moa_tiny())?;
    let (_dir, path) = written(&file::moa_tiny(&moa_tiny(), BF16).bytes());
    let single = Checkpoint::open(Cpu::default(), &path)?;
    let names = folder.model.config().tensor_names.clone();
    let config = ModelConfig { tensor_names: names, ..single.model.config().clone() };
    assert_eq!(&config, folder.model.config());
    assert_eq!(single.eos_token_ids(), folder.eos_token_ids());
    assert_eq!(single.tokenizer.bos_id(), folder.tokenizer.bos_id());

    let chat = [Message::user("Hello!"), Message::assistant("Hi."), Message::user("Bye.")];
    assert_eq!(single.chat_tokens(&chat)?, folder.chat_tokens(&chat)?);
    for add_special in [false, true] {
        let tokens = single.tokenizer.encode(TEXT, add_special)?;
        assert_eq!(tokens, folder.tokenizer.encode(TEXT, add_special)?);
        assert_eq!(single.tokenizer.decode(&tokens, true)?, TEXT);
    }
    let tokens = folder.tokenizer.encode(TEXT, true)?;
    assert_eq!(logits(&single, &tokens)?, logits(&folder, &tokens)?);
    Ok(())
}

#[test]
fn blocks_of_8_bits_are_nearly_the_same_model() -> Result<(), Error> {
    let folder = Checkpoint::open(Cpu::default(), moa_tiny())?;
    let (_dir, path) = written(&file::moa_tiny(&moa_tiny(), Q8_0).bytes());
    let single = Checkpoint::open(Cpu::default(), &path)?;
    let weights = open_tensors(&path)?;
    assert_eq!(weights.tensor("blk.0.ffn_up.weight", &[704, 256])?.blocks(), Some(BlockType::Q8_0));
    assert_ne!(single.model.fingerprint(), folder.model.fingerprint());
    // More rows than are computed in their blocks, and fewer.
    for tokens in [folder.tokenizer.encode(TEXT, true)?, vec![1, 300, 500]] {
        let (near, exact) = (logits(&single, &tokens)?, logits(&folder, &tokens)?);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = near.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
        let size: f64 = exact.iter().copied().map(square).sum();
        assert!((error / size).sqrt() < 0.02, "{}", (error / size).sqrt());
    }
    Ok(())
}

/// A file of one layer and nothing else than a configuration.
fn small(architecture: &str) -> File {
    let mut file = File::new();
    file.key("general.architecture", architecture);
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 131_072),
        ("embedding_length", 64),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
    ] {
        file.key(&format!("{architecture}.{key}"), Value::U32(value));
    }
    file.key(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6));
    file.tensor("token_embd.weight", &[64, 4], F32, vec![0; 4 * 64 * 4]);
    file
}

fn config(file: &File) -> Result<ModelConfig, Error> {
    ModelConfig::from_file(written(&file.bytes()).1)
}

#[test]
fn metadata_are_read_as_the_configuration() -> Result<(), Error> {
    let mut file = small("llama");
    file.key("llama.rope.freq_base", Value::F32(5e5))
        .key("llama.rope.scaling.type", "linear")
        .key("llama.rope.scaling.factor", Value::F32(4.0))
        .key("tokenizer.ggml.eos_token_id", Value::U32(2))
        .key("tokenizer.ggml.eot_token_id", Value::U32(3))
        .key("tokenizer.ggml.bos_token_id", Value::U32(1));
    let c = config(&file)?;
    assert_eq!((c.vocab_size, c.hidden_size, c.intermediate_size), (4, 64, 32));
    assert_eq!((c.num_attention_heads, c.num_key_value_heads, c.head_dim), (2, 2, 32));
    assert_eq!((c.rms_norm_eps, c.rope_theta), (1e-6, 5e5));
    assert_eq!(c.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert!(c.tie_word_embeddings && !c.qkv_bias && !c.o_bias && !c.mlp_bias);
    assert_eq!((c.bos_token_id, c.eos_token_ids), (Some(1), vec![2, 3]));
    file.tensor("output.weight", &[64, 4], F32, vec![0; 4 * 64 * 4]);
    file.tensor("blk.0.ffn_gate.bias", &[32], F32, vec![0; 4 * 32]);
    let c = config(&file)?;
    assert!(!c.tie_word_embeddings && c.mlp_bias);
    Ok(())
}

#[test]
fn llama3_scaling_is_known_by_its_factors() -> Result<(), Error> {
    let mut file = small("llama");
    file.key("llama.rope.freq_base", Value::F32(5e5));
    let factors = |factor: f64, theta: f64| -> Vec<u8> {
        let one = |i: i32| {
            let wave = std::f64::consts::TAU * theta.powf(f64::from(2 * i) / 32.0);
            let turns = 8192.0 / wave;
            let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        };
        (0..16).flat_map(|i| one(i).to_le_bytes()).collect()
    };
    let mut scaled = file.clone();
    scaled.tensor("rope_freqs.weight", &[16], F32, factors(8.0, 5e5));
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(config(&scaled)?.rope_scaling, expected);
    let mut other = file.clone();
    other.tensor("rope_freqs.weight", &[16], F32, factors(8.0, 1e6));
    let error = config(&other).unwrap_err();
    assert!(matches!(&error, Error::Gguf { place, .. } if place.contains("rope_freqs")), "{error}");
    file.tensor("rope_freqs.weight", &[16], F32, factors(1.0, 5e5));
    assert_eq!(config(&file)?.rope_scaling, RopeScaling::Default);
    Ok(())
}

#[test]
fn keys_of_other_architectures_are_read_or_refused() -> Result<(), Error> {
    // Scores have the usual factor where Granite's file has none.
    let mut file = small("granite");
    file.key("granite.logit_scale", Value::F32(8.0));
    let c = config(&file)?;
    assert_eq!((c.attention_multiplier, c.logits_scaling), (Some(32f64.powf(-0.5)), 8.0));
    assert_eq!((c.embedding_multiplier, c.residual_multiplier), (1.0, 1.0));
    let refused = |file: &File, key: &str| {
        let error = config(file).unwrap_err();
        assert!(matches!(&error, Error::Gguf { place, .. } if place.contains(key)), "{error}");
    };
    file.key("granite.rope.scaling.finetuned", Value::Bool(false));
    refused(&file, "rope.scaling.finetuned");

    let mut file = small("mistral3");
    assert!(config(&file)?.windows().is_empty());
    file.key("mistral3.rope.scaling.type", "yarn")
        .key("mistral3.rope.scaling.factor", Value::F32(4.0))
        .key("mistral3.rope.scaling.attn_factor", Value::F32(0.5));
    let RopeScaling::Yarn { attention_factor, .. } = config(&file)?.rope_scaling else { panic!() };
    assert_eq!(attention_factor, Some(0.5 * (0.1 * 4f64.ln() + 1.0)));
    let mut other = file.clone();
    other.key("mistral3.rope.scaling.yarn_log_multiplier", Value::F32(1.0));
    refused(&other, "yarn_log_multiplier");
    // Ministral 3's.
    file.key("mistral3.attention.temperature_scale", Value::F32(0.1))
        .key("mistral3.rope.scaling.original_context_length", Value::U32(16));
    assert_eq!(config(&file)?.query_scaling, Some(QueryScaling { beta: 0.1, original: 16 }));
    for architecture in ["llama", "qwen3"] {
        let mut file = small(architecture);
        file.key(&format!("{architecture}.attention.temperature_scale"), Value::F32(0.1));
        refused(&file, "attention.temperature_scale");
    }

    let mut file = small("phi3");
    file.key("phi3.attention.sliding_window", Value::U32(0))
        .key("phi3.rope.dimension_count", Value::U32(24));
    let c = config(&file)?;
    assert_eq!((c.windows(), c.rotated_dims()), (Vec::new(), 24));
    file.set("phi3.rope.dimension_count", Value::U32(34));
    refused(&file, "rope.dimension_count");
    Ok(())
}

#[test]
fn several_files_are_one_model() -> Result<(), Error> {
    let whole = file::moa_tiny(&moa_tiny(), Q8_0);
    let dir = tempfile::tempdir().unwrap();
    let part = |number: u16| {
        let name = format!("tiny-0000{}-of-00003.gguf", number + 1);
        let (mut file, count) = (File::new(), whole.tensors.len());
        if number == 0 {
            file.keys.clone_from(&whole.keys);
        }
        file.key("split.no", Value::Raw(2, number.to_le_bytes().to_vec()))
            .key("split.count", Value::Raw(2, 3u16.to_le_bytes().to_vec()))
            .key("split.tensors.count", Value::Raw(5, (count as i32).to_le_bytes().to_vec()));
        let bounds = [0, 2, 20, count];
        let own = bounds[number as usize]..bounds[number as usize + 1];
        file.tensors = whole.tensors[own].to_vec();
        (dir.path().join(name), file)
    };
    let parts = [0, 1, 2].map(part);
    for (path, file) in &parts {
        std::fs::write(path, file.bytes()).unwrap();
    }
    let (first, second) = (&parts[0].0, &parts[1].0);
    let (_dir, single) = written(&whole.bytes());
    assert_eq!(Gguf::open(first)?.fingerprint(), Gguf::open(&single)?.fingerprint());
    assert_eq!(Gguf::open(first)?.len_bytes(), Gguf::open(&single)?.len_bytes());
    Checkpoint::open(Cpu::default(), first)?;

    let place = |error: Error| match error {
        Error::Gguf { place, .. } => place,
        other => panic!("{other}"),
    };
    assert_eq!(place(Gguf::open(second).unwrap_err()), "key `split.no`");
    let renamed = dir.path().join("tiny.gguf");
    std::fs::copy(first, &renamed).unwrap();
    assert_eq!(place(Gguf::open(renamed).unwrap_err()), "file of several");
    std::fs::copy(first, second).unwrap();
    assert!(matches!(Gguf::open(first), Err(Error::TensorTwice { .. })));
    std::fs::write(second, File { tensors: Vec::new(), ..parts[1].1.clone() }.bytes()).unwrap();
    assert_eq!(place(Gguf::open(first).unwrap_err()), "number of tensors");
    std::fs::remove_file(second).unwrap();
    let shard = second.file_name().unwrap().to_str().unwrap();
    assert!(
        matches!(Gguf::open(first), Err(Error::ShardMissing { index, shard: s }) if index == *first && s == shard)
    );
    Ok(())
}

#[test]
fn parts_of_blocks_are_widened() -> Result<(), Error> {
    let (_dir, path) = written(&file::moa_tiny(&moa_tiny(), Q8_0).bytes());
    let tensor = Gguf::open(path)?.tensor("blk.0.ffn_down.weight", &[256, 704])?;
    let values = tensor.to_f32().unwrap();
    for (columns, blocks) in [(32..96, Some(BlockType::Q8_0)), (16..48, None)] {
        let part = tensor.columns(std::slice::from_ref(&columns))?;
        assert_eq!((part.blocks(), part.dtype()), (blocks, blocks.is_none().then_some(Dtype::F32)));
        let expected: Vec<f32> =
            values.chunks(704).flat_map(|row| row[columns.clone()].to_vec()).collect();
        assert_eq!(part.to_f32().unwrap(), expected);
    }
    let rows = tensor.rows(&[3..5, 0..1])?;
    assert_eq!(rows.to_f32().unwrap(), [&values[3 * 704..5 * 704], &values[..704]].concat());
    Ok(())
}

#[test]
fn tokens_alone_can_be_read() -> Result<(), Error> {
    let (_dir, path) = written(&file::moa_tiny(&moa_tiny(), BF16).bytes());
    let (own, folder) = (Gguf::open(path)?.tokenizer()?, Tokenizer::from_dir(moa_tiny())?);
    assert_eq!(own.encode(TEXT, true)?, folder.encode(TEXT, true)?);
    Ok(())
}
