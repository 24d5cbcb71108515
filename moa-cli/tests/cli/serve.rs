//! `moa serve` without a server.

use std::path::Path;

use crate::common::{refuses, text};

#[test]
fn the_example_of_the_documentation_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/serve.toml");
    // All of it was read before the model is missed that it names.
    refuses(dir.path(), &["serve", "--config", text(&path)], &["/var/lib/moa/model", "No such"]);
}
