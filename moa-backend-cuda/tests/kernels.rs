//! Every kernel compiles for every architecture, without a GPU, and the hot ones keep their numbers
//! in registers.
//!
//! Needs NVRTC on the loader's path and, for the register report, `cuobjdump` on PATH; says loudly what
//! it skips. With `MOA_REQUIRE_NVRTC=1` both must be there.

use std::path::Path;
use std::process::Command;

use moa_backend_cuda::{Architecture, Dtype, Error, HEAD_DIMS, Source, Variant, compile};

fn required() -> bool {
    std::env::var_os("MOA_REQUIRE_NVRTC").is_some_and(|value| value == "1")
}

/// Architectures from Ampere to Blackwell.
const ARCHITECTURES: [(u32, u32); 4] = [(8, 0), (8, 9), (9, 0), (10, 0)];

/// A kernel's name and what `cuobjdump` counts for it.
type Resources = (String, Vec<(String, u64)>);

/// Registers, stack, spills of each kernel in a cubin.
fn resources(cubin: &Path) -> Option<Vec<Resources>> {
    let output = Command::new("cuobjdump").arg("--dump-resource-usage").arg(cubin).output().ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut kernels = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.trim().strip_prefix("Function ") else { continue };
        let numbers = lines.next().unwrap_or_default().split_whitespace().filter_map(|field| {
            let (key, value) = field.split_once(':')?;
            Some((key.to_owned(), value.parse().ok()?))
        });
        kernels.push((name.trim_end_matches(':').to_owned(), numbers.collect()));
    }
    Some(kernels)
}

#[test]
fn every_kernel_compiles_and_none_spills() {
    let folder = tempfile::tempdir().unwrap();
    let jobs: Vec<(Source, Variant, Architecture)> = ARCHITECTURES
        .into_iter()
        .map(|(major, minor)| Architecture { major, minor })
        .flat_map(|architecture| {
            let variants = HEAD_DIMS.into_iter().flat_map(|head_dim| {
                [Dtype::F16, Dtype::Bf16].map(|dtype| Variant { head_dim, dtype })
            });
            variants.flat_map(move |variant| {
                let exists = |source: &Source| source.exists_for(variant.head_dim, architecture);
                let sources = Source::ALL.into_iter().filter(exists);
                sources.map(move |source| (source, variant, architecture)).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut report = true;
    let mut failures = Vec::new();
    for (source, variant, architecture) in jobs {
        let name =
            format!("{} {} {} {architecture}", source.name(), variant.head_dim, variant.dtype);
        let cubin = match compile(source, variant, architecture) {
            Ok(cubin) => cubin,
            Err(error @ Error::NoNvrtc { .. }) if !required() => {
                eprintln!("skipped: {error}");
                return;
            }
            // Compilers older than an architecture do not know it.
            Err(Error::Compile { log, .. })
                if architecture.major >= 10 && log.contains("gpu-architecture") =>
            {
                eprintln!("skipped: this NVRTC does not know {architecture}");
                continue;
            }
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        let path = folder.path().join("kernel.cubin");
        std::fs::write(&path, cubin).unwrap();
        let Some(kernels) = report.then(|| resources(&path)).flatten() else {
            assert!(!required(), "no cuobjdump on PATH");
            if report {
                eprintln!("skipped: no cuobjdump on PATH, registers and spills were not checked");
            }
            report = false;
            continue;
        };
        assert!(!kernels.is_empty(), "{name}: no kernel in the report");
        for (kernel, numbers) in kernels {
            let number = |key: &str| numbers.iter().find(|(k, _)| k == key).map_or(0, |(_, n)| *n);
            let [registers, stack, local] = ["REG", "STACK", "LOCAL"].map(number);
            println!("{name} {kernel}: {registers} registers, {stack} stack, {local} local");
            // What does not fit into registers goes to the stack, in local memory. Heads of 256 are for
            // completeness, and spill a few words outside the inner loops.
            let allowed = if variant.head_dim == 256 { 64 } else { 0 };
            if stack + local > allowed {
                failures.push(format!("{name} {kernel}: {stack} bytes of stack, {local} local"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
