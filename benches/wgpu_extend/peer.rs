//! burn's dense attention: burn-cubecl's module operation as it is by default, and each strategy that burn
//! tunes among, without its silent way back to the default.

use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use burn_backend::ops::AttentionModuleOptions;
use burn_backend::{DType, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::attention::{AttentionStrategy, attention, flash_attention};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubek::attention::forward::launch::{BlueprintStrategy, Strategy as Flash};
use cubek::attention::forward::routines::blackbox_accelerated::BlackboxAcceleratedStrategy;
use half::{bf16, f16};
use moa_backend_wgpu::cubecl::future::block_on;
use moa_backend_wgpu::{Device, Dtype};

use super::timing::{Time, time};
use super::{Result, numbers};

/// Bytes of scores up to which the default writes them all at once; it keeps several copies.
const SCORE_BYTES: usize = 512 << 20;

/// A strategy whose first run took longer is not tried again.
const SLOW_SECONDS: f64 = 1.0;

/// Queries, keys and values of some heads of one prompt, `[1, heads, tokens, head_dim]`. burn's kernels
/// know no grouped queries, so keys and values are repeated for every query head.
#[derive(Clone)]
struct Prompt {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
}

#[derive(Clone, Copy)]
enum Strategy {
    /// What `attention` does where nothing is tuned: scores are written.
    Default,
    Flash(fn() -> Flash),
}

fn accelerated<const PLANES: u8, const KEYS: u8>() -> Flash {
    let strategy = BlackboxAcceleratedStrategy { num_planes: PLANES, seq_q: 1, seq_kv: KEYS };
    Flash::BlackboxAccelerated(BlueprintStrategy::Inferred(strategy))
}

fn unit() -> Flash {
    Flash::Unit(BlueprintStrategy::Inferred(()))
}

/// burn on one prompt.
pub(crate) struct Peer {
    device: CubeDevice,
    dtype: Dtype,
    /// Tokens, query heads, KV heads, head dim.
    shape: [usize; 4],
}

impl Peer {
    pub(crate) fn new(device: &CubeDevice, shape: [usize; 4], dtype: Dtype) -> Self {
        Self { device: device.clone(), dtype, shape }
    }

    fn prompt(&self, of_heads: Range<usize>) -> Prompt {
        let [tokens, heads, kv_heads, head_dim] = self.shape;
        let client = self.device.client();
        let tensor = |of: usize, seed: u32| {
            let packed = numbers(tokens * of * head_dim, seed);
            let mut turned = Vec::with_capacity(tokens * of_heads.len() * head_dim);
            for head in of_heads.clone() {
                let from = head / (heads / of);
                for token in 0..tokens {
                    let at = (token * of + from) * head_dim;
                    turned.extend_from_slice(&packed[at..at + head_dim]);
                }
            }
            let (handle, dtype) = match self.dtype {
                Dtype::F32 => (client.create_from_slice(bytemuck::cast_slice(&turned)), DType::F32),
                Dtype::F16 => {
                    let halves: Vec<f16> = turned.into_iter().map(f16::from_f32).collect();
                    (client.create_from_slice(bytemuck::cast_slice(&halves)), DType::F16)
                }
                _ => {
                    let halves: Vec<bf16> = turned.into_iter().map(bf16::from_f32).collect();
                    (client.create_from_slice(bytemuck::cast_slice(&halves)), DType::BF16)
                }
            };
            let shape = Shape::new([1, of_heads.len(), tokens, head_dim]);
            CubeTensor::new_contiguous(client.clone(), self.device.clone(), shape, handle, dtype)
        };
        Prompt { q: tensor(heads, 1), k: tensor(kv_heads, 2), v: tensor(kv_heads, 3) }
    }

    /// Tells `each` of every strategy that gives `expected`, our dense output `[tokens, heads, head_dim]`, its
    /// time, and of the others why they have none. Without the device's time nothing ran, if there is a
    /// `clock`.
    pub(crate) fn times(
        &self,
        device: &Device,
        seconds: f64,
        expected: &[f32],
        clock: bool,
        slow: &mut HashSet<String>,
        mut each: impl FnMut(String, Result<Time>),
    ) {
        let [tokens, heads, ..] = self.shape;
        let whole = self.prompt(0..heads);
        let flash = |run: fn() -> Flash| Strategy::Flash(run);
        let mut strategies = vec![
            ("flash, matrix units, 2 planes".to_string(), flash(accelerated::<2, 1>), heads),
            ("flash, matrix units, 4 planes".to_string(), flash(accelerated::<4, 1>), heads),
            ("flash, matrix units, 8 planes".to_string(), flash(accelerated::<8, 1>), heads),
            (
                "flash, matrix units, 4 planes, 2 tiles".to_string(),
                flash(accelerated::<4, 2>),
                heads,
            ),
            ("flash, units".to_string(), flash(unit), heads),
            ("default".to_string(), Strategy::Default, heads),
        ];
        // All heads' scores may be more than a buffer holds.
        let scores = tokens * tokens * self.dtype.bytes();
        let some = (SCORE_BYTES / scores).clamp(1, heads);
        let some = (1..=some).rev().find(|&n| heads.is_multiple_of(n)).unwrap_or(1);
        if some < heads {
            strategies.push((format!("default, {some} heads at a time"), Strategy::Default, some));
        }
        let measure = |name: &str, strategy: Strategy, some: usize, slow: &mut HashSet<String>| {
            let kind = name.split(" heads").next().unwrap_or(name);
            let kind = kind.trim_end_matches(|c: char| c.is_ascii_digit()).to_string();
            if slow.contains(&kind) {
                return Err(format!("left out, as its first run took over {SLOW_SECONDS} s").into());
            }
            // What a device cannot do is a panic in places.
            let run = AssertUnwindSafe(|| -> Result<Time> {
                let prompts: Vec<Prompt> = match some == heads {
                    true => vec![whole.clone()],
                    false => (0..heads).step_by(some).map(|h| self.prompt(h..h + some)).collect(),
                };
                let all = || prompts.iter().map(|p| p.run(strategy)).collect::<Result<Vec<_>>>();
                self.check(device, &all()?, expected)?;
                let start = Instant::now();
                all()?;
                block_on(device.client().sync()).map_err(|error| format!("{error:?}"))?;
                let first = start.elapsed().as_secs_f64();
                if first > SLOW_SECONDS {
                    slow.insert(kind);
                }
                let taken = time(device, seconds.min(first * 20.0), || all().map(drop))?;
                if clock && taken.device.is_none() {
                    return Err("it took no time by the device's clock: it did not run".into());
                }
                Ok(taken)
            });
            catch_unwind(run).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                Err(format!("it panicked: {}", text.unwrap_or("without a text")).into())
            })
        };
        for (name, strategy, some) in strategies {
            let taken = measure(&name, strategy, some, slow);
            each(name, taken);
        }
    }

    /// Whether outputs of some heads each are all that is expected. What went wrong on the device is known
    /// where its result is read.
    fn check(&self, device: &Device, outputs: &[CubeTensor], expected: &[f32]) -> Result<()> {
        let [tokens, heads, _, head_dim] = self.shape;
        let tolerance = match self.dtype {
            Dtype::F32 => 1e-3,
            Dtype::F16 => 1e-2,
            _ => 5e-2,
        };
        let (mut worst, mut head) = (0.0f32, 0);
        for output in outputs {
            let read = device.client().read_one(into_contiguous(output.clone()).handle);
            let bytes = read.map_err(|error| format!("{error:?}"))?;
            let element = self.dtype.bytes();
            if bytes.len() < output.meta.shape().iter().product::<usize>() * element {
                return Err(format!("an output of {} bytes", bytes.len()).into());
            }
            for row in 0..output.meta.shape()[1] * tokens {
                let to = ((row % tokens) * heads + head + row / tokens) * head_dim;
                let from = &bytes[row * head_dim * element..][..head_dim * element];
                for (found, expected) in from.chunks_exact(element).zip(&expected[to..]) {
                    let found = match (self.dtype, found) {
                        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
                        (_, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
                        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                        _ => f32::NAN,
                    };
                    let off = (found - expected).abs();
                    worst = if off.is_nan() { f32::INFINITY } else { worst.max(off) };
                }
            }
            head += output.meta.shape()[1];
        }
        match worst <= tolerance {
            true => Ok(()),
            false => Err(format!("wrong by {worst:.1e}").into()),
        }
    }
}

impl Prompt {
    fn run(&self, strategy: Strategy) -> Result<CubeTensor> {
        let (q, k, v) = (self.q.clone(), self.k.clone(), self.v.clone());
        let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
        let out = match strategy {
            Strategy::Default => {
                attention(q, k, v, None, None, options, AttentionStrategy::default())
            }
            Strategy::Flash(flash) => flash_attention(q, k, v, None, None, options, flash()),
        };
        Ok(out.map_err(|error| format!("{error:?}"))?)
    }
}
