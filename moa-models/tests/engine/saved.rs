//! Sequences that are saved and restored.

use moa_core::{CacheType, Dtype, Plan};
use moa_models::{
    ChatSession, ChatTemplate, Checkpoint, Cpu, Decoder, EngineOptions, Error, LogitRows,
    PromptStyle, Result, Sequence, fingerprint,
};

use crate::{checkpoint, full, greedy, moa_tiny, narrow, read, step, text, tiny};

#[test]
fn a_restored_sequence_goes_on_bit_for_bit() -> Result<()> {
    let text = text(150);
    for (plan, slack) in [(full(), 0), (narrow(), 0), (narrow(), 6)] {
        for held in [3, 40, 120] {
            let mut sequence = tiny().open(&plan, 200, slack)?;
            read(&mut sequence, &text[..held], 64)?;
            let bytes = tiny().save_sequence(&sequence, &text[..held])?;
            let (mut again, tokens) = tiny().restore_sequence(&plan, &bytes)?;
            assert_eq!((&tokens[..], again.capacity()), (&text[..held], 200));
            assert_eq!(again.can_truncate(held - 2), sequence.can_truncate(held - 2));
            assert_eq!(tiny().kv_bytes(&again), tiny().kv_bytes(&sequence));
            for token in &text[held..held + 8] {
                assert_eq!(step(&mut again, &[*token])?, step(&mut sequence, &[*token])?);
            }
            assert_eq!(read(&mut again, &text[..30], 64)?, read(&mut sequence, &text[..30], 64)?);
        }
    }
    Ok(())
}

#[test]
fn an_offloaded_sequence_goes_on_bit_for_bit() -> Result<()> {
    let text = text(150);
    let mut sequence = tiny().open(&narrow(), 200, 6)?;
    read(&mut sequence, &text[..120], 64)?;
    let offloaded = tiny().offload(&sequence)?;
    let mut again = tiny().reload(&offloaded)?;
    assert_eq!(offloaded.capacity(), sequence.capacity());
    for len in 100..121 {
        assert_eq!(offloaded.can_truncate(len), sequence.can_truncate(len), "{len}");
    }
    assert!(!offloaded.can_truncate(121));
    tiny().truncate(&mut again, 116)?;
    tiny().truncate(&mut sequence, 116)?;
    for token in &text[120..130] {
        assert_eq!(step(&mut again, &[*token])?, step(&mut sequence, &[*token])?);
    }
    let other = Checkpoint::open(Cpu::default(), moa_tiny())?.model;
    assert!(matches!(other.reload(&offloaded), Err(Error::Invalid { what: "sequence", .. })));
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_its_place() -> Result<()> {
    let text = text(60);
    let mut sequence = tiny().open(&narrow(), 100, 0)?;
    read(&mut sequence, &text, 64)?;
    let bytes = tiny().save_sequence(&sequence, &text)?;
    let place = |result: Result<(Sequence<Cpu>, Vec<u32>)>| match result {
        Err(Error::SavedSequence { place, .. }) => place,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was taken"),
    };
    let of = |bytes: &[u8]| place(tiny().restore_sequence(&narrow(), bytes));
    assert_eq!(place(tiny().restore_sequence(&full(), &bytes)), "plan, layer 0, KV head 0");
    let bf16 = Checkpoint::open(Cpu::new(Dtype::Bf16), moa_tiny())?.model;
    assert_eq!(place(bf16.restore_sequence(&narrow(), &bytes)), "type of the cache");
    assert_eq!((of(b""), of(b"{}")), ("beginning".into(), "beginning".into()));
    for cut in [10, 15, 40, bytes.len() / 2, bytes.len() - 1] {
        let place = of(&bytes[..cut]);
        assert!(["version", "header", "checksum"].contains(&&place[..]), "{cut}: {place}");
    }
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert_eq!(of(&newer), "version");
    for at in [30, bytes.len() / 2, bytes.len() - 3] {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert_eq!(of(&changed), "checksum", "byte {at}");
    }
    assert!(matches!(
        tiny().save_sequence(&sequence, &text[..9]),
        Err(Error::Invalid { what: "tokens", .. })
    ));
    assert!(tiny().restore_sequence(&narrow(), &bytes).is_ok());
    Ok(())
}

#[test]
fn a_conversation_goes_on_where_it_was_saved() -> Result<()> {
    let mut chat = ChatSession::new(checkpoint(), &narrow(), 400)?;
    chat.answer("Line 7 is 4711. What is in line 7?", greedy(6))?;
    let bytes = chat.save()?;
    let options = EngineOptions::default();
    let mut again = ChatSession::restore(checkpoint(), &narrow(), &bytes, options)?;
    assert_eq!((again.messages(), again.cached_tokens()), (chat.messages(), chat.cached_tokens()));
    chat.take_usage();
    let (one, other) =
        (chat.answer("And in line 8?", greedy(6))?, again.answer("And in line 8?", greedy(6))?);
    assert_eq!(one, other);
    assert_eq!(chat.take_usage().prompt_tokens, again.take_usage().prompt_tokens);
    Ok(())
}

#[test]
fn a_conversation_of_another_template_is_refused() -> Result<()> {
    let bytes = ChatSession::new(checkpoint(), &narrow(), 400)?.save()?;
    let (mut chatml, mut raw) = (checkpoint().clone(), checkpoint().clone());
    chatml.set_template(ChatTemplate::chatml());
    raw.set_prompt_style(PromptStyle::Raw);
    for other in [&chatml, &raw] {
        let restored = ChatSession::restore(other, &narrow(), &bytes, EngineOptions::default());
        match restored.map(|_| ()) {
            Err(Error::SavedSequence { place, .. }) => assert!(place.starts_with("chat template")),
            wrong => panic!("{wrong:?}"),
        }
        let own = ChatSession::new(other, &narrow(), 400)?.save()?;
        ChatSession::restore(other, &narrow(), &own, EngineOptions::default())?;
    }
    // Tokens alone are no conversation.
    let sequence = tiny().save_sequence(&tiny().open(&narrow(), 400, 0)?, &[])?;
    let restored =
        ChatSession::restore(checkpoint(), &narrow(), &sequence, EngineOptions::default());
    assert!(matches!(restored, Err(Error::SavedSequence { .. })));
    Ok(())
}

/// The types of cache in turn, or the device's own, so that each layer has several.
fn mixed(plan: Plan) -> Result<Plan> {
    let types = [None].into_iter().chain(CacheType::ALL.map(Some)).cycle();
    let heads = plan.shape().layers * plan.shape().kv_heads;
    Ok(plan.with_cache_types(types.take(heads).collect())?)
}

/// The logits after each of these tokens, one step each.
fn each(model: &Decoder<Cpu>, of: &mut Sequence<Cpu>, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let step = |token: &u32| {
        let logits = model.forward(&mut [&mut *of], &[&[*token]], LogitRows::Last)?;
        Ok(logits.into_data())
    };
    tokens.iter().map(step).collect()
}

#[test]
fn caches_of_every_type_are_restored_bit_for_bit() -> Result<()> {
    let text = text(84);
    let (before, after) = text.split_at(80);
    let mut sizes = Vec::new();
    for own in CacheType::ALL {
        let model = Checkpoint::open(Cpu::new(own), moa_tiny())?.model;
        for plan in [narrow(), mixed(narrow())?] {
            let mut sequence = model.open(&plan, 100, 3)?;
            model.prefill(&mut sequence, before, 64)?;
            let bytes = model.save_sequence(&sequence, before)?;
            let (mut again, tokens) = model.restore_sequence(&plan, &bytes)?;
            assert_eq!(tokens, before);
            assert_eq!(model.kv_bytes(&again), model.kv_bytes(&sequence));
            assert_eq!(
                each(&model, &mut again, after)?,
                each(&model, &mut sequence, after)?,
                "{own}"
            );
            sizes.push(bytes.len());
        }
    }
    // What is written is as narrow as what is held.
    assert!(sizes[0] > 3 * sizes[6] && sizes[6] > sizes[12], "{sizes:?}");
    Ok(())
}

#[test]
fn a_plan_of_other_types_is_refused() -> Result<()> {
    let text = text(20);
    let plans = [narrow(), mixed(narrow())?];
    for (own, other) in [(0, 1), (1, 0)] {
        let mut sequence = tiny().open(&plans[own], 100, 0)?;
        read(&mut sequence, &text, 64)?;
        let bytes = tiny().save_sequence(&sequence, &text)?;
        let Err(Error::SavedSequence { place, expected, got }) =
            tiny().restore_sequence(&plans[other], &bytes)
        else {
            panic!("it was taken");
        };
        // The first head has the device's own type in both.
        assert_eq!(place, "plan, layer 0, KV head 1");
        let mut told = [expected, got];
        told.sort();
        assert_eq!(told, ["f32", "the device's cache type"]);
    }
    Ok(())
}

#[test]
fn keys_less_another_mean_are_refused() -> Result<()> {
    let model = Checkpoint::open(Cpu::new(CacheType::Int4), moa_tiny())?.model;
    let text = text(20);
    let mut sequence = model.open(&narrow(), 100, 0)?;
    model.prefill(&mut sequence, &text, 64)?;
    let mut bytes = model.save_sequence(&sequence, &text)?;
    let name = b"\"key_means\":\"";
    let found = bytes.windows(name.len()).position(|part| part == name);
    let digit = &mut bytes[found.expect("keys of 4 bits have a mean") + name.len()];
    *digit = if *digit == b'0' { b'1' } else { b'0' };
    let data = bytes.len() - 16;
    let checksum = fingerprint(&bytes[..data]);
    bytes[data..].copy_from_slice(checksum.as_bytes());
    let Err(Error::SavedSequence { place, .. }) = model.restore_sequence(&narrow(), &bytes) else {
        panic!("it was taken");
    };
    assert_eq!(place, "key_means");
    Ok(())
}
