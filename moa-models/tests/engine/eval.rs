//! Questions and calibration data: what the small model can answer, and what it is warned of.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use moa_core::{ElasticRule, FarLosses, Influence, Plan, PlanRequest, Profile, ProfileInfo};
use moa_models::{
    CacheTypes, CalibrationData, CalibrationOptions, CalibrationPrompt, CompressOptions, Error,
    Evaluation, Evidence, Item, Message, Objective, PER_HEAD, PHRASINGS, Part, Prompting, Question,
    RecordPrompt, Reference, Result, RetrievalItem, Scoring, SizedQuestion, Stage, Task, TextGoal,
    compress, refine,
};

use crate::{checkpoint, full, narrow, text, tiny};

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
    let alone = Question::new(question.turns[..1].to_vec(), Scoring::Contains);
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

#[test]
fn an_evaluation_goes_on_after_the_answers_that_it_has() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("items.jsonl");
    let question = |case| {
        let question = checkpoint().task_question(Task::MultiKey, 448, 32, (5, case))?;
        Ok(SizedQuestion { size: Some(448), case, question, place: format!("draw {case}") })
    };
    let mut questions = (0..3).map(question).collect::<Result<Vec<_>>>()?;
    let plan = full();
    let evaluation = Evaluation { items: Some(&path), ..Evaluation::new(&plan, 32) };
    // Broken off after the first answer, which is kept.
    let mut steps = Vec::new();
    let broken = checkpoint().evaluate(&questions, &evaluation, &mut |stage, done, total| {
        steps.push((stage, done, total));
        ControlFlow::Break(())
    });
    assert!(matches!(broken, Err(Error::Cancelled)), "{broken:?}");
    assert_eq!(steps, [(Stage::Evaluate, 1, 3)]);
    let first = std::fs::read_to_string(&path).unwrap();
    assert_eq!(first.lines().count(), 2);
    let all = checkpoint().evaluate(&questions, &evaluation, &mut ())?;
    assert!(std::fs::read_to_string(&path).unwrap().starts_with(&first));
    assert_eq!((all.cases, all.items[2].case), (3, 2));
    // With every answer at hand nothing is asked: times of a second run would differ.
    assert_eq!(checkpoint().evaluate(&questions, &evaluation, &mut ())?, all);
    let other = Evaluation { max_new_tokens: 16, ..evaluation.clone() };
    let refused = checkpoint().evaluate(&questions, &other, &mut ());
    let is_named = |e: &Error| matches!(e, Error::OtherSettings { setting, .. } if setting == "max_new_tokens");
    assert!(refused.as_ref().is_err_and(is_named), "{refused:?}");
    // A question that is too long is named before any other is asked.
    questions[2].question.turns[0].text = "word ".repeat(40_000);
    let alone = Evaluation::new(&plan, 32);
    let long = checkpoint().evaluate(&questions, &alone, &mut |_, _, _| unreachable!());
    let is_long = |e: &Error| {
        matches!(e, Error::Question { place, source }
            if place == "draw 2" && matches!(**source, Error::ContextExceeded { .. }))
    };
    assert!(long.as_ref().is_err_and(is_long), "{long:?}");
    Ok(())
}

#[test]
fn calibration_tells_its_progress_and_ends_when_cancelled() -> Result<()> {
    let options =
        CalibrationOptions { lengths: vec![256, 384], samples: 2, ..CalibrationOptions::default() };
    let mut steps = Vec::new();
    let mut until = |last: usize| {
        steps.clear();
        let made = checkpoint().calibrate(
            &CalibrationData::Records,
            &options,
            &mut |stage, done, total| {
                steps.push((stage, done, total));
                if done == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        );
        (made.map(|made| made.items.len()), steps.clone())
    };
    // Half as many of the longer length.
    let all: Vec<_> = (0..=3).map(|done| (Stage::Calibrate, done, 3)).collect();
    let (made, steps) = until(9);
    assert_eq!((made?, &steps), (2, &all));
    let (broken, steps) = until(2);
    assert!(matches!(broken, Err(Error::Cancelled)), "{broken:?}");
    assert_eq!(steps, all[..3]);
    Ok(())
}

#[test]
fn divergence_on_text_falls_as_spans_grow_and_bounds_the_search() -> Result<()> {
    const LENGTH: usize = 256;
    let options = CalibrationOptions { lengths: vec![LENGTH], samples: 1, ..Default::default() };
    let texts = checkpoint().text_items(&CalibrationData::Tasks, &options)?;
    assert!(texts[&LENGTH].iter().all(|item| item.tokens().len() == LENGTH));
    for length in [0, 1] {
        let short = CalibrationOptions { lengths: vec![length], ..options.clone() };
        let refused = checkpoint().text_items(&CalibrationData::Tasks, &short);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{length}: {refused:?}");
    }
    let model = tiny();
    // A text of two pieces and a rest has no more than two.
    let options = CalibrationOptions { samples: 4, ..options };
    let mut text = "word ".repeat(40);
    while checkpoint().tokenizer.encode(&text, true)?.len() < 2 * LENGTH {
        text += "The text goes on and on. ";
    }
    let data = CalibrationData::Prompts(vec![CalibrationPrompt::Text(text)]);
    let pieces = &checkpoint().text_items(&data, &options)?[&LENGTH];
    assert_eq!(pieces.len(), 2);
    assert_ne!(pieces[0].tokens(), pieces[1].tokens());

    let mut profile = Profile::new(model.shape(), ProfileInfo::default());
    profile.add(Influence::new(model.shape(), LENGTH, 64)?)?;
    let request = PlanRequest::density(1.0, &[LENGTH], 4, 20)?;
    // Plans of the same rules and other sinks are other plans: the limit is the dense one's.
    let rule = ElasticRule::fixed(24);
    let [few, many] = [4, LENGTH].map(|sink| Plan::uniform(model.shape(), sink, rule));
    let (few, many) = (few?, many?);
    let text_goal = TextGoal::NoWorseThan(&many);
    let none = BTreeMap::new();
    let evidence = Evidence { items: &texts, texts: &texts, text_goal, held_out: &none };
    let found = refine(model, evidence, &[few], &request, &profile, 0, &mut ())?;
    assert!(found.start_divergence > Some(1e-6), "{:?}", found.start_divergence);
    let evidence = Evidence { items: &none, ..evidence };
    let refused =
        refine(model, evidence, std::slice::from_ref(&many), &request, &profile, 0, &mut ());
    assert!(matches!(refused, Err(Error::Invalid { what: "items", .. })), "{refused:?}");
    let measured = |span: usize| -> Result<f64> {
        let plan = Plan::uniform(model.shape(), 4, ElasticRule::fixed(span))?;
        let text_goal = TextGoal::Weight(1.0);
        let evidence =
            Evidence { items: &texts, texts: &texts, text_goal, held_out: &BTreeMap::new() };
        let found = refine(model, evidence, &[plan], &request, &profile, 0, &mut ())?;
        Ok(found.start_divergence.expect("a text"))
    };
    let (narrow, wide, all) = (measured(24)?, measured(128)?, measured(LENGTH)?);
    assert!(narrow > wide && wide > 0.0 && all.abs() < 1e-9, "{narrow} {wide} {all}");

    // From plans with a quarter of the keys, exchange of spans finds a better one of that size, which
    // disturbs text no more than the uniform plan does.
    let request = PlanRequest::density(0.25, &[LENGTH], 4, 20)?;
    let uniform = Plan::uniform(model.shape(), 4, ElasticRule::new(0.0, 0.25)?)?;
    let text_goal = TextGoal::NoWorseThan(&uniform);
    let held_out = &BTreeMap::new();
    let evidence = Evidence { items: &texts, texts: &texts, text_goal, held_out };
    let starts = [uniform.clone()];
    let found = refine(model, evidence, &starts, &request, &profile, 30, &mut ())?;
    // Dense, the limit of text and the start come on top.
    assert!(found.evaluations <= 33, "{}", found.evaluations);
    assert!(found.plan.density(LENGTH) <= 0.25 + 1e-9);
    let [start, own] = [found.start_divergence, found.divergence].map(|of| of.expect("a text"));
    let better = (found.start_loss - found.loss, start - own);
    assert!(better.0 > 0.0 || better.1 > 0.0, "{better:?}");
    assert_eq!(found.held_out, []);

    // No head gets a rule of its own where a layer may have one.
    let mut one = request.clone();
    one.solver.max_rules_per_layer = Some(1);
    let found = refine(model, evidence, &starts, &one, &profile, 30, &mut ())?;
    assert!(one.allows(&found.plan)?, "{:?}", found.plan.rules());

    // On held-out text a plan of narrow heads is found to be worse, the uniform plan to be what it is, and the
    // search goes on until the text suffers less.
    let held_out = BTreeMap::from([(LENGTH, vec![texts[&LENGTH][0].continued(LENGTH / 2)?])]);
    let evidence = Evidence { held_out: &held_out, ..evidence };
    let same = refine(model, evidence, &starts, &request, &profile, 0, &mut ())?.held_out;
    assert_eq!((same.len(), same[0].length, Some(same[0].plan)), (1, LENGTH, same[0].limit));
    let narrow = Plan::uniform(model.shape(), 4, ElasticRule::fixed(24))?;
    // Items without a far dependency: nothing but text speaks against the narrow plan.
    let of = |evaluations, request: &PlanRequest| -> Result<_> {
        let starts = [narrow.clone()];
        let mut told = Vec::new();
        let (mut begun, mut texts) = (None, 0);
        let mut listener = |stage, done, total| {
            match stage {
                Stage::Measure => told.push(total),
                _ => texts += 1,
            }
            begun.get_or_insert((stage, done));
            ControlFlow::Continue(())
        };
        let found =
            refine(model, evidence, &starts, request, &profile, evaluations, &mut listener)?;
        // It is told of the first plan before that is measured, and of each held-out text.
        assert_eq!((begun, texts > 0), (Some((Stage::Measure, 0)), true));
        // The start, dense attention, the limit, and the held-out text three times come on top.
        assert!(found.evaluations <= evaluations + 2 * (evaluations / 4) + 6);
        // A listener is told of more where the search goes on.
        let last = told.last().copied().unwrap_or(0);
        assert!(told.is_sorted() && last + 6 >= found.evaluations, "{told:?}");
        Ok(found.held_out[0].plan.kl_mean)
    };
    // A budget that is larger than the plan would stretch it before anything is measured.
    let own = PlanRequest::density(narrow.density(LENGTH), &[LENGTH], 4, 20)?;
    let (before, after) = (of(0, &own)?, of(24, &request)?);
    assert!(before > same[0].plan.kl_mean, "{before} {same:?}");
    assert!(after < before, "{before} {after}");
    Ok(())
}

// Types are chosen from the plan in the first one on, so that the choice is never worse than it.
#[test]
fn heads_that_choose_their_types_lose_no_more_than_in_the_first_one() -> Result<()> {
    let of = |cache_types| {
        let options = CompressOptions {
            cache_types,
            density: 0.14,
            lengths: vec![384],
            validation_length: Some(384),
            samples: 2,
            validation_samples: 1,
            validation_questions: 2,
            text_samples: 0,
            evaluations: Some(16),
            ..CompressOptions::default()
        };
        Ok::<_, Error>(
            compress(checkpoint(), &CalibrationData::Records, &options, &mut ())?.refined,
        )
    };
    let (int8, chosen) = (of(CacheTypes::All(PER_HEAD[0]))?, of(CacheTypes::PerHead)?);
    assert!(chosen.loss <= int8.loss, "{} {}", chosen.loss, int8.loss);
    assert!(chosen.evaluations > int8.evaluations);
    let bytes = |plan: &Plan| plan.kv_bytes(384, PER_HEAD[0].slot_bytes(tiny().shape().head_dim));
    let most = 0.14 * bytes(&full()) as f64;
    assert!(bytes(&chosen.plan) as f64 <= most + 1.0, "{} {most}", bytes(&chosen.plan));
    let types = chosen.plan.cache_types();
    let is_known = |own: &Option<_>| own.is_some_and(|own| PER_HEAD.contains(&own));
    assert!(types.len() == tiny().shape().total_kv_heads() && types.iter().all(is_known));
    Ok(())
}

#[test]
fn calibration_names_the_tasks_that_are_answered_and_holds_out_every_third_item() -> Result<()> {
    // Sentences of the built-in tasks are beyond this model: its records remain.
    let options =
        CalibrationOptions { lengths: vec![384], samples: 3, ..CalibrationOptions::default() };
    let made = checkpoint().calibrate(&CalibrationData::Tasks, &options, &mut ())?;
    assert_eq!(made.items[&384].len(), 3);
    assert_eq!(made.data, "built-in tasks (records)");
    // All have one wording.
    assert!(made.items[&384].iter().all(|item| item.answer() == item.response()));

    let prompt = |index: usize| CalibrationPrompt::Question {
        messages: vec![Message::user(format!("{index} {}", "word ".repeat(250)))],
        answer: Some(format!("{index}")),
    };
    let data = CalibrationData::Prompts((0..6).map(prompt).collect());
    let of = |part| {
        let options = CalibrationOptions { part, samples: 9, ..options.clone() };
        checkpoint().calibrate(&data, &options, &mut ())
    };
    let (profiled, held_out) = (of(Part::Profiled)?.items, of(Part::HeldOut)?.items);
    assert_eq!((profiled[&384].len(), held_out[&384].len()), (4, 2));
    assert!(held_out[&384].iter().all(|item| !profiled[&384].contains(item)));

    // Prompts that fill less than half of a length do not stand for it.
    let long = CalibrationOptions { lengths: vec![1024], ..options };
    let error = checkpoint().calibrate(&data, &long, &mut ()).unwrap_err().to_string();
    assert!(error.contains("half as many"), "{error}");
    Ok(())
}

#[test]
fn a_plan_that_keeps_everything_agrees_with_dense_attention() -> Result<()> {
    let bos = tiny().config().bos_token_id;
    let items = Item::windows(&text(400), bos, 96, 3)?;
    let all = tiny().agreement(&items, &full(), 96, &mut ())?;
    assert_eq!((all.tokens, all.equal_greedy, all.perplexity_ratio), (3 * 95, 1.0, 1.0));
    assert!(all.kl_p99 == 0.0 && all.kv_bytes == all.kv_bytes_dense, "{all:?}");
    let perplexity = |plan: Plan| tiny().perplexity(&text(400), bos, 96, 3, &plan, &mut ());
    assert!((perplexity(full())?.perplexity / all.dense_perplexity - 1.0).abs() < 1e-9);
    // Less is kept: the distributions part, and both perplexities are those of each plan alone.
    let part = tiny().agreements(&items, &[&full(), &narrow()], 96, &mut ())?;
    assert_eq!(part[0], all);
    let part = part[1];
    assert!(part.kl_mean > 1e-3 && part.kl_p99 > part.kl_mean && part.equal_greedy < 1.0);
    assert!(part.density < 1.0 && part.kv_bytes < part.kv_bytes_dense, "{part:?}");
    assert!((perplexity(narrow())?.perplexity / part.plan_perplexity - 1.0).abs() < 1e-9);
    let ratio = part.plan_perplexity / part.dense_perplexity;
    assert!((ratio / part.perplexity_ratio - 1.0).abs() < 1e-9, "{part:?}");
    assert!(matches!(
        tiny().agreement(&items, &full(), 64, &mut ()),
        Err(Error::ContextExceeded { asked: 95, limit: 64 })
    ));
    Ok(())
}

#[test]
fn agreement_of_answers_counts_the_answers_alone_and_reads_shared_prompts_once() -> Result<()> {
    let tokens = text(140);
    // Two items that begin alike, and one that does not.
    let items = [
        Item::new(&tokens[..120], &tokens[120..130])?,
        Item::new(&[&tokens[..110], &tokens[..8]].concat(), &tokens[8..12])?,
        Item::new(&tokens[60..140], &tokens[..5])?,
    ];
    let together = tiny().agreement(&items, &narrow(), 140, &mut ())?;
    assert_eq!(together.tokens, 10 + 4 + 5);
    let each = items.chunks(1).map(|item| tiny().agreement(item, &narrow(), 140, &mut ()));
    let each = each.collect::<Result<Vec<_>>>()?;
    let sum: f64 = each.iter().map(|a| a.kl_mean * a.tokens as f64).sum();
    assert!((sum / 19.0 - together.kl_mean).abs() < 1e-5 * sum, "{together:?} {each:?}");
    let worst = each.iter().map(|a| a.kl_p99).fold(0.0, f64::max);
    assert!((worst - together.kl_p99).abs() < 1e-5 * worst);
    Ok(())
}

#[test]
fn a_question_of_one_message_is_read_as_its_prompting_says() -> Result<()> {
    let reference = || vec![Reference { text: "x".into(), depth: None }];
    let what = "So, what is it? ".repeat(12) + "Say it.";
    let chat = Question::one(&what, reference(), Scoring::Contains);
    let begun = chat.clone().with_answer_prefix(" It is");
    let raw = Question { prompting: Prompting::Text, ..begun.clone() };
    let tokens = |question: &Question| checkpoint().question_context(question, 0);
    let text = |text: &str| checkpoint().tokenizer.encode(text, true).map(|ids| ids.len());
    assert_eq!(tokens(&raw)?, text(&format!("{what} It is"))?);
    assert_eq!(tokens(&chat)?, checkpoint().chat_tokens(&[Message::user(&what)])?.len());
    assert!(tokens(&begun)? > tokens(&chat)?);
    // The answer goes on from its beginning, on a cache of just the size that was asked for.
    let plan = narrow();
    let item = checkpoint().ask(&begun, &plan, 4)?;
    assert_eq!((item.context, item.prompt_tokens), (tokens(&begun)? + 4, tokens(&begun)?));
    assert!(item.kv_bytes > 0 && item.kv_bytes < item.kv_bytes_dense, "{item:?}");
    assert_eq!(item.kv_footprint, Some(plan.kv_footprint(item.context)));
    // Of the process, on Linux.
    assert!(item.peak_bytes.is_none_or(|peak| peak > item.kv_bytes), "{item:?}");
    let two = Question { turns: [begun.turns.clone(), begun.turns.clone()].concat(), ..begun };
    assert!(matches!(tokens(&two), Err(Error::Invalid { .. })));
    Ok(())
}

#[test]
fn every_task_of_ruler_fills_the_length_asked_for() -> Result<()> {
    for task in Task::RULER.into_iter().filter(|task| !matches!(task, Task::Qa1 | Task::Qa2)) {
        let new = task.max_new_tokens();
        let question = checkpoint().task_question(task, 1024, new, (0, 1))?;
        let context = checkpoint().question_context(&question, new)?;
        // Lines, words and coded words differ in how many tokens they have.
        assert!(context <= 1024 && context > 1024 - 128, "{}: {context}", task.name());
    }
    Ok(())
}
