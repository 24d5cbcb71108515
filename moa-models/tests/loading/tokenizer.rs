use std::fs;

use moa_models::{Error, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::moa_tiny;
use crate::streamed::streamed;

/// Text that a byte-level tokenizer cuts inside characters.
const EMOJI: &str = "Füße 🦙🚀 (normal) 😶‍🌫️ \u{1F1E9}\u{1F1EA} and 我想在 12.5 km\n\n end";

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
fn a_text_that_cannot_fit_is_refused_by_its_bytes() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    for text in ["a".repeat(1 << 16), " ".repeat(1 << 16), "🦙".repeat(1 << 12)] {
        let tokens = tokenizer.encode(&text, true)?.len();
        // What fits is never refused.
        assert_eq!(tokenizer.encode_within(&text, true, tokens)?.len(), tokens);
        match tokenizer.encode_within(&text, true, 16) {
            Err(Error::ContextExceeded { asked, limit: 16 }) => {
                assert!(16 < asked && asked <= tokens)
            }
            other => panic!("{:?}", other.map(|tokens| tokens.len())),
        }
    }
    // At once: cutting it would take gigabytes.
    let text = "a b ".repeat(1 << 24);
    let begin = std::time::Instant::now();
    assert!(matches!(
        tokenizer.encode_within(&text, true, 4096),
        Err(Error::ContextExceeded { .. })
    ));
    assert!(begin.elapsed().as_secs() < 5);
    Ok(())
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
    let none = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert!(matches!(&none, Error::NoTokenizer { .. }), "{none}");
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    let none = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(none.contains("tokenizer.model") && none.contains("save_pretrained"), "{none}");
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

/// A folder with the small model's tokenizer and these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(moa_tiny().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn tokens_that_other_files_add_are_tokens_under_their_ids() -> Result<(), Error> {
    let decoder = r#"{"added_tokens_decoder": {
        "8192": {"content": "<|end|>", "special": true},
        "8200": {"content": "<|far|>", "special": true},
        "42": {"content": "H"}}}"#;
    let dir = folder(&[("tokenizer_config.json", decoder)]);
    let tokenizer = Tokenizer::from_dir(dir.path())?;
    assert_eq!(tokenizer.encode("<|far|><|end|>", false)?, [8200, 8192]);
    assert_eq!(tokenizer.special_token_id("<|end|>"), Some(8192));
    assert_eq!(tokenizer.special_token_id("world"), None);
    assert_eq!(tokenizer.decode(&[8192], true)?, "");

    let (tokens, roles) =
        (r#"{"<|im_end|>": 8192, "<x>": 8193}"#, r#"{"eos_token": "<|im_end|>"}"#);
    let dir = folder(&[("added_tokens.json", tokens), ("special_tokens_map.json", roles)]);
    let tokenizer = Tokenizer::from_dir(dir.path())?;
    assert_eq!(tokenizer.eos_id(), Some(8192));
    assert_eq!(tokenizer.special_token_id("<|im_end|>"), Some(8192));
    assert_eq!(tokenizer.decode(&tokenizer.encode("<x><|im_end|>", false)?, true)?, "<x>");

    let taken = folder(&[("added_tokens.json", r#"{"<x>": 300}"#)]);
    let tokenizer = Tokenizer::from_dir(taken.path())?;
    assert_eq!(tokenizer.token_id("<x>"), None, "tokenizer.json is right");
    let odd = folder(&[("added_tokens.json", r#"{"<x>": "300"}"#)]);
    assert!(matches!(Tokenizer::from_dir(odd.path()), Err(Error::Config { .. })));
    Ok(())
}

#[test]
fn an_added_token_may_lie_beyond_the_embedding() -> Result<(), Error> {
    let dir = folder(&[("added_tokens.json", r#"{"<pad>": 8192}"#)]);
    Tokenizer::from_dir(dir.path())?.check_vocab_size(8192)?;
    let roles = r#"{"eos_token": "<pad>"}"#;
    fs::write(dir.path().join("special_tokens_map.json"), roles).unwrap();
    let error = Tokenizer::from_dir(dir.path())?.check_vocab_size(8192).unwrap_err();
    assert!(matches!(&error, Error::TokenizerVocabulary { id: 8192, .. }), "{error}");
    Ok(())
}

#[test]
fn a_text_that_follows_on_another_keeps_its_first_space() -> Result<(), Error> {
    let tokenizer = Tokenizer::from_dir(moa_tiny())?;
    let (prompt, rest) = ("The capital of France is", " Paris. 🦙");
    let ids = tokenizer.encode(&format!("{prompt}{rest}"), true)?;
    let split = tokenizer.encode(prompt, true)?.len();
    let mut stream = tokenizer.stream_after(&ids[..split])?;
    let mut text = String::new();
    for id in &ids[split..] {
        text.push_str(&stream.push(*id)?.unwrap_or_default());
    }
    text.push_str(&stream.finish()?.unwrap_or_default());
    assert_eq!(text, rest);

    // A tokenizer of Llama 2's kind, which leaves the space out of a text of its own.
    let space =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": space, "post_processor": null, "decoder": space,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "▁is": 1, "▁Paris": 2}, "unk_token": "<unk>"}
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path())?;
    let is = tokenizer.encode("is", false)?;
    assert_eq!(tokenizer.stream_after(&is)?.push(2)?.as_deref(), Some(" Paris"));
    assert_eq!(tokenizer.stream().push(2)?.as_deref(), Some("Paris"));
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
