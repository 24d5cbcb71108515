use std::fs;

use moa_models::{ChatTemplate, Error, Message, Tokenizer};
use serde_json::json;

use crate::moa_tiny;

fn chat() -> Vec<Message> {
    vec![
        Message::system(" Be brief. "),
        Message::user(" Hello <b>! "),
        Message::assistant("Hi."),
        Message::user("Bye."),
    ]
}

fn render(source: &str) -> Result<String, Error> {
    ChatTemplate::new(source, "<s>", "</s>").render(&chat(), true)
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("model").tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

// Expected texts of files' templates come from Jinja2 3.1 set up as transformers sets it up.

#[test]
fn template_of_moa_tiny() -> Result<(), Error> {
    let template = ChatTemplate::from_dir(moa_tiny())?.unwrap();
    let expected = "<s>USER: Hello <b>! ASSISTANT: Hi.</s> USER: Bye. ASSISTANT:";
    assert_eq!(template.render(&chat(), true)?, expected);
    let expected = "<s>USER: Hi ASSISTANT: Ho</s>";
    assert_eq!(template.render(&[Message::user("Hi"), Message::assistant("Ho")], false)?, expected);
    // The template wrote the begin token: encoding must not add a second.
    let ids = Tokenizer::from_dir(moa_tiny())?.encode(expected, false)?;
    assert_eq!((ids[0], ids.iter().filter(|id| **id == 1).count(), ids.last()), (1, 1, Some(&2)));
    Ok(())
}

#[test]
fn template_of_llama_2() -> Result<(), Error> {
    let expected = "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hello <b>! [/INST] Hi. </s>\
                    <s>[INST] Bye. [/INST]";
    assert_eq!(ChatTemplate::llama2().render(&chat(), true)?, expected);
    Ok(())
}

#[test]
fn templates_of_llama_3() -> Result<(), Error> {
    let tail = "Hello <b>!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>\
                <|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>\
                <|start_header_id|>assistant<|end_header_id|>\n\n";
    let system = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n";
    let expected =
        format!("{system}Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{tail}");
    assert_eq!(ChatTemplate::llama3().render(&chat(), true)?, expected);
    Ok(())
}

#[test]
fn template_of_vicuna() -> Result<(), Error> {
    let template = ChatTemplate::vicuna();
    let expected = "<s>A chat between a curious user and an artificial intelligence assistant. \
                    The assistant gives helpful, detailed, and polite answers to the user's \
                    questions. USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:";
    let chat = [Message::user("Hello!"), Message::assistant("Hi!"), Message::user("How are you?")];
    assert_eq!(template.render(&chat, true)?, expected);
    let other = [Message::system("Be brief."), Message::user("Hello!")];
    assert_eq!(template.render(&other, true)?, "<s>Be brief. USER: Hello! ASSISTANT:");
    assert!(matches!(
        template.render(&[Message::new("tool", "")], true),
        Err(Error::Template { out_of_fuel: false, .. })
    ));
    Ok(())
}

#[test]
fn where_a_folder_keeps_its_template() -> Result<(), Error> {
    assert!(ChatTemplate::from_dir(folder(&[]).path())?.is_none());
    let config = r#"{"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}config"}"#;
    let dir = folder(&[("tokenizer_config.json", config)]);
    assert_eq!(ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], false)?, "<b>config");
    // The file beside it wins, as in transformers.
    let files =
        [("tokenizer_config.json", config), ("chat_template.jinja", "{{ bos_token }}file\n")];
    let dir = folder(&files);
    assert_eq!(ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], false)?, "<b>file");
    let list = r#"{"chat_template": [{"name": "rag", "template": "no"},
                                     {"name": "default", "template": "yes"}]}"#;
    let dir = folder(&[("tokenizer_config.json", list)]);
    assert_eq!(ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], false)?, "yes");
    let dir = folder(&[("tokenizer_config.json", &list.replace("default", "other"))]);
    assert!(matches!(ChatTemplate::from_dir(dir.path()), Err(Error::Config { .. })));
    // By name in one object, and in the file that processors have.
    let named = r#"{"chat_template": {"rag": "no", "default": "yes"}}"#;
    for file in ["tokenizer_config.json", "chat_template.json"] {
        let dir = folder(&[(file, named)]);
        assert_eq!(ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], false)?, "yes");
    }
    let dir = folder(&[("tokenizer_config.json", "{}"), ("chat_template.json", named)]);
    assert_eq!(ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], false)?, "yes");
    let named = r#"{"_name_or_path": "lmsys/Vicuna-7b-v1.5"}"#;
    let dir = folder(&[("config.json", named)]);
    let text = ChatTemplate::from_dir(dir.path())?.unwrap().render(&[], true)?;
    assert!(text.ends_with("ASSISTANT:"), "{text}");
    Ok(())
}

#[test]
fn blocks_methods_and_functions_of_transformers() -> Result<(), Error> {
    let source = "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content.strip() }}|\n    {% endif %}\n{% endfor %}\n";
    assert_eq!(render(source)?, "Hello <b>!|\nBye.|\n");
    let source = "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}\
                  {{ m.role.upper()[:2] }}{% endfor %}";
    assert_eq!(render(source)?, "SYUS");
    assert_eq!(render("{{ 'a,b'.split(',')[1] }}{{ 'abc'.startswith('ab') }}")?, "bTrue");
    assert_eq!(render("{{ {'a': ['<', 'é']} | tojson }}")?, r#"{"a": ["<", "é"]}"#);
    assert_eq!(render("{{ tools is none }}{{ nothing is defined }}")?, "TrueFalse");
    let dated = ChatTemplate::new("{{ strftime_now('%Y-%m-%d') }}", "", "");
    assert_eq!(dated.clone().with_date(2025, 2, 3)?.render(&[], false)?, "2025-02-03");
    assert!(dated.render(&[], false)?.starts_with("20"), "today");
    assert!(matches!(dated.with_date(2025, 2, 30), Err(Error::Invalid { what: "date", .. })));
    Ok(())
}

#[test]
fn variables_stand_before_special_tokens_and_not_before_what_is_asked_for() -> Result<(), Error> {
    let source = "{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}\
                  {{ tools is none }}{{ documents is none }}{{ thinks | default('-') }}";
    let template = ChatTemplate::new(source, "<s>", "</s>");
    let with = |variables: serde_json::Value| {
        template.render_with(&[Message::user("Hi")], None::<&()>, &variables, true)
    };
    let none = "<s>HiTrueTrueTrue-";
    assert_eq!(template.render_objects(&[Message::user("Hi")], None::<&()>, true)?, none);
    assert_eq!(with(json!({}))?, none);
    let asked = json!({ "messages": [], "add_generation_prompt": false, "tools": [1] });
    assert_eq!(with(asked)?, none);
    let told = json!({ "thinks": false, "bos_token": "<b>", "documents": ["a"] });
    assert_eq!(with(told)?, "<b>HiTrueTrueFalseFalse");
    Ok(())
}

#[test]
fn templates_that_do_not_end_or_fill_the_memory_are_stopped() {
    for source in [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for a in range(2000) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(64) %}\
         {% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% for a in range(90000) %}{{ messages[0].content * 90000 }}{% endfor %}",
    ] {
        let error = render(source).unwrap_err();
        assert!(matches!(&error, Error::Template { .. }), "{error}");
    }
    let loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(loops), Err(Error::Template { out_of_fuel: true, .. })));
}

#[test]
fn long_documents_fit_the_budget() -> Result<(), Error> {
    let long = [Message::user("word ".repeat(1 << 20))];
    let text = ChatTemplate::llama2().render(&long, true)?;
    assert!(text.len() > 5 << 20);
    Ok(())
}

#[test]
fn bad_templates_are_errors() {
    for source in ["{% if %}", "{{ nothing.at.all }}", "{{ raise_exception('why') }}", "{{ f() }}"]
    {
        let error = render(source).unwrap_err();
        assert!(matches!(&error, Error::Template { out_of_fuel: false, .. }), "{error}");
    }
    assert!(render("{{ raise_exception('why') }}").unwrap_err().to_string().contains("why"));
}
