//! What ranks have to agree on beside tokens: profiles, plans, lines of a chat, logs of answers; and how long they
//! wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moa_core::{Influence, Sharding};
use moa_models::{
    Brought, CalibrationData, ChatSession, Checkpoint, CompressOptions, Cpu, Error, Evaluation,
    Item, Objective, Rank, Result, Shard, SizedQuestion, Task, ThreadRank, Wait, compress,
    on_ranks,
};

use crate::shard::{Folder, biased, tiny_folder, uneven};
use crate::{checkpoint, full, greedy, moa_tiny, text};

/// What `work` gives on each of two ranks of moa-tiny.
fn on_two<T: Send>(work: impl Fn(Checkpoint<Cpu>) -> Result<T> + Sync) -> Result<Vec<T>> {
    let sharding = Sharding::balanced(&full(), 500, 2)?;
    on_ranks(ThreadRank::group(2)?, |rank: Arc<ThreadRank>| {
        let shard = Shard::new(&sharding, rank)?;
        work(Checkpoint::open_shard(Cpu::default(), moa_tiny(), shard)?)
    })
}

/// Influence of all heads, head by head, and the loss.
fn influence(folder: &Folder, ranks: usize, item: &Item) -> Result<Vec<(Vec<f64>, f64)>> {
    let plan = moa_core::Plan::full(folder.config.shape())?;
    folder.on(ranks, &plan, |model| {
        let mut influence = Influence::new(model.shape(), item.tokens().len(), 16)?;
        let loss = model.profile(item, Objective::Margin, &mut influence)?;
        let shape = model.shape();
        let heads = (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h)));
        Ok((heads.flat_map(|(layer, head)| influence.head(layer, head).to_vec()).collect(), loss))
    })
}

#[test]
fn the_number_of_ranks_does_not_change_a_profile() -> Result<()> {
    // An output matrix of its own and biases; then one that is the embedding.
    let tokens: Vec<u32> = (0..120).map(|i| (i * 31 % 203) as u32).collect();
    let english = text(120);
    for (folder, tokens, all) in
        [(biased(), &tokens, &[2, 3, 8][..]), (&tiny_folder(), &english, &[2])]
    {
        let item = Item::new(&tokens[..100], &tokens[100..])?;
        let whole = &influence(folder, 1, &item)?[0];
        let largest = whole.0.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        assert!(largest > 0.0);
        for &ranks in all {
            let got = influence(folder, ranks, &item)?;
            assert!(got.iter().all(|other| *other == got[0]), "{ranks} ranks do not agree");
            let differences = got[0].0.iter().zip(&whole.0).map(|(a, b)| (a - b).abs());
            let worst = differences.fold(0.0, f64::max);
            assert!(worst < 1e-3 * largest, "{ranks} ranks: {worst} of {largest}");
            assert!((got[0].1 - whole.1).abs() < 1e-4, "{ranks} ranks: {} {}", got[0].1, whole.1);
        }
    }
    Ok(())
}

#[test]
fn ranks_whose_searches_end_at_other_times_find_one_plan() -> Result<()> {
    let find = |checkpoint: &Checkpoint<Cpu>| {
        let mut options = CompressOptions {
            lengths: vec![256],
            validation_length: Some(384),
            samples: 2,
            validation_samples: 1,
            validation_questions: 2,
            text_samples: 1,
            evaluations: Some(24),
            ..CompressOptions::default()
        };
        if !checkpoint.model.is_first() {
            // As if the others had no time at all: their own searches would fail.
            options.solver.time_limit = Duration::ZERO;
        }
        let found = compress(checkpoint, &CalibrationData::Records, &options, &mut ())?;
        Ok((found.plan.rules().to_vec(), found.refined.loss, found.refined.start_loss))
    };
    let both = on_two(|checkpoint| find(&checkpoint))?;
    assert_eq!(both[0], both[1]);
    let (_, loss, start) = find(checkpoint())?;
    let near = |a: f64, b: f64| (a - b).abs() < 1e-3 * (1.0 + b.abs());
    // Refinement may part where measurements are near ties; what it starts from does not.
    assert!(near(both[0].2, start), "{} {start}", both[0].2);
    assert!(both[0].1 <= both[0].2 && loss <= start);
    Ok(())
}

#[test]
fn lines_that_one_rank_reads_are_said_on_all() -> Result<()> {
    let lines = ["The ship sailed", "And the harbour?"];
    let talk = |checkpoint: &Checkpoint<Cpu>, read: &AtomicUsize| {
        let mut chat = ChatSession::new(checkpoint, &full(), 400)?;
        let mut answers = Vec::new();
        loop {
            let line = checkpoint.model.agree(|| {
                let next = lines.get(read.fetch_add(1, Ordering::Relaxed));
                Ok::<_, Error>(next.map(|line| line.to_string()))
            })?;
            let Some(line) = line else { return Ok(answers) };
            answers.push(chat.answer(&line, greedy(12))?.text);
        }
    };
    let expected = talk(checkpoint(), &AtomicUsize::new(0))?;
    assert_eq!(expected.len(), 2);
    // As with stdin, who reads a line takes it from the others.
    let read = AtomicUsize::new(0);
    let answers = on_two(|checkpoint| talk(&checkpoint, &read))?;
    assert_eq!(answers, [expected.clone(), expected]);
    assert_eq!(read.into_inner(), 3);
    // Who cannot read ends the others.
    let ended = on_two(|checkpoint| checkpoint.model.agree(|| Err::<(), _>(Error::Cancelled)));
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    Ok(())
}

#[test]
fn one_rank_writes_the_answers_that_all_go_on_from() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("items.jsonl");
    let question = |case| {
        let question = checkpoint().task_question(Task::MultiKey, 448, 32, (5, case))?;
        Ok(SizedQuestion { size: Some(448), case, question, place: format!("draw {case}") })
    };
    let questions = (0..3).map(question).collect::<Result<Vec<_>>>()?;
    let plan = full();
    let evaluation = Evaluation { items: Some(&path), ..Evaluation::new(&plan, 32) };
    let answers = |report: &moa_models::RetrievalReport| {
        report.items.iter().map(|item| (item.case, item.answers.clone())).collect::<Vec<_>>()
    };
    let some = |count: usize| {
        on_two(|checkpoint| checkpoint.evaluate(&questions[..count], &evaluation, &mut ()))
    };
    some(1)?;
    let first = std::fs::read_to_string(&path).unwrap();
    assert_eq!(first.lines().count(), 2);
    let all = some(3)?;
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written.starts_with(&first) && written.lines().count() == 4, "{written}");
    // The first answer is the one of before, with its times, on both ranks.
    let seconds = |rank: usize| all[rank].items[0].prefill_seconds;
    assert_eq!(seconds(0), seconds(1));
    let alone = checkpoint().evaluate(&questions, &Evaluation::new(&plan, 32), &mut ())?;
    assert!(all.iter().all(|report| answers(report) == answers(&alone)));
    // A log of ranks is not gone on with by one device, which rounds otherwise.
    let refused = checkpoint().evaluate(&questions, &evaluation, &mut ());
    let is_named =
        |e: &Error| matches!(e, Error::OtherSettings { setting, .. } if setting == "ranks");
    assert!(refused.as_ref().is_err_and(is_named), "{refused:?}");
    Ok(())
}

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_rank_that_hangs_is_given_up_after_a_while() -> Result<()> {
    let (folder, plan) = (biased(), uneven());
    let begin = Instant::now();
    let slept = 4 * SHORT;
    let errors = std::thread::scope(|scope| {
        let ranks = ThreadRank::group_with(3, SHORT)?;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                scope.spawn(|| -> Result<Error> {
                    let number = rank.rank();
                    let model = folder.part(&plan, rank)?;
                    let mut sequence = model.open(&plan, 200, 0)?;
                    if number == 1 {
                        std::thread::sleep(slept);
                    }
                    let rows = moa_models::LogitRows::Last;
                    let step = model.forward(&mut [&mut sequence], &[&[1, 2, 3]], rows);
                    if number != 1 {
                        assert!(begin.elapsed() < slept, "waited for all of its sleep");
                    }
                    Ok(step.unwrap_err())
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect::<Result<Vec<_>>>()
    })?;
    let names = |error: &&Error| matches!(error, Error::RankSilent { rank: 1, .. });
    assert!(errors.iter().any(|error| names(&error)), "{errors:?}");
    let is_typed =
        |error| matches!(error, &Error::RankSilent { rank: 1, .. } | &Error::Rank { .. });
    assert!(errors.iter().all(is_typed), "{errors:?}");
    Ok(())
}

#[test]
fn ranks_wait_for_the_first_as_long_as_it_takes_and_then_for_the_others_in_turn() -> Result<()> {
    let value = |rank: usize| -> Brought { Arc::new(rank) };
    let meet = |late: usize| {
        on_ranks(ThreadRank::group_with(2, SHORT)?, |rank: Arc<ThreadRank>| {
            if rank.rank() == late {
                std::thread::sleep(3 * SHORT);
            }
            let all = rank.gather(value(rank.rank()), Wait::First)?;
            Ok::<_, Error>(all.iter().map(|v| *v.downcast_ref::<usize>().unwrap()).collect())
        })
    };
    let met: Vec<Vec<usize>> = meet(0)?;
    assert_eq!(met, [[0, 1], [0, 1]]);
    let silent = meet(1).unwrap_err();
    assert!(matches!(silent, Error::RankSilent { rank: 1, .. }), "{silent}");
    Ok(())
}
