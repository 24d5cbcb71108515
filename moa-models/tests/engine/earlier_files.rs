//! Item logs that earlier versions wrote load, and go on where they stopped.

use std::fs;
use std::path::Path;

use moa_models::{Error, ItemLog, Result, RetrievalItem, RetrievalReport};
use serde_json::json;

const LOG: &str = "tests/fixtures/items.jsonl";

/// The name in `"name":value`.
fn field_name(field: &str) -> String {
    field.split(':').next().unwrap_or_default().to_string()
}

#[test]
fn an_item_log_goes_on() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("items.jsonl");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(LOG), &path).unwrap();
    let before = fs::read_to_string(&path).unwrap();
    let settings = json!({
        "cache_dtype": "Bf16", "data": "20f925a8f5ec7963", "evaluation": "retrieval",
        "max_new_tokens": 6, "model": "0f69edb58b86a4bb", "plan": "6e6cd18ec312f6da", "seed": 0,
    });
    let (mut log, items) = ItemLog::<RetrievalItem>::open(&path, &settings)?;
    assert_eq!(items.len(), 2);
    let RetrievalItem { size, case, score, references, answers, .. } = &items[1];
    assert_eq!((*size, *case, *score), (None, 1, 0.0));
    assert_eq!((references[0].text.as_str(), references[0].depth), ("107", Some(0.25)));
    assert_eq!(answers, &["\n\"\n\"\n\""]);
    assert_eq!((items[1].prompt_tokens, items[1].context, items[1].new_tokens), (96, 102, 5));
    assert_eq!((items[1].kv_bytes, items[1].kv_bytes_dense), (199_680, 313_344));
    assert!((items[1].density - 0.6372549019607843).abs() < 1e-15);
    assert_eq!(RetrievalReport::new(items.clone())?.prompt_tokens_mean, 81.0);

    // A new line has the form of the old ones, and says its run at the end.
    log.push(&items[1])?;
    let after = fs::read_to_string(&path).unwrap();
    let fields = |line: &str| line.split(',').map(field_name).collect::<Vec<_>>();
    let last = |text: &str| fields(text.lines().last().unwrap());
    let mut expected = last(&before);
    expected.push("\"run\"".to_string());
    assert!(after.starts_with(&before) && expected == last(&after), "{after}");
    drop(log);
    let other = ItemLog::<RetrievalItem>::open(&path, &json!({ "seed": 1 }));
    assert!(matches!(other, Err(Error::OtherSettings { .. })));
    Ok(())
}
