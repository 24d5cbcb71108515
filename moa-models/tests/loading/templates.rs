//! Chat templates against transformers, whose renderings `fixtures/templates/make.py` wrote.

use moa_models::{ChatTemplate, Message};
use serde_json::Value;

/// What of a rendering is not as transformers has it.
fn difference(source: &str, chat: &Value, expected: &Value) -> Option<String> {
    let messages: Vec<Message> = chat["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .collect();
    let template = ChatTemplate::new(source, "<s>", "</s>").with_date(2025, 2, 3).unwrap();
    let got = template.render(&messages, chat["prompt"].as_bool().unwrap());
    match (&got, expected["text"].as_str()) {
        (Ok(got), Some(text)) if got == text => None,
        (Err(_), None) => None,
        // Python refuses to go through no tools at all; here they are an empty list.
        (Ok(_), None) if expected["error"] == "TypeError" => None,
        _ => Some(format!("{got:?}\n  not {expected}")),
    }
}

/// Checks every rendering of a file that `make.py` wrote.
#[track_caller]
fn check(fixture: &str) {
    let fixture: Value = serde_json::from_str(fixture).unwrap();
    let (chats, mut wrong, mut count) = (fixture["chats"].as_array().unwrap(), Vec::new(), 0);
    for template in fixture["templates"].as_array().unwrap() {
        let renderings = template["renderings"].as_array().unwrap();
        for (chat, expected) in chats.iter().zip(renderings) {
            count += 1;
            let source = template["source"].as_str().unwrap();
            wrong.extend(
                difference(source, chat, expected).map(|d| format!("{}: {d}", template["name"])),
            );
        }
    }
    for snippet in fixture["snippets"].as_array().unwrap() {
        count += 1;
        let source = snippet["source"].as_str().unwrap();
        wrong.extend(
            difference(source, &chats[0], &snippet["rendering"]).map(|d| format!("{source}: {d}")),
        );
    }
    assert!(wrong.is_empty(), "{} of {count} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn templates_render_as_in_transformers() {
    check(include_str!("../fixtures/templates/templates.json"));
    // Templates that the repository does not carry.
    if let Some(path) = std::env::var_os("MOA_TEMPLATES") {
        check(&std::fs::read_to_string(path).unwrap());
    }
}

#[test]
fn templates_of_hostile_depth_or_size_are_errors() {
    let chat = [Message::user("Hello")];
    for source in [
        format!("{{{{ {}1 }}}}", "-".repeat(30_000)),
        format!("{{{{ {}true }}}}", "not ".repeat(30_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(60_000)),
        format!("{{{{ 'a'{} }}}}", " % 'a'".repeat(2000)),
        "{% set ns=namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a=[ns.a,ns.a] %}{% endfor %}\
         {{ ns.a|tojson }}"
            .to_owned(),
        "{% set ns=namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a=[ns.a,ns.a] %}{% endfor %}\
         {{ ns.a|tojson(sort_keys=true) }}"
            .to_owned(),
        "{{ 'a'.ljust(10**12) }}".to_owned(),
        "{{ '%999999999999d' % 1 }}".to_owned(),
    ] {
        let result = ChatTemplate::new(&source, "", "").render(&chat, true);
        assert!(result.is_err(), "{}: {result:?}", &source[..20]);
    }
    // What is only long, or not very deep, is fine.
    let deep = |levels: usize| {
        let source = format!(
            "{{% set ns=namespace(a=[]) %}}{{% for i in range({levels}) %}}{{% set ns.a=[ns.a] %}}{{% endfor %}}\
             {{{{ ns.a }}}}"
        );
        ChatTemplate::new(source, "", "").render(&chat, true)
    };
    assert_eq!(deep(50).unwrap().len(), 102);
    assert!(deep(30_000).unwrap_err().to_string().contains("nested too deeply"));
    let long = format!("{{{{ 1{} }}}}", "+1".repeat(5000));
    assert_eq!(ChatTemplate::new(long, "", "").render(&chat, true).unwrap(), "5001");
}
