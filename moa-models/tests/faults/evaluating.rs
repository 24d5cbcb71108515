//! Evaluations that write their answers to a log and go on from it.

use std::fs;
use std::path::Path;

use moa_core::{ElasticRule, Plan};
use moa_models::{
    Checkpoint, Cpu, Error, Evaluation, Question, Reference, Result, Scoring, SizedQuestion,
};
use serde_json::Value;

use crate::calls::{Fault, count, with_fault};
use crate::world::{Random, checkpoint, faults};

const QUESTIONS: usize = 4;

fn questions() -> Vec<SizedQuestion> {
    let question = |case: usize| SizedQuestion {
        size: None,
        case,
        question: Question::one(
            format!("What is {case}?"),
            vec![Reference { text: case.to_string(), depth: None }],
            Scoring::Contains,
        ),
        place: format!("case {case}"),
    };
    (0..QUESTIONS).map(question).collect()
}

pub(crate) fn evaluate_of(checkpoint: &Checkpoint<Cpu>, plan: &Plan, log: &Path) -> Result<()> {
    let evaluation = Evaluation { items: Some(log), ..Evaluation::new(plan, 1) };
    checkpoint.evaluate(&questions(), &evaluation, &mut ()).map(drop)
}

fn evaluate(plan: &Plan, log: &Path) -> Result<()> {
    evaluate_of(checkpoint(), plan, log)
}

/// Whole lines of a log, without times and memory of the process.
pub(crate) fn lines(bytes: &[u8]) -> Vec<Value> {
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let line = |line: &[u8]| {
        let mut value: Value = serde_json::from_slice(line).expect("a whole line is JSON");
        if let Some(fields) = value.as_object_mut() {
            fields.retain(|name, _| !name.ends_with("_seconds") && name != "peak_bytes");
        }
        value
    };
    bytes[..whole].split_inclusive(|byte| *byte == b'\n').map(line).collect()
}

#[test]
fn logs_of_answers_lose_nothing_and_mix_nothing() {
    let _alone = crate::world::alone();
    let model = &checkpoint().model;
    let plan = Plan::full(model.shape()).unwrap();
    let other = Plan::uniform(model.shape(), 4, ElasticRule::fixed(24)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("items.jsonl");
    evaluate(&plan, &log).unwrap();
    let clean = fs::read(&log).unwrap();
    let all = lines(&clean);
    assert_eq!(all.len(), 1 + QUESTIONS);
    fs::remove_file(&log).unwrap();
    let calls = count(|| evaluate(&plan, &log).unwrap());

    let mut random = Random::new(1);
    let (mut tried, mut refused, mut killed) = (0, 0, 0);
    while tried < faults(200) {
        // What an earlier run left: nothing, some answers, or a part of a line.
        match random.below(3) {
            0 => drop(fs::remove_file(&log)),
            1 => {
                let ends = clean.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
                let end = ends.map(|(at, _)| at + 1).nth(random.below(4) as usize);
                fs::write(&log, &clean[..end.unwrap_or(0)]).unwrap();
            }
            _ => fs::write(&log, &clean[..random.below(clean.len() as u64) as usize]).unwrap(),
        }
        // Several runs in a row may fail.
        for _ in 0..1 + random.below(2) {
            let before = lines(&fs::read(&log).unwrap_or_default());
            let fault = Fault::ALL[random.below(Fault::ALL.len() as u64) as usize];
            let at = 1 + random.below(calls);
            let mixes = before.len() > 1 && random.below(4) == 0;
            let asked = if mixes { &other } else { &plan };
            let (result, happened) = with_fault(fault, at, || evaluate(asked, &log));
            let bytes = fs::read(&log).unwrap_or_default();
            let after = lines(&bytes);
            let place = || format!("fault {tried}: {fault:?} at {at}, {result:?}");
            // What there is, is what there would be; answers that there were, there are.
            assert_eq!(after, all[..after.len()], "{}", place());
            assert!(before.len() < 2 || after.len() >= before.len(), "{}", place());
            match &result {
                Ok(()) => assert!(!mixes && after.len() == all.len(), "{}", place()),
                Err(Error::OtherSettings { .. }) => assert!(mixes, "{}", place()),
                Err(Error::Io { .. } | Error::Line { .. }) => refused += 1,
                Err(_) => panic!("{}", place()),
            }
            if fault != Fault::Killed && result.is_err() && after.len() > before.len() {
                assert!(bytes.ends_with(b"\n"), "{}: a part of a line is left", place());
            }
            killed += u64::from(fault == Fault::Killed && result.is_err());
            tried += u64::from(happened);
        }
        evaluate(&plan, &log).unwrap();
        assert_eq!(lines(&fs::read(&log).unwrap()), all);
    }
    println!(
        "{tried} faults in evaluations of {calls} calls: {refused} refused, {killed} of them killed; none lost, none mixed"
    );
}
