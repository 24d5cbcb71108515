//! Memory that the operating system counts, in a process of its own.
#![cfg(target_os = "linux")]

use moa_backend_cpu::{CpuBackend, Tensor};
use moa_core::{Append, Dtype, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn only_written_slots_are_resident() {
    // Few long keys, so that the test is quick: a full head of which little is written, and a window.
    let (dim, capacity, window) = (1024, 1 << 16, 256);
    let backend = CpuBackend::new(Dtype::Bf16);
    let spans = [Span::full(capacity), Span::new(64, window - 64).unwrap()];
    let layout = LayerLayout::new(&spans, capacity, 0).unwrap();
    let step = Tensor::zeros(&[128, 2, dim]).unwrap();
    let run = |cache: &mut _| {
        let inputs = ExtendInputs::new(&step, &step, &step, 1.0);
        backend.extend(&mut [Append { cache, tokens: 128 }], &inputs).unwrap();
    };
    // Scratch memory stays with its thread: get it before measuring. Enough is written for what a thread gets later.
    let mut warm = backend.open(&layout, dim).unwrap();
    (0..4).for_each(|_| run(&mut warm));
    drop(warm);

    let before = resident_bytes();
    let mut cache = backend.open(&layout, dim).unwrap();
    assert_eq!(backend.bytes(&cache), (2 * 2 * dim * (capacity + window)) as u64);
    // An allocator may clear memory that it had given out before: as much as the window has, never the full head.
    let window_bytes = (2 * 2 * dim * window) as u64;
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 2 * window_bytes, "{grown} bytes of an empty cache are resident");

    (0..24).for_each(|_| run(&mut cache));
    let written = (2 * 2 * dim * 24 * 128) as u64 + window_bytes;
    let grown = resident_bytes() - before;
    assert!(grown > written * 3 / 4 && grown < written * 3 / 2, "{grown} for {written} bytes");
    let fork = backend.fork(&cache).unwrap();
    let grown = resident_bytes() - before;
    assert!(grown < written * 5 / 2, "{grown} bytes after a fork, {written} written");
    drop(fork);
}
