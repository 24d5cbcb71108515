use moa_models::{Error, Tokenizer};

/// Joins what a stream returns for `ids`.
pub(crate) fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, Error> {
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
