//! A chat model of the world from one GGUF file: SmolLM2-135M-Instruct with weights in Q4_1 and an embedding in
//! Q8_0. `ci/real-model` fetches it, and `MOA_REAL_MODEL` names the file.

use std::path::PathBuf;

use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::Plan;
use moa_models::{Checkpoint, Cpu, Dtype, EngineOptions, GenerateOptions, Message, Prompt};

use crate::test_data;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        tokens_and_chat_are_those_of_an_independent_implementation,
        greedy_answers_are_those_of_widened_weights,
        perplexity_is_that_of_widened_weights,
    ]
}

fn open() -> Result<Checkpoint<Cpu>, Stop> {
    open_on(Cpu::new(Dtype::F32))
}

fn open_on(cpu: Cpu) -> Result<Checkpoint<Cpu>, Stop> {
    match std::env::var_os("MOA_REAL_MODEL") {
        Some(path) => Ok(Checkpoint::open(cpu, PathBuf::from(path))?),
        None => Err(Stop::ignored("MOA_REAL_MODEL names no file; ci/real-model fetches it")),
    }
}

const QUESTION: &str = "What is the capital of France, and what is it known for?";

/// The question in the model's template, as llama.cpp splits it.
const TOKENS: [u32; 43] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 28, 284, 732, 314, 357,
    1343, 327, 47, 2, 198, 1, 520, 9531,
];

fn tokens_and_chat_are_those_of_an_independent_implementation() -> Verdict {
    let model = open()?;
    let chat = model.chat_tokens(&[Message::user(QUESTION)])?;
    assert_eq!((&chat[..43], &chat[43..]), (&TOKENS[..], &[198][..]));
    assert_eq!(model.tokenizer.decode(&[504, 3575, 282, 4649], true)?, "The capital of France");
    // The end of a turn, and the end of a text.
    assert_eq!(model.eos_token_ids(), [0, 2]);
    Ok(())
}

fn greedy_answers_are_those_of_widened_weights() -> Verdict {
    [false, true].into_iter().try_for_each(greedy_answer)
}

fn greedy_answer(narrow: bool) -> Verdict {
    let model = open_on(Cpu::new(Dtype::F32).narrow_activations(narrow))?;
    let plan = Plan::full(model.model.shape())?;
    let mut engine = model.engine(EngineOptions::default());
    let options = GenerateOptions { max_new_tokens: 24, ..Default::default() };
    engine.submit(Prompt::chat(&[Message::user(QUESTION)]), &plan, options);
    let answers = engine.complete_all()?;
    assert_eq!(
        answers[0].text,
        "The capital of France is Paris. It is a city renowned for its historical landmarks, culture, and the iconic Eiffel"
    );
    Ok(())
}

/// The cross entropy is that of an independent implementation on the same weights in f32, with f32 caches; where prompts
/// may round blocks and activations to bf16, too.
fn perplexity_is_that_of_widened_weights() -> Verdict {
    [false, true].into_iter().try_for_each(perplexity)
}

fn perplexity(narrow: bool) -> Verdict {
    let model = open_on(Cpu::new(Dtype::F32).narrow_activations(narrow))?;
    let text = test_data("text/H.G._Wells__The_First_Men_in_the_Moon.md")?;
    let tokens = model.tokenizer.encode(&std::fs::read_to_string(text)?, false)?;
    let plan = Plan::full(model.model.shape())?;
    let mut go_on = |_, _, _| std::ops::ControlFlow::Continue(());
    let report = model.model.perplexity(
        &tokens,
        model.model.config().bos_token_id,
        512,
        2,
        &plan,
        &mut go_on,
    )?;
    let share = (report.cross_entropy - 3.818_984).exp() - 1.0;
    assert!(share.abs() < 2e-4, "{narrow}: perplexity differs by {share}: {report:?}");
    Ok(())
}
