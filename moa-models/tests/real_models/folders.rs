//! What lies in the folders of real models is read as it is meant.

use std::fs;
use std::path::Path;

use moa_conformance::{Trial, Verdict, trials};
use moa_models::{
    ChatTemplate, Dtype, GenerationConfig, Message, ModelConfig, RopeScaling, RopeTable,
    SamplingOptions, Weights,
};

use crate::test_data;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        configs_of_real_models,
        sharded_checkpoint_of_a_trained_model,
        generation_configs_of_real_models,
        template_of_llama_2,
        templates_of_llama_3,
    ]
}

fn configs_of_real_models() -> Verdict {
    // layers, query heads, KV heads, head_dim, hidden, feed-forward, vocabulary, context
    type Row = (&'static str, [usize; 8], f64, &'static [u32], bool);
    let rows: [Row; 12] = [
        (
            "llama-2-3/llama-2-7b.json",
            [32, 32, 32, 128, 4096, 11008, 32000, 4096],
            1e4,
            &[2],
            false,
        ),
        (
            "llama-2-3/llama-2-13b.json",
            [40, 40, 40, 128, 5120, 13824, 32000, 4096],
            1e4,
            &[2],
            false,
        ),
        (
            "llama-2-3/llama-2-70b.json",
            [80, 64, 8, 128, 8192, 28672, 32000, 4096],
            1e4,
            &[2],
            false,
        ),
        (
            "llama-2-3/llama-3-8b.json",
            [32, 32, 8, 128, 4096, 14336, 128256, 8192],
            5e5,
            &[128001],
            false,
        ),
        (
            "llama-2-3/llama-3-70b.json",
            [80, 64, 8, 128, 8192, 28672, 128256, 8192],
            5e5,
            &[128001],
            false,
        ),
        (
            "llama-2-3/llama-3-8b-instruct-262k.json",
            [32, 32, 8, 128, 4096, 14336, 128256, 262_144],
            283_461_213.0,
            &[128001],
            false,
        ),
        ("vicuna-7b-v1.5-16k", [32, 32, 32, 128, 4096, 11008, 32000, 16384], 1e4, &[2], false),
        (
            "llama-3.1-3.2/Llama-3.1-8B-Instruct",
            [32, 32, 8, 128, 4096, 14336, 128256, 131_072],
            5e5,
            &[128001, 128008, 128009],
            false,
        ),
        (
            "llama-3.1-3.2/Llama-3.1-70B-Instruct",
            [80, 64, 8, 128, 8192, 28672, 128256, 131_072],
            5e5,
            &[128001, 128008, 128009],
            false,
        ),
        (
            "llama-3.1-3.2/Llama-3.2-1B-Instruct",
            [16, 32, 8, 64, 2048, 8192, 128256, 131_072],
            5e5,
            &[128001, 128008, 128009],
            true,
        ),
        (
            "llama-3.1-3.2/Llama-3.2-3B-Instruct",
            [28, 24, 8, 128, 3072, 8192, 128256, 131_072],
            5e5,
            &[128001, 128008, 128009],
            true,
        ),
        ("llama-3.2-1B", [16, 32, 8, 64, 2048, 8192, 128256, 131_072], 5e5, &[128001], true),
    ];
    let dir = test_data("configs")?;
    for (path, sizes, theta, eos, tied) in rows {
        let c = ModelConfig::from_file(dir.join(path))?;
        let got = [
            c.num_hidden_layers,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.hidden_size,
            c.intermediate_size,
            c.vocab_size,
            c.context_length(),
        ];
        assert_eq!(got, sizes, "{path}");
        assert_eq!((c.rope_theta, c.eos_token_ids.as_slice()), (theta, eos), "{path}");
        assert_eq!((c.tie_word_embeddings, c.rms_norm_eps), (tied, 1e-5), "{path}");
        let table = RopeTable::new(&c, c.context_length())?;
        assert_eq!(table.inv_freq().len(), c.head_dim / 2, "{path}");
    }
    let scaling = ModelConfig::from_file(dir.join("llama-3.2-1B"))?.rope_scaling;
    let expected = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(scaling, expected);
    Ok(())
}

fn sharded_checkpoint_of_a_trained_model() -> Verdict {
    let dir = test_data("models/moa-small")?;
    let weights = Weights::open(&dir)?;
    assert_eq!(weights.names().count(), 2 + 9 * 8);
    let q = weights.tensor("model.layers.7.self_attn.q_proj.weight", &[512, 512])?;
    assert_eq!(q.dtype(), Some(Dtype::Bf16));
    assert!(weights.tensor("model.embed_tokens.weight", &[8192, 512])?.to_f32()?[0].is_finite());
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_owned();
        if Path::new(&name) != Path::new("model-00003-of-00004.safetensors") {
            fs::copy(&path, copy.path().join(name)).unwrap();
        }
    }
    let error = Weights::open(copy.path()).unwrap_err();
    assert!(error.to_string().contains("model-00003-of-00004.safetensors"), "{error}");
    Ok(())
}

fn generation_configs_of_real_models() -> Verdict {
    let dir = test_data("tokenizers/llama2")?;
    let sampling = GenerationConfig::from_dir(dir)?.sampling(9);
    let expected =
        SamplingOptions { temperature: 0.6, top_p: 0.9, seed: 9, ..SamplingOptions::default() };
    assert_eq!(sampling, expected);
    Ok(())
}

// Expected texts of files' templates come from Jinja2 3.1 set up as transformers sets it up.

fn chat() -> Vec<Message> {
    vec![
        Message::system(" Be brief. "),
        Message::user(" Hello <b>! "),
        Message::assistant("Hi."),
        Message::user("Bye."),
    ]
}

fn template_of_llama_2() -> Verdict {
    let expected = "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hello <b>! [/INST] Hi. </s>\
                    <s>[INST] Bye. [/INST]";
    let dir = test_data("tokenizers/llama2")?;
    let template = ChatTemplate::from_dir(dir)?.unwrap();
    assert_eq!(template.render(&chat(), true)?, expected);
    let error = template.render(&[Message::assistant("first")], true).unwrap_err();
    assert!(error.to_string().contains("roles must alternate"), "{error}");
    Ok(())
}

fn templates_of_llama_3() -> Verdict {
    let tail = "Hello <b>!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>\
                <|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>\
                <|start_header_id|>assistant<|end_header_id|>\n\n";
    let system = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n";
    let dir = test_data("configs/chat_templates")?;
    for (file, date) in [
        ("meta-llama-Llama-3.1-8B-Instruct.jinja", "26 Jul 2024"),
        ("meta-llama-Llama-3.2-3B-Instruct.jinja", "23 Nov 2024"),
    ] {
        let source = fs::read_to_string(dir.join(file)).unwrap();
        let template = ChatTemplate::new(source, "<|begin_of_text|>", "<|eot_id|>");
        let template = template.with_date(2024, 11, 23)?;
        let dates = format!("Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n");
        let user = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n";
        let expected = format!("{system}{dates}Be brief.{user}{tail}");
        assert_eq!(template.render(&chat(), true)?, expected, "{file}");
        let tool = [Message::user("Hello <b>!"), Message::new("tool", "a \"<é>\"")];
        let expected = format!(
            "{system}{dates}{user}Hello <b>!<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n\
             \"a \\\"<é>\\\"\"<|eot_id|>"
        );
        assert_eq!(template.render(&tool, false)?, expected, "{file}");
    }
    Ok(())
}
