//! Bodies that nobody should send: each gets an answer in OpenAI's shape, and the server goes on. `MOA_BODIES` says how many.

use moa_core::SplitMix64;
use moa_server::ServerOptions;
use serde_json::{Value, json};

use crate::Running;
use crate::client::read;

fn bases() -> [(&'static str, Value); 5] {
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": {
        "type": "object", "properties": { "a": { "type": "integer" } } } } });
    let chat = json!({
        "model": "moa-tiny", "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
            { "role": "assistant", "content": null, "tool_calls": [{ "id": "1", "type": "function",
                "function": { "name": "f", "arguments": "{}" } }] },
            { "role": "tool", "tool_call_id": "1", "content": "2" } ],
        "max_completion_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "stream": true,
        "stream_options": { "include_usage": true }, "stop": ["x"], "seed": 1, "logprobs": true,
        "top_logprobs": 2, "logit_bias": { "5": 1 }, "tools": [tool], "tool_choice": "auto",
        "response_format": { "type": "text" }, "priority": 3, "timeout": 5, "user": "me",
        "chat_template_kwargs": { "enable_thinking": false } });
    let response = json!({
        "model": "moa-tiny", "instructions": "Be brief.", "input": [
            { "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
            { "type": "message", "role": "assistant", "status": "completed",
                "content": [{ "type": "output_text", "text": "Ho", "annotations": [] }] },
            { "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "1", "output": "2" },
            { "type": "reasoning", "summary": [] } ],
        "max_output_tokens": 3, "temperature": 0.5, "top_p": 0.9, "stream": true, "store": true,
        "tools": [{ "type": "function", "name": "f", "strict": true, "parameters": {
            "type": "object", "properties": { "a": { "type": "integer" } } } }],
        "tool_choice": { "type": "allowed_tools", "mode": "auto",
            "tools": [{ "type": "function", "name": "f" }] },
        "parallel_tool_calls": false, "text": { "format": { "type": "text" } }, "top_logprobs": 1,
        "include": ["message.output_text.logprobs"], "metadata": { "a": "b" }, "user": "me",
        "truncation": "disabled", "min_tokens": 1, "timeout": 5 });
    let completion = json!({
        "prompt": ["Hi", "Ho"], "max_tokens": 3, "temperature": 1.0, "top_k": 4, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "echo": false,
        "stop": "y", "stop_token_ids": [3], "ignore_eos": true, "logprobs": 1, "stream": false });
    [
        ("/v1/chat/completions", chat),
        ("/v1/completions", completion),
        ("/v1/responses", response),
        ("/tokenize", json!({ "prompt": "Hi" })),
        ("/detokenize", json!({ "tokens": [1, 2, 3] })),
    ]
}

struct Mutator(SplitMix64);

impl Mutator {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    /// A value that a field may not expect.
    fn odd(&mut self) -> Value {
        let all = [
            json!(null),
            json!(true),
            json!(-1),
            json!(0),
            json!(1e308),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(0.1),
            json!(""),
            json!("\u{0}\u{1f600}\u{feff}"),
            json!("x".repeat(3000)),
            json!([]),
            json!([[], {}]),
            json!({}),
            json!({ "type": "json_schema", "json_schema": { "schema": { "$ref": "#" } } }),
            json!({ "type": "json_object" }),
            json!({ "type": "function", "function": { "name": "g" } }),
            json!({ "type": "function", "name": "f" }),
            json!(vec![0; 100]),
            (0..60).fold(json!(1), |inner, _| json!([inner])),
        ];
        all[self.below(all.len())].clone()
    }

    /// Replaces, removes or repeats something anywhere within a value.
    fn change(&mut self, value: &mut Value) {
        let count = match value {
            Value::Array(items) => items.len(),
            Value::Object(fields) => fields.len(),
            _ => 0,
        };
        if count == 0 || self.below(4) == 0 {
            *value = self.odd();
            return;
        }
        let (at, how) = (self.below(count), self.below(8));
        match value {
            Value::Array(items) if how == 0 => drop(items.remove(at)),
            Value::Array(items) if how == 1 => items.push(items[at].clone()),
            Value::Array(items) => self.change(&mut items[at]),
            Value::Object(fields) => {
                let name = fields.keys().nth(at).cloned().unwrap_or_default();
                match how {
                    0 => drop(fields.remove(&name)),
                    1 => drop(fields.insert(format!("{name}s"), json!(1))),
                    _ => self.change(&mut fields[&name]),
                }
            }
            _ => {}
        }
    }

    /// The text of a body, of which some bytes may be others.
    fn body(&mut self, base: &Value) -> Vec<u8> {
        let mut value = base.clone();
        for _ in 0..1 + self.below(3) {
            self.change(&mut value);
        }
        let mut text = value.to_string().into_bytes();
        if self.below(3) == 0 {
            const BYTES: &[u8] = b"{}[]\",:0-9eE.\\unltrfas\xff\xc3\0";
            for _ in 0..1 + self.below(4) {
                let (start, old) = (self.below(text.len()), self.below(4));
                let new: Vec<u8> =
                    (0..self.below(4)).map(|_| BYTES[self.below(BYTES.len())]).collect();
                text.splice(start..text.len().min(start + old), new);
                if text.is_empty() {
                    break;
                }
            }
        }
        text
    }
}

#[test]
fn any_body_is_answered() {
    let cases = std::env::var("MOA_BODIES").map_or(600, |said| said.parse().expect("a number"));
    // Whatever a body says, it ends soon.
    let options =
        ServerOptions { max_context: Some(96), default_max_tokens: Some(2), ..Default::default() };
    let server = Running::new(options);
    let (client, bases) = (server.client, bases());
    let mut mutator = Mutator(SplitMix64::new(16));
    let mut answered = [0; 2];
    for case in 0..cases {
        let (path, base) = &bases[case % bases.len()];
        let body = mutator.body(base);
        let shown = || String::from_utf8_lossy(&body).into_owned();
        let answer = read(client.send("POST", path, "", &body));
        match answer.status {
            200 if answer.body.starts_with("event: ") => {
                let events = answer.named_events();
                assert!(events.last().is_some_and(|last| {
                    let status = last["response"]["status"].as_str();
                    ["completed", "incomplete", "failed"].map(Some).contains(&status)
                }));
            }
            200 if answer.header("content-type") == Some("text/event-stream") => {
                // What is 504 where nothing has been said: a body may ask for a tenth of a second.
                let last = answer.body.trim_end().rsplit("data: ").next().unwrap_or_default();
                let last: Value = serde_json::from_str(last).unwrap_or_default();
                if last["error"]["code"] != "timeout" {
                    drop(answer.events());
                }
            }
            200 => drop(answer.json()),
            400 | 404 | 504 => {
                let error = &answer.json()["error"];
                assert!(error["message"].is_string(), "{case}: {}\n{}", answer.body, shown());
                assert!(error["type"].is_string() && error.get("code").is_some());
            }
            other => panic!("{case}: {other}, {}\n{}", answer.body, shown()),
        }
        answered[usize::from(answer.status == 200)] += 1;
    }
    assert!(answered.iter().all(|count| *count > cases / 20), "{answered:?}");
    client.wait_for("moa_requests_running", |running| running == 0.0);
    assert_eq!(client.metric("moa_kv_bytes"), 0.0);
    for (path, base) in &bases {
        let answer = client.request("POST", path, "", base.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
}
