//! Calls of tools: those that a model makes of its own accord, and those that it must make.

use serde_json::{Value, json};

use crate::client::Client;
use crate::scripted;

fn tools() -> Value {
    let tool = |name: &str, parameters: Value| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    let city = json!({
        "type": "object", "properties": { "city": { "enum": ["Paris", "Rome"] } },
        "required": ["city"], "additionalProperties": false,
    });
    let none = json!({ "type": "object", "properties": {}, "additionalProperties": false });
    json!([tool("weather", city), tool("clock", none)])
}

fn body(content: &str) -> Value {
    json!({
        "messages": [{ "role": "user", "content": content }], "tools": tools(),
        "max_tokens": 100, "temperature": 0,
    })
}

/// The choice of a request's answer.
fn choice(client: Client, body: &Value) -> Value {
    client.ask("/v1/chat/completions", body)["choices"][0].clone()
}

/// Names and arguments of calls.
fn names(calls: &Value) -> Vec<(String, Value)> {
    let name = |call: &Value| {
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let arguments = serde_json::from_str(arguments).unwrap();
        (call["function"]["name"].as_str().unwrap().to_owned(), arguments)
    };
    calls.as_array().map_or(Vec::new(), |calls| calls.iter().map(name).collect())
}

/// Pieces of text, calls, and the reason of the end, of a stream.
fn streamed(client: Client, mut body: Value) -> (Vec<String>, Value, String) {
    body["stream"] = true.into();
    let events = client.post("/v1/chat/completions", &body).events();
    let (mut pieces, mut calls) = (Vec::new(), Vec::new());
    let (last, chunks) = events.split_last().unwrap();
    for chunk in chunks {
        assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
        let delta = &chunk["choices"][0]["delta"];
        match delta["tool_calls"].as_array() {
            Some(more) => {
                for call in more {
                    assert_eq!(call["index"], calls.len());
                    calls.push(call.clone());
                }
            }
            None => pieces.push(delta["content"].as_str().unwrap().to_owned()),
        }
    }
    assert_eq!(pieces.remove(0), "", "the first chunk tells the role alone");
    (pieces, calls.into(), last["choices"][0]["finish_reason"].as_str().unwrap().to_owned())
}

#[test]
fn calls_that_a_model_makes_are_told_as_such_and_its_text_as_it_comes() {
    let tagged = [
        "<ask 1>",
        "I ",
        "look.",
        "\n",
        "<tool_call>",
        "{\"name\": \"weather\", ",
        "\"arguments\": {\"city\": \"Paris\"}}",
        "</tool_call>",
    ];
    let list = [
        "<ask 2>",
        "[{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}",
        ", {\"name\": \"clock\", \"arguments\": {}}]",
    ];
    let text = ["<ask 3>", "{x", "} is", " a set", " [of one]"];
    let server = scripted::serve(&[&tagged, &list, &text]);
    let (paris, rome) = (json!({ "city": "Paris" }), json!({ "city": "Rome" }));
    let weather = |city: &Value| ("weather".to_owned(), city.clone());
    let both = vec![weather(&rome), ("clock".to_owned(), json!({}))];
    for (ask, pieces, calls) in [
        (tagged[0], &["I", " look."][..], vec![weather(&paris)]),
        (list[0], &[], both),
        (text[0], &text[1..], Vec::new()),
    ] {
        let reason = if calls.is_empty() { "stop" } else { "tool_calls" };
        let whole = choice(server.client, &body(ask));
        let message = &whole["message"];
        assert_eq!(message["content"].as_str().unwrap_or_default(), pieces.concat());
        assert_eq!(message["content"].is_null(), pieces.is_empty());
        assert_eq!(
            (names(&message["tool_calls"]), &whole["finish_reason"]),
            (calls.clone(), &json!(reason))
        );
        let (told, told_calls, told_reason) = streamed(server.client, body(ask));
        assert_eq!(
            (told.as_slice(), names(&told_calls), told_reason.as_str()),
            (&pieces.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>()[..], calls, reason)
        );
    }
    let mut single = body(list[0]);
    single["parallel_tool_calls"] = false.into();
    assert_eq!(names(&choice(server.client, &single)["message"]["tool_calls"]), [weather(&rome)]);
    let mut none = body(list[0]);
    none["tool_choice"] = "none".into();
    assert_eq!(choice(server.client, &none)["message"]["content"], list[1..].concat());
}

/// A grammar leaves nothing but a call, whatever the model.
#[cfg(feature = "grammar")]
#[test]
fn a_call_that_must_come_comes_whole_and_streamed() {
    let client = crate::shared();
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let allowed = json!({ "mode": "required", "tools": [named.clone()] });
    let allowed = json!({ "type": "allowed_tools", "allowed_tools": allowed });
    let all = [(json!("required"), None), (named, Some("weather")), (allowed, Some("weather"))];
    for (forced, expected) in all {
        let mut body = body("What is the weather in Paris?");
        body["tool_choice"] = forced;
        let whole = choice(client, &body);
        assert_eq!(
            (&whole["message"]["content"], &whole["finish_reason"]),
            (&Value::Null, &json!("tool_calls"))
        );
        let calls = names(&whole["message"]["tool_calls"]);
        let [(name, arguments)] = &calls[..] else { panic!("{calls:?}") };
        match name.as_str() {
            "weather" => assert!(["Paris", "Rome"].map(Value::from).contains(&arguments["city"])),
            other => assert_eq!((other, arguments), ("clock", &json!({}))),
        }
        assert!(expected.is_none_or(|own| own == name), "{name}");
        let (pieces, streamed, reason) = streamed(client, body);
        assert_eq!((pieces, names(&streamed), reason.as_str()), (Vec::new(), calls, "tool_calls"));
    }
}

/// As OpenAI tells it: the arguments so far are those of the call, and the answer ends by its length.
#[cfg(feature = "grammar")]
#[test]
fn a_call_that_must_come_and_is_cut_off_is_a_call() {
    let client = crate::shared();
    let mut body = body("What is the weather in Paris?");
    body["tools"] = json!([{ "type": "function", "function": {
        "name": "note",
        "parameters": { "type": "object", "properties": { "text": { "type": "string", "minLength": 900 } }, "required": ["text"] },
    } }]);
    body["tool_choice"] = "required".into();
    body["max_tokens"] = 40.into();
    let whole = choice(client, &body);
    assert_eq!(
        (&whole["message"]["content"], &whole["finish_reason"]),
        (&Value::Null, &json!("length"))
    );
    let function = &whole["message"]["tool_calls"][0]["function"];
    assert_eq!(function["name"], "note");
    let arguments = function["arguments"].as_str().unwrap();
    assert!(arguments.starts_with("{\"text\": \"") && !arguments.ends_with('}'), "{arguments}");
    body["stream"] = true.into();
    let chunks = client.post("/v1/chat/completions", &body).events();
    let told: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let calls: Vec<&Value> =
        told.iter().map(|own| &own["delta"]["tool_calls"]).filter(|own| !own.is_null()).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["function"], *function);
    assert_eq!(told.last().unwrap()["finish_reason"], "length");
    // What a tool does not name does not come.
    body["tools"][0]["function"]["parameters"] =
        json!({ "type": "object", "properties": { "a": { "enum": ["x"] } } });
    body["stream"] = false.into();
    for seed in 0..4 {
        (body["seed"], body["temperature"]) = (seed.into(), 1.into());
        let called = names(&choice(client, &body)["message"]["tool_calls"]);
        let [(_, arguments)] = &called[..] else { panic!("{called:?}") };
        assert!([json!({}), json!({ "a": "x" })].contains(arguments), "{arguments}");
    }
}
