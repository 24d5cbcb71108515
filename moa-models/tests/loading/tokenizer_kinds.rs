//! Tokenizers of every kind against transformers, whose tokens `fixtures/tokenizers/make.py` wrote.

use std::fs;

use moa_models::{Error, KnownTexts, Tokenizer};
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
        conversations_are_cut_as_a_whole(&tokenizer, kind)?;
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

/// Texts joined by special tokens, longer and longer, with spaces and parts of tokens beside them.
fn conversations_are_cut_as_a_whole(tokenizer: &Tokenizer, kind: &Value) -> Result<(), Error> {
    let added = kind["tokenizer"]["added_tokens"].as_array().unwrap();
    let marks: Vec<&str> = added.iter().map(|token| token["content"].as_str().unwrap()).collect();
    for limit in [1 << 20, 600] {
        let (known, mut text, mut at) = (KnownTexts::new(tokenizer, limit), String::new(), 0);
        for case in kind["texts"].as_array().unwrap() {
            for space in ["", " ", "\n"] {
                text += case["text"].as_str().unwrap();
                text += space;
                text += marks.get(at % (marks.len() + 1)).unwrap_or(&"");
                text += space;
                at += 1;
                // Twice: the second time more is known. Then another end.
                for text in
                    [text.clone(), text.clone(), format!("{text}one more"), text.clone() + "<"]
                {
                    let got = known.encode_within(&text, 1 << 20)?;
                    assert_eq!(got, tokenizer.encode(&text, false)?, "{}: {text:?}", kind["name"]);
                }
            }
        }
    }
    Ok(())
}
