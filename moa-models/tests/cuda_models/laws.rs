//! The output depends neither on chunks nor on the batch, and a sequence can be forked and rolled
//! back. Matrix products of other shapes may sum in another order, so "equal" allows for rounding,
//! but not where the shapes are the same.

use moa_conformance::{Trial, Verdict, trials};
use moa_core::SplitMix64;
use moa_models::{Cuda, Decoder, Device, LogitRows, Recordings, Sequence};

use crate::{alternating, close, cuda, plans, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        chunking_does_not_change_output,
        a_ragged_batch_equals_each_sequence_alone,
        forks_and_rolled_back_sequences_go_on_as_if_nothing_had_been,
        saved_and_offloaded_sequences_go_on_bit_for_bit,
        a_decoder_equals_single_steps,
        sequences_join_and_leave_what_is_recorded,
        of_too_many_recorded_steps_those_used_longest_ago_are_dropped,
        guesses_are_checked_and_forgotten_in_recorded_steps,
        repeats_are_bitwise_equal,
        threads_share_a_model,
    ]
}

fn chunking_does_not_change_output() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(300);
        for plan in &plans(model.shape()) {
            let whole = read(model, &mut model.open(plan, 300, 0).unwrap(), &tokens, 300);
            for chunk in [1, 7, 90] {
                let mut sequence = model.open(plan, 300, 0).unwrap();
                let got = read(model, &mut sequence, &tokens, chunk);
                close(&format!("chunks of {chunk}"), &got, &whole, share);
            }
        }
    }
    Ok(())
}

fn a_ragged_batch_equals_each_sequence_alone() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(400);
        for plan in &plans(model.shape()) {
            let lens = [130, 1, 57, 200];
            let mut batch: Vec<_> =
                lens.iter().map(|_| model.open(plan, 300, 0).unwrap()).collect();
            let mut alone: Vec<_> =
                lens.iter().map(|_| model.open(plan, 300, 0).unwrap()).collect();
            let mut at = [0; 4];
            // Prefill of different lengths, then steps that mix decode with more prompt.
            for round in [lens, [1, 1, 1, 1], [1, 30, 1, 2], [1, 1, 1, 1]] {
                let parts: Vec<&[u32]> =
                    round.iter().zip(&at).map(|(n, at)| &tokens[*at..at + n]).collect();
                let mut sequences: Vec<_> = batch.iter_mut().collect();
                let logits = model.forward(&mut sequences, &parts, LogitRows::Last).unwrap();
                let together = model.device().values(logits).unwrap();
                let each = parts.iter().zip(&mut alone).flat_map(|(part, sequence)| {
                    step(model, sequence, part).pop().expect("one row per token")
                });
                let each: Vec<f32> = each.collect();
                close(&format!("batch of {round:?}"), &together, &each, share);
                at.iter_mut().zip(round).for_each(|(at, n)| *at += n);
            }
        }
    }
    Ok(())
}

fn forks_and_rolled_back_sequences_go_on_as_if_nothing_had_been() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(220);
        for plan in &plans(model.shape()) {
            let mut straight = model.open(plan, 300, 8).unwrap();
            read(model, &mut straight, &tokens[..150], 150);
            let mut fork = model.fork(&straight).unwrap();
            // The fork goes its own way, and comes back.
            step(model, &mut fork, &tokens[200..208]);
            model.truncate(&mut fork, 150).unwrap();
            let expected = step(model, &mut straight, &tokens[150..180]);
            assert_eq!(step(model, &mut fork, &tokens[150..180]), expected);
            assert_eq!(model.kv_bytes(&fork), model.kv_bytes(&straight));
        }
    }
    Ok(())
}

/// With slots that were never written, and with rings that have wrapped.
fn saved_and_offloaded_sequences_go_on_bit_for_bit() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(220);
        for plan in &plans(model.shape()) {
            for held in [20, 150] {
                let mut sequence = model.open(plan, 300, 8).unwrap();
                read(model, &mut sequence, &tokens[..held], 150);
                let bytes = model.save_sequence(&sequence, &tokens[..held]).unwrap();
                let (restored, known) = model.restore_sequence(plan, &bytes).unwrap();
                assert_eq!(known, &tokens[..held]);
                let offloaded = model.offload(&sequence).unwrap();
                assert!(offloaded.bytes() <= model.kv_bytes(&sequence));
                let expected = step(model, &mut sequence, &tokens[held..held + 30]);
                for mut again in [restored, model.reload(&offloaded).unwrap()] {
                    assert_eq!(model.kv_bytes(&again), model.kv_bytes(&sequence));
                    assert_eq!(step(model, &mut again, &tokens[held..held + 30]), expected);
                }
            }
        }
    }
    Ok(())
}

/// The first steps are plain, then one runs by the plans for all lengths, then a graph is replayed.
fn a_decoder_equals_single_steps() -> Verdict {
    for (checkpoint, _) in cuda()? {
        decoder_equals_steps(&checkpoint.model);
    }
    Ok(())
}

pub(crate) fn decoder_equals_steps(model: &Decoder<Cuda>) {
    let tokens = prose(400);
    let vocab = model.config().vocab_size;
    for plan in &plans(model.shape()) {
        let lens = [130, 3, 57];
        let open = || {
            lens.map(|len| {
                let mut sequence = model.open(plan, len + 60, 0).unwrap();
                read(model, &mut sequence, &tokens[..len], 500);
                sequence
            })
        };
        let (replayed, mut plain) = (open(), open());
        let mut next = [5, 6, 7];
        let mut session = model.session(replayed.into()).unwrap();
        for round in 0..40 {
            let parts: Vec<&[u32]> = next.chunks(1).collect();
            let mut batch: Vec<_> = plain.iter_mut().collect();
            let expected = model.forward(&mut batch, &parts, LogitRows::Last).unwrap();
            let expected = model.device().values(expected).unwrap();
            let rows = expected.chunks(vocab);
            let likeliest: Vec<u32> = rows.map(crate::likeliest).collect();
            if round % 3 == 0 {
                let got = session.step(model, &next).unwrap();
                assert!(got == expected, "logits differ in round {round}");
            } else {
                assert_eq!(session.step_greedy(model, &next).unwrap(), likeliest, "round {round}");
            }
            // Not greedy: a small model would repeat itself.
            next = [0, 1, 2].map(|i| (likeliest[i] + round) % vocab as u32);
        }
        assert!(session.step(model, &[vocab as u32, 1, 1]).is_err());
        assert!(session.step(model, &[1, 1]).is_err());
        let mut replayed = session.into_sequences();
        // The sequences know what has happened, and have room for 20 more.
        for (replayed, plain) in replayed.iter_mut().zip(&mut plain) {
            assert_eq!(replayed.len(), plain.len());
            let more = &tokens[300..320];
            assert_eq!(step(model, replayed, more), step(model, plain, more));
        }
        let mut session = model.session(replayed).unwrap();
        assert!(session.step_greedy(model, &next).is_err(), "there is no room");
    }
}

fn sequences_join_and_leave_what_is_recorded() -> Verdict {
    for (checkpoint, _) in cuda()? {
        join_and_leave(&checkpoint.model);
    }
    Ok(())
}

/// In random order, of random lengths: steps have the bits of those that are not recorded, and few are recorded.
pub(crate) fn join_and_leave(model: &Decoder<Cuda>) {
    const CHANGES: usize = 60;
    let tokens = prose(400);
    let vocab = model.config().vocab_size;
    for (seed, plan) in (1..).zip(&plans(model.shape())) {
        let mut random = SplitMix64::new(seed);
        let mut recordings = Recordings::default();
        let (mut replayed, mut plain) = (Vec::new(), Vec::new());
        for change in 0..CHANGES {
            // Rather more at first, and fewer in the end.
            let many = if change < CHANGES / 2 { 20 } else { 2 };
            if replayed.is_empty() || random.below(many + 4) > replayed.len() {
                let len = 1 + random.below(250);
                let capacity = len + 10 + random.below(1500);
                for batch in [&mut replayed, &mut plain] {
                    let mut sequence = model.open(plan, capacity, 0).unwrap();
                    read(model, &mut sequence, &tokens[..len], 500);
                    batch.push(sequence);
                }
            } else {
                let at = random.below(replayed.len());
                replayed.remove(at);
                plain.remove(at);
            }
            let has_room = |sequence: &Sequence<Cuda>| sequence.len() + 5 <= sequence.capacity();
            replayed.retain(has_room);
            plain.retain(has_room);
            if replayed.is_empty() {
                continue;
            }
            let mut session =
                model.session_with(std::mem::take(&mut replayed), recordings).unwrap();
            for round in 0..5 {
                let next: Vec<u32> = plain.iter().map(|_| random.below(vocab) as u32).collect();
                let parts: Vec<&[u32]> = next.chunks(1).collect();
                let mut batch: Vec<_> = plain.iter_mut().collect();
                let expected = model.forward(&mut batch, &parts, LogitRows::Last).unwrap();
                let expected = model.device().values(expected).unwrap();
                let what = format!("change {change}, round {round}, {} sequences", next.len());
                if round % 2 == 0 {
                    assert!(session.step(model, &next).unwrap() == expected, "logits: {what}");
                } else {
                    let likeliest: Vec<u32> =
                        expected.chunks(vocab).map(crate::likeliest).collect();
                    assert_eq!(session.step_greedy(model, &next).unwrap(), likeliest, "{what}");
                }
            }
            (replayed, recordings) = session.into_parts();
        }
        println!("{} of {CHANGES} batches were recorded", recordings.count());
        // Each of them would be in a session that keeps nothing.
        assert!((1..=CHANGES / 4).contains(&recordings.count()), "{recordings:?}");
        let mut others = cuda().unwrap().into_iter().map(|(other, _)| &*other.model);
        let other = others.find(|other| !std::ptr::eq(*other, model)).unwrap();
        let sequence = other.open(plan, 10, 0).unwrap();
        assert!(other.session_with(vec![sequence], recordings).is_err(), "another model's");
    }
}

/// 24 are kept beside the one that ran last. Whatever was dropped, steps have the bits of those that are not recorded.
fn of_too_many_recorded_steps_those_used_longest_ago_are_dropped() -> Verdict {
    const MOST: usize = 25;
    let (checkpoint, _) = cuda()?[0];
    let model = &checkpoint.model;
    let [dense, _] = plans(model.shape());
    let vocab = model.config().vocab_size;
    let mut recordings = Recordings::default();
    // How often steps of so many sequences of this capacity have to be recorded.
    let mut run = |many: usize, capacity: usize| {
        let open = || (0..many).map(|_| model.open(&dense, capacity, 0).unwrap()).collect();
        let (replayed, mut plain): (Vec<_>, Vec<_>) = (open(), open());
        let before = recordings.count();
        let mut session = model.session_with(replayed, std::mem::take(&mut recordings)).unwrap();
        for round in 0..6 {
            let next: Vec<u32> = (0..many).map(|i| ((i + 7 * round) % vocab) as u32).collect();
            let parts: Vec<&[u32]> = next.chunks(1).collect();
            let mut batch: Vec<_> = plain.iter_mut().collect();
            let expected = model.forward(&mut batch, &parts, LogitRows::Last).unwrap();
            let expected = model.device().values(expected).unwrap();
            let got = session.step(model, &next).unwrap();
            assert!(got == expected, "{many} sequences of {capacity}, round {round}");
        }
        recordings = session.into_parts().1;
        recordings.count() - before
    };
    // Each is for more sequences than those before, or for sequences that need more work.
    let few = [1, 2, 4].map(|many| (many, 64));
    let many = [64, 1536, 4096]
        .into_iter()
        .flat_map(|capacity| [8, 16, 24, 32, 48, 64, 96, 128].map(|many| (many, capacity)));
    let batches: Vec<_> = few.into_iter().chain(many).take(MOST + 1).collect();
    assert_eq!(batches.len(), MOST + 1);
    for &(many, capacity) in &batches {
        assert_eq!(run(many, capacity), 1, "{many} sequences of {capacity}");
    }
    // The first one is gone, the second is the oldest that is kept.
    assert_eq!((run(2, 64), run(1, 64)), (0, 1));
    // For it went the oldest but the one that has run since.
    assert_eq!((run(2, 64), run(4, 64)), (0, 1));
    Ok(())
}

/// Beside steps of one token, which are recorded too: neither may rest on how many tokens the other has appended.
fn guesses_are_checked_and_forgotten_in_recorded_steps() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(400);
        for plan in &plans(model.shape()) {
            let lens = [130, 3];
            let open = || {
                lens.map(|len| {
                    let mut sequence = model.open(plan, len + 150, 8).unwrap();
                    read(model, &mut sequence, &tokens[..len], 500);
                    sequence
                })
            };
            let mut plain = open();
            let mut session = model.session(open().into()).unwrap();
            let wide = session.wide(5).expect("the GPU records steps");
            assert!((2..=5).contains(&wide));
            for round in 0..30 {
                let new = if round % 3 == 2 { 1 } else { wide };
                let parts = [0, 1].map(|i| tokens[5 * round + 40 * i..][..new].to_vec());
                let each = parts.each_ref().map(Vec::as_slice);
                let rows: Vec<usize> = (0..2 * new).collect();
                let before = plain.each_ref().map(|sequence| sequence.len());
                let mut batch: Vec<_> = plain.iter_mut().collect();
                let expected = model.forward(&mut batch, &each, LogitRows::Rows(&rows)).unwrap();
                let expected = model.device().values(expected).unwrap();
                let got = match new {
                    1 => session.step(model, &parts.concat()).unwrap(),
                    _ => session.check(model, &parts).unwrap(),
                };
                assert!(got == expected, "logits differ in round {round}");
                for (i, sequence) in plain.iter_mut().enumerate() {
                    let right = before[i] + 1 + (round + i) % new;
                    model.truncate(sequence, right).unwrap();
                    session.truncate(model, i, right).unwrap();
                }
            }
            let parts = vec![tokens[..wide].to_vec(); 2];
            let likeliest = session.check_greedy(model, &parts).unwrap();
            assert_eq!(likeliest.len(), 2 * wide);
            // A step of another width is not a recorded one.
            let short = vec![tokens[..1].to_vec(); 2];
            assert_eq!(session.check_greedy(model, &short).unwrap().len(), 2);
            assert!(session.truncate(model, 2, 1).is_err());
        }
    }
    Ok(())
}

fn repeats_are_bitwise_equal() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(150);
        let plan = alternating(model.shape(), 8, 24, 48);
        let run = || {
            let mut sequence = model.open(&plan, 160, 0).unwrap();
            let prompt = step(model, &mut sequence, &tokens[..149]);
            [prompt, step(model, &mut sequence, &tokens[149..])].concat()
        };
        let first = run();
        assert!((0..5).all(|_| run() == first));
    }
    Ok(())
}

/// Each thread prepares and captures graphs of its own while the others launch.
fn threads_share_a_model() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let tokens = prose(120);
        let [dense, _] = plans(model.shape());
        let run = |thread: usize| -> Vec<Vec<f32>> {
            let prompt = &tokens[..40 + 20 * thread];
            let mut sequence = model.open(&dense, 120, 0).unwrap();
            let mut all = vec![read(model, &mut sequence, prompt, 120)];
            let mut session = model.session(vec![sequence]).unwrap();
            all.extend((0..12).map(|i| session.step(model, &[tokens[i]]).unwrap()));
            all
        };
        let alone: Vec<_> = (0..4).map(run).collect();
        for _ in 0..5 {
            let together: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || run(i))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(together == alone);
        }
    }
    Ok(())
}
