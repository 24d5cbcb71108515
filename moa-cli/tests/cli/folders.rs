//! Model folders, prompts and conversations as people have them.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::{edit, edit_header, json_of, moa_in, model_copy, ok, refuses, text, tiny};

/// A model without a chat template.
fn base_model(root: &Path) -> std::path::PathBuf {
    let base = model_copy(root, "base");
    edit(&base.join("tokenizer_config.json"), |c| {
        _ = c.as_object_mut().unwrap().remove("chat_template")
    });
    let _ = fs::remove_file(base.join("chat_template.jinja"));
    base
}

fn generated(root: &Path, model: &Path, more: &[&str]) -> String {
    let args = ["generate", "--model", text(model), "--max-new-tokens", "4"];
    let answer = json_of(root, &[&args[..], more].concat());
    answer["completions"][0]["text"].as_str().unwrap().to_string()
}

#[test]
fn a_base_model_is_asked_without_a_template_by_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let base = base_model(root);
    let prompt = ["--prompt", "The ship left the harbor and"];
    let raw = generated(root, &base, &prompt);
    assert_eq!(raw, generated(root, &tiny(), &[&prompt[..], &["--raw"]].concat()));
    assert!(raw.starts_with(' '), "the first space belongs to the text: {raw:?}");
    let vicuna = generated(root, &base, &[&prompt[..], &["--template", "vicuna"]].concat());
    assert_ne!(raw, vicuna);
    // A template in a file, which an editor began with a byte order mark.
    fs::write(root.join("raw.jinja"), "\u{feff}{{ bos_token }}{{ messages[0].content }}").unwrap();
    let own = generated(root, &base, &[&prompt[..], &["--template", "raw.jinja"]].concat());
    assert_eq!(own, raw, "the same tokens");
    refuses(
        root,
        &["generate", "--model", text(&base), "--prompt", "x", "--template", "none.jinja"],
        &["--template", "llama3", "none.jinja"],
    );

    let line = |n: usize| json!({"prompt": "The ship left. ".repeat(n), "answer": "It came back."});
    fs::write(root.join("data.jsonl"), format!("\u{feff}{}\n{}\n", line(80), line(90))).unwrap();
    let size =
        ["--lengths", "256", "--samples", "1", "--max-response", "8", "--data", "data.jsonl"];
    let model = ["--model", text(&base)];
    let profile = [&["profile"][..], &model, &size, &["--out", "p.safetensors"]].concat();
    ok(root, &profile);
    // Neither prompt fills half of the longer length.
    let two =
        [&["profile"][..], &model, &size[2..], &["--lengths", "256,1024", "--out", "q"]].concat();
    refuses(root, &two, &["no calibration item of 1024 tokens", "half as many"]);
    let small = ["--evaluations", "0", "--validation-samples", "1", "--density", "0.5"];
    let compress =
        [&["compress"][..], &model, &size, &small, &["--validation-length", "256"]].concat();
    ok(root, &[&compress[..], &["--out", "plan.json"]].concat());
    let tasks =
        ["--task", "passkey", "--lengths", "256", "--samples", "1", "--max-new-tokens", "4"];
    let tasks = [&["eval", "tasks"][..], &model, &tasks, &["--items", "i.jsonl"]].concat();
    ok(root, &tasks);
    // Items of other prompts are other items.
    let vicuna = [&tasks[..], &["--template", "vicuna"]].concat();
    refuses(root, &vicuna, &["i.jsonl", "template"]);
}

#[test]
fn tensors_that_the_configuration_does_not_know_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let model = model_copy(root, "layers");
    edit(&model.join("config.json"), |c| c["num_hidden_layers"] = json!(4));
    let generate =
        ["generate", "--model", text(&model), "--prompt", "Hello", "--max-new-tokens", "2"];
    refuses(root, &generate, &["model.layers.4.", "--ignore-extra-tensors"]);
    let output = moa_in(root, &[&generate[..], &["--ignore-extra-tensors"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("warning: "), "{stderr}");

    let model = model_copy(root, "quantised");
    edit_header(&model.join("model.safetensors"), |header| {
        let object = header.as_object_mut().unwrap();
        let tensor = object.remove("model.layers.0.self_attn.q_proj.weight").unwrap();
        object.insert("model.layers.0.self_attn.q_proj.qweight".into(), tensor);
    });
    let generate = ["generate", "--model", text(&model), "--prompt", "Hello"];
    refuses(root, &generate, &["GPTQ or AWQ", "16 bits"]);
}

// It once was one, of models in GPTQ and AWQ too.
#[test]
fn a_configuration_of_how_weights_were_quantised_is_no_warning() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_copy(dir.path(), "model");
    edit(&model.join("config.json"), |config| {
        config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    });
    let args = ["generate", "--model", text(&model), "--prompt", "Hello", "--max-new-tokens", "1"];
    let output = moa_in(dir.path(), &args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !stderr.contains("warning"), "{stderr}");
}

#[test]
fn what_is_no_folder_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let generate = |model: &str, parts: &[&str]| {
        refuses(root, &["generate", "--model", model, "--prompt", "Hello"], parts);
    };
    #[cfg(not(feature = "hub"))]
    generate("owner/name@v1", &["owner/name@v1", "--features hub"]);
    generate("./owner/name", &["./owner/name", "No such file"]);
    fs::write(root.join("model.txt"), "x").unwrap();
    generate("model.txt", &["--model", "a model folder", "model.txt"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
        generate("link", &["link", "nowhere", "does not exist"]);
    }
    let model = model_copy(root, "pointer");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    fs::write(model.join("model.safetensors"), pointer).unwrap();
    generate(text(&model), &["git lfs pull"]);
    // An adapter alone is no model, and beside one it is said to be left out.
    let adapted = model_copy(root, "adapted");
    let adapter = json!({"base_model_name_or_path": "owner/base"}).to_string();
    fs::write(adapted.join("adapter_config.json"), &adapter).unwrap();
    let args =
        ["generate", "--model", text(&adapted), "--prompt", "Hello", "--max-new-tokens", "1"];
    let output = moa_in(root, &args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("an adapter of owner/base"), "{stderr}");
    fs::create_dir(root.join("adapter")).unwrap();
    fs::write(root.join("adapter/adapter_config.json"), &adapter).unwrap();
    generate("adapter", &["no config.json", "an adapter of owner/base"]);
    fs::write(root.join("d.jsonl"), "{\"prompt\": \"a\"}\n{\"prompt\": }\n").unwrap();
    let tiny = tiny();
    let profile =
        ["profile", "--model", text(&tiny), "--data", "d.jsonl", "--out", "p.safetensors"];
    refuses(root, &profile, &["d.jsonl, line 2: ", "column 12"]);
}

#[test]
fn warnings_reach_the_user_unless_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let model = model_copy(root, "odd");
    edit(&model.join("generation_config.json"), |c| c["temperature"] = json!(-1));
    let generate =
        ["generate", "--model", text(&model), "--prompt", "Hello", "--max-new-tokens", "2"];
    let said = |more: &[&str]| {
        let output = moa_in(root, &[&generate[..], more].concat());
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&[]).contains("warning: ") && said(&["--json"]).contains("temperature"));
    assert!(!said(&["--quiet"]).contains("warning"));
}

/// A run of a conversation.
fn chat(root: &Path, lines: &str, more: &[&str]) -> Output {
    generate_from(root, lines.as_bytes(), &[&["--chat"], more].concat())
}

/// `moa generate` with so much on stdin.
fn generate_from(root: &Path, stdin: &[u8], more: &[&str]) -> Output {
    let tiny = tiny();
    let args = ["generate", "--model", text(&tiny), "--json", "--max-new-tokens", "6"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_moa"))
        .args(args)
        .args(more)
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A conversation that ended reads no more lines.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

#[test]
fn stdin_is_a_prompt_and_has_lines_that_are_text() {
    let dir = tempfile::tempdir().unwrap();
    let answer = |more: &[&str]| {
        let output = generate_from(dir.path(), b"Hello", more);
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        result["completions"][0]["text"].clone()
    };
    assert_eq!(answer(&["--prompt-file", "-"]), answer(&["--prompt", "Hello"]));
    let output = generate_from(dir.path(), b"Hello.\n\xff\n", &["--chat"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("error: stdin, line 2: stream did not contain"), "{stderr}");
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), result["turns"].as_array().unwrap().len()), (Some(2), 1));
}

#[test]
fn a_conversation_that_outgrows_its_context_loses_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let lines = "Hello there, how are you?\n".repeat(8);
    let run = |how: &[&str]| {
        let output = chat(root, &lines, &[&["--context", "60"], how].concat());
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), result)
    };
    let answered = |result: &Value| {
        let turns = result["turns"].as_array().unwrap();
        turns.iter().filter(|turn| turn["text"].is_string()).count()
    };
    let (code, stopped) = run(&[]);
    assert_eq!(code, Some(2), "{stopped}");
    let first = answered(&stopped);
    assert!((1..8).contains(&first), "{stopped}");
    assert!(stopped["error"].as_str().unwrap().contains("context of"), "{stopped}");
    let (code, kept) = run(&["--on-overflow", "keep"]);
    assert_eq!((code, answered(&kept)), (Some(0), first), "{kept}");
    assert_eq!(kept["turns"].as_array().unwrap().len(), 8);
    let (code, dropped) = run(&["--on-overflow", "drop-oldest"]);
    assert_eq!((code, answered(&dropped)), (Some(0), 8), "{dropped}");
    assert!(dropped["turns"][7]["dropped_messages"].as_u64() > Some(0), "{dropped}");
}

#[test]
fn a_conversation_has_instructions_and_tokens_that_stop_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let held = |more: &[&str]| {
        let output = chat(root, "\u{feff}Hello.\n", more);
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        result["turns"][0].clone()
    };
    let template = ["--template", "chatml"];
    let (plain, system) =
        (held(&template), held(&[&template[..], &["--system", "Be brief."]].concat()));
    let tokens = |turn: &Value| turn["cached_tokens"].as_u64().unwrap();
    assert!(tokens(&system) > tokens(&plain) + 4, "{system} {plain}");
    assert_eq!(plain["user"], "Hello.");

    let text = plain["text"].as_str().unwrap();
    assert!(!text.is_empty());
    let tiny = tiny();
    let generate =
        ["generate", "--model", self::text(&tiny), "--prompt", "Hello", "--max-new-tokens", "4"];
    let all = json_of(root, &generate);
    assert_eq!(all["completions"][0]["new_tokens"], 4, "{all}");
    // Of all tokens below 8192, one comes first; ids and texts name the same one.
    let ids: Vec<String> = (3..8192).map(|id| format!("--stop-token={id}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let stopped = json_of(root, &[&generate[..], &ids].concat());
    assert_eq!(stopped["completions"][0]["finish"], "stop", "{stopped}");
    assert_eq!(stopped["completions"][0]["new_tokens"], 0, "{stopped}");
    refuses(
        root,
        &[&generate[..], &["--stop-token", "<|none|>"]].concat(),
        &["--stop-token", "8192"],
    );
}

#[test]
fn guesses_of_any_kind_leave_the_answer_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let plan = ["plan", "uniform", "--model", text(&tiny), "--window", "60", "--sink", "4"];
    ok(root, &[&plan[..], &["--out", "small.json"]].concat());
    let prompt = "one two three four ".repeat(12);
    let args = ["generate", "--model", text(&tiny), "--prompt", &prompt, "--max-new-tokens", "16"];
    let run = |more: &[&str]| json_of(root, &[&args[..], more].concat());
    let plain = run(&[]);
    assert_eq!(plain["drafted_tokens"], 0);
    for more in [
        &["--speculate", "ngram"][..],
        &["--draft-plan", "small.json"],
        &["--draft-model", text(&tiny), "--draft-plan", "small.json"],
        &["--draft-model", text(&tiny)],
    ] {
        assert_eq!(run(more)["completions"], plain["completions"], "{more:?}");
    }
    let other = model_copy(root, "other");
    edit(&other.join("tokenizer.json"), |file| {
        let vocabulary = &mut file["model"]["vocab"];
        let (one, another) = (vocabulary["om"].take(), vocabulary["\u{120}n"].take());
        (vocabulary["om"], vocabulary["\u{120}n"]) = (another, one);
    });
    for (more, parts) in [
        (&["--draft-model", "other"][..], ["expected token `", "to be 300"]),
        (&["--draft-model", "nowhere"], ["--draft-model nowhere", "nowhere"]),
        (&["--speculate", "ngram", "--draft-plan", "small.json"], ["--speculate", "--draft-plan"]),
    ] {
        refuses(root, &[&args[..], more].concat(), &parts);
    }
}

#[test]
fn a_conversation_goes_on_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let result = |lines: &str, more: &[&str]| {
        let output = chat(root, lines, more);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default(), text)
    };
    let texts = |result: &Value| {
        let turns = result["turns"].as_array().unwrap();
        turns.iter().map(|turn| turn["text"].clone()).collect::<Vec<_>>()
    };
    let (whole, _) = result("Hello.\nAnd again.\n", &["--context", "200"]);
    let (first, _) = result("Hello.\n", &["--context", "200", "--save-state", "chat.state"]);
    let (second, _) = result("And again.\n", &["--load-state", "chat.state"]);
    assert_eq!([texts(&first), texts(&second)].concat(), texts(&whole));
    for more in [
        &["--cache-dtype", "int8"][..],
        &["--uniform", "0.5"],
        &["--template", "chatml"],
        &["--raw"],
    ] {
        let (none, told) =
            result("And again.\n", &[&["--load-state", "chat.state"], more].concat());
        assert!(none.is_null() && told.contains("saved sequence: "), "{none} {told}");
    }
}

#[test]
fn numbers_of_a_generation_config_that_are_left_out_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let folder = model_copy(root, "model");
    let config = json!({ "do_sample": true, "temperature": -5, "top_p": 1.5, "max_new_tokens": 0 });
    fs::write(folder.join("generation_config.json"), config.to_string()).unwrap();
    let args = ["generate", "--model", text(&folder), "--prompt", "Hello", "--max-new-tokens", "1"];
    let output = moa_in(root, &args);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    for field in ["`temperature` is -5;", "`top_p` is 1.5;", "`max_new_tokens` is 0;"] {
        let place = format!("generation_config.json: {field}");
        assert!(told.contains(&place), "{field}: {told}");
    }
    // Nothing was decoded after the first token, at no speed.
    assert!(told.contains("decode 0 tokens, - tok/s"), "{told}");
}

#[test]
fn dense_has_16_bits_whatever_the_caches_have() {
    let dir = tempfile::tempdir().unwrap();
    let (root, tiny) = (dir.path(), tiny());
    let plan =
        ["plan", "uniform", "--model", text(&tiny), "--density", "0.5", "--out", "plan.json"];
    ok(root, &plan);
    edit(&root.join("plan.json"), |plan| {
        let heads = plan["rules"].as_array().unwrap().iter();
        let types = heads.map(|row| vec!["int8"; row.as_array().unwrap().len()]);
        plan["cache_types"] = types.collect::<Vec<_>>().into();
    });
    let shown = |more: &[&str]| {
        let value = json_of(root, &[&["plan", "show", "plan.json", "--at", "1024"], more].concat());
        let at = value["at"][0].clone();
        (at["kv_bytes"].as_u64().unwrap(), at["kv_bytes_dense"].as_u64().unwrap())
    };
    let plain = shown(&[]);
    assert!(3 * plain.0 < plain.1 && plain.1 < 5 * plain.0, "{plain:?}");
    for own in ["int4", "int8"] {
        assert_eq!(shown(&["--cache-dtype", own]), plain);
    }
    let generate =
        ["generate", "--model", text(&tiny), "--prompt", "Hello", "--max-new-tokens", "4"];
    let dense = json_of(root, &generate)["kv_bytes_dense"].clone();
    for more in [
        &["--cache-dtype", "int4"][..],
        &["--cache-dtype", "int4", "--plan", "plan.json"],
        &["--plan", "plan.json"],
    ] {
        let value = json_of(root, &[&generate, more].concat());
        assert_eq!(value["kv_bytes_dense"], dense, "{more:?}");
        assert!(value["kv_bytes"].as_u64() < dense.as_u64(), "{more:?}");
        let output = moa_in(root, &[&generate, more].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        let is_overruled = more.len() == 4;
        assert_eq!(told.contains("hold in place of --cache-dtype int4"), is_overruled, "{told}");
    }
}
