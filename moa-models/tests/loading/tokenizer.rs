use std::fs;
use std::path::Path;

use moa_models::{ChatTemplate, Error, Message, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{moa_tiny, test_data};

/// Text that a byte-level tokenizer cuts inside characters.
const EMOJI: &str = "Füße 🦙🚀 (normal) 😶‍🌫️ \u{1F1E9}\u{1F1EA} and 我想在 12.5 km\n\n end";

/// Joins what a stream returns for `ids`.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, Error> {
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for &id in ids {
        if let Some(piece) = stream.push(id)? {
            assert!(!piece.is_empty());
            text.push_str(&piece);
        }
    }
    text.push_str(&stream.finish()?.unwrap_or_default());
    Ok(text)
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

#[test]
fn tokenizer_of_moa_tiny() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    assert_eq!(tokenizer.vocab_size(), 8192);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!(tokenizer.token_id("</s>"), Some(2));
    // As the tokenizers library for Python encodes it.
    let ids = [1, 42, 470, 81, 14, 854, 3, 223, 19, 20, 21];
    assert_eq!(tokenizer.encode("Hello, world! 123", true)?, ids);
    assert_eq!(tokenizer.encode("Hello, world! 123", false)?, ids[1..]);
    assert_eq!(tokenizer.decode(&ids, true)?, "Hello, world! 123");
    assert_eq!(tokenizer.decode(&ids, false)?, "<s>Hello, world! 123");
    tokenizer.check_vocab_size(8192)
}

#[test]
fn tokenizer_of_another_vocabulary_names_both() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    match tokenizer.check_vocab_size(8191) {
        Err(Error::TokenizerVocabulary { path, id, vocab_size, .. }) => {
            assert_eq!((id, vocab_size), (8191, 8191));
            assert!(path.ends_with("tokenizer.json"));
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn bad_tokenizer_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_dir(dir.path()), Err(Error::Io { .. })));
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(Tokenizer::from_dir(dir.path()), Err(Error::Tokenizer { .. })));
    fs::copy(moa_tiny().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let config = dir.path().join("tokenizer_config.json");
    fs::write(&config, r#"{"bos_token": "<nobody>"}"#).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert!(error.to_string().contains("<nobody>"), "{error}");
    fs::write(&config, r#"{"bos_token": 7}"#).unwrap();
    assert!(matches!(Tokenizer::from_dir(dir.path()), Err(Error::Config { .. })));
}

#[test]
fn special_tokens_of_the_older_file() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(moa_tiny().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path())?.bos_id(), None);
    let map = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#;
    fs::write(dir.path().join("special_tokens_map.json"), map).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path())?;
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    Ok(())
}

#[test]
fn truncation_of_the_file_is_switched_off() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(moa_tiny().join("tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    file["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path())?.encode("Hello, world! 123", true)?.len(), 11);
    Ok(())
}

#[test]
fn stream_holds_back_half_characters() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    let ids = tokenizer.encode(EMOJI, true)?;
    assert!(ids.len() > EMOJI.chars().count(), "some characters take several tokens");
    assert_eq!(streamed(&tokenizer, &ids)?, EMOJI);
    // A text that ends inside a character ends with U+FFFD.
    let llama = tokenizer.encode("a🦙", false)?;
    let cut = streamed(&tokenizer, &llama[..llama.len() - 1])?;
    assert_eq!(cut, "a\u{FFFD}");
    Ok(())
}

#[test]
fn stream_survives_bytes_that_are_no_text() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    // The last token of an emoji is a continuation byte.
    let Some(&continuation) = tokenizer.encode("🦙", false)?.last() else { panic!("no token") };
    let word = tokenizer.encode(" word", false)?;
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for _ in 0..100 {
        text.push_str(&stream.push(continuation)?.unwrap_or_default());
    }
    assert!(text.chars().count() > 80, "broken bytes come out in the end: {text}");
    for id in word {
        text.push_str(&stream.push(id)?.unwrap_or_default());
    }
    assert!(text.ends_with("\u{FFFD} word"), "{text}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn streaming_does_not_change_the_text(text in "[ a-zé字🦙\\n0-9]{0,30}") {
        thread_local! {
            static TINY: Tokenizer = Tokenizer::from_dir(moa_tiny()).unwrap();
        }
        TINY.with(|tokenizer| {
            let ids = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(streamed(tokenizer, &ids).unwrap(), text);
            Ok(())
        })?;
    }
}

#[test]
fn llama_2_reference_encodings() -> Result<(), Error> {
    let Some(dir) = test_data("tokenizers/llama2") else { return Ok(()) };
    let tokenizer = Tokenizer::from_dir(&dir)?;
    check_cases(&tokenizer, &cases(&dir, "ggml-vocab-llama-spm.gguf"))?;
    assert_eq!(tokenizer.encode("Hello", true)?[0], 1);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    // A character of byte tokens followed by a broken byte: <0xE6> <0x88> <0x91> <0xFF>, then " a".
    let byte = |byte: u32| byte + 3;
    let broken = [15043, byte(0xe6), byte(0x88), byte(0x91), byte(0xff), 263];
    let text = streamed(&tokenizer, &broken)?;
    assert!(text.starts_with("Hello我") && text.ends_with(" a"), "{text}");
    Ok(())
}

#[test]
fn llama_3_reference_encodings() -> Result<(), Error> {
    let Some(dir) = test_data("tokenizers/llama3") else { return Ok(()) };
    let Some(config) = test_data("configs/llama-3.2-1B/tokenizer_config.json") else {
        return Ok(());
    };
    let model = tempfile::tempdir().unwrap();
    fs::copy(&config, model.path().join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    let ranks = fs::read_to_string(dir.join("tokenizer.model")).unwrap();
    let file = from_tiktoken(&ranks, &config["added_tokens_decoder"]).to_string();
    fs::write(model.path().join("tokenizer.json"), file).unwrap();

    let tokenizer = Tokenizer::from_dir(model.path())?;
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id()), (128_256, Some(128_000)));
    tokenizer.check_vocab_size(128_256)?;
    check_cases(&tokenizer, &cases(&dir, "ggml-vocab-llama-bpe.gguf"))?;
    // The cases of the tokenizer's own test.
    let sentence = [128000, 2028, 374, 264, 1296, 11914, 13];
    assert_eq!(tokenizer.encode("This is a test sentence.", true)?, sentence);
    let chat = [Message::system("This is a test sentence."), Message::user("This is a response.")];
    let text = ChatTemplate::llama3()?.render(&chat, true)?;
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
