use std::collections::VecDeque;

use axum::body::Bytes;
use serde_json::{Value, json};

use crate::http::answer::{Said, Usage, now};
use crate::http::error::ApiError;
use crate::http::logprobs::ChoiceLogprobs;
use crate::state::State;

/// A response as far as it is told, and the events that tell it.
///
/// Its items are a message, where something is said that is no call, and then one for each call. An item begins and ends by
/// events of its own.
pub(crate) struct Told {
    /// What a client that does not stream reads.
    object: Value,
    /// Items that have ended.
    output: Vec<Value>,
    /// What all ids of its items end in.
    unique: String,
    /// Events told.
    events: usize,
    /// The message, once it has begun.
    message: Option<Message>,
}

/// What was told of a message.
#[derive(Default)]
struct Message {
    text: String,
    logprobs: Vec<Value>,
}

impl Message {
    /// Its only part.
    fn part(&self) -> Value {
        json!({
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": self.logprobs,
        })
    }
}

impl Told {
    /// One that tells again what was `asked`, an object.
    pub(crate) fn new(state: &State, asked: Value) -> Self {
        let unique = format!("{:016x}", state.unique());
        let mut object = json!({
            "id": format!("resp_{unique}"),
            "object": "response",
            "created_at": now(),
            "completed_at": null,
            "status": "in_progress",
            "error": null,
            "incomplete_details": null,
            "model": state.model.name,
            "output": [],
            "usage": null,
        });
        if let (Value::Object(object), Value::Object(asked)) = (&mut object, asked) {
            object.extend(asked);
        }
        Self { object, output: Vec::new(), unique, events: 0, message: None }
    }

    pub(crate) fn object(&self) -> &Value {
        &self.object
    }

    /// Tells that the loop has begun.
    pub(crate) fn begin(&mut self, out: &mut VecDeque<Bytes>) {
        self.tell_response("response.created", out);
        self.tell_response("response.in_progress", out);
    }

    /// Tells what is said next.
    pub(crate) fn push(&mut self, said: Said, usage: &Usage, out: &mut VecDeque<Bytes>) {
        let Said { text, logprobs, calls, finish } = said;
        let is_all = finish.is_some() && calls.is_empty();
        if self.message.is_none() && (is_all || !text.is_empty()) {
            self.begin_message(out);
        }
        let mut message = self.message.take();
        if let Some(message) = &mut message
            && (!text.is_empty() || !logprobs.is_empty())
        {
            let logprobs = entries(logprobs);
            message.text.push_str(&text);
            let own = json!({ "delta": text, "logprobs": logprobs });
            self.tell_of_part("response.output_text.delta", own, out);
            message.logprobs.extend(logprobs);
        }
        let Some(finish) = finish else {
            self.message = message;
            return;
        };
        let status = if finish == "length" { "incomplete" } else { "completed" };
        if let Some(message) = message {
            self.end_message(&message, status, out);
        }
        for call in &calls {
            self.tell_call(call, status, out);
        }
        match status {
            "completed" => self.object["completed_at"] = now().into(),
            _ => self.object["incomplete_details"] = json!({ "reason": "max_output_tokens" }),
        }
        self.object["usage"] = json!({
            "input_tokens": usage.prompt,
            // Nobody pays for what is kept.
            "input_tokens_details": { "cached_tokens": usage.cached, "cache_write_tokens": 0 },
            "output_tokens": usage.generated,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": usage.prompt + usage.generated,
        });
        self.end(status, out);
    }

    /// Tells what has kept it from its end.
    pub(crate) fn fail(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        if let Some(message) = self.message.take() {
            self.output.push(self.message_item("incomplete", json!([message.part()])));
        }
        // The only one of OpenAI's codes that is about the server.
        self.object["error"] = json!({ "code": "server_error", "message": error.message });
        self.end("failed", out);
    }

    fn end(&mut self, status: &str, out: &mut VecDeque<Bytes>) {
        self.object["status"] = status.into();
        self.object["output"] = std::mem::take(&mut self.output).into();
        self.tell_response(&format!("response.{status}"), out);
    }

    fn begin_message(&mut self, out: &mut VecDeque<Bytes>) {
        let item = self.message_item("in_progress", json!([]));
        self.tell_item("response.output_item.added", &item, out);
        let message = Message::default();
        self.tell_of_part("response.content_part.added", json!({ "part": message.part() }), out);
        self.message = Some(message);
    }

    fn end_message(&mut self, message: &Message, status: &str, out: &mut VecDeque<Bytes>) {
        let own = json!({ "text": message.text, "logprobs": message.logprobs });
        self.tell_of_part("response.output_text.done", own, out);
        self.tell_of_part("response.content_part.done", json!({ "part": message.part() }), out);
        let item = self.message_item(status, json!([message.part()]));
        self.tell_item("response.output_item.done", &item, out);
        self.output.push(item);
    }

    fn tell_call(&mut self, call: &Value, status: &str, out: &mut VecDeque<Bytes>) {
        let (index, arguments) = (self.output.len(), &call["function"]["arguments"]);
        let id = format!("fc_{}{index}", self.unique);
        let item = |arguments: &Value, status: &str| {
            json!({
                "type": "function_call",
                "id": id,
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": arguments,
                "status": status,
            })
        };
        self.tell_item("response.output_item.added", &item(&"".into(), "in_progress"), out);
        let delta = json!({ "item_id": id, "output_index": index, "delta": arguments });
        self.tell("response.function_call_arguments.delta", delta, out);
        let done = json!({
            "item_id": id,
            "output_index": index,
            "name": call["function"]["name"],
            "arguments": arguments,
        });
        self.tell("response.function_call_arguments.done", done, out);
        let item = item(arguments, status);
        self.tell_item("response.output_item.done", &item, out);
        self.output.push(item);
    }

    fn message_item(&self, status: &str, content: Value) -> Value {
        json!({
            "type": "message",
            "id": format!("msg_{}", self.unique),
            "role": "assistant",
            "status": status,
            "content": content,
        })
    }

    fn tell_response(&mut self, event: &str, out: &mut VecDeque<Bytes>) {
        self.tell(event, json!({ "response": self.object }), out);
    }

    fn tell_item(&mut self, event: &str, item: &Value, out: &mut VecDeque<Bytes>) {
        self.tell(event, json!({ "output_index": self.output.len(), "item": item }), out);
    }

    /// Tells of the message's part.
    fn tell_of_part(&mut self, event: &str, mut own: Value, out: &mut VecDeque<Bytes>) {
        own["item_id"] = format!("msg_{}", self.unique).into();
        own["output_index"] = self.output.len().into();
        own["content_index"] = 0.into();
        self.tell(event, own, out);
    }

    fn tell(&mut self, event: &str, mut own: Value, out: &mut VecDeque<Bytes>) {
        own["type"] = event.into();
        own["sequence_number"] = self.events.into();
        self.events += 1;
        out.push_back(format!("event: {event}\ndata: {own}\n\n").into());
    }
}

/// Tokens of a part, whose bytes are a list where chat completions may have none.
fn entries(logprobs: ChoiceLogprobs) -> Vec<Value> {
    let whole = |entry: &mut Value| {
        if entry["bytes"].is_null() {
            entry["bytes"] = json!([]);
        }
    };
    let mut entries = logprobs.entries();
    for entry in &mut entries {
        whole(entry);
        entry["top_logprobs"].as_array_mut().into_iter().flatten().for_each(whole);
    }
    entries
}
