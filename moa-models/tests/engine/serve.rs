//! Requests that come and go: none of them changes what another gets.

use std::collections::BTreeMap;

use moa_models::{
    Cpu, Error, Finish, GenerateOptions, Generated, Next, Request, Result, SamplingOptions,
    Sequence, Served,
};

use crate::{continued, greedy, narrow, text, tiny};

fn request(id: u64, prompt: &[u32], options: &GenerateOptions) -> Result<Request<Cpu>> {
    let sequence = tiny().open(&narrow(), prompt.len() + options.max_new_tokens, 0)?;
    Ok(Request { id, sequence, prompt: prompt.to_vec(), options: options.clone() })
}

/// Serves requests, each handed over at the call of `next` given with it.
fn serve(mut requests: Vec<(usize, Request<Cpu>)>) -> Result<BTreeMap<u64, Generated>> {
    requests.sort_by_key(|(at, _)| *at);
    let mut requests = requests.into_iter().peekable();
    let (mut calls, mut most) = (0, 0);
    let (mut finished, mut told) = (BTreeMap::new(), BTreeMap::<u64, Vec<u32>>::new());
    tiny().serve(
        &mut |running| {
            calls += 1;
            most = most.max(running);
            // Nothing would come any more once this says so with nothing running.
            requests.next_if(|(at, _)| *at <= calls || running == 0).map(|(_, request)| request)
        },
        &mut |event| {
            match event {
                Served::Token { id, token } => told.entry(id).or_default().push(token),
                Served::Finished { id, generated, sequence } => {
                    assert!(sequence.len() < sequence.capacity());
                    finished.insert(id, generated);
                }
                Served::Refused { id, error } => panic!("{id}: {error}"),
            }
            Next::Continue
        },
    )?;
    assert!(most > 1, "requests ran together");
    for (id, generated) in &finished {
        assert_eq!(&generated.tokens, told.get(id).unwrap_or(&Vec::new()));
    }
    Ok(finished)
}

#[test]
fn requests_that_come_and_go_get_what_they_get_alone() -> Result<()> {
    let text = text(400);
    let prompts = [(0, 150, 12), (1, 31, 4), (4, 90, 20), (9, 200, 3), (9, 2, 9), (60, 40, 5)];
    for sampled in [false, true] {
        let options = |id: usize, new: usize| GenerateOptions {
            // Chunks of different sizes, so that prompts are read over several steps.
            prefill_chunk: 20 + 13 * id,
            sampling: SamplingOptions {
                temperature: if sampled && id.is_multiple_of(2) { 0.9 } else { 0.0 },
                seed: id as u64,
                ..SamplingOptions::default()
            },
            ..greedy(new)
        };
        let all = prompts.iter().enumerate();
        let requests = all.map(|(id, &(at, len, new))| {
            Ok((at, request(id as u64, &text[id..id + len], &options(id, new))?))
        });
        let served = serve(requests.collect::<Result<_>>()?)?;
        assert_eq!(served.len(), prompts.len());
        for (id, &(_, len, new)) in prompts.iter().enumerate() {
            let alone = continued(&narrow(), &text[id..id + len], &options(id, new))?;
            assert_eq!(served[&(id as u64)].tokens, alone, "request {id}");
            assert_eq!(served[&(id as u64)].finish, Finish::Length);
        }
    }
    Ok(())
}

#[test]
fn a_refused_request_stops_nobody() -> Result<()> {
    let text = text(60);
    let vocab = tiny().config().vocab_size as u32;
    let good = |id| request(id, &text, &greedy(6));
    let short = Request { sequence: tiny().open(&narrow(), 10, 0)?, ..good(2)? };
    let mut requests = vec![
        good(0)?,
        Request { prompt: vec![vocab], ..good(1)? },
        short,
        Request { prompt: Vec::new(), ..good(3)? },
        Request { options: GenerateOptions { prefill_chunk: 0, ..greedy(6) }, ..good(4)? },
        good(5)?,
    ]
    .into_iter();
    let (mut refused, mut finished) = (Vec::new(), Vec::new());
    tiny().serve(&mut |_| requests.next(), &mut |event| {
        match event {
            Served::Refused { id, error } => {
                assert!(matches!(error, Error::Invalid { .. } | Error::ContextExceeded { .. }));
                refused.push(id);
            }
            Served::Finished { id, generated, .. } => finished.push((id, generated.tokens)),
            Served::Token { .. } => {}
        }
        Next::Continue
    })?;
    assert_eq!(refused, [1, 2, 3, 4]);
    let alone = continued(&narrow(), &text, &greedy(6))?;
    assert_eq!(finished, [(0, alone.clone()), (5, alone)]);
    Ok(())
}

#[test]
fn a_request_can_be_ended_and_all_can_be_cancelled() -> Result<()> {
    let text = text(90);
    let both = || -> Result<_> {
        Ok(vec![request(0, &text[..50], &greedy(20))?, request(1, &text, &greedy(9))?].into_iter())
    };
    let mut requests = both()?;
    let mut count = 0;
    let mut ended: Vec<(u64, Generated, Sequence<Cpu>)> = Vec::new();
    tiny().serve(&mut |_| requests.next(), &mut |event| match event {
        Served::Token { id: 0, .. } => {
            count += 1;
            if count == 3 { Next::Stop } else { Next::Continue }
        }
        Served::Finished { id, generated, sequence } => {
            ended.push((id, generated, sequence));
            Next::Continue
        }
        _ => Next::Continue,
    })?;
    assert_eq!((ended[0].0, ended[0].1.finish, ended[0].1.tokens.len()), (0, Finish::Stopped, 3));
    assert_eq!((ended[1].0, ended[1].1.finish), (1, Finish::Length));
    assert_eq!(ended[1].1.tokens, continued(&narrow(), &text, &greedy(9))?);
    // All new tokens but the last are in the sequence that comes back.
    assert_eq!(ended[0].2.len(), 52);

    let mut requests = both()?;
    let cancelled = tiny().serve(&mut |_| requests.next(), &mut |_| Next::Cancel);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    Ok(())
}
