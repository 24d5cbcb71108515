//! Influence: block sums, losses of spans, profile files.

use moa_core::{Error, Influence, ModelShape, Position, Profile, ProfileInfo, Span};

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };

/// Block sums of `E_ij` = 1 for every causal pair of a sequence of `length` tokens.
fn ones(length: usize, block: usize) -> Vec<f64> {
    let n = length.div_ceil(block);
    let mut blocks = vec![0.0; 2 * n * n];
    for i in 0..length {
        for j in 0..=i {
            for head in 0..2 {
                blocks[head * n * n + i / block * n + j / block] += 1.0;
            }
        }
    }
    blocks
}

#[test]
fn loss_counts_hidden_pairs() {
    let (length, block) = (48, 8);
    let mut influence = Influence::new(SHAPE, length, block).unwrap();
    for layer in 0..2 {
        influence.add_layer(layer, 6, &ones(length, block), 1.0).unwrap();
    }
    influence.count_sample();
    for sink in [0, 8, 11, 16] {
        for window in 1..=50 {
            let span = Span::new(sink, window).unwrap();
            let hidden = (0..length)
                .flat_map(|i| (0..=i).map(move |j| (i, j)))
                .filter(|(i, j)| !span.attends(Position(*i), Position(*j)))
                .count() as f64;
            let loss = influence.loss(1, 1, span);
            // Exact where the sink ends with a block; else the sink's block is spread evenly.
            let slack = if sink % block == 0 { 1e-9 } else { 12.0 };
            assert!(
                (loss - hidden).abs() <= slack,
                "sink {sink} window {window}: {loss} for {hidden}"
            );
        }
    }
}

#[test]
fn shards_merge_to_the_mean_over_samples() {
    let mut a = Influence::new(SHAPE, 32, 8).unwrap();
    let mut b = a.clone();
    for layer in 0..2 {
        a.add_layer(layer, 4, &ones(32, 8), 1.0).unwrap();
        // A shorter sample leaves the later blocks as they are.
        b.add_layer(layer, 3, &ones(24, 8), 3.0).unwrap();
    }
    a.count_sample();
    b.count_sample();
    let span = Span::new(0, 8).unwrap();
    let (alone, other) = (a.loss(0, 0, span), b.loss(0, 0, span));
    a.merge(&b).unwrap();
    assert_eq!(a.samples(), 2);
    assert!((a.loss(0, 0, span) - (alone + other) / 2.0).abs() < 1e-9);
    let longer = Influence::new(SHAPE, 64, 8).unwrap();
    assert!(matches!(a.merge(&longer), Err(Error::Invalid { .. })));
    let wider = Influence::new(ModelShape { layers: 3, ..SHAPE }, 32, 8).unwrap();
    assert!(matches!(a.merge(&wider), Err(Error::ShapeMismatch { .. })));
    assert!(a.add_layer(2, 4, &ones(32, 8), 1.0).is_err());
    assert!(a.add_layer(0, 4, &[0.0; 7], 1.0).is_err());
    assert!(Influence::new(SHAPE, 8, 9).is_err() && Influence::new(SHAPE, 0, 1).is_err());
}

fn profile() -> Profile {
    let info = ProfileInfo {
        fingerprint: Some("aa".into()),
        objective: "margin".into(),
        data: "test".into(),
    };
    let mut profile = Profile::new(SHAPE, info);
    for length in [32, 64] {
        let mut influence = Influence::new(SHAPE, length, 8).unwrap();
        influence.add_layer(0, length / 8, &ones(length, 8), 0.5).unwrap();
        influence.count_sample();
        influence.add_far_loss(1.5);
        profile.add(influence).unwrap();
    }
    profile
}

#[test]
fn a_saved_profile_loads_the_same_and_merges() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("profile.safetensors");
    profile().save(&path).unwrap();
    let mut loaded = Profile::load(&path).unwrap();
    assert_eq!(loaded, profile());
    loaded.add(profile().at(32).unwrap().clone()).unwrap();
    assert_eq!(loaded.at(32).unwrap().samples(), 2);
    assert_eq!(loaded.at(32).unwrap().far_losses().samples(), 2);
    assert!(!loaded.at(64).unwrap().far_losses().is_noise());
    match loaded.at(48) {
        Err(Error::UnknownLength { length: 48, available }) => assert_eq!(available, [32, 64]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_profile_files_are_typed_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("profile.safetensors");
    profile().save(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        match Profile::load(&path) {
            Err(Error::Format { path: p, reason }) => {
                assert_eq!(p, path);
                reason
            }
            other => panic!("{other:?}"),
        }
    };
    for cut in [0, 7, 20, good.len() - 1] {
        with(&good[..cut]);
    }
    let text = String::from_utf8_lossy(&good).into_owned();
    assert!(text.contains("moa-profile-1"));
    let mut other = good.clone();
    let at = text.find("moa-profile-1").unwrap();
    other[at..at + 3].copy_from_slice(b"moo");
    assert!(with(&other).contains("format"));
    let mut nan = good.clone();
    let end = nan.len();
    nan[end - 8..].copy_from_slice(&f64::NAN.to_le_bytes());
    assert!(with(&nan).contains("finite"));
    assert!(matches!(Profile::load(dir.path().join("none")), Err(Error::Io { .. })));
}
