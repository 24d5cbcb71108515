//! What programs build on: devices chosen at run time, a conversation in a server's struct, hidden states, logits
//! processors, options in files.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use moa_models::{
    AnyChatSession, AnyCheckpoint, Constraint, DeviceName, Dtype, EngineOptions, Error,
    GenerateOptions, LogitRows, Message, Prompt, Result, SamplingOptions, Weights,
};

use crate::{checkpoint, full, moa_tiny, narrow, text, tiny};

fn options() -> GenerateOptions {
    GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() }
}

#[test]
fn a_device_chosen_at_run_time_answers_as_the_one_in_the_type() -> Result<()> {
    let any = AnyCheckpoint::open("cpu".parse()?, Dtype::F32, moa_tiny())?;
    let own = checkpoint().complete(&narrow(), "The harbour", 8)?;
    assert_eq!(any.complete(&narrow(), "The harbour", 8)?, own);
    let mut engine = any.engine(EngineOptions::default());
    engine.submit(text(60), &narrow(), options());
    let mut other = checkpoint().engine(EngineOptions::default());
    other.submit(text(60), &narrow(), options());
    assert_eq!(engine.complete_all()?, other.complete_all()?);
    assert!(engine.is_idle());

    for (name, device) in [
        ("cpu", DeviceName::Cpu),
        ("cuda:0", DeviceName::Cuda(0)),
        ("cuda:3", DeviceName::Cuda(3)),
        ("wgpu", DeviceName::Wgpu(None)),
        ("wgpu:1", DeviceName::Wgpu(Some(1))),
    ] {
        assert_eq!((name.parse::<DeviceName>()?, device.to_string()), (device, name.to_string()));
    }
    for name in ["", "cpu:0", "cuda:", "cuda:x", "cuda:0,1", "tpu"] {
        assert!(matches!(name.parse::<DeviceName>(), Err(Error::Invalid { .. })), "{name}");
    }
    #[cfg(not(feature = "cuda"))]
    {
        let missing = AnyCheckpoint::open(DeviceName::Cuda(0), Dtype::Bf16, moa_tiny());
        assert!(missing.unwrap_err().to_string().contains("feature"));
    }
    Ok(())
}

/// Conversations of several users, in a struct without lifetimes or type parameters, used from threads.
#[derive(Clone)]
struct Server {
    checkpoint: AnyCheckpoint,
    chats: Arc<Mutex<HashMap<u32, AnyChatSession>>>,
}

impl Server {
    fn answer(&self, user: u32, text: &str) -> Result<String> {
        let mut chats = self.chats.lock().expect("no thread panics");
        let mut chat = match chats.remove(&user) {
            Some(chat) => chat,
            None => self.checkpoint.chat(&full(), 512, EngineOptions::default())?,
        };
        let answer = chat.answer(text, options());
        chats.insert(user, chat);
        Ok(answer?.text)
    }
}

#[test]
fn conversations_live_in_a_servers_struct() -> Result<()> {
    let checkpoint = AnyCheckpoint::open(DeviceName::Cpu, Dtype::F32, moa_tiny())?;
    let server = Server { checkpoint, chats: Arc::default() };
    let first = server.answer(1, "Hello")?;
    let threads = [1, 2].map(|user| {
        let server = server.clone();
        std::thread::spawn(move || server.answer(user, "Hello"))
    });
    let [again, other] = threads.map(|thread| thread.join().expect("no panic"));
    again?;
    assert_eq!(other?, first);
    let turns = |user| server.chats.lock().expect("no panic")[&user].messages().len();
    assert_eq!((turns(1), turns(2)), (4, 2));
    // The server goes down and comes up again.
    let saved = server.chats.lock().expect("no panic")[&1].save()?;
    let again = server.checkpoint.restore_chat(&full(), &saved, EngineOptions::default())?;
    assert_eq!(again.messages().len(), 4);
    let before = server.answer(1, "And now?")?;
    server.chats.lock().expect("no panic").insert(1, again);
    assert_eq!(server.answer(1, "And now?")?, before);
    Ok(())
}

/// moa-tiny's output matrix is its embedding, which the file has.
#[test]
fn hidden_states_times_the_output_matrix_are_the_logits() -> Result<()> {
    let tokens = text(40);
    let rows = LogitRows::Rows(&[3, 39]);
    let mut sequences = [tiny().open(&narrow(), 40, 0)?, tiny().open(&narrow(), 40, 0)?];
    let [first, second] = &mut sequences;
    let hidden = tiny().hidden_states(&mut [first], &[&tokens], rows)?;
    let logits = tiny().forward(&mut [second], &[&tokens], rows)?;
    let device = tiny().device();
    let (size, vocab) = (tiny().config().hidden_size, tiny().config().vocab_size);
    assert_eq!(moa_models::Device::shape(device, &hidden), [2, size]);
    assert_eq!(sequences[0].len(), 40);
    let (hidden, logits) = (hidden.data().to_vec(), logits.data().to_vec());
    let matrix = Weights::open(moa_tiny())?.tensor("model.embed_tokens.weight", &[vocab, size])?;
    let matrix = matrix.to_f32()?;
    for (row, id) in [(0, 0), (0, 77), (1, 5), (1, vocab - 1)] {
        let (h, w) = (&hidden[row * size..][..size], &matrix[id * size..][..size]);
        let expected: f64 = h.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let got = f64::from(logits[row * vocab + id]);
        assert!((got - expected).abs() < 1e-3 * expected.abs().max(1.), "{got} {expected}");
    }
    let mut sequence = tiny().open(&narrow(), 40, 0)?;
    let beyond = tiny().hidden_states(&mut [&mut sequence], &[&tokens], LogitRows::Rows(&[40]));
    assert!(matches!(beyond, Err(Error::Invalid { .. })));
    assert_eq!(sequence.len(), 0);
    Ok(())
}

/// Doubles what a token's logit is above the mean and favours one token at the third step.
#[derive(Debug)]
struct Processor(usize);

impl Constraint for Processor {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<()> {
        logits.iter_mut().for_each(|logit| *logit *= 2.);
        self.0 += 1;
        if self.0 == 3 {
            logits[500] = 1e6;
        }
        Ok(())
    }

    fn accept(&mut self, _: u32) -> Result<bool> {
        Ok(false)
    }
}

#[test]
fn a_constraint_is_a_logits_processor() -> Result<()> {
    let mut engine = checkpoint().engine(EngineOptions::default());
    let eos = GenerateOptions { eos_token_ids: Some(Vec::new()), ..options() };
    let plain = engine.submit(text(60), &full(), eos.clone());
    let processed = engine.submit(text(60), &full(), eos);
    assert!(plain < processed && engine.constrain(processed, Box::new(Processor(0))));
    let [plain, processed] = engine.complete_all()?.try_into().expect("two requests");
    assert_eq!(plain.tokens[..2], processed.tokens[..2]);
    assert_eq!(processed.tokens[2], 500);
    assert_ne!(plain.tokens[2], 500);
    Ok(())
}

#[test]
fn messages_and_options_go_through_json() -> Result<(), serde_json::Error> {
    let sampling = SamplingOptions {
        temperature: 0.7,
        top_k: Some(40),
        logit_bias: vec![(7, f32::NEG_INFINITY), (9, -1.5)],
        seed: 3,
        ..SamplingOptions::default()
    };
    let options = GenerateOptions { sampling, stop: vec!["\n".into()], ..options() };
    let text = serde_json::to_string(&options)?;
    assert!(text.contains("[7,null]"), "{text}");
    assert_eq!(serde_json::from_str::<GenerateOptions>(&text)?, options);
    // It would come back as what forbids the token.
    let sampling = SamplingOptions { logit_bias: vec![(7, f32::INFINITY)], ..Default::default() };
    assert!(serde_json::to_string(&sampling).is_err());
    let short: GenerateOptions = serde_json::from_str(r#"{ "max_new_tokens": 9 }"#)?;
    assert_eq!(short, GenerateOptions { max_new_tokens: 9, ..GenerateOptions::default() });
    assert!(serde_json::from_str::<GenerateOptions>(r#"{ "max_tokens": 9 }"#).is_err());
    let engine: EngineOptions = serde_json::from_str(r#"{ "max_batch": 4 }"#)?;
    assert_eq!(engine, EngineOptions { max_batch: 4, ..EngineOptions::default() });
    let prompt = Prompt::chat(&[Message::system("Be brief."), Message::user("Hello")]);
    let text = serde_json::to_string(&prompt)?;
    assert_eq!(
        text,
        r#"{"chat":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hello"}]}"#
    );
    assert_eq!(serde_json::from_str::<Prompt>(&text)?, prompt);
    Ok(())
}
