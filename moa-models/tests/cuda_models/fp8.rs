//! Models whose linear layers have 8-bit weights, against the CPU on the numbers that these hold.

use std::path::Path;
use std::sync::LazyLock;

use moa_backend_cuda::e4m3;
use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_models::{Backward, Checkpoint, Cpu, Cuda, Dtype, Error, Load};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::laws::{decoder_equals_steps, join_and_leave};
use crate::text::{greedy, greedy_text_agrees};
use crate::{
    Models, close, cpu, difference, load, loaded, moa_tiny, open, plans, prose, read, step,
};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        rounding_weights_changes_little,
        logits_are_those_of_the_rounded_weights,
        greedy_text_is_that_of_the_rounded_weights_or_parts_at_a_near_tie,
        greedy_text_is_mostly_that_of_the_exact_weights,
        a_decoder_with_8_bit_weights_equals_single_steps,
        bytes_are_counted_as_they_are,
        gradients_are_refused,
        activations_of_16_bit_weights_are_not_rounded,
        rounding_activations_changes_little,
        short_steps_have_activations_of_16_bits,
        a_decoder_with_8_bit_activations_equals_single_steps,
    ]
}

/// moa-tiny with the weights of its linear layers rounded to e4m3, row by row.
fn rounded() -> &'static Checkpoint<Cpu> {
    static ROUNDED: LazyLock<Checkpoint<Cpu>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        for entry in std::fs::read_dir(moa_tiny()).expect("moa-tiny").map(Result::unwrap) {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
        }
        round(&folder.path().join("model.safetensors"));
        Checkpoint::open(Cpu::default(), folder.path()).expect("moa-tiny, rounded")
    });
    &ROUNDED
}

fn round(file: &Path) {
    let bytes = std::fs::read(file).expect("weights");
    let weights = SafeTensors::deserialize(&bytes).expect("weights");
    let (mut count, mut all) = (0, Vec::new());
    for (name, tensor) in weights.tensors() {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        if !name.ends_with("_proj.weight") {
            all.push((name, dtype, shape, tensor.data().to_vec()));
            continue;
        }
        assert_eq!(dtype, safetensors::Dtype::BF16, "{name}");
        let pairs = tensor.data().as_chunks::<2>().0.iter();
        let values: Vec<f32> =
            pairs.map(|pair| f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16)).collect();
        let mut codes = vec![0; shape[1]];
        let mut data = Vec::new();
        for row in values.chunks(shape[1]) {
            let scale = e4m3::encode_row(row, &mut codes).expect("finite weights");
            for code in &codes {
                // Exact in bf16 too, which makes CPU and GPU read the same numbers.
                let bits = (scale * e4m3::decode(*code)).to_bits();
                assert_eq!(bits & 0xffff, 0);
                data.extend(((bits >> 16) as u16).to_le_bytes());
            }
        }
        count += 1;
        all.push((name, dtype, shape, data));
    }
    assert_eq!(count, 6 * 7);
    let views = all.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).expect("the same shape"))
    });
    safetensors::serialize_to_file(views, None, file).expect("a file");
}

/// moa-tiny with 8-bit weights on the GPU, with how far its logits may be from those of the CPU on
/// the same weights: no further than with 16-bit weights, as activations are the same.
fn cuda() -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    static TINY: LazyLock<Models> = LazyLock::new(|| load(|device| device.with_fp8_weights()));
    loaded(&TINY)
}

/// The same by the kernels that every GPU has, which weights of products of 8 bits keep to.
fn by_rows() -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    static TINY: LazyLock<Models> =
        LazyLock::new(|| load(|device| device.with_fp8_weights().without_wgmma()));
    loaded(&TINY)
}

/// Activations rounded too, where the GPU multiplies them.
fn of_8_bits() -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    static TINY: LazyLock<Models> =
        LazyLock::new(|| load(|device| device.with_fp8_weights().with_fp8_activations().unwrap()));
    match open(Dtype::Bf16)?.gpu().architecture().has_e4m3() {
        true => loaded(&TINY),
        false => Err(Stop::ignored("a GPU without products of e4m3")),
    }
}

/// Runs on the CPU: what rounding alone does to this model.
fn rounding_weights_changes_little() {
    let (exact, rounded) = (&cpu().model, &rounded().model);
    let tokens = prose(400);
    let [dense, _] = plans(exact.shape());
    let expected = step(exact, &mut exact.open(&dense, 400, 0).unwrap(), &tokens);
    let got = step(rounded, &mut rounded.open(&dense, 400, 0).unwrap(), &tokens);
    let same =
        expected.iter().zip(&got).filter(|(a, b)| crate::likeliest(a) == crate::likeliest(b));
    let same = same.count();
    let worst = difference(&got.concat(), &expected.concat());
    println!("{same} of 400 likeliest tokens are the same, logits within {worst} of their spread");
    assert!(same >= 380, "{same} of 400 likeliest tokens are the same");
    assert!(worst < 0.3, "{worst}");
}

fn logits_are_those_of_the_rounded_weights() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let (gpu, cpu) = (&checkpoint.model, &rounded().model);
        let tokens = prose(420);
        for plan in &plans(cpu.shape()) {
            // Weights widened in memory, and in registers.
            for chunk in [400, 100, 30, 3] {
                let mut here = cpu.open(plan, 500, 0).unwrap();
                let mut there = gpu.open(plan, 500, 0).unwrap();
                let expected = read(cpu, &mut here, &tokens[..400], 400);
                let got = read(gpu, &mut there, &tokens[..400], chunk);
                close(&format!("prompt of 400 in {chunk}"), &got, &expected, share);
                if chunk != 400 {
                    continue;
                }
                let mut decoded = [Vec::new(), Vec::new()];
                for token in &tokens[400..] {
                    decoded[0].extend(step(gpu, &mut there, &[*token]).concat());
                    decoded[1].extend(step(cpu, &mut here, &[*token]).concat());
                }
                close("decode of 20", &decoded[0], &decoded[1], share);
            }
        }
    }
    Ok(())
}

fn greedy_text_is_that_of_the_rounded_weights_or_parts_at_a_near_tie() -> Verdict {
    for (checkpoint, share) in cuda()? {
        greedy_text_agrees(&checkpoint.model, &rounded().model, share);
    }
    Ok(())
}

fn greedy_text_is_mostly_that_of_the_exact_weights() -> Verdict {
    let text = prose(2000);
    let prompts: Vec<&[u32]> = (0..20).map(|i| &text[i * 60..i * 60 + 200]).collect();
    let [dense, _] = plans(cpu().model.shape());
    for (checkpoint, _) in cuda()? {
        let expected = greedy(&cpu().model, &dense, &prompts);
        let got = greedy(&checkpoint.model, &dense, &prompts);
        let first = expected.iter().zip(&got).filter(|(a, b)| a[0] == b[0]).count();
        let equal = expected.iter().zip(&got).filter(|(a, b)| a == b).count();
        println!("{equal} of 20 texts and {first} first tokens are equal");
        assert!(first >= 16, "{first} of 20 first tokens are equal");
    }
    Ok(())
}

fn a_decoder_with_8_bit_weights_equals_single_steps() -> Verdict {
    for (checkpoint, _) in cuda()? {
        decoder_equals_steps(&checkpoint.model);
        join_and_leave(&checkpoint.model);
    }
    Ok(())
}

fn bytes_are_counted_as_they_are() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        // 6 layers of 4 + 2 + 2 heads of 64 and an MLP of 704, on 256; one factor for each output.
        let linear = 6 * 256 * (64 * (4 + 2 + 2 + 4) + 3 * 704);
        let outputs = 6 * (64 * 8 + 256 + 2 * 704 + 256);
        let rest = 8192 * 256 + 13 * 256;
        assert_eq!(model.weight_bytes(), linear + 4 * outputs + 2 * rest);
        assert_eq!(model.device().weight_bytes(100), 200);
        assert_eq!(open(Dtype::Bf16)?.linear_bytes(1000, 10), 2000);
    }
    Ok(())
}

fn gradients_are_refused() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let device = checkpoint.model.device();
        let message = device.check_gradients().unwrap_err().to_string();
        assert!(message.contains("fp8") && message.contains("gradients"), "{message}");
        open(Dtype::F16)?.check_gradients()?;
    }
    Ok(())
}

fn activations_of_16_bit_weights_are_not_rounded() -> Verdict {
    let error = open(Dtype::Bf16)?.with_fp8_activations().unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("fp8 activations") && message.contains("bf16"), "{message}");
    Ok(())
}

fn rounding_activations_changes_little() -> Verdict {
    for (checkpoint, _) in of_8_bits()? {
        let (gpu, cpu) = (&checkpoint.model, &rounded().model);
        let tokens = prose(400);
        let [dense, _] = plans(cpu.shape());
        let expected = step(cpu, &mut cpu.open(&dense, 400, 0).unwrap(), &tokens);
        let got = step(gpu, &mut gpu.open(&dense, 400, 0).unwrap(), &tokens);
        let same =
            expected.iter().zip(&got).filter(|(a, b)| crate::likeliest(a) == crate::likeliest(b));
        let same = same.count();
        let worst = difference(&got.concat(), &expected.concat());
        println!(
            "{same} of 400 likeliest tokens are the same, logits within {worst} of their spread"
        );
        assert!(same >= 370, "{same} of 400 likeliest tokens are the same");
        // No less than rounding does: the products were of 8 bits.
        assert!((0.05..0.6).contains(&worst), "{worst}");
    }
    Ok(())
}

/// Bit for bit the model whose activations are never rounded, by the same kernels.
fn short_steps_have_activations_of_16_bits() -> Verdict {
    for ((rounding, _), (exact, _)) in of_8_bits()?.into_iter().zip(by_rows()?) {
        let (rounding, exact) = (&rounding.model, &exact.model);
        let tokens = prose(300);
        for plan in &plans(exact.shape()) {
            for (chunk, same) in [(128, true), (100, true), (129, false), (300, false)] {
                let here = read(exact, &mut exact.open(plan, 300, 0).unwrap(), &tokens, chunk);
                let there =
                    read(rounding, &mut rounding.open(plan, 300, 0).unwrap(), &tokens, chunk);
                assert_eq!(here == there, same, "chunks of {chunk}");
            }
        }
    }
    Ok(())
}

fn a_decoder_with_8_bit_activations_equals_single_steps() -> Verdict {
    for (checkpoint, _) in of_8_bits()? {
        decoder_equals_steps(&checkpoint.model);
        join_and_leave(&checkpoint.model);
    }
    Ok(())
}
