//! burn's dense attention: burn-cubecl's module operation, with each strategy that it tunes among.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn_backend::ops::AttentionModuleOptions;
use burn_backend::{DType, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::attention::{AttentionStrategy, attention};
use burn_cubecl::tensor::CubeTensor;
use cubek::attention::forward::routines::blackbox_accelerated::BlackboxAcceleratedStrategy;
use half::{bf16, f16};
use moa_backend_wgpu::{Device, Dtype};

use super::timing::{Time, time};
use super::{Result, numbers};

/// Bytes of scores up to which the strategy that writes them all is tried; it keeps several copies.
const SCORE_BYTES: usize = 2 << 30;

/// Queries, keys and values of one prompt, `[1, heads, tokens, head_dim]`. burn's kernels know no
/// grouped queries, so keys and values are repeated for every query head.
pub(crate) struct Peer {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
}

/// A strategy with its name.
type Strategy = (String, fn() -> AttentionStrategy);

fn accelerated<const PLANES: u8>() -> AttentionStrategy {
    let strategy = BlackboxAcceleratedStrategy { num_planes: PLANES, seq_q: 1, seq_kv: 1 };
    AttentionStrategy::FlashBlackboxAccelerated(strategy)
}

impl Peer {
    pub(crate) fn new(
        device: &CubeDevice,
        [tokens, heads, kv_heads, head_dim]: [usize; 4],
        dtype: Dtype,
    ) -> Self {
        let client = device.client();
        let tensor = |of: usize, seed: u32| {
            let packed = numbers(tokens * of * head_dim, seed);
            let mut turned = Vec::with_capacity(tokens * heads * head_dim);
            for head in 0..heads {
                let from = head / (heads / of);
                for token in 0..tokens {
                    let at = (token * of + from) * head_dim;
                    turned.extend_from_slice(&packed[at..at + head_dim]);
                }
            }
            let (handle, dtype) = match dtype {
                Dtype::F32 => (client.create_from_slice(bytemuck::cast_slice(&turned)), DType::F32),
                Dtype::F16 => {
                    let halves: Vec<f16> = turned.into_iter().map(f16::from_f32).collect();
                    (client.create_from_slice(bytemuck::cast_slice(&halves)), DType::F16)
                }
                Dtype::Bf16 => {
                    let halves: Vec<bf16> = turned.into_iter().map(bf16::from_f32).collect();
                    (client.create_from_slice(bytemuck::cast_slice(&halves)), DType::BF16)
                }
            };
            let shape = Shape::new([1, heads, tokens, head_dim]);
            CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype)
        };
        Self { q: tensor(heads, 1), k: tensor(kv_heads, 2), v: tensor(kv_heads, 3) }
    }

    /// Every strategy's name with its time, or why it did not run.
    pub(crate) fn times(&self, device: &Device, seconds: f64) -> Vec<(String, Result<Time>)> {
        let shape = self.q.meta.shape();
        let scores = shape[1] * shape[2] * shape[2] * self.q.dtype.size();
        let mut strategies: Vec<Strategy> = vec![
            ("flash, matrix units, 2 planes".into(), accelerated::<2>),
            ("flash, matrix units, 4 planes".into(), accelerated::<4>),
            ("flash, matrix units, 8 planes".into(), accelerated::<8>),
            ("flash, units".into(), || AttentionStrategy::FlashUnit),
        ];
        if scores <= SCORE_BYTES {
            strategies.push(("separate kernels".into(), || AttentionStrategy::Fallback));
        }
        let measure = |strategy: fn() -> AttentionStrategy| -> Result<Time> {
            // What a device cannot do is a panic in places.
            let run = AssertUnwindSafe(|| time(device, seconds, || self.run(strategy()).map(drop)));
            catch_unwind(run).unwrap_or_else(|_| Err("it panicked".into()))
        };
        strategies.into_iter().map(|(name, strategy)| (name, measure(strategy))).collect()
    }

    fn run(&self, strategy: AttentionStrategy) -> Result<CubeTensor> {
        let (q, k, v) = (self.q.clone(), self.k.clone(), self.v.clone());
        let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
        let out = attention(q, k, v, None, None, options, strategy);
        Ok(out.map_err(|error| format!("{error:?}"))?)
    }

    /// Output of the last token, `[heads, head_dim]`, by burn's choice among what always runs.
    pub(crate) fn last(&self) -> Result<Vec<f32>> {
        let out = self.run(AttentionStrategy::FlashUnit)?;
        let (heads, tokens, dim) =
            (self.q.meta.shape()[1], self.q.meta.shape()[2], self.q.meta.shape()[3]);
        let data = burn_cubecl::ops::into_data_sync(out).convert::<f32>();
        let all = data.try_to_vec::<f32>().map_err(|error| format!("{error:?}"))?;
        let row = |head: usize| &all[((head + 1) * tokens - 1) * dim..(head + 1) * tokens * dim];
        Ok((0..heads).flat_map(row).copied().collect())
    }
}
