use std::fs;

use moa_models::{Error, GenerationConfig, SamplingOptions};

use crate::moa_tiny;

#[test]
fn generation_config_of_moa_tiny() -> Result<(), Error> {
    let config = GenerationConfig::from_dir(moa_tiny())?;
    assert_eq!((config.eos_token_ids.as_slice(), config.max_new_tokens), (&[2][..], Some(64)));
    assert_eq!(config.sampling(0), SamplingOptions::default());
    Ok(())
}

#[test]
fn folder_without_generation_config() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(GenerationConfig::from_dir(dir.path())?, GenerationConfig::default());
    fs::write(dir.path().join("generation_config.json"), "{\"top_k\": 1, \"top_k\": 2}").unwrap();
    assert!(matches!(GenerationConfig::from_dir(dir.path()), Err(Error::Json { .. })));
    Ok(())
}
