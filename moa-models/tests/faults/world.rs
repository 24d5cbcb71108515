//! A model as small as can be, with moa-tiny's tokenizer, and random numbers.

use std::fs;
use std::path::Path;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use moa_models::{Checkpoint, Cpu};
use serde_json::{Value, json};

/// One test at a time: allocations fail whoever asks for them.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Numbers by a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Of `MOA_FAULTS_SEED`.
    pub(crate) fn new(salt: u64) -> Self {
        let seed = std::env::var("MOA_FAULTS_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
        Self((seed.unwrap_or(1) ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// How many faults are to be tried, of all.
pub(crate) fn faults(usual: u64) -> u64 {
    std::env::var("MOA_FAULTS").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

pub(crate) fn moa_tiny() -> &'static Path {
    static TINY: LazyLock<std::path::PathBuf> =
        LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny"));
    &TINY
}

/// The model's files.
pub(crate) fn write_model(folder: &Path) {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(moa_tiny().join(name), folder.join(name)).unwrap();
    }
    let text = fs::read_to_string(moa_tiny().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (field, size) in [
        ("hidden_size", 16),
        ("intermediate_size", 16),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 2),
        ("head_dim", 8),
    ] {
        config[field] = size.into();
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let layer = "model.layers.0.";
    let tensors = [
        ("model.embed_tokens.weight".to_string(), vec![8192, 16]),
        ("model.norm.weight".to_string(), vec![16]),
        (format!("{layer}input_layernorm.weight"), vec![16]),
        (format!("{layer}post_attention_layernorm.weight"), vec![16]),
    ];
    let square = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        .into_iter()
        .chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
        .map(|name| (format!("{layer}{name}.weight"), vec![16, 16]));
    let (mut header, mut data, mut random) = (json!({}), Vec::new(), Random(5));
    for (name, shape) in tensors.into_iter().chain(square) {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            let x = random.below(1 << 16) as f32 / 32768.0 - 1.0;
            data.extend((((x + 0.3 * x.signum()).to_bits() >> 16) as u16).to_le_bytes());
        }
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()] });
        header[name] = entry;
    }
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

/// The model, open.
pub(crate) fn checkpoint() -> &'static Checkpoint<Cpu> {
    static MODEL: LazyLock<Checkpoint<Cpu>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path());
        Checkpoint::open(Cpu::default(), folder.path()).unwrap()
    });
    &MODEL
}
