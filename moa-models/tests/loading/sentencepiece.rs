//! Folders that have SentencePiece's `tokenizer.model` alone, against what the library itself makes of texts
//! (`tests/fixtures/sentencepiece/make.py`).

use std::fs;
use std::path::Path;

use moa_models::{Error, Tokenizer};

fn folder(kind: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    fs::copy(from.join(format!("{kind}.model")), dir.path().join("tokenizer.model")).unwrap();
    dir
}

#[test]
fn texts_become_the_pieces_of_the_library() -> Result<(), Error> {
    let expected = include_str!("../fixtures/sentencepiece/expected.json");
    let expected: serde_json::Value = serde_json::from_str(expected).unwrap();
    for kind in ["bpe", "unigram"] {
        let tokenizer = Tokenizer::from_dir(folder(kind).path())?;
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
        for case in expected[kind].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case[1].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false)?, ids, "{kind} {text:?}");
            // What has no piece is shown in the library's own way.
            if !ids.contains(&0) {
                assert_eq!(tokenizer.decode(&ids, true)?, case[2].as_str().unwrap(), "{kind}");
            }
        }
    }
    Ok(())
}

#[test]
fn texts_begin_as_llamas_do_unless_the_configuration_says_otherwise() -> Result<(), Error> {
    let dir = folder("bpe");
    let own = Tokenizer::from_dir(dir.path())?;
    assert_eq!(own.encode("The cache", true)?.first(), Some(&1));
    let tokens = own.encode("<s>The cache</s>", false)?;
    assert_eq!((tokens.first(), tokens.last()), (Some(&1), Some(&2)));
    let config = r#"{"add_bos_token": false, "add_eos_token": true}"#;
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let own = Tokenizer::from_dir(dir.path())?;
    let tokens = own.encode("The cache", true)?;
    assert_ne!(tokens.first(), Some(&1));
    assert_eq!(tokens.last(), Some(&2));
    Ok(())
}
