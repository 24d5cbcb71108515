//! The shapes of OpenAI's API, and that the tokens are those of the engine.

use std::collections::BTreeSet;

use moa_models::{ChatTemplate, EngineOptions, GenerateOptions, Message, Prompt};
use moa_server::ServerOptions;
use serde_json::{Value, json};

use crate::client::Client;
use crate::{Running, checkpoint, narrow, shared};

/// What the engine says to a prompt.
fn expected(prompt: impl Into<Prompt>, max_new_tokens: usize) -> String {
    let mut engine = checkpoint().engine(EngineOptions::default());
    let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
    engine.submit(prompt, &narrow(), options);
    engine.complete_all().unwrap().remove(0).text
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[test]
fn completions_are_those_of_the_engine() {
    let client = shared();
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0 });
    let answer = client.ask("/v1/completions", &body);
    assert_eq!(answer["choices"][0]["text"], expected("Once upon a time", 20));
    assert_eq!(answer["object"], "text_completion");
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 20);
    assert_eq!(usage["total_tokens"].as_u64(), Some(20 + usage["prompt_tokens"].as_u64().unwrap()));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let messages = json!([{ "role": "user", "content": "What is the weather like?" }]);
    let answer =
        client.ask("/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 12 }));
    let prompt = Prompt::chat(&[Message::user("What is the weather like?")]);
    assert_eq!(content(&answer), expected(prompt, 12));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
}

#[test]
fn streams_join_to_the_whole() {
    let client = shared();
    let mut body = json!({
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "Tell a story." }] }],
        "max_completion_tokens": 16, "seed": 3, "temperature": 0.9, "n": 2,
    });
    let whole = client.ask("/v1/chat/completions", &body);
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let events = client.post("/v1/chat/completions", &body).events();
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    let mut texts = [String::new(), String::new()];
    let mut ended = [None, None];
    for (at, chunk) in chunks.iter().enumerate() {
        assert_eq!(
            (&chunk["object"], &chunk["usage"]),
            (&json!("chat.completion.chunk"), &Value::Null)
        );
        assert_eq!(chunk["id"], chunks[0]["id"]);
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        if at < 2 {
            assert_eq!(choice["delta"], json!({ "role": "assistant", "content": "" }));
        }
        assert_eq!(ended[index], None, "nothing follows an end");
        texts[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        ended[index] = choice["finish_reason"].as_str();
    }
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(whole["choices"][index]["message"]["content"], *text);
        assert_eq!(whole["choices"][index]["finish_reason"].as_str(), ended[index]);
    }
    assert_ne!(texts[0], texts[1], "choices have seeds of their own");
    let body = json!({ "prompt": ["One", "Two"], "max_tokens": 4, "stream": true });
    let mut texts = [String::new(), String::new()];
    for chunk in client.post("/v1/completions", &body).events() {
        assert_eq!(chunk["object"], "text_completion");
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize]
            .push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(texts, [expected("One", 4), expected("Two", 4)]);
}

#[test]
fn the_template_is_told_what_a_request_tells_it() {
    let mut own = checkpoint();
    let source = "{{ bos_token }}{{ messages[0].content }}{{ more | default(' waited') }}";
    own.set_template(ChatTemplate::new(source, "<s>", "</s>"));
    let server = Running::of(own, narrow(), ServerOptions::default());
    let ask = |variables: Value| {
        let messages = json!([{ "role": "user", "content": "The ship" }]);
        let body = json!({
            "messages": messages, "max_tokens": 12, "temperature": 0,
            "chat_template_kwargs": variables,
        });
        content(&server.client.ask("/v1/chat/completions", &body)).to_owned()
    };
    for (variables, text) in [
        (json!(null), "The ship waited"),
        (json!({}), "The ship waited"),
        (json!({ "more": " sailed" }), "The ship sailed"),
        (json!({ "messages": [{ "content": "No" }], "more": " sank" }), "The ship sank"),
    ] {
        assert_eq!(
            ask(variables.clone()).trim_start(),
            expected(text, 12).trim_start(),
            "{variables}"
        );
    }
}

#[test]
fn options_change_what_they_are_about() {
    let client = shared();
    let ask = |more: Value| {
        let mut body = json!({ "prompt": "The ship sailed", "max_tokens": 12, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ask("/v1/completions", &body)["choices"][0].clone()
    };
    let plain = ask(json!({ "logprobs": 3 }));
    let text = plain["text"].as_str().unwrap().to_owned();
    let told = &plain["logprobs"];
    assert_eq!(told["tokens"].as_array().unwrap().len(), 12);
    for (at, logprob) in told["token_logprobs"].as_array().unwrap().iter().enumerate() {
        let best = told["top_logprobs"][at].as_object().unwrap().values();
        let best = best.map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(logprob.as_f64(), Some(best), "greedy takes the likeliest");
    }
    assert_eq!(ask(json!({}))["text"], text, "asking for logprobs changes nothing");
    // A stream tells the same, piece by piece.
    let body = json!({
        "prompt": "The ship sailed", "max_tokens": 12, "temperature": 0, "logprobs": 3, "stream": true,
    });
    let chunks = client.post("/v1/completions", &body).events();
    assert!(chunks.len() > 2);
    for field in ["tokens", "text_offset"] {
        let told = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][field].as_array());
        let joined: Vec<Value> = told.flatten().cloned().collect();
        assert_eq!(plain["logprobs"][field], json!(joined), "{field}");
    }
    // A stop string ends the text before it.
    let stop: String = text.chars().skip(text.chars().count() / 2).take(4).collect();
    let stopped = ask(json!({ "stop": [stop.clone()] }));
    assert_eq!(stopped["text"].as_str(), text.split(stop.as_str()).next());
    assert_eq!(stopped["finish_reason"], "stop");
    // A forbidden token does not come.
    let first = client.ask("/tokenize", &json!({ "prompt": "The ship sailed" }))["tokens"].clone();
    let mut with_text = first.as_array().unwrap().clone();
    let whole = client.ask("/tokenize", &json!({ "prompt": format!("The ship sailed{text}") }));
    with_text.push(whole["tokens"][with_text.len()].clone());
    let banned = with_text.last().unwrap().to_string();
    assert_ne!(ask(json!({ "logit_bias": { banned: -100 } }))["text"], text);
    // The strongest penalties keep those twelve tokens apart, two of which are one without.
    let distinct = |choice: &Value| {
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap().iter();
        tokens.map(|token| token.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>().len()
    };
    let fresh = ask(json!({ "frequency_penalty": 2, "presence_penalty": 2, "logprobs": 0 }));
    assert!(distinct(&plain) < 12, "{plain}");
    assert_eq!(distinct(&fresh), 12, "{fresh}");
    assert_eq!(ask(json!({ "echo": true }))["text"], format!("The ship sailed{text}"));
    let chat = json!({
        "messages": [{ "role": "user", "content": "Hello" }],
        "logprobs": true, "top_logprobs": 2, "max_tokens": 3,
    });
    let told =
        client.ask("/v1/chat/completions", &chat)["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(told.as_array().unwrap().len(), 3);
    assert_eq!(told[0]["token"], told[0]["top_logprobs"][0]["token"]);
    assert_eq!(told[0]["top_logprobs"].as_array().unwrap().len(), 2);
}

#[test]
fn the_server_tells_of_itself() {
    let client = shared();
    let models = client.get("/v1/models").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("moa-tiny")));
    assert_eq!(client.get("/v1/models/moa-tiny").status, 200);
    assert_eq!(client.get("/v1/models/gpt").json()["error"]["code"], "model_not_found");
    assert_eq!(client.get("/health").json()["status"], "ok");
    assert!(client.get("/").body.starts_with("<!doctype html>"));
    assert_eq!(client.get("/plan").json()["layers"], 6);
    let odd = Running::new(ServerOptions { max_context: Some(5000), ..ServerOptions::default() });
    let labels = |client: Client| {
        let plan = client.get("/plan").json();
        let lengths = plan["lengths"].as_array().unwrap().iter();
        lengths.map(|own| own["label"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(labels(client), ["1k tokens", "4k tokens", "8k tokens"]);
    assert_eq!(labels(odd.client), ["1k tokens", "4k tokens", "5000 tokens"]);
    let tokens = client.ask("/tokenize", &json!({ "prompt": "Once upon" }))["tokens"].clone();
    let text = client.ask("/detokenize", &json!({ "tokens": tokens }))["prompt"].clone();
    assert!(text.as_str().unwrap().ends_with("Once upon"), "{text}");
    assert_eq!(client.get("/v2").status, 404);
    let wrong = client.get("/v1/completions");
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST, OPTIONS")));
    let asked = client.request("OPTIONS", "/v1/models", "", b"");
    assert_eq!((asked.status, asked.header("allow")), (204, Some("GET, HEAD, OPTIONS")));
    for path in ["/v1/embeddings", "/v1/audio/speech", "/props"] {
        let missing = client.post(path, &json!({ "input": "x" })).json()["error"].clone();
        assert_eq!(missing["code"], "unknown_url");
        assert!(missing["message"].as_str().unwrap().contains("/v1/chat/completions"), "{missing}");
    }
}

/// OpenAI's client writes `%2F` for a slash since its version 3.
#[test]
fn names_of_models_may_have_slashes() {
    let model_name = Some("acme/chat 50%".to_owned());
    let own = Running::new(ServerOptions { model_name, ..ServerOptions::default() });
    for path in ["acme/chat%2050%", "acme%2Fchat%2050%25", "acme%2fchat%2050%25"] {
        let answer = own.client.get(&format!("/v1/models/{path}"));
        assert_eq!(answer.json()["id"], "acme/chat 50%", "{path}");
    }
    // A sign is no digit of a byte.
    let other = Running::new(ServerOptions {
        model_name: Some("acme/a%+1".to_owned()),
        ..ServerOptions::default()
    });
    assert_eq!(other.client.get("/v1/models/acme/a%+1").json()["id"], "acme/a%+1");
}

/// Fields of vLLM and llama.cpp, by which programs that were written for those say what an answer must be.
#[cfg(feature = "grammar")]
#[test]
fn answers_have_the_form_that_is_asked_for() {
    let client = shared();
    let schema = json!({ "type": "object", "properties": { "sea": { "enum": ["calm", "wild"] } },
        "required": ["sea"], "additionalProperties": false });
    let is_object = |text: &str| text == r#"{"sea": "calm"}"# || text == r#"{"sea": "wild"}"#;
    let is_choice = |text: &str| ["a \"b\"", "\\d", "x/<y>.*"].contains(&text);
    let is_one_of_many = |text: &str| text.starts_with("the ") && text.ends_with("th");
    let is_number = |text: &str| {
        text.len() == 5
            && text.bytes().take(3).all(|byte| byte.is_ascii_digit())
            && ('a'..='f').any(|last| text.ends_with(&format!("-{last}")))
    };
    let is_word = |text: &str| ["xyy", "xyz", "xzy", "xzz"].contains(&text);
    let choices = json!(["a \"b\"", "\\d", "x/<y>.*"]);
    let format = json!({ "type": "json_schema", "json_schema": { "schema": schema } });
    type IsRight = fn(&str) -> bool;
    let ways: [(&str, Value, IsRight); 9] = [
        ("structured_outputs", json!({ "json": schema }), is_object),
        ("structured_outputs", json!({ "regex": "[0-9]{3}-[a-f]" }), is_number),
        ("structured_outputs", json!({ "choice": choices }), is_choice),
        ("structured_outputs", json!({ "grammar": "start: \"x\" /[yz]{2}/" }), is_word),
        ("guided_json", json!(schema.to_string()), is_object),
        ("guided_choice", choices.clone(), is_choice),
        ("guided_choice", (0..3000).map(|n| format!("the {n}th")).collect(), is_one_of_many),
        ("json_schema", schema.clone(), is_object),
        ("response_format", format, is_object),
    ];
    for (field, value, is_right) in ways {
        let mut body = json!({ "prompt": "Say: ", "max_tokens": 40, "temperature": 1, "seed": 4 });
        body[field] = value.clone();
        let text = client.ask("/v1/completions", &body)["choices"][0]["text"].clone();
        assert!(is_right(text.as_str().unwrap().trim_start()), "{field} {value}: {text}");
    }
    for (body, param) in [
        (json!({ "grammar": "root ::= [0-9]+" }), "grammar"),
        (
            json!({ "structured_outputs": { "choice": ["a"], "regex": "a" } }),
            "structured_outputs.regex",
        ),
        (json!({ "structured_outputs": { "choice": [] } }), "structured_outputs.choice"),
        (json!({ "structured_outputs": { "choice": [1] } }), "structured_outputs.choice"),
        (json!({ "structured_outputs": { "regex": "(" } }), "structured_outputs.regex"),
        (json!({ "guided_json": { "type": "nothing" } }), "guided_json"),
        (
            json!({ "response_format": { "type": "json_schema",
                "json_schema": { "schema": { "type": "nothing" } } } }),
            "response_format",
        ),
        (json!({ "guided_regex": 7 }), "guided_regex"),
        (json!({ "guided_json": "{" }), "guided_json"),
        (
            json!({ "guided_regex": "a", "response_format": { "type": "json_object" } }),
            "guided_regex",
        ),
    ] {
        let mut all = json!({ "prompt": "x", "max_tokens": 1 });
        all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let answer = client.post("/v1/completions", &all);
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (400, &json!(param)),
            "{body}"
        );
    }
    let none = json!({ "prompt": "x", "guided_choice": [] });
    let error = client.post("/v1/completions", &none).json()["error"]["message"].clone();
    assert_eq!(error, "`guided_choice` must be an array of at least one text, got an empty array");
    let broken = json!({ "prompt": "x", "structured_outputs": { "regex": "(" } });
    assert_eq!(client.post("/v1/completions", &broken).status, 400);
}

/// As programs ask that measure how likely texts are.
#[test]
fn an_echo_tells_how_likely_the_prompt_was() {
    let client = shared();
    let text = "The ship sailed into the harbour and the crew went ashore";
    let tokens = client.ask("/tokenize", &json!({ "prompt": text }))["tokens"].clone();
    let tokens: Vec<u32> = serde_json::from_value(tokens).unwrap();
    let ask = |more: Value| {
        let mut body = json!({ "prompt": tokens, "max_tokens": 1, "temperature": 0, "echo": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ask("/v1/completions", &body)["choices"].clone()
    };
    // What is kept of the prompt by now is of no use to the second one.
    for _ in 0..2 {
        let told = ask(json!({ "logprobs": 2 }))[0]["logprobs"].clone();
        let logprobs = told["token_logprobs"].as_array().unwrap();
        assert_eq!(logprobs.len(), tokens.len() + 1);
        assert_eq!((&logprobs[0], &told["top_logprobs"][0]), (&Value::Null, &Value::Null));
        for at in 1..logprobs.len() {
            let mut body = json!({ "prompt": tokens[..at], "max_tokens": 1, "logprobs": 2 });
            if at < tokens.len() {
                // The likeliest token in its place.
                body["temperature"] = 0.into();
                let own = client.ask("/v1/completions", &body)["choices"][0]["logprobs"].clone();
                let likeliest = own["token_logprobs"][0].as_f64().unwrap();
                let top = told["top_logprobs"][at].as_object().unwrap();
                assert_eq!(top.len(), 2);
                let best = top.values().map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max);
                // Steps of many rows may round otherwise.
                assert!((best - likeliest).abs() < 0.1, "{at}: {best} {likeliest}");
                assert!(logprobs[at].as_f64().unwrap() <= best);
            }
        }
    }
    let all = ask(json!({ "logprobs": 1, "n": 2, "temperature": 1, "seed": 3, "max_tokens": 4 }));
    let first = |index: usize| all[index]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(first(0).len(), tokens.len() + 4);
    assert_eq!(first(0)[..tokens.len()], first(1)[..tokens.len()]);
    assert_eq!(
        ask(json!({ "logprobs": 1, "max_tokens": 0 }))[0]["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .len(),
        tokens.len()
    );
    // A token stands in the text where its offset says, for which one that the text lacks takes no room.
    for (prompt, echoed) in [
        (json!(text), text),
        (json!(tokens), text),
        (json!(format!("{text}</s>")), &format!("{text}</s>")),
        (json!([tokens.clone(), vec![2]].concat()), text),
    ] {
        let body = json!({ "prompt": prompt, "max_tokens": 1, "echo": true, "logprobs": 1 });
        let choice = client.ask("/v1/completions", &body)["choices"][0].clone();
        let all: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
        assert!(choice["text"].as_str().unwrap().starts_with(echoed), "{choice}");
        let told = &choice["logprobs"];
        assert_eq!(told["tokens"][0], "<s>");
        for (at, token) in told["tokens"].as_array().unwrap().iter().enumerate().take(tokens.len())
        {
            let token = if at == 0 { "" } else { token.as_str().unwrap() };
            let offset = told["text_offset"][at].as_u64().unwrap() as usize;
            let there: String = all[offset..].iter().take(token.chars().count()).collect();
            assert_eq!(there, token, "{at}: {told}");
        }
        let last = told["text_offset"].as_array().unwrap().last().unwrap();
        assert_eq!(*last, echoed.chars().count(), "{told}");
    }
    let body =
        json!({ "prompt": tokens, "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1 });
    let whole = client.ask("/v1/completions", &body)["choices"][0].clone();
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let chunks = client.post("/v1/completions", &streamed).events();
    let joined = |field: &str| {
        let told = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][field].as_array());
        Value::from(told.flatten().cloned().collect::<Vec<_>>())
    };
    for field in ["tokens", "text_offset"] {
        assert_eq!(joined(field), whole["logprobs"][field], "{field}");
    }
    // Other requests beside it change last digits.
    let [streamed, whole] = [joined("token_logprobs"), whole["logprobs"]["token_logprobs"].clone()];
    let pairs = streamed.as_array().unwrap().iter().zip(whole.as_array().unwrap());
    let differs = |(a, b): (&Value, &Value)| {
        let close = a.as_f64().zip(b.as_f64()).map(|(a, b)| (a - b).abs() < 0.1);
        !close.unwrap_or(a == b)
    };
    assert_eq!(pairs.filter(|pair| differs(*pair)).count(), 0, "{streamed} {whole}");
}

#[test]
fn a_conversation_may_end_in_a_message_that_goes_on() {
    let mut own = checkpoint();
    let source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}(said){% endif %}";
    own.set_template(ChatTemplate::new(source, "<s>", "</s>"));
    let server = Running::of(own, narrow(), ServerOptions::default());
    let messages = json!([
        { "role": "user", "content": "Who?" },
        { "role": "assistant", "content": [{ "type": "refusal", "refusal": "The ship " }] },
    ]);
    let ask = |more: Value| {
        let mut body = json!({ "messages": messages, "max_tokens": 8, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let tokens = server.client.ask("/tokenize", &body)["count"].clone();
        let answer = server.client.ask("/v1/chat/completions", &body);
        assert_eq!(answer["usage"]["prompt_tokens"], tokens, "{more}");
        content(&answer).trim_start().to_owned()
    };
    for (more, text) in [
        (json!({}), "[Who?][The ship ](said)"),
        (json!({ "add_generation_prompt": false }), "[Who?][The ship ]"),
        (json!({ "continue_final_message": true }), "[Who?][The ship"),
    ] {
        let tokens = server
            .client
            .ask("/tokenize", &json!({ "prompt": text, "add_special_tokens": false }))["tokens"]
            .clone();
        let body = json!({ "prompt": tokens, "max_tokens": 8, "temperature": 0 });
        let expected = server.client.ask("/v1/completions", &body)["choices"][0]["text"].clone();
        assert_eq!(ask(more.clone()), expected.as_str().unwrap().trim_start(), "{more}");
    }
}

/// Bodies, and the field that is at fault.
fn bad_bodies() -> Vec<(&'static str, Value, &'static str)> {
    let message = json!([{ "role": "user", "content": "Hi" }]);
    let chat = |field: &str, value: Value| {
        let mut body = json!({ "messages": message });
        body[field] = value;
        ("/v1/chat/completions", body)
    };
    let mut all = vec![
        ("/v1/chat/completions", json!({}), "messages"),
        ("/v1/completions", json!({}), "prompt"),
        ("/v1/completions", json!({ "prompt": [[99_999_999]] }), "prompt"),
        ("/v1/completions", json!({ "prompt": [-1] }), "prompt"),
        ("/v1/completions", json!({ "prompt": [[]] }), "prompt"),
        ("/v1/completions", json!({ "prompt": "word ".repeat(100_000) }), "prompt"),
        ("/v1/completions", json!({ "prompt": vec![5; 8192] }), "prompt"),
        ("/v1/responses", json!({ "input": "word ".repeat(100_000) }), "input"),
        ("/v1/completions", json!({ "prompt": "x", "suffix": "y" }), "suffix"),
        ("/v1/completions", json!({ "prompt": "x", "best_of": 3 }), "best_of"),
        ("/v1/completions", json!({ "prompt": "x", "logprobs": 21 }), "logprobs"),
        ("/tokenize", json!({ "prompt": 7 }), "prompt"),
        ("/tokenize", json!({ "messages": 7 }), "messages"),
        ("/detokenize", json!({ "tokens": "x" }), "tokens"),
        ("/detokenize", json!({ "tokens": [5, 99_999_999] }), "tokens"),
    ];
    for (field, value, param) in [
        ("messages", json!([]), "messages"),
        ("messages", json!([7]), "messages[0]"),
        ("messages", json!([{ "role": "king", "content": "" }]), "messages[0].role"),
        ("messages", json!([{ "role": "user" }]), "messages[0].content"),
        (
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            "messages[0].content",
        ),
        ("temperature", json!(-1), "temperature"),
        ("temperature", json!("hot"), "temperature"),
        ("top_p", json!(1.5), "top_p"),
        ("n", json!(0), "n"),
        ("n", json!(1000), "n"),
        ("max_tokens", json!(-1), "max_tokens"),
        ("max_tokens", json!(0), "max_tokens"),
        ("max_tokens", json!(1.5), "max_tokens"),
        ("stop", json!([""]), "stop"),
        ("stop", json!([1]), "stop"),
        ("stop_token_ids", json!([99_999_999]), "stop_token_ids"),
        ("logit_bias", json!({ "x": 1 }), "logit_bias"),
        ("logit_bias", json!({ "1": 1e9 }), "logit_bias"),
        ("top_logprobs", json!(2), "top_logprobs"),
        ("presence_penalty", json!(3), "presence_penalty"),
        ("seed", json!("a"), "seed"),
        ("priority", json!(1.5), "priority"),
        ("model", json!("gpt-4"), "model"),
        ("tools", json!([{}]), "tools"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("response_format", json!({ "type": "xml" }), "response_format.type"),
        ("functions", json!([{}]), "functions"),
        ("add_generation_prompt", json!(1), "add_generation_prompt"),
        ("continue_final_message", json!(true), "continue_final_message"),
        (
            "tool_choice",
            json!({ "type": "allowed_tools", "allowed_tools": { "mode": "required" } }),
            "tool_choice",
        ),
        ("stream_options", json!(1), "stream_options"),
        ("min_tokens", json!(-1), "min_tokens"),
        ("chat_template_kwargs", json!([1]), "chat_template_kwargs"),
    ] {
        let (path, body) = chat(field, value);
        all.push((path, body, param));
    }
    all
}

#[test]
fn bad_fields_are_named() {
    let client = shared();
    for (path, body, param) in bad_bodies() {
        let answer = client.post(path, &body);
        let error = &answer.json()["error"];
        assert!((400..500).contains(&answer.status), "{body}: {error}");
        assert_eq!(error["param"], param, "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}

#[test]
fn faults_say_what_came() {
    let client = shared();
    let told = |body: Value| {
        client.post("/v1/completions", &body).json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let empty = told(json!({ "prompt": "x", "stop": "" }));
    assert!(empty.ends_with("got one of 0 bytes"), "{empty}");
    // By its bytes it has more tokens than the context, of which nobody knows how many.
    let long = told(json!({ "prompt": "word ".repeat(100_000) }));
    assert!(long.contains("the prompt has at least "), "{long}");
    let known = told(json!({ "prompt": vec![5; 9000] }));
    assert!(known.ends_with("the prompt has 9000"), "{known}");
}

#[test]
fn bodies_that_are_no_requests_are_refused_and_others_served() {
    let client = shared();
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    let deep_field = [b"{\"messages\":".to_vec(), deep.clone(), b"}".to_vec()].concat();
    let long = json!({ "prompt": "word ".repeat(100_000), "max_tokens": 1 }).to_string();
    let bodies: [&[u8]; 9] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{\"prompt\": \"\\ud800\"}",
        &deep,
        &deep_field,
        long.as_bytes(),
    ];
    for body in bodies {
        for path in ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"] {
            let answer = client.request("POST", path, "", body);
            if path == "/tokenize" && body == long.as_bytes() {
                assert_eq!(answer.status, 200);
                continue;
            }
            assert_eq!(answer.status, 400, "{path}: {}", answer.body);
            assert!(answer.json()["error"]["message"].is_string());
        }
    }
    assert_eq!(client.get("/health").status, 200);
}
