//! What long jobs say of themselves where nobody sees a bar.

use crate::common::{json_of, moa_in, refuses, tiny};

#[test]
fn stages_are_told_where_stderr_is_no_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let profile = ["profile", "--model", tiny, "--lengths", "256", "--samples", "3"];
    let profile = [&profile[..], &["--out", "p.safetensors"]].concat();
    let compress = ["compress", "--model", tiny, "--profile", "p.safetensors", "--density", "0.6"];
    let few = ["--validation-samples", "2", "--evaluations", "0", "--text-samples", "1"];
    let compress = [&compress[..], &few, &["--out", "plan.json"]].concat();
    let quantize = ["quantize", "--model", tiny, "--type", "q8_0", "--out", "t.gguf", "--force"];
    let jobs: [(&[&str], &[&str]); 3] = [
        (&profile, &["calibrate: 0/3, 00:00:0", "profile: 0/3, 00:00:0"]),
        // Before the first plan is measured, and while held-out text is read.
        (
            &compress,
            &["search: 0/1, 00:00:0", "calibrate: 0/3, 00:00:0", "measure: 0/", "evaluate: "],
        ),
        (&quantize, &["quantize: 0/", ", 00:00:0"]),
    ];
    for (args, expected) in jobs {
        let output = moa_in(root, &[args, &["--json"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        assert_eq!(output.stdout.split(|byte| *byte == b'\n').count(), 2, "one line: {args:?}");
        if args[0] == "compress" {
            let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let stages = found["stages"].as_array().unwrap();
            assert!(stages.iter().all(|own| own["seconds"].as_f64() > Some(0.0)), "{found}");
            let names: Vec<_> = stages.iter().map(|own| own["stage"].as_str().unwrap()).collect();
            assert_eq!(names, ["search", "calibrate", "measure", "evaluate"]);
        }
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

#[test]
fn a_search_measures_what_there_is_time_for_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let few = ["--lengths", "256", "--samples", "1", "--validation-samples", "1"];
    let of = |more: &[&'static str]| -> Vec<&str> {
        let args = ["compress", "--model", tiny, "--density", "0.3", "--out", "plan.json"];
        [&args[..], &few, &["--text-samples", "1"], more].concat()
    };
    let warns =
        |found: &serde_json::Value| found["warnings"].to_string().contains("there was time to");
    // Over before the first plan is measured: one of the starts is chosen.
    let short = json_of(root, &of(&["--minutes", "0.001"]));
    assert!(warns(&short), "{short}");
    assert!(short["warnings"].to_string().contains("0 of 172 plans"), "{short}");
    let short = short["losses"]["evaluations"].as_u64().unwrap();
    let long = json_of(root, &of(&["--minutes", "60", "--evaluations", "30"]));
    assert!(!warns(&long), "{long}");
    assert!(long["losses"]["evaluations"].as_u64().unwrap() > short, "{long}");
    let refused = ["--minutes=0", "--minutes=-1", "--minutes=nan", "--minutes=1e300"]
        .map(|m| (m, "time above 0"));
    for (minutes, reason) in refused.into_iter().chain([("--minutes=x", "not a number")]) {
        refuses(root, &of(&[minutes]), &["--minutes <MINUTES>", reason]);
    }
}
