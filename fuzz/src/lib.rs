//! Fuzz targets live in `tests/formats.rs`; CONTRIBUTING.md says how to run them for long.
