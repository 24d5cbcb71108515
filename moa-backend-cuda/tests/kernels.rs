//! Every kernel compiles for every architecture, without a GPU, and the hot ones keep their numbers
//! in registers.
//!
//! Needs NVRTC on the loader's path and, for the register report, `cuobjdump` on PATH; without
//! them the trial is ignored. With `MOA_REQUIRE_NVRTC=1` both must be there.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use moa_backend_cuda::{Architecture, Dtype, Error, HEAD_DIMS, Source, Variant, compile};
use moa_conformance::{Stop, Verdict, run, trials};

fn main() -> ExitCode {
    run(trials![every_kernel_compiles_and_none_spills])
}

/// Architectures from Ampere to Blackwell.
const ARCHITECTURES: [(u32, u32); 4] = [(8, 0), (8, 9), (9, 0), (10, 0)];

type Job = (Source, Variant, Architecture);

fn jobs() -> Vec<Job> {
    let mut jobs = Vec::new();
    for (major, minor) in ARCHITECTURES {
        let architecture = Architecture { major, minor };
        for head_dim in HEAD_DIMS {
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let exists = |source: &Source| source.exists_for(head_dim, architecture);
                let sources = Source::ALL.into_iter().filter(exists);
                jobs.extend(sources.map(|s| (s, Variant { head_dim, dtype }, architecture)));
            }
        }
    }
    jobs
}

fn required() -> bool {
    std::env::var_os("MOA_REQUIRE_NVRTC").is_some_and(|value| value == "1")
}

/// What is wrong with a kernel, what this machine lacks to look at it, or its resources.
enum Found {
    Wrong(String),
    Lacking(String),
    /// The compiler is older than the architecture.
    Unknown(Architecture),
    Fine(String),
}

fn look(job: &Job, path: &Path) -> Found {
    let (source, variant, architecture) = *job;
    let name = format!("{} {} {} {architecture}", source.name(), variant.head_dim, variant.dtype);
    let cubin = match compile(source, variant, architecture) {
        Ok(cubin) => cubin,
        Err(error @ Error::NoNvrtc { .. }) if !required() => {
            return Found::Lacking(error.to_string());
        }
        Err(Error::Compile { log, .. })
            if architecture.major >= 10 && log.contains("gpu-architecture") =>
        {
            return Found::Unknown(architecture);
        }
        Err(error) => return Found::Wrong(format!("{name}: {error}")),
    };
    std::fs::write(path, cubin).unwrap();
    let output = match Command::new("cuobjdump").arg("--dump-resource-usage").arg(path).output() {
        Ok(output) => output,
        Err(error) if required() => return Found::Wrong(format!("cuobjdump: {error}")),
        Err(_) => {
            return Found::Lacking("no cuobjdump on PATH to look at kernels' registers".into());
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // What does not fit into registers goes to the stack, in local memory. Heads of 256 and Blackwell
    // are for completeness, and may spill a few words outside the inner loops.
    let hot = variant.head_dim < 256 && architecture.major < 10;
    // Products of blocks, and decode from narrow rows, keep an address or two there, which are read back once a record.
    let allowed = match (hot, source) {
        (true, Source::Blocks | Source::NarrowDecode) => 32,
        // A softcap's tanh takes registers that plain scores leave free.
        (_, Source::WgmmaSoftcap | Source::NarrowDecodeSoftcap) => 128,
        // 16 rows of 256 elements fill all registers of a thread.
        (false, Source::NarrowDecode) => 96,
        (true, _) => 0,
        (false, _) => 64,
    };
    let (mut report, mut wrong) = (Vec::new(), false);
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(kernel) = line.trim().strip_prefix("Function ") else { continue };
        let fields = lines.next().unwrap_or_default();
        let number = |key: &str| -> u64 {
            let field = fields.split_whitespace().find_map(|field| field.strip_prefix(key));
            field.and_then(|value| value.strip_prefix(':')?.parse().ok()).unwrap_or(0)
        };
        let [registers, stack, local] = ["REG", "STACK", "LOCAL"].map(number);
        wrong |= registers == 0 || stack + local > allowed;
        report.push(format!(
            "{name} {kernel} {registers} registers, {stack} + {local} bytes spilled"
        ));
    }
    match wrong || report.is_empty() {
        true => Found::Wrong(format!("{name}:\n{}", report.join("\n"))),
        false => Found::Fine(report.join("\n")),
    }
}

fn every_kernel_compiles_and_none_spills() -> Verdict {
    let folder = tempfile::tempdir()?;
    let jobs = jobs();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(2, usize::from).min(16);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    let one = look(job, &folder.path().join(format!("{index}.cubin")));
                    found.lock().unwrap().push((index, one));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap();
    assert_eq!(found.len(), jobs.len());
    found.sort_by_key(|(index, _)| *index);
    let (mut wrong, mut lacking) = (Vec::new(), None);
    for (_, one) in found {
        match one {
            Found::Wrong(text) => wrong.push(text),
            Found::Lacking(reason) => lacking = Some(reason),
            Found::Unknown(architecture) => println!("this NVRTC does not know {architecture}"),
            Found::Fine(text) => println!("{text}"),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    lacking.map_or(Ok(()), |reason| Err(Stop::ignored(reason)))
}
