//! Conversations on one cache.

use moa_core::{ElasticRule, Plan};
use moa_models::{
    ChatSession, Completion, Cpu, EngineOptions, Error, Event, Finish, GenerateOptions, Message,
    PHRASINGS, Result,
};

use crate::{checkpoint, full, tiny};

const CAPACITY: usize = 1024;

fn options() -> GenerateOptions {
    GenerateOptions { max_new_tokens: 24, ..GenerateOptions::default() }
}

fn open(plan: &Plan) -> Result<ChatSession<Cpu>> {
    ChatSession::new(checkpoint(), plan, CAPACITY)
}

/// The answer to `messages`, read from their start.
fn from_scratch(plan: &Plan, messages: &[Message]) -> Result<Completion> {
    let tokens = checkpoint().chat_tokens(messages)?;
    let mut engine = checkpoint().engine(EngineOptions::default());
    engine.resume(tiny().open(plan, CAPACITY, 0)?, tokens, options());
    Ok(engine.complete_all()?.remove(0))
}

/// Questions that the model answers: records of a few lines.
fn questions() -> [String; 3] {
    [1, 2, 3].map(|seed| PHRASINGS[0].prompt(5, seed).text)
}

/// Every ring has wrapped after a question.
fn wrapped() -> Plan {
    Plan::uniform(tiny().shape(), 16, ElasticRule::fixed(64)).expect("a valid shape")
}

/// Says `content`; the answer and how many tokens were read for it.
fn say(session: &mut ChatSession<Cpu>, content: &str) -> Result<(Completion, usize)> {
    session.take_usage();
    let completion = session.answer(content, options())?;
    Ok((completion, session.take_usage().prompt_tokens))
}

#[test]
fn three_turns_equal_reading_the_whole_conversation_each_time() -> Result<()> {
    let mut session = open(&full())?;
    let mut messages = Vec::new();
    for (turn, question) in questions().iter().enumerate() {
        let cached = session.cached_tokens();
        messages.push(Message::user(question));
        let whole = checkpoint().chat_tokens(&messages)?.len();
        let (answer, read) = say(&mut session, question)?;
        assert_eq!(answer, from_scratch(&full(), &messages)?, "turn {turn}");
        assert!(!answer.text.trim().is_empty());
        messages.push(Message::assistant(&answer.text));
        assert_eq!(session.messages(), messages);
        // The answers are written back as they were made, so that nothing is read twice.
        assert_eq!(read, whole - cached, "turn {turn}");
        assert!(session.cached_tokens() >= whole, "turn {turn}");
    }
    Ok(())
}

// The last token of an answer that was cut short is not in the cache, and a turn that is refused
// takes nothing out of it.
#[test]
fn a_turn_reads_only_what_the_cache_lacks() -> Result<()> {
    let [first, second, _] = questions();
    for plan in [full(), wrapped()] {
        let mut session = open(&plan)?;
        let short = GenerateOptions { max_new_tokens: 5, ..options() };
        let cut = session.answer(&first, short)?;
        assert_eq!(cut.finish, Finish::Length);
        let mut messages = vec![Message::user(&first)];
        let cached = checkpoint().chat_tokens(&messages)?.len() + 4;
        assert_eq!(session.cached_tokens(), cached);

        let error = say(&mut session, &"far too long ".repeat(CAPACITY)).unwrap_err();
        assert!(matches!(error, Error::ContextExceeded { limit: CAPACITY, .. }), "{error}");
        assert_eq!(session.cached_tokens(), cached);

        messages.extend([Message::assistant(&cut.text), Message::user(&second)]);
        let whole = checkpoint().chat_tokens(&messages)?.len();
        let (answer, read) = say(&mut session, &second)?;
        assert_eq!(answer, from_scratch(&plan, &messages)?);
        assert_eq!(read, whole - cached, "after {:?}", cut.text);
    }
    Ok(())
}

#[test]
fn turns_on_wrapped_rings_equal_reading_the_whole_conversation() -> Result<()> {
    let plan = wrapped();
    let mut session = open(&plan)?;
    let mut messages = Vec::new();
    for question in &questions() {
        messages.push(Message::user(question));
        let (answer, _) = say(&mut session, question)?;
        assert!(session.cached_tokens() > 64);
        assert_eq!(answer, from_scratch(&plan, &messages)?);
        messages.push(Message::assistant(&answer.text));
    }
    Ok(())
}

// An answer that the template does not write back as it was made: here cut in mid-word by a stop
// string, so that the ring holds tokens that are not part of the conversation.
#[test]
fn a_ring_that_cannot_roll_back_reads_again() -> Result<()> {
    let plan = wrapped();
    let mut session = open(&plan)?;
    let [first, second, _] = questions();
    let whole = from_scratch(&plan, &[Message::user(&first)])?.text;
    let end = whole.char_indices().nth(whole.chars().count() * 3 / 4).unwrap().0;
    let stop: String = whole[end..].chars().take(3).collect();
    let cut = session.answer(&first, GenerateOptions { stop: vec![stop], ..options() })?;
    assert!(whole.starts_with(&cut.text) && cut.text.len() < whole.len());
    let messages = [Message::user(&first), Message::assistant(&cut.text), Message::user(&second)];
    let (answer, _) = say(&mut session, &second)?;
    assert_eq!(answer, from_scratch(&plan, &messages)?);
    Ok(())
}

#[test]
fn a_turn_that_fails_is_not_part_of_the_conversation() -> Result<()> {
    let [first, second, _] = questions();
    let messages = [Message::user(&first)];
    for plan in [full(), wrapped()] {
        let expected = from_scratch(&plan, &messages)?;
        let engine = EngineOptions { prefill_chunk: 32, ..EngineOptions::default() };
        let mut session = ChatSession::with_options(checkpoint(), &plan, CAPACITY, engine)?;
        // While the message is read, and while it is answered.
        for cancel_text in [false, true] {
            session.say(&second, options())?;
            let again = session.say(&second, options());
            assert!(matches!(again, Err(Error::Invalid { what: "turn", .. })), "{again:?}");
            loop {
                match session.step()?.expect("the turn is not over") {
                    Event::Prefill { done, .. } if !cancel_text && done >= 64 => break,
                    Event::Text { .. } => break,
                    _ => {}
                }
            }
            session.cancel()?;
            assert!(session.step()?.is_none());
            assert!(session.messages().is_empty());
        }
        let empty = GenerateOptions { stop: vec![String::new()], ..options() };
        let refused = session.answer(&second, empty).unwrap_err();
        assert!(matches!(refused, Error::Invalid { what: "stop string", .. }), "{refused}");
        let long = "far too long ".repeat(CAPACITY);
        let error = say(&mut session, &long).unwrap_err();
        assert!(matches!(error, Error::ContextExceeded { limit: CAPACITY, .. }), "{error}");
        assert!(session.messages().is_empty());
        assert_eq!(say(&mut session, &first)?.0, expected);
        assert_eq!(session.messages().len(), 2);
    }
    Ok(())
}
