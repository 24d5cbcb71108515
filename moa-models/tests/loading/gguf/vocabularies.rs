//! Tokenizers from metadata.

use moa_models::{Error, Gguf, Tokenizer};

use super::file::{File, Value};
use super::written;

fn tokenizer(file: &File) -> Result<Tokenizer, Error> {
    Gguf::open(written(&file.bytes()).1)?.tokenizer()
}

fn place(result: Result<Tokenizer, Error>) -> String {
    match result {
        Err(Error::Gguf { place, .. }) => place,
        other => panic!("expected a fault, got {other:?}"),
    }
}

/// Pieces with scores, bytes for what no piece spells.
fn sentencepiece() -> File {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut types = vec![2, 3, 3];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    let pieces = ["▁", "a", "b", "c", "▁a", "bc", "ab", "▁ab", "<x>"];
    tokens.extend(pieces.map(String::from));
    types.extend([1; 8]);
    types.push(4);
    let mut scores = vec![0.0; 259];
    scores.extend([-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -2.0, -4.0, 0.0]);
    let mut file = File::new();
    file.key("tokenizer.ggml.model", "llama")
        .key("tokenizer.ggml.tokens", Value::Texts(tokens))
        .key("tokenizer.ggml.token_type", Value::I32s(types))
        .key("tokenizer.ggml.scores", Value::F32s(scores))
        .key("tokenizer.ggml.bos_token_id", Value::U32(1))
        .key("tokenizer.ggml.eos_token_id", Value::U32(2));
    file
}

#[test]
fn pieces_merge_by_score_and_bytes_fill_in() -> Result<(), Error> {
    let mut file = sentencepiece();
    let own = tokenizer(&file)?;
    let id = |piece: &str| own.token_id(piece).unwrap();
    // `bc` has a higher score than `ab`, and the begin token goes before the text.
    assert_eq!(own.encode("abc", true)?, [1, id("▁a"), id("bc")]);
    assert_eq!(own.encode("ab b", false)?, [id("▁ab"), id("▁"), id("b")]);
    let tokens = own.encode("é", false)?;
    assert_eq!(tokens, [id("▁"), id("<0xC3>"), id("<0xA9>")]);
    assert_eq!(own.decode(&tokens, true)?, "é");
    // A token of the user's stands for itself, and is no special one.
    let tokens = own.encode("a<x>", false)?;
    assert_eq!((tokens.last(), own.decode(&tokens, true)?), (Some(&id("<x>")), "a<x>".into()));
    assert_eq!((own.bos_id(), own.eos_id()), (Some(1), Some(2)));

    file.key("tokenizer.ggml.add_space_prefix", Value::Bool(false))
        .key("tokenizer.ggml.add_bos_token", Value::Bool(false))
        .key("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let own = tokenizer(&file)?;
    assert_eq!(own.encode("abc", true)?, [id("a"), id("bc"), 2]);
    Ok(())
}

#[test]
fn what_is_missing_or_unknown_is_named() {
    let key = |name: &str| format!("key `tokenizer.ggml.{name}`");
    let without = |name: &str| {
        let mut file = sentencepiece();
        file.keys.retain(|(key, _)| key != &format!("tokenizer.ggml.{name}"));
        place(tokenizer(&file))
    };
    for name in ["model", "tokens", "scores"] {
        assert_eq!(without(name), key(name));
    }
    let with = |name: &str, value: Value| {
        let mut file = sentencepiece();
        file.set(&format!("tokenizer.ggml.{name}"), value);
        tokenizer(&file)
    };
    assert_eq!(place(with("model", "bert".into())), key("model"));
    assert_eq!(place(with("scores", Value::F32s(vec![0.0]))), key("scores"));
    assert_eq!(place(with("token_type", Value::I32s(vec![1]))), key("token_type"));
    // Ways to put a piece together are as many as it has characters.
    let mut tokens: Vec<String> = (0..268).map(|i| format!("{i}")).collect();
    tokens[260] = "a".repeat(100_000);
    assert_eq!(place(with("tokens", Value::Texts(tokens))), key("tokens"));
    assert_eq!(place(with("bos_token_id", Value::U32(9999))), key("bos_token_id"));
    // Of bytes that merge.
    assert_eq!(place(with("model", "gpt2".into())), key("merges"));
    let mut file = sentencepiece();
    file.set("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "no-such");
    let error = tokenizer(&file).unwrap_err().to_string();
    assert!(error.contains("no-such") && error.contains("llama-bpe"), "{error}");
    file.set("tokenizer.ggml.pre", "gpt-2");
    file.key("tokenizer.ggml.merges", Value::Texts(vec!["ab".into()]));
    assert_eq!(place(tokenizer(&file)), key("merges"));
}
