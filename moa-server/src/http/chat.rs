//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use moa_models::{ChatTemplate, Error};
use serde_json::{Map, Value, json};

use super::answer::{Answer, Echo, Kind};
use super::error::ApiError;
use super::fields::{Fields, short};
use super::form::{Form, form};
use super::params::Params;
use super::submit::{Prompt, submit};
use super::tools::Callable;
use crate::grammar::Grammar;
use crate::state::State;

/// Most messages of a conversation, and most tools.
pub(crate) const MOST: usize = 4096;

pub(crate) async fn complete(state: Arc<State>, body: &[u8]) -> Result<Response, ApiError> {
    let came = Instant::now();
    let mut fields = Fields::parse(body)?;
    let mut params = Params::of(&mut fields, &state, came)?;
    if params.options.max_new_tokens == 0 {
        return Err(ApiError::field("max_tokens", "at least 1", 0));
    }
    let logprobs = fields.flag("logprobs")?;
    let top = fields.count("top_logprobs", 0, 20)?;
    if top.is_some() && !logprobs {
        return Err(ApiError::field("top_logprobs", "left out without `logprobs`", "a number"));
    }
    params.options.logprobs = logprobs.then(|| top.unwrap_or(0));
    fields.refuse("functions", "use `tools`")?;
    fields.refuse("function_call", "use `tool_choice`")?;
    fields.refuse("audio", "the model makes text alone")?;
    let turn = Turn {
        messages: messages(&mut fields)?,
        tools: tools(&mut fields)?,
        choice: fields.value("tool_choice"),
        parallel: parallel(&mut fields)?,
        form: form(&mut fields)?,
    };
    turn.answer(state, came, fields, params, Kind::Chat).await
}

/// Whether an answer may hold several calls.
pub(crate) fn parallel(fields: &mut Fields) -> Result<bool, ApiError> {
    Ok(fields.get("parallel_tool_calls", "true or false")?.unwrap_or(true))
}

/// A conversation that the model is to go on with, in the shapes of chat completions.
pub(crate) struct Turn {
    /// As [`message`] makes them.
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Vec<Value>,
    pub(crate) choice: Option<Value>,
    pub(crate) parallel: bool,
    pub(crate) form: Option<Form>,
}

impl Turn {
    /// Has the loop answer it. Of the fields, those are read that say how the template is told.
    pub(crate) async fn answer(
        mut self,
        state: Arc<State>,
        came: Instant,
        mut fields: Fields,
        params: Params,
        kind: Kind,
    ) -> Result<Response, ApiError> {
        let template = template(&state)?;
        let ending = Ending::of(&mut fields, &self.messages)?;
        let variables = fields.get("chat_template_kwargs", "an object")?.unwrap_or_default();
        let plan = ToolPlan::new(self.tools, self.choice)?;
        let form = match (&plan.forced, self.form) {
            (Some(schema), None) => Some(("tools".to_owned(), Grammar::schema(schema.clone()))),
            (None, form) => form,
            (Some(_), Some((field, _))) => {
                let expected = "left out where a tool must be called";
                return Err(ApiError::field(&field, expected, "another form of the answer"));
            }
        };
        if !plan.tools.is_empty() && (!template.knows_tools() || plan.forced.is_some()) {
            tell_of_tools(&mut self.messages, &plan, template.knows_tools());
        }
        let echoes = vec![Echo::default(); params.choices];
        let mut answer = Answer::new(Arc::clone(&state), kind, echoes);
        answer.logprobs = params.options.logprobs.is_some();
        // An answer that was asked for in a form of its own is no call.
        let is_call = !plan.tools.is_empty() && (plan.forced.is_some() || form.is_none());
        answer.tools = is_call.then(|| {
            let names = plan.tools.iter().filter_map(|tool| tool["function"]["name"].as_str());
            let names = names.map(str::to_owned).collect();
            Callable { names, parallel: self.parallel, forced: plan.forced.is_some() }
        });
        let (messages, tools) = (self.messages, plan.tools);
        let text = ChatText { template, messages, tools, variables, ending };
        submit(state, params, came, vec![Prompt::Chat(Box::new(text))], form, answer).await
    }
}

/// The conversation of a request that is to be cut into tokens alone.
pub(crate) fn conversation(fields: &mut Fields, state: &State) -> Result<ChatText, ApiError> {
    let messages = messages(fields)?;
    Ok(ChatText {
        template: template(state)?,
        tools: tools(fields)?,
        ending: Ending::of(fields, &messages)?,
        variables: fields.get("chat_template_kwargs", "an object")?.unwrap_or_default(),
        messages,
    })
}

fn template(state: &State) -> Result<ChatTemplate, ApiError> {
    state.text.template.clone().ok_or_else(|| {
        ApiError::invalid(
            "the model has no chat template: start the server with one (--template), or use \
             /v1/completions",
        )
    })
}

/// How the text of a conversation ends, by fields of vLLM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// With the beginning of an answer.
    Answer,
    /// With the end of its last message.
    Message,
    /// In its last message, which goes on.
    Within,
}

impl Ending {
    fn of(fields: &mut Fields, messages: &[Value]) -> Result<Self, ApiError> {
        let goes_on = fields.flag("continue_final_message")?;
        let begins = fields.get("add_generation_prompt", "true or false")?.unwrap_or(!goes_on);
        match (goes_on, begins) {
            (true, true) => {
                let expected = "false with `add_generation_prompt`";
                Err(ApiError::field("continue_final_message", expected, true))
            }
            (true, false) if messages.last().is_some_and(|last| last["role"] != "assistant") => {
                let expected = "left out where the last message is not the assistant's";
                Err(ApiError::field("continue_final_message", expected, true))
            }
            (true, false) => Ok(Self::Within),
            (false, true) => Ok(Self::Answer),
            (false, false) => Ok(Self::Message),
        }
    }
}

/// A conversation that goes through a template.
pub(crate) struct ChatText {
    template: ChatTemplate,
    messages: Vec<Value>,
    tools: Vec<Value>,
    /// What else the template is told.
    variables: Map<String, Value>,
    ending: Ending,
}

impl ChatText {
    /// Its tokens, and how many of them are those of the messages of the system that it begins with: any other
    /// conversation with these begins with those tokens.
    pub(crate) fn tokens(&self, state: &State) -> Result<(Vec<u32>, Option<usize>), Error> {
        let text = self.render(&self.messages)?;
        // The template writes the begin-of-sequence token itself.
        let encode = |text: &str| state.text.known.encode_within(text, state.model.context);
        // First, so that its tokens are known when the whole is cut into tokens.
        // Without rings what is kept can be cut there.
        let is_kept = state.model.has_rings && state.options.prefix_cache > 0;
        let system = is_kept.then(|| self.system(&text)).flatten().map(encode).transpose()?;
        let tokens = encode(&text)?;
        let shared =
            system.map(|system| system.iter().zip(&tokens).take_while(|(a, b)| a == b).count());
        Ok((tokens, shared))
    }

    fn render(&self, messages: &[Value]) -> Result<String, Error> {
        let tools = (!self.tools.is_empty()).then_some(&self.tools);
        let begins = self.ending == Ending::Answer;
        let mut text = self.template.render_with(messages, tools, &self.variables, begins)?;
        let last = messages.last().and_then(|last| last["content"].as_str()).map(str::trim);
        if let (Ending::Within, Some(said)) = (self.ending, last)
            && let Some(at) = text.rfind(said)
        {
            text.truncate(at + said.len());
        }
        Ok(text)
    }

    /// The beginning of the conversation's `text` that is the same whatever follows the messages of the system.
    fn system<'t>(&self, text: &'t str) -> Option<&'t str> {
        let end = self.messages.iter().position(|message| message["role"] != "system")?;
        if end == 0 {
            return None;
        }
        // As another conversation would be: what it has in common with this one does not depend on what they say.
        let mut other = self.messages[..=end].to_vec();
        let said = other[end]["content"].as_str().unwrap_or_default();
        other[end]["content"] = if said.trim_start().starts_with('a') { "b" } else { "a" }.into();
        let other = self.render(&other).ok()?;
        let same = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        (0..=same).rev().find_map(|len| text.get(..len))
    }
}

const MESSAGES: &str = "an array of at least one message";

/// Messages as templates know them: contents are texts, and arguments of calls objects.
fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let messages: Option<Vec<Value>> = fields.get("messages", MESSAGES)?;
    let messages = messages.unwrap_or_default();
    if messages.is_empty() || messages.len() > MOST {
        let got = format!("{} messages", messages.len());
        return Err(ApiError::field("messages", MESSAGES, got));
    }
    let one = |(at, one)| message(one, &format!("messages[{at}]"));
    messages.into_iter().enumerate().map(one).collect()
}

/// A message as templates know it; `place` names it where it is none.
pub(crate) fn message(mut message: Value, place: &str) -> Result<Value, ApiError> {
    if !message.is_object() {
        return Err(ApiError::field(place, "an object", short(&message)));
    }
    let role = match message["role"].as_str() {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        _ => {
            let roles = "system, developer, user, assistant or tool";
            let role = short(&message["role"]);
            return Err(ApiError::field(&format!("{place}.role"), roles, role));
        }
    };
    let role = Value::from(role);
    let content = match message["content"].take() {
        Value::Null if role == "assistant" => String::new(),
        content => text_of(content, &format!("{place}.content"))?,
    };
    let mut known = json!({ "role": role, "content": content });
    if let Value::Array(calls) = message["tool_calls"].take() {
        let calls: Vec<Value> = calls.into_iter().map(call).collect();
        known["tool_calls"] = calls.into();
    }
    for field in ["name", "tool_call_id"] {
        if let Value::String(text) = message[field].take() {
            known[field] = text.into();
        }
    }
    Ok(known)
}

/// A text, or one in parts, which chat completions and responses call by different names.
pub(crate) fn text_of(content: Value, place: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => {
            return Err(ApiError::field(place, "a text, or an array of parts", short(&other)));
        }
    };
    let text = |part: &Value| {
        let kind = part["type"].as_str().unwrap_or("none");
        let text = match kind {
            "text" | "input_text" | "output_text" => part["text"].as_str(),
            "refusal" => part["refusal"].as_str(),
            _ => None,
        };
        text.map(str::to_owned).ok_or_else(|| {
            let expected = "a text, or parts with a text (this model reads no other)";
            ApiError::field(place, expected, format!("a part of type {kind}"))
        })
    };
    Ok(parts.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// A call whose arguments are an object, where they are the text of one.
pub(crate) fn call(mut call: Value) -> Value {
    if let Some(Value::String(text)) = call.pointer("/function/arguments")
        && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(text)
    {
        call["function"]["arguments"] = arguments;
    }
    call
}

fn tools(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let expected = "an array of {\"type\": \"function\", \"function\": {\"name\", \"parameters\"}}";
    let tools: Vec<Value> = fields.get("tools", expected)?.unwrap_or_default();
    let is_function =
        |tool: &Value| tool["type"] == "function" && tool["function"]["name"].is_string();
    match tools.iter().find(|tool| !is_function(tool)) {
        Some(tool) => Err(ApiError::field("tools", expected, short(tool))),
        None if tools.len() > MOST => Err(ApiError::field("tools", "at most 4096", tools.len())),
        None => Ok(tools),
    }
}

/// Which tools may be called, and what the answer must be where one must.
struct ToolPlan {
    tools: Vec<Value>,
    /// JSON schema of a call.
    forced: Option<Value>,
}

impl ToolPlan {
    fn new(mut tools: Vec<Value>, mut choice: Option<Value>) -> Result<Self, ApiError> {
        let expected = "none, auto, required, allowed_tools, or a function of `tools` by its name";
        if let Some(allowed) = choice.as_mut().and_then(|choice| choice.get_mut("allowed_tools")) {
            let names = allowed["tools"].as_array().cloned().unwrap_or_default();
            let is_allowed = |tool: &Value| {
                names.iter().any(|own| own["function"]["name"] == tool["function"]["name"])
            };
            tools.retain(is_allowed);
            choice = Some(allowed["mode"].take());
        }
        let named = |name: &str| {
            tools.iter().find(|tool| tool["function"]["name"] == name).map(call_schema)
        };
        let forced = match &choice {
            None => None,
            Some(choice) => match choice.as_str() {
                Some("none") => return Ok(Self { tools: Vec::new(), forced: None }),
                Some("auto") => None,
                Some("required") if !tools.is_empty() => {
                    let calls: Vec<Value> = tools.iter().map(call_schema).collect();
                    Some(json!({ "anyOf": calls }))
                }
                Some(_) => return Err(ApiError::field("tool_choice", expected, choice)),
                None => {
                    let schema = choice["function"]["name"].as_str().and_then(named);
                    let fault = || ApiError::field("tool_choice", expected, short(choice));
                    Some(schema.ok_or_else(fault)?)
                }
            },
        };
        Ok(Self { tools, forced })
    }
}

/// The schema of a call of one tool. Other arguments than those that a tool names are of no use to it, and small models go on
/// with them without end.
fn call_schema(tool: &Value) -> Value {
    let function = &tool["function"];
    let mut parameters = match &function["parameters"] {
        Value::Null => json!({ "type": "object", "properties": {} }),
        parameters => parameters.clone(),
    };
    let is_plain = |parameters: &Map<String, Value>| {
        let others =
            ["additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"];
        parameters.contains_key("properties")
            && !others.iter().any(|other| parameters.contains_key(*other))
    };
    if let Some(object) = parameters.as_object_mut().filter(|object| is_plain(object)) {
        object.insert("additionalProperties".to_owned(), false.into());
    }
    json!({
        "type": "object",
        "properties": { "name": { "const": function["name"] }, "arguments": parameters },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

/// Tells a model of its tools whose template does not, and how a call that must come is written.
fn tell_of_tools(messages: &mut Vec<Value>, plan: &ToolPlan, knows: bool) {
    let mut text = String::new();
    if !knows {
        text.push_str("You can call these functions:\n");
        for tool in &plan.tools {
            text.push_str(&format!("{}\n", tool["function"]));
        }
    }
    text.push_str(
        "To call a function, answer with nothing but {\"name\": its name, \"arguments\": an object}.",
    );
    match messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let content = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{content}\n\n{text}").into();
        }
        _ => messages.insert(0, json!({ "role": "system", "content": text })),
    }
}
