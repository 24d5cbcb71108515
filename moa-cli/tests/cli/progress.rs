//! What long jobs say of themselves where nobody sees a bar.

use crate::common::{moa_in, tiny};

#[test]
fn stages_are_told_where_stderr_is_no_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let profile = ["profile", "--model", tiny, "--lengths", "256", "--samples", "3"];
    let profile = [&profile[..], &["--out", "p.safetensors"]].concat();
    let compress = ["compress", "--model", tiny, "--profile", "p.safetensors", "--density", "0.6"];
    let few = ["--validation-samples", "2", "--evaluations", "0", "--text-samples", "0"];
    let compress = [&compress[..], &few, &["--out", "plan.json"]].concat();
    let quantize = ["quantize", "--model", tiny, "--type", "q8_0", "--out", "t.gguf", "--force"];
    let jobs: [(&[&str], &[&str]); 3] = [
        (&profile, &["calibrate: 0/3, 00:00:0", "profile: 0/3, 00:00:0"]),
        (&compress, &["search: 0/1, 00:00:0", "calibrate: 0/3, 00:00:0", "measure: "]),
        (&quantize, &["quantize: 0/", ", 00:00:0"]),
    ];
    for (args, expected) in jobs {
        let output = moa_in(root, &[args, &["--json"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        assert_eq!(output.stdout.split(|byte| *byte == b'\n').count(), 2, "one line: {args:?}");
        let mut rest = &stderr[..];
        for part in expected {
            let (_, after) = rest.split_once(part).unwrap_or_else(|| panic!("{part} in {stderr}"));
            rest = after;
        }
        let quiet = moa_in(root, &[args, &["--quiet"]].concat());
        assert!(quiet.status.success() && quiet.stderr.is_empty(), "{args:?}");
        assert!(!quiet.stdout.is_empty(), "{args:?}");
    }
}
