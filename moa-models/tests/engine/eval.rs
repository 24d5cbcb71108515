//! Questions and calibration data: what the small model can answer, and what it is warned of.

use std::collections::BTreeMap;

use moa_core::{ElasticRule, FarLosses, Plan};
use moa_models::{
    Item, Message, Objective, PHRASINGS, Question, RecordPrompt, Result, RetrievalItem, Scoring,
    Task,
};

use crate::{checkpoint, full, tiny};

fn ask(task: Task, plan: &Plan) -> Result<RetrievalItem> {
    let question = checkpoint().task_question(task, 512, 32, (0, 0))?;
    checkpoint().ask(&question, plan, 32)
}

#[test]
fn questions_in_longevals_wording_are_answered() -> Result<()> {
    for (task, references) in [(Task::MultiKey, 1), (Task::Mqar, 4)] {
        let item = ask(task, &full())?;
        assert_eq!((item.score, item.references.len()), (1.0, references), "{item:?}");
        assert_eq!(item.kv_bytes, item.kv_bytes_dense);
        // A conversation reads its record once.
        assert!(item.prompt_tokens < item.context, "{item:?}");
    }
    // Too little is kept to answer from, and it is counted.
    let narrow = Plan::uniform(tiny().shape(), 16, ElasticRule::fixed(48))?;
    let item = ask(Task::Mqar, &narrow)?;
    assert!(item.score < 1.0 && item.kv_bytes * 10 < item.kv_bytes_dense, "{item:?}");
    Ok(())
}

#[test]
fn a_conversation_answers_its_first_message_as_if_it_were_the_only_one() -> Result<()> {
    // A fixed span does not change with the length that the conversation is opened for.
    let plan = Plan::uniform(tiny().shape(), 16, ElasticRule::fixed(320))?;
    let question = checkpoint().task_question(Task::Mqar, 512, 32, (1, 0))?;
    let alone = Question { turns: question.turns[..1].to_vec(), scoring: Scoring::Contains };
    let both = checkpoint().ask(&question, &plan, 32)?;
    assert_eq!(checkpoint().ask(&alone, &plan, 32)?.answers[0], both.answers[0]);
    Ok(())
}

#[test]
fn far_losses_tell_far_answers_from_near_ones() -> Result<()> {
    let far = |item: Item| {
        let items = BTreeMap::from([(384, vec![item])]);
        let profile = tiny().profile_all(&items, Objective::Margin, 64, "test", &mut ())?;
        Ok::<_, moa_models::Error>(profile.at(384)?.far_losses().clone())
    };
    // The question is about one of the first lines, which begin in the middle of the prompt.
    let first = |r: &RecordPrompt| {
        let at = r.text.find(&format!("<{}>", r.answer));
        at.is_some_and(|at| r.text[..at].matches("line ").count() < 3)
    };
    let record = (0..1000).map(|seed| PHRASINGS[0].prompt(8, seed)).find(first);
    let RecordPrompt { text: record, answer } = record.unwrap();
    let key = record.rsplit("in line ").next().unwrap().split('?').next().unwrap();
    let response = format!(" The <REGISTER_CONTENT> in line {key} is <{answer}>.");
    let prompt = checkpoint().chat_tokens(&[Message::user(&record)])?;
    let response = checkpoint().tokenizer.encode(&response, false)?;
    let record = far(Item::new(&prompt, &response)?)?;
    assert!(record.samples() == 1 && record.mean() > FarLosses::LEAST, "{record:?}");
    // Whatever it is that the response needs, the last lines say it too.
    let prose = "The sea was calm and the ship went on. ".repeat(40);
    let tokens = checkpoint().tokenizer.encode(&prose, true)?;
    let prose = far(Item::new(&tokens[..288], &tokens[288..320])?)?;
    assert!(prose.samples() == 1 && prose.mean() < FarLosses::LEAST, "{prose:?}");
    Ok(())
}
