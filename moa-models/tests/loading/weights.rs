use std::fs;

use moa_models::{Dtype, Error, Weights};
use proptest::prelude::*;

use crate::moa_tiny;

/// The bytes of a safetensors file with this header and `len` bytes of data, counting up.
fn file(header: &str, len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..len).map(|i| i as u8));
    bytes
}

fn tensor(name: &str, dtype: &str, shape: &[usize], begin: usize, end: usize) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
}

/// Opens a folder with these bytes as its only weights file.
fn open(bytes: &[u8]) -> Result<Weights, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Weights::open(dir.path())
}

/// Opens a folder with these shards, each of one F32 tensor of 1 element, and this index.
fn open_shards(shards: &[(&str, &str)], index: &[(&str, &str)]) -> Result<Weights, Error> {
    let dir = tempfile::tempdir().unwrap();
    for (shard, name) in shards {
        let header = format!("{{{}}}", tensor(name, "F32", &[1], 0, 4));
        fs::write(dir.path().join(shard), file(&header, 4)).unwrap();
    }
    let entries: Vec<_> = index.iter().map(|(k, v)| format!("\"{k}\":\"{v}\"")).collect();
    let text = format!("{{\"metadata\":{{}},\"weight_map\":{{{}}}}}", entries.join(","));
    fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    Weights::open(dir.path())
}

#[track_caller]
fn rejected(bytes: &[u8], reason: &str) {
    match open(bytes) {
        Err(Error::Safetensors { path, reason: got }) => {
            assert!(path.ends_with("model.safetensors"), "{}", path.display());
            assert!(got.contains(reason), "{got}");
        }
        other => panic!("expected `{reason}`, got {other:?}"),
    }
}

#[test]
fn elements_of_the_three_types() -> Result<(), Error> {
    let parts = [
        tensor("a", "F32", &[1, 2], 0, 8),
        tensor("b", "F16", &[2], 8, 12),
        tensor("c", "BF16", &[2], 12, 16),
    ];
    let mut bytes = file(&format!("{{{}}}", parts.join(",")), 0);
    bytes.extend([1.5f32, -2.0].into_iter().flat_map(f32::to_le_bytes));
    bytes.extend([1.5f32, -2.0].into_iter().flat_map(|x| half::f16::from_f32(x).to_le_bytes()));
    bytes.extend([1.5f32, -2.0].into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes()));
    let weights = open(&bytes)?;
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!((weights.len_bytes(), weights.contains("d")), (16, false));
    for (name, shape, dtype) in
        [("a", &[1, 2][..], Dtype::F32), ("b", &[2], Dtype::F16), ("c", &[2], Dtype::Bf16)]
    {
        let tensor = weights.tensor(name, shape)?;
        assert_eq!((tensor.dtype(), tensor.shape()), (Some(dtype), shape));
        assert_eq!(tensor.bytes().len(), 2 * dtype.bytes());
        assert_eq!(tensor.to_f32().unwrap(), [1.5, -2.0]);
    }
    Ok(())
}

#[test]
fn wrong_shape_missing_tensor_and_integers_are_errors() -> Result<(), Error> {
    let header =
        format!("{{{},{}}}", tensor("a", "F32", &[2, 3], 0, 24), tensor("i", "I8", &[4], 24, 28));
    let weights = open(&file(&header, 28))?;
    match weights.tensor("a", &[3, 2]) {
        Err(Error::TensorShape { name, expected, got, .. }) => {
            assert_eq!((name.as_str(), expected, got), ("a", vec![3, 2], vec![2, 3]));
        }
        other => panic!("{other:?}"),
    }
    let error = weights.tensor("i", &[4]).unwrap_err();
    assert!(matches!(&error, Error::TensorDtype { got, .. } if got == "I8"), "{error}");
    assert!(error.to_string().contains("quantised"), "{error}");
    let error = weights.tensor("b", &[1]).unwrap_err();
    assert!(matches!(&error, Error::TensorMissing { name, .. } if name == "b"), "{error}");
    Ok(())
}

#[test]
fn truncated_at_any_byte_is_an_error() {
    let whole = file(&format!("{{{}}}", tensor("a", "F32", &[2], 0, 8)), 8);
    assert!(open(&whole).is_ok());
    for len in 0..whole.len() {
        let result = open(&whole[..len]);
        assert!(matches!(result, Err(Error::Safetensors { .. })), "{len}: {result:?}");
    }
    rejected(&[&whole[..], &[0]].concat(), "not fully covered");
}

proptest! {
    #[test]
    fn a_changed_byte_never_leads_outside_the_file(at in 0usize..140, value: u8) {
        let parts = [tensor("a", "F32", &[2], 0, 8), tensor("b", "F16", &[1, 2], 8, 12)];
        let mut bytes = file(&format!("{{{}}}", parts.join(",")), 12);
        let at = at.min(bytes.len() - 1);
        bytes[at] = value;
        if let Ok(weights) = open(&bytes) {
            for (name, shape) in [("a", &[2][..]), ("b", &[1, 2])] {
                if let Ok(tensor) = weights.tensor(name, shape) {
                    let elements: usize = shape.iter().product();
                    prop_assert_eq!(tensor.bytes().len(), elements * tensor.dtype().map_or(0, Dtype::bytes));
                }
            }
        }
    }
}

#[test]
fn overlaps_gaps_and_wrong_sizes_are_errors() {
    let two = |a: (usize, usize), b: (usize, usize)| {
        format!("{{{},{}}}", tensor("a", "F32", &[1], a.0, a.1), tensor("b", "F32", &[1], b.0, b.1))
    };
    assert!(open(&file(&two((0, 4), (4, 8)), 8)).is_ok());
    rejected(&file(&two((0, 4), (2, 6)), 6), "invalid offset");
    rejected(&file(&two((0, 4), (8, 12)), 12), "invalid offset");
    rejected(&file(&two((4, 0), (0, 4)), 4), "invalid offset");
    let one = |shape: &[usize], end| format!("{{{}}}", tensor("a", "F32", shape, 0, end));
    rejected(&file(&one(&[3], 8), 8), "invalid shape");
    rejected(&file(&one(&[usize::MAX, 2], 8), 8), "overflow");
}

#[test]
fn bad_headers_are_errors() {
    rejected(&file("{\"a\":", 0), "JSON");
    rejected(&file("[]", 0), "JSON");
    let mut huge = 100_000_001u64.to_le_bytes().to_vec();
    huge.extend([b' '; 64]);
    rejected(&huge, "header too large");
    rejected(&[0xff; 64], "header too large");
    rejected(b"<!DOCTYPE html><html></html>", "begins with `<!DOCTYPE html><`");
    let mut long = 1000u64.to_le_bytes().to_vec();
    long.extend([b' '; 64]);
    rejected(&long, "invalid header length");
    // The last of two equal keys would win silently.
    let twice = tensor("a", "F32", &[1], 0, 4);
    rejected(&file(&format!("{{{twice},{twice}}}"), 4), "duplicate key `a`");
}

#[test]
fn folder_without_safetensors_says_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Weights::open(dir.path()), Err(Error::NoWeights { .. })));
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = Weights::open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::NoWeights { got, .. } if got == "pytorch_model.bin"),
        "{error}"
    );
    assert!(matches!(Weights::open(dir.path().join("nowhere")), Err(Error::Io { .. })));
}

#[test]
fn index_must_tell_the_truth() -> Result<(), Error> {
    let shards = [("1.safetensors", "a"), ("2.safetensors", "b")];
    let good = [("a", "1.safetensors"), ("b", "2.safetensors")];
    let weights = open_shards(&shards, &good)?;
    assert_eq!(weights.tensor("b", &[1])?.bytes(), [0, 1, 2, 3]);

    match open_shards(&shards[..1], &good) {
        Err(Error::ShardMissing { shard, .. }) => assert_eq!(shard, "2.safetensors"),
        other => panic!("{other:?}"),
    }
    // What the index says of tensors that no model asks for is no matter.
    let weights = open_shards(&shards, &[&good[..], &[("c", "1.safetensors")]].concat())?;
    assert!(matches!(weights.tensor("c", &[1]), Err(Error::TensorMissing { .. })));
    // The same tensor twice is fine, two tensors of one name are not.
    open_shards(&[("1.safetensors", "a"), ("2.safetensors", "a")], &good)?;
    let dir = tempfile::tempdir().unwrap();
    for (shard, len) in [("m-00001-of-00002.safetensors", 4), ("m-00002-of-00002.safetensors", 8)] {
        let header = format!("{{{}}}", tensor("a", "F32", &[len / 4], 0, len));
        fs::write(dir.path().join(shard), file(&header, len)).unwrap();
    }
    match Weights::open(dir.path()) {
        Err(Error::TensorTwice { name, first, second }) => {
            assert!(name == "a" && first.ends_with("m-00001-of-00002.safetensors"));
            assert!(second.ends_with("m-00002-of-00002.safetensors"));
        }
        other => panic!("{other:?}"),
    }
    for shard in ["../1.safetensors", "/etc/passwd", "a/b", "..", "", "c:x", "a\\\\b"] {
        let result = open_shards(&shards, &[("a", shard)]);
        assert!(matches!(result, Err(Error::ShardName { .. })), "{shard}: {result:?}");
    }
    Ok(())
}

#[test]
fn index_without_weight_map_is_an_error() {
    let open = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        Weights::open(dir.path())
    };
    assert!(matches!(open("{}"), Err(Error::MissingField { .. })));
    assert!(matches!(open(r#"{"weight_map":{"a":1}}"#), Err(Error::Config { .. })));
    let twice = r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#;
    assert!(matches!(open(twice), Err(Error::Json { .. })));
}

#[test]
fn a_tensor_outlives_its_weights() -> Result<(), Error> {
    let tensor = {
        let weights = Weights::open(moa_tiny())?;
        weights.tensor("model.norm.weight", &[256])?
    };
    assert!(tensor.clone().to_f32().unwrap().iter().all(|x| x.is_finite()));
    Ok(())
}

#[test]
fn fingerprint_is_of_the_tensors_not_of_the_files() -> Result<(), Error> {
    let two = format!("{{{},{}}}", tensor("a", "F32", &[1], 0, 4), tensor("b", "F32", &[1], 4, 8));
    let mut bytes = file(&two, 8);
    // The two shards both hold the bytes 0 to 3.
    let data = bytes.len() - 8;
    bytes.copy_within(data..data + 4, data + 4);
    let single = open(&bytes)?.fingerprint();
    let shards = [("1.safetensors", "a"), ("2.safetensors", "b")];
    let index = [("a", "1.safetensors"), ("b", "2.safetensors")];
    assert_eq!(single, open_shards(&shards, &index)?.fingerprint());
    // FNV-1a of `a\nF32 [1]\n` 00 01 02 03 `b\nF32 [1]\n` 00 01 02 03, computed apart.
    assert_eq!(single, FINGERPRINT);
    bytes[data] ^= 1;
    assert_ne!(single, open(&bytes)?.fingerprint());
    let other = two.replace("\"b\"", "\"c\"");
    assert_ne!(single, open(&file(&other, 8))?.fingerprint());
    Ok(())
}

const FINGERPRINT: &str = "b2564407191306ae";

proptest! {
    #[test]
    fn slices_are_those_of_the_whole(
        dtype in prop_oneof![Just(("F32", 4)), Just(("BF16", 2))],
        (rows, cols) in (1usize..9, 1usize..9),
        shift in 0usize..3,
        cuts in prop::collection::vec((0usize..9, 0usize..9), 0..4),
    ) {
        let (name, size) = dtype;
        let len = rows * cols * size;
        // What lies before the tensor may leave it at any address.
        let parts = [
            tensor("before", "U8", &[shift], 0, shift),
            tensor("w", name, &[rows, cols], shift, shift + len),
        ];
        let weights = open(&file(&format!("{{{}}}", parts.join(",")), shift + len)).unwrap();
        let whole = weights.tensor("w", &[rows, cols]).unwrap();
        let values: Vec<u32> = whole.to_f32().unwrap().iter().map(|x| x.to_bits()).collect();
        let within = |count: usize| -> Vec<std::ops::Range<usize>> {
            let range = |(a, b): &(usize, usize)| a.min(b) % (count + 1)..a.max(b) % (count + 1);
            cuts.iter().map(range).filter(|range| range.start <= range.end).collect()
        };
        let of = |tensor: &moa_models::MappedTensor| -> Vec<u32> {
            tensor.to_f32().unwrap().iter().map(|x| x.to_bits()).collect()
        };

        let picked: Vec<usize> = within(rows).into_iter().flatten().collect();
        let some = whole.rows(&within(rows)).unwrap();
        let expected: Vec<u32> =
            picked.iter().flat_map(|row| values[row * cols..(row + 1) * cols].to_vec()).collect();
        prop_assert_eq!((some.shape(), of(&some)), (&[picked.len(), cols][..], expected));

        let picked: Vec<usize> = within(cols).into_iter().flatten().collect();
        let some = whole.columns(&within(cols)).unwrap();
        let row = |row: usize| picked.iter().map(move |col| row * cols + col).collect::<Vec<_>>();
        let expected: Vec<u32> = (0..rows).flat_map(row).map(|place| values[place]).collect();
        prop_assert_eq!((some.shape(), of(&some)), (&[rows, picked.len()][..], expected));

        let beyond = whole.columns(&[0..1, 1..cols + 1]).unwrap_err();
        let named = matches!(beyond, Error::Invalid { what: "columns of a weight", .. });
        prop_assert!(named, "{beyond}");
        let beyond = whole.rows(&[0..1, rows + 1..rows + 1]).unwrap_err();
        let named = matches!(beyond, Error::Invalid { what: "rows of a weight", .. });
        prop_assert!(named, "{beyond}");
    }
}

#[test]
fn shards_without_an_index_are_read_if_all_are_there() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let write = |shard: &str, name: &str| {
        let header = format!("{{{}}}", tensor(name, "F32", &[1], 0, 4));
        fs::write(dir.path().join(shard), file(&header, 4)).unwrap();
    };
    write("model-00001-of-00002.safetensors", "a");
    let error = Weights::open(dir.path()).unwrap_err();
    let missing = "model-00002-of-00002.safetensors";
    assert!(matches!(&error, Error::ShardMissing { shard, .. } if shard == missing), "{error}");
    write(missing, "b");
    assert_eq!(Weights::open(dir.path())?.names().collect::<Vec<_>>(), ["a", "b"]);
    write("other-00001-of-00001.safetensors", "c");
    let error = Weights::open(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::NoWeights { got, .. } if got.contains("other")), "{error}");
    Ok(())
}

#[test]
fn names_without_a_prefix_or_behind_a_wrappers_are_found() -> Result<(), Error> {
    for (embedding, norm, output) in [
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        ("embed_tokens.weight", "norm.weight", "lm_head.weight"),
        ("w.model.embed_tokens.weight", "w.model.norm.weight", "w.lm_head.weight"),
        (
            "model.language_model.embed_tokens.weight",
            "model.language_model.norm.weight",
            "lm_head.weight",
        ),
    ] {
        let parts: Vec<_> = [embedding, norm, output]
            .iter()
            .enumerate()
            .map(|(i, name)| tensor(name, "F32", &[1], 4 * i, 4 * i + 4))
            .collect();
        let weights = open(&file(&format!("{{{}}}", parts.join(",")), 12))?;
        for (i, name) in
            ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].iter().enumerate()
        {
            assert!(weights.contains(name), "{name} of {embedding}");
            assert_eq!(weights.tensor(name, &[1])?.bytes()[0] as usize, 4 * i, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_pointer_of_git_lfs_says_what_to_do() {
    let error =
        open(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n").unwrap_err();
    assert!(matches!(&error, Error::LfsPointer { .. }), "{error}");
}
