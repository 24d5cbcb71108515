//! KV caches of 8 and 4 bits, for all heads and for each head.

use moa_conformance::{Trial, Verdict, trials};
use moa_core::{CacheType, ModelShape, Plan};
use moa_models::{Checkpoint, Cpu, Dtype};

use crate::laws::{decoder_equals_steps, join_and_leave};
use crate::{alternating, close, moa_tiny, open, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![heads_of_narrow_types_give_what_the_cpu_gives, replayed_steps_are_single_steps]
}

fn typed(shape: ModelShape, wide: Dtype) -> Plan {
    let plan = alternating(shape, 8, 24, 48);
    let types = [None, Some(CacheType::K8V4), Some(wide.into()), Some(CacheType::Int8)];
    let heads = plan.rules().len();
    plan.with_cache_types((0..heads).map(|head| types[head % 4]).collect()).unwrap()
}

fn heads_of_narrow_types_give_what_the_cpu_gives() -> Verdict {
    let tokens = prose(140);
    for (wide, share) in [(Dtype::F16, 0.1), (Dtype::Bf16, 0.2)] {
        for own in [CacheType::Int8, CacheType::Fp8] {
            let cpu = Checkpoint::open(Cpu::new(own), moa_tiny())?.model;
            let gpu = Checkpoint::open(open(wide)?.with_cache_type(own)?, moa_tiny())?.model;
            for plan in [Plan::full(cpu.shape())?, typed(cpu.shape(), wide)] {
                let mut expected = cpu.open(&plan, 200, 0)?;
                let mut sequence = gpu.open(&plan, 200, 0)?;
                assert_eq!(gpu.kv_bytes(&sequence), cpu.kv_bytes(&expected), "{own}");
                let whole = read(&cpu, &mut expected, &tokens, 100);
                close(
                    &format!("{own} {wide}"),
                    &read(&gpu, &mut sequence, &tokens, 100),
                    &whole,
                    share,
                );
                for token in [5, 6, 7] {
                    let [got, whole] =
                        [step(&gpu, &mut sequence, &[token]), step(&cpu, &mut expected, &[token])];
                    close(&format!("{own} {wide} decode"), &got[0], &whole[0], share);
                }
            }
        }
    }
    Ok(())
}

fn replayed_steps_are_single_steps() -> Verdict {
    for (wide, own) in [
        (Dtype::F16, CacheType::K8V4),
        (Dtype::Bf16, CacheType::Int8),
        (Dtype::Bf16, CacheType::Int4),
        (Dtype::F16, CacheType::Int4),
    ] {
        let gpu = Checkpoint::open(open(wide)?.with_cache_type(own)?, moa_tiny())?;
        decoder_equals_steps(&gpu.model);
        join_and_leave(&gpu.model);
    }
    Ok(())
}
