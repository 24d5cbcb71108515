//! Attention of a recorded step: decode of one sequence whose length, and angles, are in a buffer.

use cubecl::prelude::SequenceArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};
use moa_core::CacheType;

use super::decode::{Decode, Run};
use super::{Limits, arg};
use crate::kernels::codes::load_words;
use crate::kernels::decode::{BroughtLaunch, DECODE_UNITS, HeldLaunch, NewLaunch, Shape, decode};
use crate::kernels::keys::{Head, MAX_SPLITS, MIN_SPLIT_KEYS, keys};
use crate::{Cache, Device, Result, Tensor};

/// Buffers of the kernel.
const BINDINGS: usize = 10;

/// The heads of one type of a layer's cache.
#[derive(Debug)]
pub(crate) struct Part {
    decode: Decode,
    own: CacheType,
    heads: Vec<Head>,
    table: Handle,
    keys: Handle,
    values: Handle,
}

impl Part {
    /// Those of a cache; `None` where there is no recorded kernel for one.
    pub(crate) fn of(
        device: &Device,
        cache: &Cache,
        group: usize,
        dim: usize,
    ) -> Option<Vec<Self>> {
        let limits = Limits::of(device);
        if limits.bindings < BINDINGS {
            return None;
        }
        let part = |(number, own): (usize, &crate::cache::Group)| {
            own.own.dtype()?;
            let store = cache.store(number);
            Some(Self {
                decode: Decode::of(device, &limits, own.own, group, dim, false)?,
                own: own.own,
                heads: own.heads.clone(),
                table: own.table.clone(),
                keys: store.keys.clone(),
                values: store.values.clone(),
            })
        };
        cache.groups().iter().enumerate().map(part).collect()
    }

    /// Splits that are enough for so many tokens, whatever fewer there are.
    fn splits(&self, tokens: usize) -> u32 {
        let tokens = tokens as u32;
        let counts = self.heads.iter().map(|head| keys(head, tokens - 1, tokens).count);
        counts.max().unwrap_or(1).div_ceil(MIN_SPLIT_KEYS).clamp(1, MAX_SPLITS)
    }

    /// Queues attention of the token whose length and angles are in `brought`, up to `tokens` of them with itself, and the
    /// append: `q` is `[1, query heads, dim]`, `k` and `v` alike.
    ///
    /// # Safety
    /// The tensors have these shapes, the caches have room for the token.
    #[allow(clippy::too_many_arguments)]
    pub(crate) unsafe fn launch(
        &self,
        device: &Device,
        [q, k, v]: [&Tensor; 3],
        [out, lse]: [&Tensor; 2],
        brought: &Handle,
        tokens: usize,
        scale: f32,
        turned: bool,
    ) -> Result<()> {
        let (splits, vectors) = (self.splits(tokens), self.decode.vectors);
        let heads = q.shape()[1];
        let partial = match splits {
            1 => None,
            _ => {
                let rows = heads * splits as usize;
                Some(device.alloc_two("partial results", rows * 4 * vectors, 2 * rows)?)
            }
        };
        let run = Run { sequences: 1, splits, partial };
        let (to, stats) = match &run.partial {
            Some([out, stats]) => (out, stats),
            None => (out.handle(), lse.handle()),
        };
        let new = NewLaunch::new(
            arg(q.handle()),
            arg(k.handle()),
            arg(v.handle()),
            arg(to),
            arg(stats),
            0,
            0,
            heads as u32,
            k.shape()[1] as u32,
            vectors as u32,
            scale,
            0.0,
            0,
        );
        let held = HeldLaunch::new(arg(&self.keys), arg(&self.values), arg(&self.table), 0);
        let mut one = SequenceArg::new();
        one.push(held);
        let mut step = SequenceArg::new();
        step.push(BroughtLaunch::new(arg(brought)));
        let shape = Shape {
            sequences: 1,
            partial: run.partial.is_some(),
            recorded: true,
            turned,
            ..self.decode.shape
        };
        // SAFETY: as the caller promises; the outputs have room.
        unsafe {
            decode::launch_unchecked(
                device.client(),
                CubeCount::Static(splits, self.heads.len() as u32, 1),
                CubeDim::new_1d(DECODE_UNITS as u32),
                load_words(self.own.keys()),
                load_words(self.own.values()),
                new,
                one,
                step,
                shape,
            );
        }
        let heads = [self.heads.len(), heads];
        // SAFETY: as above.
        unsafe { self.decode.join(device, &run, 0, &self.table, [out, lse], heads) };
        Ok(())
    }
}
