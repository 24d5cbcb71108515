//! Folders and files as people have them, which are models and which are told what they are.

use std::fs;
use std::path::Path;

use moa_models::{Checkpoint, Cpu, Dtype, Error, Gguf, ModelConfig, OpenOptions, quantize};
use serde_json::{Value, json};

use crate::extra_tensors::{add, answer, copy, edit, open, set};
use crate::gguf::file;
use crate::moa_tiny;

fn adapter(dir: &Path) {
    let config = json!({"peft_type": "LORA", "base_model_name_or_path": "owner/base"});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), "").unwrap();
}

#[test]
fn a_folder_that_is_no_model_says_what_to_name() {
    fn file(dir: &Path, name: &str) {
        fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        fs::write(dir.join(name), "{}").unwrap();
    }
    type Make = fn(&Path);
    let folders: [(Make, &str); 8] = [
        (adapter, "an adapter of owner/base"),
        (|dir| ["a.gguf", "mmproj-a.gguf"].iter().for_each(|name| file(dir, name)), "a.gguf; name"),
        (|dir| file(dir, "params.json"), "params.json, Mistral's own"),
        (|dir| file(dir, "snapshots/0a/config.json"), "snapshots/0a"),
        (|dir| file(dir, "checkpoint-500/config.json"), "checkpoint-500/config.json; name"),
        (|dir| file(dir, "notes.txt"), "got notes.txt"),
        (|dir| file(dir, "mmproj-a.gguf"), "got mmproj-a.gguf"),
        (|_| (), "an empty folder"),
    ];
    for (make, expected) in folders {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let out = dir.path().join("out.gguf");
        let errors = [
            open(dir.path()).unwrap_err(),
            ModelConfig::from_file(dir.path()).unwrap_err(),
            quantize(dir.path(), Dtype::F32, out, &mut ()).unwrap_err(),
        ];
        for error in errors {
            let Error::NoConfig { path, .. } = &error else { panic!("{error}") };
            assert_eq!(path, dir.path());
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
    let dir = copy();
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.gguf")).unwrap();
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::NoTokenizer { got, .. } if got.contains("a.gguf")), "{error}");
}

#[test]
fn an_adapter_is_no_model_and_is_not_read_beside_one() -> Result<(), Error> {
    let dir = copy();
    adapter(dir.path());
    assert_eq!(answer(&open(dir.path())?), answer(&open(&moa_tiny())?));
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::NoWeights { got, .. } if got.contains("owner/base")),
        "{error}"
    );
    Ok(())
}

#[test]
fn weights_that_mlx_quantised_are_named() {
    let dir = copy();
    edit(dir.path(), |header, data| {
        let name = "model.layers.0.mlp.up_proj";
        // 8 numbers of 4 bits in each, 32 of which would do.
        header[format!("{name}.weight")]["dtype"] = "U32".into();
        header[format!("{name}.weight")]["shape"] = json!([704, 128]);
        for end in ["scales", "biases"] {
            add(header, data, &format!("{name}.{end}"), "BF16", &[704, 4], &[0; 704 * 8]);
        }
    });
    set(dir.path(), "config.json", "quantization", json!({"group_size": 64, "bits": 4}));
    let ignoring = OpenOptions::default().ignore_extra_tensors(true);
    for error in [open(dir.path()).unwrap_err(), ignoring.open(Cpu::default(), &dir).unwrap_err()] {
        assert!(matches!(&error, Error::Quantized { scheme, .. } if scheme == "MLX"), "{error}");
    }
}

/// The configuration of the small model.
fn config() -> Value {
    serde_json::from_slice(&fs::read(moa_tiny().join("config.json")).unwrap()).unwrap()
}

#[test]
fn rotation_of_each_type_of_layers_is_read_where_it_is_one() -> Result<(), Error> {
    let read = |parameters: Value| {
        let mut config = config();
        let fields = config.as_object_mut().unwrap();
        fields.remove("rope_theta");
        fields.insert("rope_parameters".to_owned(), parameters);
        ModelConfig::from_json(&config.to_string())
    };
    let of = |theta: f64| json!({"rope_type": "linear", "factor": 2.0, "rope_theta": theta});
    let flat = read(of(7e5))?;
    assert_eq!(flat.rope_theta, 7e5);
    for kind in ["full_attention", "sliding_attention"] {
        assert_eq!(read(json!({kind: of(7e5)}))?, flat);
    }
    let both = |other| json!({"full_attention": of(7e5), "sliding_attention": of(other)});
    assert_eq!(read(both(7e5))?, flat);
    let error = read(both(1e4)).unwrap_err();
    let named = matches!(&error, Error::Config { field, .. } if field == "rope_parameters.sliding_attention");
    assert!(named, "{error}");
    Ok(())
}

// The names of transformers 4 and 5.
#[test]
fn the_text_part_of_a_model_of_images_is_a_model() -> Result<(), Error> {
    let whole = open(&moa_tiny())?;
    for (prefix, own) in [("language_model.model.", "model."), ("model.language_model.", "model.")]
    {
        let dir = copy();
        edit(dir.path(), |header, data| {
            let tensors = header.as_object_mut().unwrap();
            let renamed = std::mem::take(tensors).into_iter();
            tensors.extend(renamed.map(|(name, value)| (name.replacen(own, prefix, 1), value)));
            add(header, data, "vision_tower.patch_conv.weight", "F32", &[2], &[0; 8]);
        });
        let mut text = config();
        text["model_type"] = "mistral".into();
        text["sliding_window"] = Value::Null;
        text.as_object_mut().unwrap().remove("tie_word_embeddings");
        let outer = json!({"model_type": "mistral3", "text_config": text,
            "tie_word_embeddings": true, "vision_config": {"model_type": "pixtral"}});
        fs::write(dir.path().join("config.json"), outer.to_string()).unwrap();
        assert_eq!(answer(&open(dir.path())?), answer(&whole));
        let path = dir.path().join("text.gguf");
        quantize(dir.path(), Dtype::Bf16, &path, &mut ())?;
        assert_eq!(answer(&Checkpoint::open(Cpu::default(), path)?), answer(&whole));
        // What stands among the text's tensors is the text's.
        let unread = "language_model.visual_expert.weight";
        edit(dir.path(), |header, data| {
            add(header, data, unread, "F32", &[2], &[0; 8]);
            add(header, data, &format!("{prefix}norm.bias"), "F32", &[256], &[1; 1024]);
        });
        let error = open(dir.path()).unwrap_err();
        let Error::TensorsUnread { names, .. } = &error else { panic!("{error}") };
        assert!(names.contains(&format!("{prefix}norm.bias")), "{error}");
        assert_eq!(names.contains(&unread.to_owned()), prefix.starts_with("language"), "{error}");
    }
    let other = json!({"model_type": "x", "text_config": {"model_type": "x_text"}});
    let error = ModelConfig::from_json(&other.to_string()).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "model_type"), "{error}");
    Ok(())
}

#[test]
fn a_gguf_file_that_is_no_model_says_what_it_is() {
    for (kind, architecture) in [("mmproj", "clip"), ("adapter", "llama"), ("imatrix", "imatrix")] {
        let mut part = file::File::new();
        part.key("general.architecture", architecture).key("general.type", kind);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part.gguf");
        fs::write(&path, part.bytes()).unwrap();
        let error = ModelConfig::from_file(&path).unwrap_err();
        assert!(error.to_string().contains("key `general.type` must be model"), "{error}");
        assert!(error.to_string().ends_with(kind), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("page.gguf");
    fs::write(&path, "<!DOCTYPE html>").unwrap();
    let error = Gguf::open(&path).unwrap_err();
    assert!(error.to_string().contains("got `<!DO`"), "{error}");
}

// A fine-tune whose embedding was made longer for tokens of its own, to a multiple of 64.
#[test]
fn added_tokens_of_a_longer_embedding_are_written_and_read() -> Result<(), Error> {
    let dir = copy();
    edit(dir.path(), |header, data| {
        let name = "model.embed_tokens.weight";
        let place = header[name]["data_offsets"].clone();
        let at = |i: usize| place[i].as_u64().unwrap() as usize;
        let own = [&data[at(0)..at(1)], &[0; 64 * 512]].concat();
        let removed = data.drain(at(0)..at(1)).len();
        for (other, tensor) in header.as_object_mut().unwrap() {
            for offset in
                tensor.get_mut("data_offsets").and_then(Value::as_array_mut).into_iter().flatten()
            {
                if other != name && offset.as_u64().unwrap() as usize >= at(1) {
                    *offset = (offset.as_u64().unwrap() as usize - removed).into();
                }
            }
        }
        add(header, data, name, "BF16", &[8256, 256], &own);
    });
    set(dir.path(), "config.json", "vocab_size", 8256.into());
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({"id": 8192, "content": "<|tool|>",
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    fs::write(&path, tokenizer.to_string()).unwrap();
    let folder = open(dir.path())?;
    let out = dir.path().join("model.gguf");
    quantize(dir.path(), Dtype::Bf16, &out, &mut ())?;
    let written = Checkpoint::open(Cpu::default(), out)?;
    for checkpoint in [&folder, &written] {
        assert_eq!(checkpoint.model.config().vocab_size, 8256);
        assert_eq!(checkpoint.tokenizer.token_id("<|tool|>"), Some(8192));
        let tokens = checkpoint.tokenizer.encode("a<|tool|>b", false)?;
        assert_eq!(tokens.iter().filter(|token| **token == 8192).count(), 1);
    }
    assert_eq!(answer(&written), answer(&folder));
    Ok(())
}

#[test]
fn weights_of_8_bits_with_scales_are_read_and_written() -> Result<(), Error> {
    let name = "model.layers.0.mlp.up_proj";
    let codes: Vec<u8> = (0..704 * 256).map(|i| (i * 37 % 0x60 + i % 2 * 0x80) as u8).collect();
    let scale = |block: usize| 2f32.powi(-10 - (block % 3) as i32);
    let model = |is_fp8: bool, config: Value| {
        let dir = copy();
        edit(dir.path(), |header, data| {
            // A bias of zeros, which is none, keeps the place of what was there.
            let own = header.as_object_mut().unwrap().remove(&format!("{name}.weight")).unwrap();
            let at = |i: usize| own["data_offsets"][i].as_u64().unwrap() as usize;
            data[at(0)..at(1)].fill(0);
            header[format!("{name}.bias")] = own;
            let weight = format!("{name}.weight");
            if is_fp8 {
                add(header, data, &weight, "F8_E4M3", &[704, 256], &codes);
                let scales: Vec<u8> = (0..12).flat_map(|b| scale(b).to_le_bytes()).collect();
                add(header, data, &format!("{name}.weight_scale_inv"), "F32", &[6, 2], &scales);
                add(header, data, &format!("{name}.input_scale"), "F32", &[], &[0; 4]);
            } else {
                let number = |(i, code): (usize, &u8)| {
                    let block = i / 256 / 128 * 2 + i % 256 / 128;
                    let bits = (moa_core::e4m3_to_f32(*code) * scale(block)).to_bits();
                    ((bits >> 16) as u16).to_le_bytes()
                };
                let numbers: Vec<u8> = codes.iter().enumerate().flat_map(number).collect();
                add(header, data, &weight, "BF16", &[704, 256], &numbers);
            }
        });
        set(dir.path(), "config.json", "quantization_config", config);
        dir
    };
    let plain = model(false, Value::Null);
    let expected = answer(&open(plain.path())?);
    assert_ne!(expected, answer(&open(&moa_tiny())?));
    let fp8 = |block: Value| json!({"quant_method": "fp8", "weight_block_size": block});
    for config in [Value::Null, fp8(json!([128, 128])), fp8(Value::Null)] {
        let dir = model(true, config);
        assert_eq!(answer(&open(dir.path())?), expected);
        let out = dir.path().join("model.gguf");
        quantize(dir.path(), Dtype::Bf16, &out, &mut ())?;
        assert_eq!(answer(&Checkpoint::open(Cpu::default(), out)?), expected);
    }
    let error = open(model(true, fp8(json!([64, 128]))).path()).unwrap_err();
    assert!(matches!(&error, Error::TensorShape { name, .. } if name.ends_with("_inv")), "{error}");
    let error = open(model(true, fp8(json!([64]))).path()).unwrap_err();
    let named =
        matches!(&error, Error::Config { field, .. } if field.ends_with("weight_block_size"));
    assert!(named, "{error}");
    Ok(())
}
