//! Questions answered from what token eviction leaves of a prompt.

use moa_models::{
    Error, Eviction, EvictionKind, PHRASINGS, Prompting, Question, RecordPrompt, Reference, Result,
    RetrievalItem, Scoring, Task,
};

use crate::{checkpoint, full, tiny};

fn question(task: Task) -> Result<Question> {
    checkpoint().task_question(task, 512, 32, (0, 0))
}

fn ask(
    kind: EvictionKind,
    density: f64,
    before_question: bool,
    question: &Question,
) -> Result<RetrievalItem> {
    checkpoint().ask_evicting(question, &Eviction { kind, density, before_question }, 32)
}

#[test]
fn nothing_evicted_answers_as_dense_attention() -> Result<()> {
    // One message, and four after each other on one cache.
    for task in [Task::MultiKey, Task::Mqar] {
        let question = question(task)?;
        let dense = checkpoint().ask(&question, &full(), 32)?;
        for kind in EvictionKind::ALL {
            for before in [false, true] {
                let item = ask(kind, 1.0, before, &question)?;
                assert_eq!(item.answers, dense.answers, "{kind:?} {before}");
                assert_eq!((item.kv_bytes, item.density), (dense.kv_bytes, 1.0));
                assert_eq!(item.prompt_tokens, dense.prompt_tokens);
                assert_eq!(item.score, dense.score);
                assert!((item.kv_footprint.unwrap() - 1.0).abs() < 1e-9);
            }
        }
    }
    Ok(())
}

/// Numbers of three digits in a record, and an answer that begins before the number: the window's last query looks for
/// the first digit, and its two neighbours are kept with it. Of longer numbers SnapKV loses the rest on this model.
fn needle() -> Question {
    let RecordPrompt { text, answer } = PHRASINGS[0].prompt(12, 3);
    let mut short = String::new();
    for part in text.split_inclusive('<') {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        short.push_str(&part[..digits.min(3)]);
        short.push_str(&part[digits..]);
    }
    let (_, asked) = short.rsplit_once("in line ").unwrap();
    let name = asked.split_once('?').unwrap().0;
    let begins = format!(" The <REGISTER_CONTENT> in line {name} is <");
    let right = answer.to_string()[..3].to_string();
    let reference = Reference { text: right, depth: None };
    Question::one(short, vec![reference], Scoring::Contains).with_answer_prefix(begins)
}

#[test]
fn the_question_in_the_window_finds_the_needle() -> Result<()> {
    for (kind, question) in [
        (EvictionKind::SnapKv, needle()),
        (EvictionKind::AdaKv, needle()),
        (EvictionKind::KvZip, question(Task::MultiKey)?),
    ] {
        let item = ask(kind, 0.35, false, &question)?;
        assert_eq!(item.score, 1.0, "{item:?}");
        // What is held is what the density says, to a slot a head.
        let slots = tiny().shape().total_kv_heads() as u64;
        let slot = item.kv_bytes_dense / slots / item.context as u64;
        assert_eq!(item.kv_bytes, slots * slot * (item.context as f64 * 0.35) as u64);
        assert!(item.kv_footprint.unwrap() > 0.8, "the prompt is held whole while it is read");
    }
    Ok(())
}

#[test]
fn too_small_a_density_and_a_message_without_a_context_are_refused() -> Result<()> {
    let error = ask(EvictionKind::SnapKv, 0.05, false, &question(Task::MultiKey)?).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "density", .. }), "{error}");
    let bare = Question::one("Who is it?", Vec::new(), Scoring::Contains);
    // Nor is the begin token of a text a context.
    let text = Question { prompting: Prompting::Text, ..bare.clone() };
    for question in [bare, text] {
        let error = ask(EvictionKind::KvZip, 0.9, true, &question).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "question", .. }), "{error}");
    }
    Ok(())
}

#[test]
fn text_goes_on_from_what_an_eviction_left() -> Result<()> {
    let text =
        (0..90).map(|i| format!("Line {i} of the text says {}. ", i * i)).collect::<String>();
    let windows = checkpoint().text_windows(&text, 256, 1)?;
    let items = [windows[0].continued(32)?];
    let of = |kind, density, before_question| {
        let eviction = Eviction { kind, density, before_question };
        checkpoint().agreement_evicting(&items, &eviction, &mut ())
    };
    for kind in EvictionKind::ALL {
        let all = of(kind, 1.0, false)?;
        assert!(all.tokens == 32 && all.kl_mean < 1e-4 && all.density == 1.0, "{kind:?} {all:?}");
        let [half, quarter] = [0.5, 0.25].map(|density| of(kind, density, false));
        let (half, quarter) = (half?, quarter?);
        assert!((quarter.density - 0.25).abs() < 0.01, "{quarter:?}");
        assert!(half.kl_mean > 1e-4 && quarter.kl_mean > half.kl_mean, "{half:?} {quarter:?}");
        // The text has no question, and an eighth of it is predicted.
        assert!(matches!(of(kind, 0.5, true), Err(Error::Invalid { what: "eviction", .. })));
        assert!(matches!(of(kind, 0.1, false), Err(Error::Invalid { what: "density", .. })));
    }
    for predicted in [0, 256] {
        let refused = windows[0].continued(predicted);
        assert!(matches!(refused, Err(Error::Invalid { what: "continuation", .. })), "{refused:?}");
    }
    Ok(())
}
