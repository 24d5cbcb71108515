//! `moa serve` without a server.

use std::path::Path;
use std::process::Command;

use crate::common::{refuses, text, tiny};

#[test]
fn the_example_of_the_documentation_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/serve.toml");
    // All of it was read before the model is missed that it names.
    refuses(dir.path(), &["serve", "--config", text(&path)], &["/var/lib/moa/model", "No such"]);
}

#[test]
fn options_that_cannot_work_are_refused_by_their_flags() {
    let (dir, tiny) = (tempfile::tempdir().unwrap(), tiny());
    for (flag, value, told) in [
        ("--context", "9000", "8192"),
        ("--max-new-tokens", "9000", "8192"),
        ("--min-context", "9000", "8192"),
        ("--kv-memory", "1KiB", "shortest request"),
        ("--kv-memory", "0", "at least"),
        ("--max-body", "0", "at least 1"),
        ("--request-timeout", "2000000000", "ten years"),
        ("--name", "", "one character"),
        ("--cors", "foo", "https://example.com"),
        ("--api-key", "", "MOA_API_KEY"),
    ] {
        let args = ["serve", "--model", text(&tiny), "--port", "0", flag, value];
        refuses(dir.path(), &args, &[flag, told]);
    }
}

// As a compose file makes it of a variable that was forgotten: a server without a key is not what was meant.
#[test]
fn an_empty_variable_is_no_server_without_a_key() {
    let args = ["serve", "--model", text(&tiny()), "--port", "0"].map(str::to_owned);
    let run = Command::new(env!("CARGO_BIN_EXE_moa")).args(args).env("MOA_API_KEY", "").output();
    let output = run.unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("MOA_API_KEY") && told.contains("an empty one"), "{told}");
}
