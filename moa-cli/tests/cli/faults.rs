//! What goes wrong around a run: full disks, killed processes, two at once, odd names, nobody who reads.

use std::fs;
#[cfg(unix)]
use std::io::{Read, Write};
use std::path::Path;
#[cfg(unix)]
use std::process::Child;
use std::process::{Command, Stdio};

use moa_core::{ElasticRule, ModelShape, Plan, Profile, ProfileInfo};

use crate::common::{cases, moa_in, model_copy, ok, refuses, tiny};

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };

fn moa(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moa"));
    command.current_dir(folder);
    command
}

/// A profile in which every head needs a little of everything.
fn profile(path: &Path, scale: f64) {
    let mut influence = moa_core::Influence::new(SHAPE, 256, 32).unwrap();
    for layer in 0..SHAPE.layers {
        let blocks: Vec<f64> = (0..2 * 64).map(|i| scale * f64::from(i % 7)).collect();
        influence.add_layer(layer, 8, &blocks, 1.0).unwrap();
    }
    influence.count_sample();
    let mut profile = Profile::new(SHAPE, ProfileInfo::default());
    profile.add(influence).unwrap();
    profile.save(path).unwrap();
}

fn plans(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut plans: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    plans.sort();
    plans
}

const SEARCH: [&str; 7] =
    ["search", "--profile", "profile.safetensors", "--time-limit", "1", "--out", "plans"];

/// A limit of the size of files is what a full disk is: some files are written, then none.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_old_plans() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    profile(&root.join("profile.safetensors"), 1.0);
    ok(root, &SEARCH);
    let before = plans(&root.join("plans"));
    assert!(!before.is_empty());
    profile(&root.join("profile.safetensors"), 3.0);
    let line = format!(
        "trap '' XFSZ; ulimit -f 1; exec {} {} --force",
        env!("CARGO_BIN_EXE_moa"),
        SEARCH.join(" ")
    );
    let full = Command::new("bash").args(["-c", &line]).current_dir(root).output().unwrap();
    let stderr = String::from_utf8_lossy(&full.stderr);
    if before.iter().any(|(_, plan)| plan.len() > 1024) {
        assert_eq!(full.status.code(), Some(2), "{stderr}");
        assert_eq!(plans(&root.join("plans")), before, "{stderr}");
    }
    ok(root, &[&SEARCH[..], &["--force"]].concat());
    assert_ne!(plans(&root.join("plans")), before);
}

#[test]
fn two_searches_of_one_folder_do_not_mix_their_plans() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut whole = Vec::new();
    for (name, scale) in [("a", 1.0), ("b", 3.0)] {
        profile(&root.join(name), scale);
        ok(
            root,
            &["search", "--profile", name, "--time-limit", "1", "--out", &format!("of-{name}")],
        );
        whole.push(plans(&root.join(format!("of-{name}"))));
    }
    for _ in 0..3 {
        let runs: Vec<_> = ["a", "b"]
            .iter()
            .map(|name| {
                moa(root)
                    .args([
                        "search",
                        "--profile",
                        name,
                        "--time-limit",
                        "1",
                        "--out",
                        "both",
                        "--force",
                    ])
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for mut run in runs {
            assert!(run.wait().unwrap().success());
        }
        let both: Vec<String> =
            plans(&root.join("both")).into_iter().map(|(_, text)| fields(&text)).collect();
        let of = |set: &[(String, Vec<u8>)]| {
            set.iter().map(|(_, text)| fields(text)).collect::<Vec<_>>()
        };
        assert!(whole.iter().any(|set| of(set) == both), "mixed: {both:?}");
    }
}

/// Predicted losses tell the plans of two profiles apart.
fn fields(plan: &[u8]) -> String {
    let plan = Plan::from_json(std::str::from_utf8(plan).unwrap()).unwrap();
    format!("{:?}", plan.provenance.predicted_losses)
}

#[test]
fn two_evaluations_of_one_log_do_not_mix_their_answers() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    cases(&root.join("cases.jsonl"), 4, 6);
    let tiny = tiny();
    let args =
        ["--model", tiny.to_str().unwrap(), "--data", "cases.jsonl", "--items", "items.jsonl"];
    let eval = |extra: &[&str]| {
        let mut command = moa(root);
        command.args(["eval", "retrieval", "--max-new-tokens", "2"]).args(args).args(extra);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let runs = [eval(&[]), eval(&["--uniform", "0.3"])].map(|run| run.wait_with_output().unwrap());
    let done = runs.iter().filter(|run| run.status.success()).count();
    assert_eq!(done, 1, "{runs:?}");
    let log = fs::read_to_string(root.join("items.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 5, "{log}");
    let run = |line: &str| line.rsplit("\"run\":").next().unwrap().to_string();
    let first = run(log.lines().nth(1).unwrap());
    assert!(log.lines().skip(1).all(|line| run(line) == first), "{log}");
}

#[test]
fn a_file_that_is_no_log_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    cases(&root.join("cases.jsonl"), 1, 4);
    fs::write(root.join("mine.json"), "{\"a\": [1, 2]}").unwrap();
    let tiny = tiny();
    let args = ["eval", "retrieval", "--model", tiny.to_str().unwrap(), "--data", "cases.jsonl"];
    refuses(root, &[&args[..], &["--items", "mine.json"]].concat(), &["mine.json", "settings"]);
    refuses(
        root,
        &[&args[..], &["--items", "cases.jsonl"]].concat(),
        &["--items", "which is read"],
    );
}

fn weights(model: &Path) -> String {
    model.join("model.safetensors").to_str().unwrap().to_string()
}

#[test]
fn outputs_are_no_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let config = root.join("config.json");
    fs::copy(tiny().join("config.json"), &config).unwrap();
    let uniform = ["plan", "uniform", "--config", "config.json", "--density", "0.5"];
    refuses(root, &[&uniform[..], &["--out", "config.json"]].concat(), &["--out", "which is read"]);
    ok(root, &[&uniform[..], &["--out", "plan.json"]].concat());
    refuses(
        root,
        &["plan", "export", "plan.json", "--out", "./plan.json"],
        &["--out", "which is read"],
    );
    refuses(
        root,
        &["plan", "show", "plan.json", "--svg", "plan.json"],
        &["--svg", "which is read"],
    );
    refuses(
        root,
        &["report", "--plan", "p=plan.json", "--out", "plan.json"],
        &["--out", "which is read"],
    );
    fs::write(root.join("data.jsonl"), "{\"prompt\": \"a\"}\n").unwrap();
    let model = tiny();
    let model = model.to_str().unwrap();
    for command in ["profile", "compress"] {
        let args = [command, "--model", model, "--data", "data.jsonl", "--out"];
        refuses(root, &[&args[..], &["data.jsonl"]].concat(), &["--out", "which is read"]);
        let own = tiny().join("config.json");
        refuses(root, &[&args[..], &[own.to_str().unwrap()]].concat(), &["--out", "which is read"]);
    }
    fs::write(root.join("template"), "{{ messages }}").unwrap();
    for (flag, file) in [
        ("--plan", "plan.json"),
        ("--draft-plan", "plan.json"),
        ("--draft-model", model),
        ("--template", "template"),
    ] {
        let state = if file == model { weights(tiny().as_path()) } else { file.to_string() };
        let args = ["generate", "--model", model, "--chat", flag, file, "--save-state", &state];
        refuses(root, &args, &["--save-state", "which is read"]);
    }
    let copy = model_copy(root, "copy");
    let quantize = |of: &str, out: &str| {
        let args = ["quantize", "--model", of, "--type", "q8_0", "--out", out, "--force"];
        refuses(root, &args, &["--out", "which is read"]);
    };
    quantize("copy", &weights(&copy));
    ok(root, &["quantize", "--model", "copy", "--type", "q8_0", "--out", "copy/a.gguf"]);
    quantize("copy/a.gguf", "copy/../copy/a.gguf");
    quantize("copy", "copy/a.gguf");
    fs::rename(root.join("plan.json"), root.join("heads.svg")).unwrap();
    let report = ["report", "--plan", "heads.svg", "--out", "r.html", "--svg", "."];
    refuses(root, &report, &["--svg", "which is read"]);
    refuses(root, &[&uniform[..], &["--out", "-"]].concat(), &["--out", "the name of a file"]);
    let both = ["compress", "--model", model, "--out", "x", "--save-profile", "./x"];
    refuses(root, &both, &["--save-profile", "another file than --out"]);
    refuses(root, &["quickstart", "--model", model, "--out", model], &["--out", "model's"]);
}

/// The plan is written, and said on stdout, whatever bytes its name has and whoever reads stderr.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_no_text_and_a_stderr_that_fails_lose_nothing() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let name = OsStr::from_bytes(b"plan-\xff.json");
    let config = tiny().join("config.json");
    let output = moa(root)
        .args(["plan", "uniform", "--density", "0.5", "--json", "--config"])
        .arg(&config)
        .arg("--out")
        .arg(name)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown["out"], "plan-\u{fffd}.json");
    for args in
        [vec!["plan", "show", "--json"], vec!["report", "--out", "r.html", "--json", "--plan"]]
    {
        let file = if args[0] == "report" { OsStr::new("x=no.json") } else { name };
        let run = moa(root).args(&args).arg(file).output().unwrap();
        assert_eq!(run.status.success(), args[0] == "plan");
    }
    profile(&root.join("profile.safetensors"), 1.0);
    let folder = OsStr::from_bytes(b"plans-\xff");
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let search = moa(root)
        .args([
            "search",
            "--profile",
            "profile.safetensors",
            "--space",
            "fixed",
            "--time-limit",
            "1",
        ])
        .args(["--json", "-vv", "--out"])
        .arg(folder)
        .stderr(full())
        .output()
        .unwrap();
    assert!(search.status.success());
    assert!(!plans(&root.join(folder)).is_empty());
    // An error that cannot be told is still an error, and no panic.
    let mut missing = moa(root);
    let status = missing.args(["plan", "show", "none.json"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(2));
    let mut shown = moa(root);
    let status = shown.args(["plan", "show"]).arg(name).stdout(full()).stderr(full()).status();
    assert_eq!(status.unwrap().code(), Some(2));
}

/// A pipe that nobody writes to would be waited for without end.
#[cfg(unix)]
#[test]
fn pipes_in_place_of_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let model = tiny();
    let model = model.to_str().unwrap();
    assert!(
        Command::new("mkfifo").args(["p", "p.gguf"]).current_dir(root).status().unwrap().success()
    );
    cases(&root.join("cases.jsonl"), 1, 4);
    for args in [
        &["plan", "show", "p"][..],
        &["plan", "uniform", "--density", "0.5", "--out", "q", "--config", "p"],
        &["search", "--profile", "p", "--out", "q"],
        &["report", "--out", "q", "--items", "x=p"],
        &["generate", "--prompt", "a", "--model", "p.gguf"],
        &["generate", "--prompt", "a", "--model", model, "--plan", "p"],
        &["generate", "--prompt", "a", "--model", model, "--template", "p"],
        &["profile", "--out", "q", "--model", model, "--data", "p"],
        &["eval", "retrieval", "--model", model, "--data", "p"],
        &["eval", "retrieval", "--model", model, "--data", "cases.jsonl", "--items", "p"],
        &["eval", "perplexity", "--lengths", "8", "--model", model, "--text", "p"],
        &["eval", "agreement", "--model", model, "--text", "p"],
    ] {
        let mut run =
            moa(root).args(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begin = std::time::Instant::now();
        while run.try_wait().unwrap().is_none() {
            if begin.elapsed().as_secs() > 30 {
                run.kill().unwrap();
                panic!("{args:?} waits");
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains("a pipe or a device, not a file"), "{args:?}: {stderr}");
    }
}

/// Read weights are the mapped ones.
#[test]
fn weights_that_are_read_are_those_that_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny();
    let args = ["generate", "--raw", "--prompt", "The", "--max-new-tokens", "4", "--model"];
    let args = [&args[..], &[model.to_str().unwrap()]].concat();
    let mapped = ok(dir.path(), &args);
    assert_eq!(ok(dir.path(), &[&args[..], &["--no-mmap"]].concat()), mapped);
}

#[test]
fn control_characters_of_a_plan_are_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Plan::uniform(SHAPE, 4, ElasticRule::fixed(16)).unwrap();
    plan.provenance.method = Some("\u{1b}]0;title\u{7}\u{1b}[2Jmine".to_string());
    plan.save(dir.path().join("plan.json")).unwrap();
    let text = ok(dir.path(), &["plan", "show", "plan.json"]);
    assert!(!text.contains('\u{1b}') && text.contains("mine"), "{text}");
    // As little those of a bad plan, in an error.
    fs::write(dir.path().join("bad.json"), "{\"format\": \"\u{9b}2J\"}").unwrap();
    let output = moa_in(dir.path(), &["plan", "show", "bad.json"]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains('\u{9b}'));
}

#[test]
fn sizes_that_no_model_has_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let config = tiny().join("config.json");
    let config = config.to_str().unwrap();
    let (half, most) = ("9223372036854775808", "18446744073709551615");
    let heads =
        ["plan", "retrieval-heads", "--config", config, "--heads", "0:0", "--out", "p.json"];
    let uniform = ["plan", "uniform", "--config", config, "--out", "p.json"];
    refuses_usage(root, &[&heads[..], &["--window", most]].concat());
    refuses_usage(root, &[&uniform[..], &["--window", most]].concat());
    refuses_usage(root, &[&uniform[..], &["--density", "0.5", "--sink", most]].concat());
    ok(root, &[&uniform[..], &["--density", "0.5"]].concat());
    refuses_usage(root, &["plan", "show", "p.json", "--at", "4611686018427387904"]);
    ok(root, &["plan", "show", "p.json", "--at", "2147483648"]);
    let model = tiny();
    let model = model.to_str().unwrap();
    refuses_usage(root, &["profile", "--model", model, "--lengths", half, "--out", "x"]);
    let generate = ["generate", "--model", model, "--prompt", "a", "--max-new-tokens"];
    refuses_usage(root, &[&generate[..], &["18446744073709551614"]].concat());
    refuses_usage(
        root,
        &["eval", "suite", "--model", model, "--preset", "ruler-9007199254740992k"],
    );
    // A model that a plan would need gigabytes for.
    let text = fs::read_to_string(config).unwrap();
    let mut large: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, value) in [
        ("num_hidden_layers", 1 << 20),
        ("num_attention_heads", 1 << 20),
        ("num_key_value_heads", 1 << 20),
        ("hidden_size", 1 << 20),
    ] {
        large[field] = value.into();
    }
    large["head_dim"] = 1.into();
    fs::write(root.join("large.json"), large.to_string()).unwrap();
    refuses(
        root,
        &["plan", "uniform", "--config", "large.json", "--density", "1", "--out", "q"],
        &["large.json"],
    );
    let bench = ["bench", "--config", "large.json", "--random-weights", "0"];
    refuses(root, &bench, &["large.json"]);
}

/// Refused where flags are read.
fn refuses_usage(folder: &Path, args: &[&str]) {
    let output = moa_in(folder, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}\n{stderr}");
    assert!(stderr.contains("2^31") || stderr.contains("must be"), "{args:?}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{args:?}\n{stderr}");
}

/// A size that wraps is a wrong answer with exit code 0: tests find it in any crate, and what reads sizes from outside has
/// the checks in releases too.
#[test]
fn overflows_are_checked_in_tests_and_in_releases() {
    let wrapped = std::panic::catch_unwind(|| std::hint::black_box(usize::MAX) + 1);
    assert!(wrapped.is_err(), "tests are built without overflow checks");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let manifest = fs::read_to_string(path).unwrap();
    let (_, release) = manifest.split_once("[profile.release.package]").unwrap();
    let release = release.split("\n[").next().unwrap();
    for name in ["moa-core", "moa-models", "moa-report", "moa-server", "moa-cli"] {
        assert!(release.contains(&format!("\n{name}.overflow-checks = true\n")), "{name}");
    }
    assert!(!manifest.contains("overflow-checks = false"));
}

/// Ends a process as a terminal or a service manager does; its exit code.
#[cfg(unix)]
fn interrupt(process: &mut Child, signal: &str) -> Option<i32> {
    let kill = Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap();
    assert!(kill.success());
    process.wait().unwrap().code()
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversation_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let chat = ["generate", "--model", tiny.to_str().unwrap(), "--chat"];
    // While the next turn is waited for, and while one is answered.
    for (signal, most) in [("-INT", "2"), ("-TERM", "2"), ("-INT", "4000")] {
        let mut run = moa(root)
            .args(chat)
            .args(["--max-new-tokens", most, "--save-state", "chat.state"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // `wait` closes what it still has.
        let mut stdin = run.stdin.take().unwrap();
        stdin.write_all(b"Hello.\n").unwrap();
        let mut stdout = run.stdout.take().unwrap();
        stdout.read_exact(&mut [0]).unwrap();
        assert_eq!(interrupt(&mut run, signal), Some(130), "{signal} {most}");
        ok(root, &[&chat[..], &["--load-state", "chat.state"]].concat());
        fs::remove_file(root.join("chat.state")).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_file_of_blocks_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut run = moa(root)
        .args(["quantize", "--type", "q4_k", "--out", "tiny.gguf", "--model"])
        .arg(tiny())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while fs::read_dir(root).unwrap().count() == 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(interrupt(&mut run, "-INT"), Some(130));
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
}
