//! Every bad input ends with exit code 2, a message that names the place, and nothing written.

use std::fs;
use std::path::Path;

use crate::common::{cases, edit, edit_header, moa_in, model_copy, ok, refuses, text, tiny};
use serde_json::json;

/// `moa generate` on a model folder that has to be refused.
fn refuses_model(root: &Path, model: &Path, parts: &[&str]) {
    let model = model.to_str().unwrap();
    refuses(
        root,
        &["generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", "2"],
        parts,
    );
    refuses(root, &["compress", "--model", model, "--out", "plan.json"], parts);
}

#[test]
fn broken_weights_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();

    let model = model_copy(root, "truncated");
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    refuses_model(root, &model, &["model.safetensors"]);

    let model = model_copy(root, "overlapping");
    edit_header(&model.join("model.safetensors"), |header| {
        let norm = header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
        header["model.layers.1.input_layernorm.weight"]["data_offsets"] = norm;
    });
    refuses_model(root, &model, &["model.safetensors"]);

    let model = model_copy(root, "huge-header");
    let mut bytes = bytes;
    bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    fs::write(model.join("model.safetensors"), &bytes).unwrap();
    refuses_model(root, &model, &["model.safetensors", "header"]);

    let model = model_copy(root, "shard");
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let index =
        json!({ "weight_map": { "model.norm.weight": "model-00002-of-00002.safetensors" } });
    fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
    refuses_model(
        root,
        &model,
        &["model.safetensors.index.json", "model-00002-of-00002.safetensors"],
    );

    let model = model_copy(root, "no-weights");
    fs::remove_file(model.join("model.safetensors")).unwrap();
    refuses_model(root, &model, &["no-weights", "model.safetensors"]);

    let file = root.join("single.gguf");
    fs::write(&file, b"GGUF\x03\0\0\0").unwrap();
    refuses_model(root, &file, &["single.gguf", "GGUF", "number of tensors"]);
}

#[test]
fn broken_configuration_and_tokenizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();

    let model = model_copy(root, "field");
    edit(&model.join("config.json"), |c| _ = c.as_object_mut().unwrap().remove("vocab_size"));
    refuses_model(root, &model, &["config.json", "vocab_size", "missing"]);

    let model = model_copy(root, "dimensions");
    edit(&model.join("config.json"), |c| c["hidden_size"] = json!(512));
    refuses_model(root, &model, &["model.safetensors", "must have shape"]);

    let model = model_copy(root, "vocabulary");
    edit(&model.join("tokenizer.json"), |t| {
        t["model"]["vocab"]["of-another-model"] = json!(8192);
    });
    refuses_model(root, &model, &["tokenizer.json", "vocabulary", "8192"]);

    refuses_model(root, &root.join("nowhere"), &["nowhere"]);
    refuses_model(root, &tiny().join("config.json"), &["config.json"]);
}

#[test]
fn plans_for_other_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let generate = |plan: &str, parts: &[&str]| {
        refuses(root, &["generate", "--model", tiny, "--plan", plan, "--prompt", "Hello"], parts);
    };

    ok(root, &["plan", "uniform", "--model", tiny, "--density", "0.5", "--out", "good.json"]);
    let plan = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = root.join(name);
        fs::copy(root.join("good.json"), &path).unwrap();
        edit(&path, change);
    };
    plan("dims.json", &|p| p["model"]["head_dim"] = json!(128));
    generate("dims.json", &["dims.json", "head_dim 128", "head_dim 64"]);
    plan("weights.json", &|p| p["model"]["fingerprint"] = json!("0123abcd"));
    generate("weights.json", &["weights.json (see --any-weights)", "0123abcd"]);
    plan("lines.json", &|p| {
        let line = |k: u32| json!({ "alpha": 1000 * k, "beta": 0.3 / f64::from(k) });
        p["rules"][0][1] = json!([line(1), line(2), line(3)]);
    });
    let export = ["plan", "export", "lines.json", "--out", "published.json"];
    refuses(root, &export, &["lines.json (see --format json)", "layer 0, KV head 1"]);
    let any = ["--prompt", "Hello", "--max-new-tokens", "1", "--any-weights"];
    ok(root, &[&["generate", "--model", tiny, "--plan", "weights.json"], &any[..]].concat());
    plan("alpha.json", &|p| p["rules"][1][0]["alpha"] = json!(null));
    generate("alpha.json", &["alpha.json"]);
    plan("heads.json", &|p| _ = p["rules"][3].as_array_mut().unwrap().pop());
    generate("heads.json", &["heads.json", "rules[3]"]);
    plan("version.json", &|p| p["version"] = json!(99));
    generate("version.json", &["version.json", "version"]);
    plan("types.json", &|p| p["cache_types"] = json!(vec![["int8", "int3"]; 6]));
    generate("types.json", &["types.json", "int3"]);
    plan("heads.json", &|p| p["cache_types"] = json!(vec![["int8"]; 6]));
    generate("heads.json", &["heads.json", "cache_types[0]", "2 heads"]);
    // Two types in every layer: the plan's, and the flag's for heads that the plan leaves open.
    plan("mixed.json", &|p| p["cache_types"] = json!(vec![[json!("int4"), json!(null)]; 6]));
    let any = [&any[..], &["--cache-dtype", "int8"]].concat();
    ok(root, &[&["generate", "--model", tiny, "--plan", "mixed.json"], &any[..]].concat());

    let text = fs::read_to_string(root.join("good.json")).unwrap();
    fs::write(root.join("nan.json"), text.replacen("\"alpha\": 0.0", "\"alpha\": NaN", 1)).unwrap();
    generate("nan.json", &["nan.json", "line"]);
    refuses(root, &["plan", "show", "nan.json"], &["nan.json"]);
    refuses(root, &["plan", "export", "nan.json", "--out", "published.json"], &["nan.json"]);
    generate("nowhere.json", &["nowhere.json"]);
}

#[test]
fn broken_published_plans_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let config = tiny().join("config.json");
    let config = config.to_str().unwrap();
    let import = |text: &str, parts: &[&str]| {
        fs::write(root.join("published.json"), text).unwrap();
        let args = [
            "plan",
            "import",
            "--published",
            "published.json",
            "--config",
            config,
            "--out",
            "plan.json",
        ];
        refuses(root, &args, &[parts, &["published.json"]].concat());
    };
    let row = "[0,0,0,0]";
    let table = |first: &str| format!("[{first},{row},{row},{row},{row},{row}]");
    import(&format!("{{\"alphas\":{},\"betas\":{}}}", table("[NaN,0,0,0]"), table(row)), &[]);
    import(&format!("{{\"alphas\":{},\"betas\":{}}}", table("[1e999,0,0,0]"), table(row)), &[]);
    import(
        &format!("{{\"alphas\":{},\"betas\":{}}}", table("[0,0]"), table(row)),
        &["alphas[0]", "4 heads"],
    );
    import(&format!("{{\"alphas\":{},\"betas\":{}}}", table(row), table("[-1,0,0,0]")), &["beta"]);
    import("{\"alphas\":[]}", &["betas"]);
    import("not JSON", &[]);
}

#[test]
fn flags_are_named_whose_values_the_model_cannot_follow() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = text(&tiny);
    let plan = ["plan", "uniform", "--model", tiny, "--density", "0.25", "--out", "plan.json"];
    ok(root, &plan);
    fs::create_dir(root.join("plans")).unwrap();
    fs::copy(root.join("plan.json"), root.join("plans/plan-0.json")).unwrap();
    fs::write(
        root.join("hotpotqa.jsonl"),
        json!({ "input": "Who?", "context": "The ship sailed. ".repeat(40), "answers": ["a"] })
            .to_string(),
    )
    .unwrap();
    let generate = ["generate", "--model", tiny, "--prompt", "a"];
    let profile = ["profile", "--model", tiny, "--out", "p.safetensors", "--lengths"];
    let agreement =
        ["eval", "agreement", "--model", tiny, "--plan", "plan.json", "--data", "records"];
    let heads = ["plan", "retrieval-heads", "--model", tiny, "--window", "64", "--out", "d.json"];
    let cases: [(&[&str], &[&str], &[&str]); 12] = [
        (&profile, &["100"], &["--lengths: ", "at least 160 tokens", "got 100"]),
        (&profile, &["512", "--max-response", "400"], &["--lengths: ", "at least 864", "400"]),
        (&profile, &["9000"], &["--lengths: ", "9000", "8192"]),
        (
            &["validate", "--model", tiny, "--plans", "plans"],
            &["--length", "10", "--out", "v.json"],
            &["--length: ", "got 10"],
        ),
        (&agreement, &["--lengths", "64"], &["--lengths: ", "got 64"]),
        (
            &["compress", "--model", tiny, "--out", "c.json"],
            &["--lengths", "9000"],
            &["--lengths: "],
        ),
        (
            &["bench", "--model", tiny],
            &["--new-tokens", "4"],
            &["--new-tokens: ", "5 that warm up"],
        ),
        (&["bench", "--model", tiny], &["--prompts", "9000"], &["--prompts", "8192"]),
        (
            &["eval", "longbench", "--model", tiny, "--data", "hotpotqa.jsonl"],
            &["--max-length", "10"],
            &["--max-length: "],
        ),
        (&generate, &["--stop", ""], &["--stop"]),
        (&generate, &["--temperature=-1"], &["--temperature"]),
        (&heads, &["--heads", "6:1"], &["--heads", "layer 6, KV head 1", "below"]),
    ];
    for (command, flags, parts) in cases {
        refuses(root, &[command, flags].concat(), parts);
    }
    // It has said by then what it is about to do.
    let quick = moa_in(root, &["quickstart", "--out", "q", "--lengths", "9000"]);
    let told = String::from_utf8_lossy(&quick.stderr);
    assert!(told.contains("--lengths: ") && told.contains("8192"), "{told}");
}

#[test]
fn values_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    for density in ["0", "-1", "1.5", "NaN", "a"] {
        let args = ["compress", "--model", tiny, "--density", density, "--out", "plan.json"];
        // A value with a dash in front is taken for an option: also a refusal.
        refuses(root, &args, if density == "-1" { &["-1"] } else { &["--density", "above 0"] });
    }
    refuses(root, &["search", "--profile", "p", "--density", "0", "--out", "plans"], &["density"]);
    refuses(
        root,
        &["generate", "--model", tiny, "--uniform", "0", "--prompt", "a"],
        &["--uniform"],
    );
    refuses(root, &["generate", "--model", tiny, "--prompt", "a", "--top-p", "2"], &["top_p", "2"]);
    refuses(root, &["generate", "--model", tiny], &["--prompt"]);
    refuses(root, &["generate", "--model", tiny, "--prompt", "a", "--what"], &["--what"]);
    refuses(
        root,
        &["generate", "--model", tiny, "--prompt", "a", "--device", "tpu"],
        &["tpu", "cpu"],
    );
    // Without the feature it is named; with it the device, or what is missing for it.
    refuses(
        root,
        &["generate", "--model", tiny, "--prompt", "a", "--device", "cuda:99"],
        if cfg!(feature = "cuda") { &["CUDA"] } else { &["cuda:99", "--features cuda"] },
    );
    refuses(
        root,
        &["generate", "--model", tiny, "--prompt", "a", "--weights", "int4"],
        &["--weights", "int4", "fp8"],
    );
    refuses(
        root,
        &["generate", "--model", tiny, "--prompt", "a", "--weights", "fp8"],
        &["--weights", "CPU", "fp8"],
    );
    for activations in [&["--activations", "fp8"][..], &["--activations", "int8"]] {
        let args = ["generate", "--model", tiny, "--prompt", "a"];
        refuses(root, &[&args, activations].concat(), &["--activations", activations[1], "fp8"]);
    }
    // No gradients, on any device: said before one is opened.
    for args in [
        &["profile", "--model", "none", "--out", "p"][..],
        &["compress", "--model", "none", "--out", "p"],
        &["quickstart", "--model", "none", "--out", "p"],
        &["bench", "--model", "none", "--profile"],
    ] {
        refuses(root, &[args, &["--weights", "fp8"]].concat(), &["--weights", "profiling", "fp8"]);
    }
    refuses(
        root,
        &["generate", "--model", tiny, "--prompt", "a", "--device", "wgpu:99"],
        if cfg!(feature = "wgpu") { &["no GPU"] } else { &["wgpu:99", "--features wgpu"] },
    );
    refuses(
        root,
        &["profile", "--model", tiny, "--objective", "mse", "--out", "p"],
        &["mse", "margin"],
    );
    refuses(
        root,
        &["profile", "--model", tiny, "--lengths", "16384", "--out", "p"],
        &["16384", "8192"],
    );
    refuses(
        root,
        &["profile", "--model", tiny, "--lengths", "64", "--out", "p"],
        &["64", "at least"],
    );
    refuses(
        root,
        &["compress", "--model", tiny, "--sink", "64", "--min-span", "64", "--out", "p"],
        &["min_span"],
    );
    refuses(root, &["frobnicate"], &["frobnicate"]);
    refuses(root, &["quickstart", "--length", "10"], &["--length", "256"]);
    refuses(
        root,
        &["quickstart", "--model", tiny, "--length", "8193", "--lengths", "256"],
        &["--length", "8193", "8192"],
    );
    refuses(
        root,
        &[
            "plan",
            "retrieval-heads",
            "--model",
            tiny,
            "--heads",
            "9:0",
            "--window",
            "10",
            "--out",
            "p",
        ],
        &["layer 9"],
    );
}

#[test]
fn prompts_longer_than_the_context_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    fs::write(root.join("long.txt"), "many words of text ".repeat(4000)).unwrap();
    let args = ["generate", "--model", tiny, "--uniform", "0.1", "--prompt-file", "long.txt"];
    refuses(root, &args, &["long.txt", "8192"]);

    cases(&root.join("cases.jsonl"), 1, 12);
    let long = fs::read_to_string(root.join("long.txt")).unwrap();
    let case = json!({ "prompt": long, "expected_number": 1 });
    let both = fs::read_to_string(root.join("cases.jsonl")).unwrap() + &case.to_string();
    fs::write(root.join("cases.jsonl"), both).unwrap();
    let args = [
        "eval",
        "retrieval",
        "--model",
        tiny,
        "--data",
        "cases.jsonl",
        "--max-new-tokens",
        "2",
        "--items",
        "items.jsonl",
    ];
    refuses(root, &args, &["cases.jsonl, case 2", "8192"]);
    let args = ["eval", "retrieval", "--model", tiny, "--data", "cases.jsonl", "--lines", "4"];
    refuses(root, &args, &["cases.jsonl, case 2"]);
    fs::write(root.join("bad.jsonl"), "{\"prompt\": \"a\"}\n").unwrap();
    refuses(
        root,
        &["eval", "retrieval", "--model", tiny, "--data", "bad.jsonl"],
        &["bad.jsonl, line 1"],
    );
    let args = ["eval", "perplexity", "--model", tiny, "--text", "long.txt", "--length", "9000"];
    refuses(root, &args, &["--lengths: ", "9000", "8192"]);
}

#[test]
fn places_that_cannot_be_written_are_refused_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    // The model does not exist: that the output comes up first shows the order of the checks.
    fs::write(root.join("file"), "a file where a folder is needed").unwrap();
    for out in ["file/plan.json", "missing/plan.json", "."] {
        refuses(root, &["compress", "--model", "none", "--out", out], &["cannot be written"]);
        refuses(root, &["profile", "--model", "none", "--out", out], &["cannot be written"]);
        refuses(
            root,
            &["validate", "--model", "none", "--plans", "none", "--out", out],
            &["cannot be written"],
        );
        refuses(
            root,
            &["plan", "uniform", "--model", "none", "--density", "0.5", "--out", out],
            &["cannot be written"],
        );
        refuses(root, &["plan", "export", "none", "--out", out], &["cannot be written"]);
    }
    refuses(
        root,
        &["quickstart", "--model", "none", "--out", "file"],
        &["file", "cannot be written"],
    );
    refuses(root, &["quickstart", "--model", "none", "--out", "new"], &["none"]);
    refuses(root, &["search", "--profile", "none", "--out", "new"], &["none"]);
    let tiny = tiny();
    let args = ["generate", "--model", tiny.to_str().unwrap(), "--prompt-file", "none.txt"];
    refuses(root, &args, &["none.txt"]);
}

#[test]
fn errors_with_json_leave_stdout_empty() {
    let dir = tempfile::tempdir().unwrap();
    refuses(dir.path(), &["plan", "show", "none.json", "--json"], &["none.json"]);
}

#[cfg(feature = "cuda")]
#[test]
fn a_model_that_gpus_cannot_share_is_refused_before_they_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let prompt = ["generate", "--model", tiny, "--prompt", "a", "--device"];
    // The model has 2 KV heads.
    refuses(
        root,
        &[&prompt[..], &["cuda:0,1,2"]].concat(),
        &["--device", "1 to 2 (KV heads)", "3"],
    );
    refuses(
        root,
        &["generate", "--model", tiny, "--chat", "--save-state", "s", "--device", "cuda:0,1"],
        &["--save-state", "[0, 1]"],
    );
    let bench = ["bench", "--model", tiny, "--profile", "--device", "cuda:0,1"];
    refuses(root, &bench, &["--profile", "one device"]);
    let profile = ["profile", "--model", tiny, "--device", "cuda:0,1,2", "--out", "p.safetensors"];
    refuses(root, &profile, &["--device", "1 to 2 (KV heads)"]);
    let bench = ["bench", "--model", "nowhere", "--device", "cuda:0,1"];
    refuses(root, &bench, &["nowhere"]);
}
