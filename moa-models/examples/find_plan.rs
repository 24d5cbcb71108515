//! Find a plan for a checkpoint from library code: what `moa compress` does.
//!
//! ```sh
//! cargo run --release -p moa-models --example find_plan
//! ```

use std::ops::ControlFlow;

use moa_models::{
    CalibrationData, Checkpoint, CompressOptions, Cpu, Dtype, Result, Stage, compress,
};

fn main() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let checkpoint = Checkpoint::open(Cpu::new(Dtype::Bf16), folder)?;
    let options = CompressOptions {
        density: 0.3,
        lengths: vec![512, 1024],
        samples: 2,
        validation_samples: 2,
        evaluations: Some(30),
        ..CompressOptions::default()
    };
    let mut progress = |stage: Stage, done: usize, of: usize| {
        eprint!("\r{stage} {done}/{of}   ");
        ControlFlow::Continue(())
    };
    let found = compress(&checkpoint, &CalibrationData::Tasks, &options, &mut progress)?;
    eprintln!();
    println!(
        "response loss: dense {:.4}, first-order plan {:.4}, refined plan {:.4}",
        found.refined.dense_loss, found.refined.start_loss, found.refined.loss
    );
    for length in [512, 1024, 4096] {
        println!("density at {length} tokens: {:.3}", found.plan.density(length));
    }
    print!("{}", found.plan.to_json());
    Ok(())
}
