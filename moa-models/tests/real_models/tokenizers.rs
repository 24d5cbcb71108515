//! Tokens as llama.cpp and the tokenizer of Llama 3 have them.

use std::fs;
use std::path::Path;

use moa_conformance::{Trial, Verdict, trials};
use moa_models::{ChatTemplate, Error, Gguf, Message, Tokenizer};
use serde_json::{Value, json};

use crate::gguf_file::{File, Value as Metadata};
use crate::streamed::streamed;
use crate::test_data;

pub(crate) fn trials() -> Vec<Trial> {
    trials![llama_2_reference_encodings, llama_3_reference_encodings]
}

/// The cases of a llama.cpp vocabulary test and their encodings without begin token.
fn cases(dir: &Path, stem: &str) -> Vec<(String, Vec<u32>)> {
    let input = fs::read_to_string(dir.join(format!("{stem}.inp"))).unwrap();
    let output = fs::read_to_string(dir.join(format!("{stem}.out"))).unwrap();
    let ids = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let input = input.split("\n__ggml_vocab_test__\n").map(str::to_owned);
    let cases: Vec<_> = input.zip(output.lines().map(ids)).collect();
    assert!(cases.len() > 40, "{}", cases.len());
    cases
}

fn check_cases(tokenizer: &Tokenizer, cases: &[(String, Vec<u32>)]) -> Result<(), Error> {
    for (text, ids) in cases {
        assert_eq!(&tokenizer.encode(text, false)?, ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, true)?, text);
        assert_eq!(&streamed(tokenizer, ids)?, text);
    }
    Ok(())
}

fn llama_2_reference_encodings() -> Verdict {
    let dir = test_data("tokenizers/llama2")?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let cases = cases(&dir, "ggml-vocab-llama-spm.gguf");
    check_cases(&tokenizer, &cases)?;
    let file = fs::read(dir.join("tokenizer.json"))?;
    // The vocabulary's scores count down from the first piece, behind the bytes, but for runs of spaces.
    let own = from_gguf("llama", &serde_json::from_slice(&file)?, |file, tokens| {
        let scores = tokens.iter().enumerate().map(|(id, token)| match id {
            0..259 => 0.0,
            _ if token.chars().all(|c| c == '▁') => -1e9,
            _ => 259.0 - id as f32,
        });
        file.key("tokenizer.ggml.scores", Metadata::F32s(scores.collect()));
    })?;
    check_cases(&own, &cases)?;
    assert_eq!(own.encode("Hello", true)?[0], 1);
    assert_eq!(tokenizer.encode("Hello", true)?[0], 1);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    // A character of byte tokens followed by a broken byte: <0xE6> <0x88> <0x91> <0xFF>, then " a".
    let byte = |byte: u32| byte + 3;
    let broken = [15043, byte(0xe6), byte(0x88), byte(0x91), byte(0xff), 263];
    let text = streamed(&tokenizer, &broken)?;
    assert!(text.starts_with("Hello我") && text.ends_with(" a"), "{text}");
    Ok(())
}

fn llama_3_reference_encodings() -> Verdict {
    let dir = test_data("tokenizers/llama3")?;
    let config = test_data("configs/llama-3.2-1B/tokenizer_config.json")?;
    let model = tempfile::tempdir().unwrap();
    fs::copy(&config, model.path().join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    let ranks = fs::read_to_string(dir.join("tokenizer.model")).unwrap();
    let file = from_tiktoken(&ranks, &config["added_tokens_decoder"]).to_string();
    fs::write(model.path().join("tokenizer.json"), file).unwrap();

    let tokenizer = Tokenizer::from_dir(model.path())?;
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id()), (128_256, Some(128_000)));
    tokenizer.check_vocab_size(128_256)?;
    let cases = cases(&dir, "ggml-vocab-llama-bpe.gguf");
    check_cases(&tokenizer, &cases)?;
    let file = fs::read(model.path().join("tokenizer.json"))?;
    let own = from_gguf("gpt2", &serde_json::from_slice(&file)?, |file, _| {
        file.key("tokenizer.ggml.pre", "llama-bpe");
        file.set("tokenizer.ggml.bos_token_id", Metadata::U32(128_000));
    })?;
    check_cases(&own, &cases)?;
    assert_eq!(own.encode("This is a test sentence.", true)?[..2], [128_000, 2028]);
    // The cases of the tokenizer's own test.
    let sentence = [128000, 2028, 374, 264, 1296, 11914, 13];
    assert_eq!(tokenizer.encode("This is a test sentence.", true)?, sentence);
    let chat = [Message::system("This is a test sentence."), Message::user("This is a response.")];
    let text = ChatTemplate::llama3().render(&chat, true)?;
    let dialog = [
        128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009, 128006, 882,
        128007, 271, 2028, 374, 264, 2077, 13, 128009, 128006, 78191, 128007, 271,
    ];
    assert_eq!(tokenizer.encode(&text, false)?, dialog);
    Ok(())
}

/// A `tokenizer.json` of Llama 3 from its file of ranks.
fn from_tiktoken(ranks: &str, added: &Value) -> Value {
    let tokens: Vec<Vec<u8>> =
        ranks.lines().map(|line| base64(line.split(' ').next().unwrap())).collect();
    let ids: std::collections::HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_slice(), id)).collect();
    let letters = byte_letters();
    let spell = |token: &[u8]| token.iter().map(|b| letters[*b as usize]).collect::<String>();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (spell(token), json!(id))).collect();
    let mut merges = Vec::new();
    for token in &tokens {
        let cuts = (1..token.len()).map(|cut| token.split_at(cut));
        let mut pairs: Vec<_> =
            cuts.filter(|(a, b)| ids.contains_key(a) && ids.contains_key(b)).collect();
        pairs.sort_by_key(|(a, b)| (ids[a], ids[b]));
        merges.extend(pairs.into_iter().map(|(a, b)| json!([spell(a), spell(b)])));
    }
    let added: Vec<Value> = added
        .as_object()
        .unwrap()
        .iter()
        .map(|(id, token)| {
            let mut token = token.clone();
            token["id"] = json!(id.parse::<u32>().unwrap());
            token
        })
        .collect();
    let split = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}\
                 | ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                       "use_regex": false});
    let bos = "<|begin_of_text|>";
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
            bytes]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [128000], "tokens": [bos]}}},
        "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": true, "vocab": vocab, "merges": merges},
    })
}

/// The letter that stands for each byte in byte-level vocabularies.
fn byte_letters() -> Vec<char> {
    let mut spare = 256..;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => spare.next().and_then(char::from_u32).unwrap(),
        })
        .collect()
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |c: u8| DIGITS.iter().position(|d| *d == c).unwrap() as u32;
    let mut bytes = Vec::new();
    for chunk in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = chunk.iter().fold(0, |bits, c| bits << 6 | digit(*c)) << (6 * (4 - chunk.len()));
        bytes.extend(&bits.to_be_bytes()[1..chunk.len()]);
    }
    bytes
}

/// The vocabulary of a `tokenizer.json` by way of a GGUF file, to which `more` is added.
fn from_gguf(
    model: &str,
    tokenizer: &Value,
    more: impl Fn(&mut File, &[String]),
) -> Result<Tokenizer, Error> {
    let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap().iter();
    let added = tokenizer["added_tokens"].as_array().unwrap().iter();
    let id = |id: &Value| id.as_u64().unwrap() as usize;
    let mut all: Vec<(usize, String, i32)> = vocabulary
        .map(|(token, own)| {
            let byte = model == "llama" && token.len() == 6 && token.starts_with("<0x");
            (id(own), token.clone(), if byte { 6 } else { 1 })
        })
        .collect();
    for token in added {
        let own = id(&token["id"]);
        all.retain(|(id, ..)| *id != own);
        let kind = if model == "llama" && own == 0 { 2 } else { 3 };
        all.push((own, token["content"].as_str().unwrap().to_owned(), kind));
    }
    all.sort();
    let merge = |merge: &Value| match merge {
        Value::String(pair) => pair.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    };
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let mut file = File::new();
    let tokens: Vec<String> = all.iter().map(|one| one.1.clone()).collect();
    file.key("tokenizer.ggml.model", model)
        .key("tokenizer.ggml.token_type", Metadata::I32s(all.iter().map(|one| one.2).collect()))
        .key("tokenizer.ggml.tokens", Metadata::Texts(tokens.clone()))
        .key("tokenizer.ggml.bos_token_id", Metadata::U32(1));
    if model == "gpt2" {
        file.key("tokenizer.ggml.merges", Metadata::Texts(merges));
    }
    more(&mut file, &tokens);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vocabulary.gguf");
    fs::write(&path, file.bytes()).unwrap();
    Gguf::open(&path)?.tokenizer()
}
