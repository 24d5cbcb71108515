//! `/v1/responses`: what chat completions answer, told in items and by events.

use std::io::Read as _;
use std::time::Duration;

use moa_models::ChatTemplate;
use moa_server::ServerOptions;
use serde_json::{Value, json};

use crate::client::Client;
use crate::{Running, checkpoint, narrow, scripted, shared};

const PATH: &str = "/v1/responses";

fn with(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The text of a response of one message.
fn text(response: &Value) -> &str {
    let [item] = &response["output"].as_array().unwrap()[..] else { panic!("{response}") };
    assert_eq!((&item["type"], &item["role"]), (&json!("message"), &json!("assistant")));
    assert!(item["id"].as_str().unwrap().starts_with("msg_"));
    let [part] = &item["content"].as_array().unwrap()[..] else { panic!("{item}") };
    assert_eq!((&part["type"], &part["annotations"]), (&json!("output_text"), &json!([])));
    part["text"].as_str().unwrap()
}

/// Calls of a response, each by its name and arguments.
fn calls(response: &Value) -> Vec<(&str, Value)> {
    let items = response["output"].as_array().unwrap().iter();
    let calls = items.filter(|item| item["type"] == "function_call").map(|item| {
        assert!(item["id"].as_str().unwrap().starts_with("fc_"), "{item}");
        assert!(item["call_id"].as_str().unwrap().starts_with("call_"), "{item}");
        let arguments = serde_json::from_str(item["arguments"].as_str().unwrap()).unwrap();
        (item["name"].as_str().unwrap(), arguments)
    });
    calls.collect()
}

/// What differs between two responses to the same request, made the same.
fn without_ids(response: &Value) -> Value {
    let mut response = response.clone();
    for field in ["id", "created_at", "completed_at"] {
        response[field] = Value::Null;
    }
    // The second one may find the prompt read.
    response["usage"]["input_tokens_details"] = Value::Null;
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response
}

/// Reads a stream as clients do, by its events alone, and checks that they are in order; the response they end with.
fn streamed(client: Client, body: &Value) -> Value {
    let answer = client.post(PATH, &with(body.clone(), &json!({ "stream": true })));
    let events = answer.named_events();
    for (event, kind) in events.iter().zip(["response.created", "response.in_progress"]) {
        let response = &event["response"];
        assert_eq!((&event["type"], &response["status"]), (&json!(kind), &json!("in_progress")));
        assert_eq!((&response["output"], &response["usage"]), (&json!([]), &Value::Null));
    }
    let (last, items) = events[2..].split_last().unwrap();
    let mut ended: Vec<Value> = Vec::new();
    let mut item: Option<Value> = None;
    // What is told of the item's text or arguments, and whether that has ended.
    let (mut told, mut logprobs, mut is_whole) = (String::new(), Vec::new(), false);
    for event in items {
        let kind = event["type"].as_str().unwrap();
        assert_eq!(event["output_index"], ended.len(), "{event}");
        if kind == "response.output_item.added" {
            assert!(item.is_none(), "one begins where another has ended");
            assert_eq!(event["item"]["status"], "in_progress");
            item = Some(event["item"].clone());
            (told, logprobs, is_whole) = (String::new(), Vec::new(), false);
            continue;
        }
        let own = item.as_mut().unwrap_or_else(|| panic!("no item has begun: {event}"));
        if kind == "response.output_item.done" {
            let done = &event["item"];
            assert_eq!((&done["id"], &done["type"]), (&own["id"], &own["type"]));
            assert!(is_whole);
            match own["type"].as_str() {
                Some("message") => assert_eq!(done["content"], own["content"]),
                _ => assert_eq!(done["arguments"], told),
            }
            ended.push(done.clone());
            item = None;
            continue;
        }
        assert_eq!(event["item_id"], own["id"]);
        let is_message = own["type"] == "message";
        assert_eq!(event["content_index"].is_null(), !is_message);
        match kind {
            "response.content_part.added" => {
                assert_eq!((&own["content"], &event["part"]["text"]), (&json!([]), &json!("")));
                own["content"] = json!([event["part"]]);
            }
            "response.output_text.delta" => {
                assert!(own["content"][0].is_object() && !is_whole);
                told.push_str(event["delta"].as_str().unwrap());
                logprobs.extend(event["logprobs"].as_array().unwrap().clone());
            }
            "response.output_text.done" => {
                assert_eq!(event["text"], told);
                assert_eq!(event["logprobs"].as_array(), Some(&logprobs));
                is_whole = true;
            }
            "response.content_part.done" => {
                let part = &event["part"];
                assert_eq!((&part["text"], is_whole), (&json!(told), true));
                assert_eq!(part["logprobs"].as_array(), Some(&logprobs));
                own["content"][0] = part.clone();
            }
            "response.function_call_arguments.delta" => {
                assert!(!is_message && !is_whole);
                told.push_str(event["delta"].as_str().unwrap());
            }
            "response.function_call_arguments.done" => {
                assert_eq!((&event["arguments"], &event["name"]), (&json!(told), &own["name"]));
                is_whole = true;
            }
            other => panic!("{other}"),
        }
    }
    assert!(item.is_none(), "an item has not ended");
    let response = last["response"].clone();
    let status = response["status"].as_str().unwrap();
    assert_eq!(last["type"], format!("response.{status}"));
    assert_eq!(response["id"], events[0]["response"]["id"]);
    assert_eq!(response["output"], Value::from(ended));
    response
}

#[test]
fn a_response_says_what_a_chat_says_whole_and_streamed() {
    let client = shared();
    let told = json!({ "temperature": 0, "max_output_tokens": 14 });
    let said = json!({ "temperature": 0, "max_tokens": 14 });
    let hello = "Hello! Who are you?";
    let user = json!({ "role": "user", "content": hello });
    let system = json!({ "role": "system", "content": "Be brief." });
    let earlier = json!({ "role": "assistant", "content": "A ship.\nAnd you?" });
    for (input, messages) in [
        (json!({ "input": hello }), json!([user])),
        (json!({ "input": [user] }), json!([user])),
        (json!({ "input": hello, "instructions": "Be brief." }), json!([system, user])),
        (
            json!({ "input": [
                { "type": "message", "role": "developer", "content": "Be brief." },
                { "type": "message", "role": "user", "content": [
                    { "type": "input_text", "text": "Hello! Who are you?" } ] },
                { "type": "reasoning", "id": "rs_1", "summary": [] },
                { "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                    "content": [
                        { "type": "output_text", "text": "A ship.", "annotations": [] },
                        { "type": "refusal", "refusal": "And you?" } ] },
                user,
            ] }),
            json!([system, user, earlier, user]),
        ),
    ] {
        let response = client.ask(PATH, &with(told.clone(), &input));
        let chat = client
            .ask("/v1/chat/completions", &with(said.clone(), &json!({ "messages": messages })));
        assert_eq!(text(&response), chat["choices"][0]["message"]["content"], "{input}");
        let (usage, of_chat) = (&response["usage"], &chat["usage"]);
        assert_eq!(usage["input_tokens"], of_chat["prompt_tokens"]);
        assert_eq!(usage["output_tokens"], of_chat["completion_tokens"]);
        assert_eq!(usage["total_tokens"], of_chat["total_tokens"]);
        assert_eq!(usage["output_tokens_details"]["reasoning_tokens"], 0);
        assert!(usage["input_tokens_details"]["cached_tokens"].is_u64());
        let is_cut = chat["choices"][0]["finish_reason"] == "length";
        let (status, reason) = match is_cut {
            true => ("incomplete", json!({ "reason": "max_output_tokens" })),
            false => ("completed", Value::Null),
        };
        assert_eq!(
            (&response["status"], &response["incomplete_details"]),
            (&json!(status), &reason)
        );
        assert_eq!(response["output"][0]["status"], status);
        assert_eq!(response["completed_at"].is_null(), is_cut);
        let streamed = streamed(client, &with(told.clone(), &input));
        assert_eq!(without_ids(&streamed), without_ids(&response), "{input}");
    }
}

#[test]
fn a_text_that_ends_by_itself_is_completed_and_so_is_none() {
    let server = scripted::serve(&[&["<ask>", "It ", "ends."], &["<nothing>"]]);
    for (ask, said) in [("<ask>", "It ends."), ("<nothing>", "")] {
        let body = json!({ "input": ask, "temperature": 0 });
        let response = server.client.ask(PATH, &body);
        assert_eq!((text(&response), &response["status"]), (said, &json!("completed")));
        assert_eq!(response["output"][0]["status"], "completed");
        assert_eq!(without_ids(&streamed(server.client, &body)), without_ids(&response));
    }
}

/// The parameters that the types of OpenAI's clients need, and those that say what was asked for.
#[test]
fn a_response_tells_what_was_asked_for() {
    let client = shared();
    let response = client.ask(PATH, &json!({ "input": "Hi", "max_output_tokens": 2 }));
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert!(response["created_at"].as_u64() > Some(1_700_000_000));
    let other = client.ask(PATH, &json!({ "input": "Hi", "max_output_tokens": 2 }));
    assert_ne!(response["id"], other["id"]);
    for (field, value) in [
        ("object", json!("response")),
        ("model", json!("moa-tiny")),
        ("error", Value::Null),
        ("instructions", Value::Null),
        ("metadata", json!({})),
        ("parallel_tool_calls", json!(true)),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("top_p", json!(1.0)),
        ("text", json!({ "format": { "type": "text" } })),
        ("truncation", json!("disabled")),
        ("store", json!(false)),
        ("background", json!(false)),
        ("previous_response_id", Value::Null),
        ("user", Value::Null),
        ("max_output_tokens", json!(2)),
    ] {
        assert_eq!(response.get(field), Some(&value), "{field}");
    }
    let asked = json!({
        "input": "Hi", "max_output_tokens": 2, "instructions": "Be brief.", "temperature": 0.7,
        "top_p": 0.9, "metadata": { "a": "b" }, "user": "me", "store": true, "truncation": "disabled",
        "parallel_tool_calls": false, "tool_choice": "none", "seed": 7, "top_k": 5,
        "tools": [{ "type": "function", "name": "f", "strict": true }],
        "reasoning": { "effort": "high" }, "include": ["reasoning.encrypted_content"],
        "stream_options": { "include_obfuscation": false }, "service_tier": "auto", "unheard_of": 1,
    });
    let response = client.ask(PATH, &asked);
    for field in [
        "instructions",
        "temperature",
        "top_p",
        "metadata",
        "user",
        "parallel_tool_calls",
        "tool_choice",
    ] {
        assert_eq!(response[field], asked[field], "{field}");
    }
    let tool = json!({
        "type": "function", "name": "f", "strict": true, "description": null, "parameters": null,
    });
    assert_eq!((&response["tools"], &response["store"]), (&json!([tool]), &json!(false)));
    assert_eq!(text(&client.ask(PATH, &asked)), text(&response), "a seed is a seed");
}

/// The template sees what it sees of the same conversation in chat completions.
#[test]
fn calls_and_their_outputs_are_turns_of_the_conversation() {
    let mut own = checkpoint();
    let source = "{% for m in messages %}[{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}\
        <{{ c.id }} {{ c.function.name }} {{ c.function.arguments.city }}>{% endfor %}\
        {{ m.tool_call_id }}]{% endfor %}{{ tools }}";
    own.set_template(ChatTemplate::new(source, "<s>", "</s>"));
    let server = Running::of(own, narrow(), ServerOptions::default());
    let call = |id: &str, city: &str| {
        json!({ "type": "function_call", "id": format!("fc_{id}"), "call_id": id, "name": "weather",
            "arguments": json!({ "city": city }).to_string(), "status": "completed" })
    };
    let output = |id: &str, output: Value| json!({ "type": "function_call_output", "call_id": id, "output": output });
    let said = json!({ "type": "message", "role": "assistant", "content": [
        { "type": "output_text", "text": "I look.", "annotations": [] } ] });
    let input = json!([
        { "role": "user", "content": "The weather?" },
        said, call("1", "Paris"), call("2", "Rome"),
        output("1", "rain".into()), output("2", json!([{ "type": "input_text", "text": "sun" }])),
        call("3", "Oslo"), output("3", "snow".into()),
    ]);
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } } });
    let tool = json!({ "name": "weather", "description": "Tells it.", "parameters": parameters });
    let told = |id: &str, city: &str| {
        json!({ "id": id, "type": "function", "function": { "name": "weather",
            "arguments": json!({ "city": city }).to_string() } })
    };
    let messages = json!([
        { "role": "user", "content": "The weather?" },
        { "role": "assistant", "content": "I look.", "tool_calls": [told("1", "Paris"), told("2", "Rome")] },
        { "role": "tool", "content": "rain", "tool_call_id": "1" },
        { "role": "tool", "content": "sun", "tool_call_id": "2" },
        { "role": "assistant", "content": null, "tool_calls": [told("3", "Oslo")] },
        { "role": "tool", "content": "snow", "tool_call_id": "3" },
    ]);
    let asked = json!({ "max_tokens": 8, "temperature": 0, "messages": messages,
        "tools": [{ "type": "function", "function": tool }] });
    let answer = server.client.ask("/v1/chat/completions", &asked);
    let body = json!({ "max_output_tokens": 8, "temperature": 0, "input": input,
        "tools": [with(json!({ "type": "function" }), &tool)] });
    let response = server.client.ask(PATH, &body);
    assert_eq!(response["usage"]["input_tokens"], answer["usage"]["prompt_tokens"]);
    assert_eq!(text(&response), answer["choices"][0]["message"]["content"]);
    // What was read for one is there for the other: the tokens are the same.
    let cached = response["usage"]["input_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached >= response["usage"]["input_tokens"].as_u64().map(|all| all - 1), "{response}");
}

fn tools() -> Value {
    let city = json!({ "type": "object", "properties": { "city": { "enum": ["Paris", "Rome"] } },
        "required": ["city"], "additionalProperties": false });
    let none = json!({ "type": "object", "properties": {}, "additionalProperties": false });
    json!([
        { "type": "function", "name": "weather", "parameters": city, "strict": true },
        { "type": "function", "name": "clock", "parameters": none },
    ])
}

#[test]
fn calls_that_a_model_makes_are_items() {
    let tagged = [
        "<ask 1>",
        "I ",
        "look.",
        "<tool_call>",
        "{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}",
        "</tool_call>",
    ];
    let list = [
        "<ask 2>",
        "[{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}",
        ", {\"name\": \"clock\", \"arguments\": {}}]",
    ];
    let server = scripted::serve(&[&tagged, &list]);
    let ask = |content: &str, more: Value| {
        let body = json!({ "input": content, "tools": tools(), "temperature": 0, "max_output_tokens": 100 });
        let body = with(body, &more);
        let response = server.client.ask(PATH, &body);
        assert_eq!(response["status"], "completed");
        assert_eq!(without_ids(&streamed(server.client, &body)), without_ids(&response));
        response
    };
    let both = ask(list[0], json!({}));
    assert_eq!(
        calls(&both),
        [("weather", json!({ "city": "Rome" })), ("clock", json!({}))],
        "and no empty message before them"
    );
    assert_eq!(both["output"].as_array().unwrap().len(), 2);
    assert_ne!(both["output"][0]["id"], both["output"][1]["id"]);
    assert_ne!(both["output"][0]["call_id"], both["output"][1]["call_id"]);
    let said = ask(tagged[0], json!({}));
    assert_eq!(said["output"][0]["content"][0]["text"], "I look.");
    assert_eq!(calls(&said), [("weather", json!({ "city": "Paris" }))]);
    let first = ask(list[0], json!({ "parallel_tool_calls": false }));
    assert_eq!(calls(&first), [("weather", json!({ "city": "Rome" }))]);
    assert_eq!(text(&ask(list[0], json!({ "tool_choice": "none" }))), list[1..].concat());
    let clock = json!({ "type": "allowed_tools", "mode": "auto",
        "tools": [{ "type": "function", "name": "clock" }] });
    let allowed = ask(tagged[0], json!({ "tool_choice": clock }));
    assert_eq!(text(&allowed), tagged[1..].concat(), "what may not be called is text");
}

#[cfg(feature = "grammar")]
#[test]
fn a_call_that_must_come_is_an_item_and_incomplete_where_it_is_cut_off() {
    let client = shared();
    let named = json!({ "type": "function", "name": "weather" });
    let allowed = json!({ "type": "allowed_tools", "mode": "required", "tools": [named.clone()] });
    for (choice, name) in
        [(json!("required"), None), (named, Some("weather")), (allowed, Some("weather"))]
    {
        let body = json!({ "input": "What is the weather in Paris?", "tools": tools(),
            "tool_choice": choice, "temperature": 0, "max_output_tokens": 100 });
        let response = client.ask(PATH, &body);
        let called = calls(&response);
        let [(own, _)] = &called[..] else { panic!("{response}") };
        assert!(name.is_none_or(|name| name == *own), "{response}");
        assert_eq!(response["output"].as_array().unwrap().len(), 1);
        assert_eq!((&response["tool_choice"], &response["status"]), (&choice, &json!("completed")));
        assert_eq!(without_ids(&streamed(client, &body)), without_ids(&response));
    }
    let note = json!({ "type": "object", "required": ["text"],
        "properties": { "text": { "type": "string", "minLength": 900 } } });
    let body = json!({ "input": "Note it.", "tool_choice": "required", "temperature": 0, "max_output_tokens": 40,
        "tools": [{ "type": "function", "name": "note", "parameters": note }] });
    let cut = client.ask(PATH, &body);
    assert_eq!(
        (&cut["status"], &cut["output"][0]["status"]),
        (&json!("incomplete"), &json!("incomplete"))
    );
    assert!(cut["output"][0]["arguments"].as_str().unwrap().starts_with("{\"text\": \""));
    assert_eq!(without_ids(&streamed(client, &body)), without_ids(&cut));
}

#[cfg(feature = "grammar")]
#[test]
fn answers_have_the_format_that_is_asked_for() {
    let client = shared();
    let schema = json!({ "type": "object", "properties": { "sea": { "enum": ["calm", "wild"] } },
        "required": ["sea"], "additionalProperties": false });
    let format = json!({ "type": "json_schema", "name": "sea", "strict": true, "schema": schema });
    let body = json!({ "input": "How is the sea?", "temperature": 0, "max_output_tokens": 60,
        "text": { "format": format, "verbosity": "low" } });
    let response = client.ask(PATH, &body);
    let said: Value = serde_json::from_str(text(&response)).unwrap();
    assert!(["calm", "wild"].map(Value::from).contains(&said["sea"]), "{said}");
    assert_eq!(response["text"]["format"], format);
    assert_eq!(without_ids(&streamed(client, &body)), without_ids(&response));
    let choice = json!({ "input": "Yes?", "structured_outputs": { "choice": ["yes", "no"] } });
    assert!(["yes", "no"].contains(&text(&client.ask(PATH, &choice)).trim_start()));
    let object = json!({ "input": "Hi", "text": { "format": { "type": "json_object" } },
        "max_output_tokens": 30 });
    assert!(text(&client.ask(PATH, &object)).starts_with('{'));
}

#[test]
fn log_probabilities_are_those_of_a_chat() {
    let client = shared();
    let body =
        json!({ "input": "Hello", "temperature": 0, "max_output_tokens": 5, "top_logprobs": 2 });
    let plain = client.ask(PATH, &body);
    assert_eq!(plain["output"][0]["content"][0]["logprobs"], json!([]));
    let body = with(body, &json!({ "include": ["message.output_text.logprobs"] }));
    let response = client.ask(PATH, &body);
    assert_eq!(text(&response), text(&plain));
    let told = response["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    let chat = json!({ "messages": [{ "role": "user", "content": "Hello" }], "temperature": 0,
        "max_tokens": 5, "logprobs": true, "top_logprobs": 2 });
    let chat =
        client.ask("/v1/chat/completions", &chat)["choices"][0]["logprobs"]["content"].clone();
    let chat = chat.as_array().unwrap();
    assert_eq!((told.len(), chat.len()), (5, 5));
    for (own, other) in told.iter().zip(chat) {
        assert_eq!((&own["token"], own["bytes"].is_array()), (&other["token"], true));
        assert_eq!(own["top_logprobs"].as_array().unwrap().len(), 2);
        let differs = own["logprob"].as_f64().unwrap() - other["logprob"].as_f64().unwrap();
        // Other requests beside it change last digits.
        assert!(differs.abs() < 0.1, "{own} {other}");
    }
    let parts = streamed(client, &body)["output"][0]["content"].clone();
    assert_eq!(parts[0]["logprobs"].as_array().unwrap().len(), 5);
}

#[test]
fn what_the_server_does_not_do_is_refused_by_name() {
    let client = shared();
    let input = |item: Value| json!({ "input": [{ "role": "user", "content": "Hi" }, item] });
    let part = |kind: &str| {
        let content = json!([{ "type": "input_text", "text": "What is it?" }, { "type": kind }]);
        json!({ "input": [{ "role": "user", "content": content }] })
    };
    let field = |name: &str, value: Value| {
        let mut body = json!({ "input": "Hi" });
        body[name] = value;
        body
    };
    let mut all = vec![
        (json!({}), "input"),
        (json!({ "input": null }), "input"),
        (json!({ "input": 7 }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [], "instructions": "Be brief." }), "input"),
        (json!({ "input": [{ "type": "reasoning", "summary": [] }] }), "input"),
        (json!({ "input": ["Hi"] }), "input[0]"),
        (input(json!({ "role": "king", "content": "Hi" })), "input[1].role"),
        (input(json!({ "role": "user" })), "input[1].content"),
        (input(json!({ "type": 7 })), "input[1].type"),
        (input(json!({ "type": "item_reference", "id": "msg_1" })), "input[1].type"),
        (input(json!({ "type": "web_search_call", "id": "ws_1" })), "input[1].type"),
        (
            input(json!({ "type": "function_call", "name": "f", "arguments": "{}" })),
            "input[1].call_id",
        ),
        (
            input(json!({ "type": "function_call", "call_id": "1", "arguments": "{}" })),
            "input[1].name",
        ),
        (
            input(json!({ "type": "function_call", "call_id": "1", "name": "f" })),
            "input[1].arguments",
        ),
        (input(json!({ "type": "function_call_output", "call_id": "1" })), "input[1].output"),
        (input(json!({ "type": "function_call_output", "output": "1" })), "input[1].call_id"),
        (part("input_image"), "input[0].content"),
        (part("input_file"), "input[0].content"),
        (part("input_audio"), "input[0].content"),
    ];
    let schema = |schema: Value| json!({ "format": { "type": "json_schema", "name": "a", "schema": schema } });
    for (name, value, param) in [
        ("previous_response_id", json!("resp_1"), "previous_response_id"),
        ("background", json!(true), "background"),
        ("conversation", json!("conv_1"), "conversation"),
        ("prompt", json!({ "id": "pmpt_1" }), "prompt"),
        ("truncation", json!("auto"), "truncation"),
        ("truncation", json!(1), "truncation"),
        ("messages", json!([{ "role": "user", "content": "Hi" }]), "messages"),
        ("max_tokens", json!(5), "max_tokens"),
        ("max_completion_tokens", json!(5), "max_completion_tokens"),
        ("n", json!(2), "n"),
        ("response_format", json!({ "type": "text" }), "response_format"),
        ("model", json!("gpt-5"), "model"),
        ("instructions", json!(["Be brief."]), "instructions"),
        ("max_output_tokens", json!(0), "max_output_tokens"),
        ("max_output_tokens", json!("5"), "max_output_tokens"),
        ("temperature", json!(-1), "temperature"),
        ("top_p", json!(2), "top_p"),
        ("top_logprobs", json!(21), "top_logprobs"),
        ("include", json!("message.output_text.logprobs"), "include"),
        ("stream", json!("yes"), "stream"),
        ("store", json!("no"), "store"),
        ("user", json!(1), "user"),
        ("metadata", json!({ "a": 1 }), "metadata"),
        ("metadata", json!([]), "metadata"),
        ("parallel_tool_calls", json!(1), "parallel_tool_calls"),
        ("tools", json!({}), "tools"),
        ("tools", json!([7]), "tools[0]"),
        ("tools", json!([{ "type": "web_search" }]), "tools[0].type"),
        ("tools", json!([{ "name": "f" }]), "tools[0].type"),
        ("tools", json!([{ "type": "function", "function": { "name": "f" } }]), "tools[0].name"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!({ "type": "web_search" }), "tool_choice"),
        ("tool_choice", json!({ "type": "function", "name": "f" }), "tool_choice"),
        ("text", json!("json"), "text"),
        ("text", json!({ "format": { "type": "xml" } }), "text.format.type"),
        ("text", json!({ "format": "text" }), "text.format.type"),
        ("text", schema(json!(7)), "text.format.schema"),
    ] {
        all.push((field(name, value), param));
    }
    for (body, param) in all {
        for body in [body.clone(), with(body, &json!({ "stream": true }))] {
            // What is no boolean stays so.
            let answer = client.post(PATH, &body);
            if param == "stream" && body["stream"] == true {
                continue;
            }
            let error = answer.json()["error"].clone();
            let status = if param == "model" { 404 } else { 400 };
            assert_eq!(
                (answer.status, &error["param"]),
                (status, &json!(param)),
                "{body}: {error}"
            );
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
    // What says that nothing of the kind is asked for is none of them.
    let nothing = json!({
        "input": "Hi", "previous_response_id": null, "background": false, "conversation": null,
        "prompt": null, "truncation": null, "tools": [], "text": { "format": null }, "metadata": null,
        "max_output_tokens": 1,
    });
    assert_eq!(client.post(PATH, &nothing).status, 200);
    let wrong = client.get(PATH);
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST, OPTIONS")));
    assert_eq!(client.get("/v1/responses/resp_1").json()["error"]["code"], "unknown_url");
}

#[test]
fn a_stream_that_nobody_reads_ends_its_request_and_one_that_fails_says_so() {
    let server = Running::new(ServerOptions::default());
    let client = server.client;
    let endless = json!({ "input": "The history of navigation", "max_output_tokens": 6000,
        "ignore_eos": true, "stream": true });
    let mut socket = client.send("POST", PATH, "", endless.to_string().as_bytes());
    socket.read_exact(&mut [0; 200]).unwrap();
    client.wait_for("moa_requests_running", |running| running == 1.0);
    drop(socket);
    client.wait_for("moa_requests_running", |running| running == 0.0);
    assert_eq!(client.metric("moa_requests_cancelled_total"), 1.0);

    let late = with(endless, &json!({ "timeout": 1.0 }));
    let began = std::time::Instant::now();
    let events = client.post(PATH, &late).named_events();
    assert!(began.elapsed() < Duration::from_secs(30));
    let response = &events.last().unwrap()["response"];
    assert_eq!(
        (&events.last().unwrap()["type"], &response["status"]),
        (&json!("response.failed"), &json!("failed"))
    );
    assert_eq!(response["error"]["code"], "server_error");
    assert!(response["error"]["message"].is_string());
    let told = events.iter().filter_map(|event| event["delta"].as_str()).collect::<String>();
    assert!(!told.is_empty());
    assert_eq!(
        (text(response), &response["output"][0]["status"]),
        (told.as_str(), &json!("incomplete"))
    );
}

#[test]
fn a_text_has_at_least_min_tokens() {
    let server = scripted::serve(&[&["<ask>", "It ", "ends ", "here, now."]]);
    let ask = |more: Value| {
        let body = json!({ "messages": [{ "role": "user", "content": "<ask>" }], "temperature": 0, "max_tokens": 9 });
        let answer = server.client.ask("/v1/chat/completions", &with(body, &more));
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        (text, answer["usage"]["completion_tokens"].as_u64().unwrap())
    };
    assert_eq!(ask(json!({})), ("It ends here, now.".to_owned(), 3));
    assert_eq!(ask(json!({ "min_tokens": 3 })), ("It ends here, now.".to_owned(), 3));
    let (text, tokens) = ask(json!({ "min_tokens": 6 }));
    assert!(text.starts_with("It ends here, now.") && (6..=9).contains(&tokens), "{text} {tokens}");
    assert_eq!(ask(json!({ "stop": "end" })).0, "It ");
    let (text, tokens) = ask(json!({ "stop": ["end", "It"], "min_tokens": 3 }));
    assert_eq!((text.as_str(), tokens), ("It ends here, now.", 3));
    let response =
        json!({ "input": "<ask>", "temperature": 0, "max_output_tokens": 9, "min_tokens": 6 });
    assert!(server.client.ask(PATH, &response)["usage"]["output_tokens"].as_u64() >= Some(6));
    let body = json!({ "prompt": "<ask>", "temperature": 0, "max_tokens": 9, "min_tokens": 6 });
    let usage = server.client.ask("/v1/completions", &body)["usage"].clone();
    assert!(usage["completion_tokens"].as_u64() >= Some(6), "{usage}");
    for more in [
        json!({ "min_tokens": 10 }),
        json!({ "min_tokens": -1 }),
        json!({ "min_tokens": 2, "structured_outputs": { "choice": ["a"] } }),
    ] {
        let answer = server.client.post("/v1/completions", &with(body.clone(), &more));
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (400, &json!("min_tokens")),
            "{more}"
        );
    }
}
