//! Compressions that write a profile and a plan over older ones, and go on from the profile.

use std::fs;
use std::path::Path;

use moa_core::{Plan, Profile};
use moa_models::{
    CalibrationData, CalibrationPrompt, CompressOptions, Error, Result, compress, compress_profile,
};

use crate::calls::{Fault, count, with_fault};
use crate::world::{Random, checkpoint, faults};

/// What `moa compress --save-profile` does, or with a profile `moa compress --profile`.
fn run(folder: &Path, seed: u64, resumes: bool) -> Result<()> {
    let options = CompressOptions {
        density: 0.5,
        lengths: vec![96],
        samples: 2,
        max_response: 4,
        validation_length: Some(96),
        validation_samples: 1,
        text_samples: 0,
        evaluations: Some(0),
        seed,
        ..CompressOptions::default()
    };
    let prompts = CalibrationPrompt::load(folder.join("data.jsonl"))?;
    let data = CalibrationData::Prompts(prompts);
    if resumes {
        let profile = Profile::load(folder.join("profile.safetensors"))?;
        let found = compress_profile(checkpoint(), &data, profile, &options, &mut ())?;
        return Ok(found.plan.save(folder.join("plan.json"))?);
    }
    let found = compress(checkpoint(), &data, &options, &mut ())?;
    found.profile.save(folder.join("profile.safetensors"))?;
    Ok(found.plan.save(folder.join("plan.json"))?)
}

/// The profile and the plan that lie there, which can be read.
fn read(folder: &Path) -> (Profile, Plan) {
    let profile = Profile::load(folder.join("profile.safetensors")).expect("a whole profile");
    (profile, Plan::load(folder.join("plan.json")).expect("a whole plan"))
}

/// A run that was told of its failure leaves no files of its own; one that is killed may.
fn sweep(folder: &Path, fault: Fault, place: &str) {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let strays: Vec<_> = entries.filter(|path| path.extension() == Some("tmp".as_ref())).collect();
    assert!(strays.is_empty() || fault == Fault::Killed, "{place}: {strays:?}");
    strays.iter().for_each(|path| fs::remove_file(path).unwrap());
}

#[test]
fn profiles_and_plans_are_old_or_new_ones() {
    let _alone = crate::world::alone();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let line = |i: usize| {
        let prompt = format!("{i} {}", "word ".repeat(60 + i));
        format!("{}\n", serde_json::json!({ "prompt": prompt, "answer": format!("{}", i * 7) }))
    };
    fs::write(folder.join("data.jsonl"), (0..9).map(line).collect::<String>()).unwrap();
    // Two sets of files that are not alike.
    let sets = [0, 1].map(|seed| {
        run(folder, seed, false).unwrap();
        read(folder)
    });
    assert_ne!(sets[0].0, sets[1].0);
    let calls = count(|| run(folder, 1, false).unwrap());

    let mut random = Random::new(2);
    let (mut tried, mut refused, mut killed, mut now) = (0, 0, 0, 1);
    while tried < faults(100) {
        let next = 1 - now;
        let fault = Fault::ALL[random.below(Fault::ALL.len() as u64) as usize];
        let at = 1 + random.below(calls);
        let (result, happened) = with_fault(fault, at, || run(folder, next, false));
        let number = tried;
        let place = || format!("fault {number}: {fault:?} at {at}, {result:?}");
        let (profile, plan) = read(folder);
        let of = |found: &dyn Fn(usize) -> bool| [now, next].map(|set| found(set as usize));
        let [_, is_new] = of(&|set| sets[set].0 == profile);
        let [was_plan, is_plan] = of(&|set| sets[set].1.rules() == plan.rules());
        assert!(is_new || sets[now as usize].0 == profile, "{}", place());
        assert!(was_plan || is_plan, "{}", place());
        // The plan comes after its profile.
        assert!(is_new || was_plan, "{}", place());
        match &result {
            Ok(()) => assert!(is_new && is_plan, "{}", place()),
            Err(Error::Io { .. } | Error::Core(moa_core::Error::Io { .. })) => refused += 1,
            Err(_) => panic!("{}", place()),
        }
        sweep(folder, fault, &place());
        killed += u64::from(fault == Fault::Killed && result.is_err());
        tried += u64::from(happened);
        // Goes on from the profile that is there, through a fault more.
        let (seed, at) = (if is_new { next } else { now }, 1 + random.below(calls + 1));
        let (_, happened) = with_fault(fault, at, || run(folder, seed, true));
        sweep(folder, fault, &format!("{}, then {fault:?} at {at}", place()));
        let (still, plan) = read(folder);
        assert_eq!(still, profile, "{}", place());
        assert!(sets.iter().any(|set| set.1.rules() == plan.rules()), "{}", place());
        run(folder, seed, true).unwrap();
        assert_eq!(read(folder).1.rules(), sets[seed as usize].1.rules(), "{}", place());
        tried += u64::from(happened);
        now = seed;
    }
    println!(
        "{tried} faults in compressions of {calls} calls: {refused} refused, {killed} of them killed; none lost, none mixed"
    );
}
