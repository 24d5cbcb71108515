//! Files that are refused, by the place that is at fault.

use moa_models::{Checkpoint, Cpu, Error, ModelConfig, OpenOptions, Tensors as _};
use proptest::prelude::*;

use super::file::{BF16, F32, File, Value, moa_tiny};
use super::{config, open, small, written};

/// The place of a file's fault, what was expected there and what was found.
#[track_caller]
fn fault<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, String, String) {
    match result {
        Err(Error::Gguf { path, place, expected, got }) => {
            assert!(path.ends_with("model.gguf"), "{}", path.display());
            (place, expected, got)
        }
        other => panic!("expected a fault, got {other:?}"),
    }
}

#[track_caller]
fn refused(file: &File, place: &str, expected: &str) {
    let found = fault(open(&file.bytes()));
    assert!(found.0.contains(place) && found.1.contains(expected), "{found:?}");
}

fn two_tensors() -> File {
    let mut file = File::new();
    file.key("general.architecture", "llama").key("x", Value::U32(1));
    file.key("names", Value::Texts(vec!["a".into(), "b".into()]));
    file.tensor("a", &[8], F32, vec![1; 32]);
    file.tensor("b", &[4, 2], BF16, vec![2; 16]);
    file
}

#[test]
fn truncated_at_any_byte_is_an_error() {
    let whole = two_tensors().bytes();
    assert!(open(&whole).is_ok());
    for len in 1..whole.len() {
        fault(open(&whole[..len]));
    }
    // An empty file cannot be mapped everywhere.
    assert!(open(&[]).is_err());
}

#[test]
fn versions_2_and_3_are_read() {
    for (version, good) in [(0, false), (1, false), (2, true), (3, true), (4, false)] {
        let file = File { version, ..two_tensors() };
        assert_eq!(open(&file.bytes()).is_ok(), good, "{version}");
    }
    let big_endian = File { version: 3u32.swap_bytes(), ..two_tensors() };
    let (place, _, got) = fault(open(&big_endian.bytes()));
    assert!(place == "version" && got.contains("big-endian"), "{place} {got}");
    let mut magic = two_tensors().bytes();
    magic[0] = b'g';
    assert_eq!(fault(open(&magic)).0, "magic");
}

#[test]
fn names_and_keys_are_there_once() {
    let mut file = two_tensors();
    file.key("x", Value::U32(2));
    refused(&file, "key `x`", "once");
    let mut file = two_tensors();
    file.tensor("a", &[1], F32, vec![0; 4]);
    refused(&file, "tensor `a`", "once");
}

#[test]
fn tensors_lie_in_the_file_and_apart() {
    let at = |offset| {
        let mut file = two_tensors();
        file.tensors[1].offset = Some(offset);
        file
    };
    assert!(open(&at(32).bytes()).is_ok());
    refused(&at(0), "tensor `a`", "behind tensor `b`");
    refused(&at(33), "tensor `b`", "a multiple of 32");
    refused(&at(64), "tensor `b`", "within the file");
    refused(&at(u64::MAX - 31), "tensor `b`", "within the file");
    for axes in [vec![1 << 40, 1 << 40], vec![u64::MAX], vec![1 << 33]] {
        let mut file = two_tensors();
        file.tensors[0].axes = axes;
        refused(&file, "tensor `a`", "within the file");
    }
    for axes in [vec![], vec![1; 5], vec![0, 8]] {
        let mut file = two_tensors();
        file.tensors[0].axes = axes;
        refused(&file, "tensor `a`", "axes");
    }
    for alignment in [0, 24, 1 << 30] {
        let mut file = two_tensors();
        file.key("general.alignment", Value::U32(alignment));
        refused(&file, "general.alignment", "power of 2");
    }
}

#[test]
fn types_that_are_not_read_are_named() {
    for (kind, name) in [(10, "Q2_K"), (20, "IQ4_NL"), (26, "I32"), (99, "type 99")] {
        let mut file = two_tensors();
        file.tensors[0].kind = kind;
        let (place, expected, got) = fault(open(&file.bytes()));
        assert!(place == "tensor `a`" && expected.contains("Q4_K") && got == name, "{got}");
    }
    let mut file = two_tensors();
    file.tensors[0].kind = 8;
    refused(&file, "tensor `a`", "multiple of 32");
}

#[test]
fn counts_beyond_the_file_are_refused_before_memory_is_taken() {
    let whole = two_tensors().bytes();
    for (at, place) in [(8, "number of tensors"), (16, "number of keys"), (24, "a key")] {
        for count in [u64::MAX, 1 << 40, whole.len() as u64] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert_eq!(fault(open(&bytes)).0, place);
        }
    }
    let array = |kind: u32, len: u64| {
        let mut file = File::new();
        let bytes = [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
        file.key("list", Value::Raw(9, bytes));
        file
    };
    for kind in [0, 4, 8, 9, 12] {
        refused(&array(kind, u64::MAX), "key `list`", "at most");
    }
    refused(&array(13, 0), "key `list`", "a type from 0 to 12");
    let mut deep = File::new();
    let level = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    deep.key("deep", Value::Raw(9, level.repeat(1000)));
    refused(&deep, "key `deep`", "levels");
    let mut binary = File::new();
    binary.key("text", Value::Raw(8, [&1u64.to_le_bytes()[..], &[0xff]].concat()));
    refused(&binary, "key `text`", "UTF-8");
}

#[test]
fn keys_that_are_missing_or_wrong_are_named() {
    let (place, expected, got) = fault(config(&small("mamba")));
    assert!(place.contains("general.architecture") && expected.contains("qwen3"), "{expected}");
    assert_eq!(got, "mamba");
    for key in ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let key = format!("llama.{key}");
        let mut file = small("llama");
        file.keys.retain(|(name, _)| *name != key);
        assert!(fault(config(&file)).0.contains(&key));
        assert!(fault(config(file.key(&key, "many"))).0.contains(&key));
        assert!(fault(config(file.set(&key, Value::U32(0)))).0.contains(&key));
        let differ = Value::I32s(vec![1, 2]);
        assert!(fault(config(file.set(&key, differ))).0.contains(&key));
    }
    for (key, value) in [
        ("expert_count", Value::U32(8)),
        ("logit_scale", Value::F32(0.5)),
        ("rope.dimension_count", Value::U32(16)),
        ("rope.scaling.type", "longrope".into()),
    ] {
        let mut file = small("llama");
        file.key(&format!("llama.{key}"), value);
        assert!(fault(config(&file)).0.contains(key), "{key}");
    }
}

#[test]
fn heads_are_counted_within_bounds_and_have_rows_in_pairs() {
    let (key, name) = ("llama.attention.head_count", "blk.0.attn_q.weight");
    let mut file = small("llama");
    file.tensor(name, &[64, 64], F32, vec![0; 4 * 64 * 64]);
    // One number of 64 bits in an array.
    let many =
        [&11u32.to_le_bytes()[..], &1u64.to_le_bytes(), &(1i64 << 31).to_le_bytes()].concat();
    file.set(key, Value::Raw(9, many));
    let read = |file: &File| open(&file.bytes()).unwrap().tensor(name, &[64, 64]);
    assert!(fault(read(&file)).0.contains(key));
    file.set(key, Value::U32(24));
    assert_eq!(fault(read(&file)).0, format!("tensor `{name}`"));
    file.set(key, Value::U32(32));
    assert_eq!(read(&file).unwrap().shape(), [64, 64]);
}

#[test]
fn a_tensor_that_nobody_reads_is_an_error_or_ignored() {
    for name in ["blk.0.attn_q_norm.weight", "blk.9.attn_q.weight", "blk.0.attn_v.bias", "extra"] {
        let mut file = moa_tiny(&crate::moa_tiny(), BF16);
        file.tensor(name, &[32], F32, vec![0; 128]);
        let (_dir, path) = written(&file.bytes());
        let error = Checkpoint::open(Cpu::default(), &path).unwrap_err();
        assert!(
            matches!(&error, Error::TensorsUnread { names, .. } if *names == [name]),
            "{error}"
        );
        let options = OpenOptions::default().ignore_extra_tensors(true);
        options.open(Cpu::default(), &path).unwrap();
    }
}

#[test]
fn a_file_by_its_name_is_a_gguf_file() {
    let (_dir, path) = written(b"not at all");
    assert_eq!(fault(ModelConfig::from_file(&path)).0, "magic");
    assert_eq!(fault(Checkpoint::open(Cpu::default(), &path)).0, "magic");
}

proptest! {
    #[test]
    fn a_changed_byte_never_leads_outside_the_file(at in 0usize..400, value: u8) {
        let mut bytes = small("llama").bytes();
        let at = at.min(bytes.len() - 1);
        bytes[at] = value;
        let (_dir, path) = written(&bytes);
        if let Ok(gguf) = moa_models::Gguf::open(&path) {
            let names: Vec<String> = gguf.names().map(str::to_owned).collect();
            for name in names {
                if let Ok(tensor) = gguf.tensor(&name, &[4, 64]) {
                    prop_assert_eq!(tensor.to_f32().unwrap().len(), 256);
                }
            }
            let _ = ModelConfig::from_file(&path);
        }
    }
}
