//! What was read before is not read again, and nobody can tell by the likeliest tokens. (How a text is cut
//! into steps changes its attention by the rounding of f32 sums, here as elsewhere.)

use moa_core::{ElasticRule, Plan};
use moa_models::ChatTemplate;
use moa_server::ServerOptions;
use serde_json::{Value, json};

use crate::client::Client;
use crate::{Running, checkpoint, narrow};

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

fn long_text(topic: &str) -> String {
    format!("The history of {topic} is the history of people who trusted numbers. ").repeat(8)
}

/// The answers of a conversation of several turns; each with the tokens that were not read.
fn converse(client: Client, turns: usize, topic: &str) -> Vec<(String, u64, u64)> {
    let mut messages = vec![json!({ "role": "user", "content": long_text(topic) })];
    let mut all = Vec::new();
    for turn in 0..turns {
        let body = json!({ "messages": messages, "max_tokens": 12, "temperature": 0 });
        let answer = client.ask("/v1/chat/completions", &body);
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        all.push((
            text.clone(),
            cached(&answer),
            answer["usage"]["prompt_tokens"].as_u64().unwrap(),
        ));
        messages.push(json!({ "role": "assistant", "content": text }));
        messages.push(json!({ "role": "user", "content": format!("And then? {turn}") }));
    }
    all
}

#[test]
fn turns_read_what_is_new_and_say_what_a_cold_run_says() {
    let plans = [
        narrow(),
        // Spans that grow with the length.
        Plan::uniform(checkpoint().model.shape(), 8, ElasticRule::new(0.0, 0.25).unwrap()).unwrap(),
    ];
    for plan in plans {
        let warm = Running::with_plan(plan.clone(), ServerOptions::default());
        let cold = ServerOptions { prefix_cache: 0, ..ServerOptions::default() };
        let cold = Running::with_plan(plan, cold);
        let (warm_turns, cold_turns) =
            (converse(warm.client, 5, "navigation"), converse(cold.client, 5, "navigation"));
        let mut hits = 0;
        for (warm, cold) in warm_turns.iter().zip(&cold_turns) {
            assert_eq!(warm.0, cold.0, "{warm_turns:?} {cold_turns:?}");
            assert_eq!(cold.1, 0);
            hits += usize::from(warm.1 + 30 >= warm.2);
        }
        // A conversation that grows out of its capacity is read again once.
        assert!(hits >= 3, "{warm_turns:?}");
        // The same again is there but for one token.
        let again = converse(warm.client, 1, "navigation");
        assert_eq!((&again[0].0, again[0].1), (&warm_turns[0].0, again[0].2 - 1));
        assert!(warm.client.metric("moa_prefix_hits_total") >= 4.0);
        assert!(warm.client.metric("moa_prefix_cache_bytes") > 0.0);
    }
}

#[test]
fn a_beginning_that_requests_share_is_copied_where_they_part() {
    let server = Running::new(ServerOptions::default());
    let shared = long_text("astronomy");
    let ask = |end: &str| {
        let body = json!({ "prompt": format!("{shared}{end}"), "max_tokens": 8 });
        let answer = server.client.ask("/v1/completions", &body);
        (cached(&answer), answer["choices"][0]["text"].clone())
    };
    let first = ask("First, the stars were counted one by one.");
    let second = ask("Second, their light was split.");
    let third = ask("Third, nobody looked through a glass.");
    assert_eq!((first.0, second.0), (0, 0));
    assert!(third.0 > 60, "{}", third.0);
    let cold = ServerOptions { prefix_cache: 0, ..ServerOptions::default() };
    let cold = Running::new(cold);
    let body = json!({
        "prompt": format!("{shared}Third, nobody looked through a glass."), "max_tokens": 8,
    });
    assert_eq!(cold.client.ask("/v1/completions", &body)["choices"][0]["text"], third.1);
}

/// A prompt was read before that has the same beginning, which ends where nobody parted before.
#[test]
fn marks_serve_the_second_prompt_and_give_what_a_cold_run_gives() {
    let options = ServerOptions { prefill_chunk: 100, ..ServerOptions::default() };
    let marked = ServerOptions { prefix_every: 64, ..options.clone() };
    let (warm, without) =
        (Running::new(marked), ServerOptions { prefix_every: 0, ..options.clone() });
    let cold = Running::new(ServerOptions { prefix_cache: 0, ..options });
    let without = Running::new(without);
    let shared = long_text("astronomy");
    let ask = |server: &Running, end: &str| {
        let body = json!({
            "prompt": format!("{shared}{end}"), "max_tokens": 24, "temperature": 0, "logprobs": 3,
        });
        let answer = server.client.ask("/v1/completions", &body);
        (cached(&answer), answer["choices"][0].clone())
    };
    let first = "First, the stars were counted one by one.";
    for server in [&warm, &without] {
        assert_eq!(ask(server, first), (0, ask(&cold, first).1));
    }
    let [second, third] =
        ["Second, their light was split.", "Third, nobody looked through a glass."];
    let (held, answer) = ask(&warm, second);
    assert!(held >= 64 && held % 64 == 0, "{held}");
    // Likelihoods too, to the last digit.
    assert_eq!(answer, ask(&cold, second).1);
    // That one was copied where it parted from the first one.
    let (further, answer) = ask(&warm, third);
    assert!(further >= held, "{further}");
    assert_eq!(answer, ask(&cold, third).1);
    assert_eq!(ask(&without, second).0, 0);
}

/// Nobody has parted from the first conversation yet, and there are no other marks.
#[test]
fn the_second_conversation_with_the_same_system_message_is_read_on_from_its_end() {
    let source = "{{ bos_token }}{% for one in messages %}[{{ one.role }}] {{ one.content }}\n\
        {% endfor %}[assistant]";
    let serve = |prefix_cache: u64| {
        let mut own = checkpoint();
        own.set_template(ChatTemplate::new(source, "<s>", "</s>"));
        let options = ServerOptions { prefix_cache, prefix_every: 0, ..ServerOptions::default() };
        Running::of(own, narrow(), ServerOptions { prefill_chunk: 100, ..options })
    };
    let (warm, cold) = (serve(256 << 20), serve(0));
    let ask = |server: &Running, system: &str, question: &str| {
        let messages = json!([
            { "role": "system", "content": system }, { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": question },
        ]);
        let answer = server.client.ask(
            "/v1/chat/completions",
            &json!({
                "messages": messages, "max_tokens": 24, "temperature": 0, "logprobs": true,
                "top_logprobs": 3,
            }),
        );
        (cached(&answer), answer["choices"][0].clone())
    };
    let tokens = |system: &str, question: &str| {
        let text =
            format!("<s>[system] {system}\n[system] Be brief.\n[user] {question}\n[assistant]");
        checkpoint().tokenizer.encode(&text, false).expect("a text")
    };
    let common = |system: &str, a: &str, b: &str| {
        let (a, b) = (tokens(system, a), tokens(system, b));
        (a.iter().zip(&b).take_while(|(a, b)| a == b).count() as u64, a.len() as u64)
    };
    let long = "How did they find their way when neither sun nor stars were seen for many days?";
    let other = "Who drew the first map that showed every coast as it really is, and for whom?";
    for (topic, first, second) in [("stars", long, other), ("winds", "Why?", "Who?")] {
        let system = long_text(topic);
        let (shared, len) = common(&system, first, second);
        assert_eq!(ask(&warm, &system, first).0, 0);
        let (held, answer) = ask(&warm, &system, second);
        // A step ends only where 16 tokens of the prompt are left.
        assert_eq!(held, shared.min(len - 16), "{topic}");
        assert_eq!(answer, ask(&cold, &system, second).1, "{topic}");
    }
}

#[test]
fn kept_sequences_stay_within_their_bytes() {
    let limit = 1 << 20;
    let server = Running::new(ServerOptions { prefix_cache: limit, ..ServerOptions::default() });
    for topic in ["maps", "clocks", "winds", "tides", "stars", "ropes"] {
        converse(server.client, 1, topic);
        assert!(server.client.metric("moa_prefix_cache_bytes") <= limit as f64);
    }
    assert!(server.client.metric("moa_prefix_cache_bytes") > 0.0);
    // The last is there, the first is not.
    assert!(converse(server.client, 1, "ropes")[0].1 > 0);
    assert_eq!(converse(server.client, 1, "maps")[0].1, 0);
}

#[test]
fn what_has_no_room_on_the_device_is_kept_in_host_memory() {
    let topics = ["maps", "clocks", "winds", "tides", "stars", "ropes"];
    let (device, host) = (1 << 20, 2 << 20);
    let options = ServerOptions { prefix_cache: device, ..ServerOptions::default() };
    let server = Running::new(ServerOptions { prefix_host: host, ..options });
    let cold = topics.map(|topic| converse(server.client, 1, topic));
    for (topic, cold) in topics.iter().zip(cold).rev() {
        let again = &converse(server.client, 1, topic)[0];
        assert_eq!((&again.0, again.1), (&cold[0].0, again.2 - 1), "{topic}");
    }
    for (name, limit) in [("moa_prefix_cache_bytes", device), ("moa_prefix_host_bytes", host)] {
        let bytes = server.client.metric(name);
        assert!(bytes > 0.0 && bytes <= limit as f64, "{name} {bytes}");
    }
}
