//! Tokenizers of every kind against transformers, whose tokens `fixtures/tokenizers/make.py` wrote.

use std::fs;

use moa_models::{Error, Tokenizer};
use serde_json::Value;

use crate::streamed::streamed;

#[test]
fn tokens_and_texts_are_those_of_transformers() -> Result<(), Error> {
    let fixture: Value =
        serde_json::from_str(include_str!("../fixtures/tokenizers/tokenizers.json")).unwrap();
    let kinds = fixture.as_array().unwrap();
    assert!(kinds.len() >= 10);
    for kind in kinds {
        let name = &kind["name"];
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in
            [("tokenizer.json", "tokenizer"), ("tokenizer_config.json", "config")]
        {
            fs::write(dir.path().join(file), kind[content].to_string()).unwrap();
        }
        let tokenizer = Tokenizer::from_dir(dir.path())?;
        for case in kind["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids =
                |field: &str| -> Vec<u32> { serde_json::from_value(case[field].clone()).unwrap() };
            assert_eq!(tokenizer.encode(text, true)?, ids("ids"), "{name}: {text:?}");
            assert_eq!(tokenizer.encode(text, false)?, ids("plain"), "{name}: {text:?}");
            let decoded = tokenizer.decode(&ids("ids"), true)?;
            assert_eq!(decoded, case["decoded"], "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids("ids"), false)?, case["whole"], "{name}: {text:?}");
            assert_eq!(streamed(&tokenizer, &ids("ids"))?, decoded, "{name}: {text:?}");
        }
    }
    Ok(())
}
