//! Weights in f32, f16 or bf16. Few rows are dot products straight from the weights' storage type, bound by memory.

use std::borrow::Cow;

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use super::blocks::Blocks;
use super::panels::{self, Side};
use super::stretches::{STRETCH, for_each_stretch};
use super::{PANEL_ROWS, WeightData, WeightRef};
use crate::element::Element;
use crate::pool::SharedMut;
use crate::simd::dispatch;
use crate::simd::dot::{Rows, streamed_dots};
use crate::simd::outer::LANES;
use crate::zeroed::zeroed;
use crate::{Result, Tensor};

/// Elements of a weight, and by what they are multiplied.
#[derive(Clone, Copy)]
pub(super) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// With activations rounded to bf16.
    #[cfg(target_arch = "x86_64")]
    Pairs(&'a [bf16], panels::pairs::Machine),
}

impl<'a> Numbers<'a> {
    /// The numbers of a weight, or else its blocks.
    pub(super) fn new(weight: &WeightRef<'a>) -> Result<Self, Blocks<'a>> {
        Ok(match weight.data {
            WeightData::F32(w) => Self::F32(w),
            WeightData::F16(w) => Self::F16(w),
            WeightData::Bf16(w) => {
                #[cfg(target_arch = "x86_64")]
                if let Some(machine) = panels::pairs::Machine::here().filter(|_| weight.narrow) {
                    return Ok(Self::Pairs(w, machine));
                }
                Self::Bf16(w)
            }
            WeightData::Blocks(kind, bytes) => return Err(Blocks { kind, bytes }),
        })
    }
}

/// Products with several matrices `[n, k]`. Activations are rounded once.
pub(super) fn forward_all(
    x: &Tensor,
    layers: &[(Numbers<'_>, usize, &SharedMut<'_, f32>)],
) -> Result<()> {
    let (m, k) = (x.rows(), x.row_len());
    if m * k == 0 || layers.is_empty() {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    let narrow = {
        let machine = layers.iter().find_map(|(own, ..)| match own {
            Numbers::Pairs(_, machine) => Some(*machine),
            _ => None,
        });
        machine.map(|machine| panels::pairs::Activations::new(machine, x)).transpose()?
    };
    let x = x.data();
    if m >= PANEL_ROWS {
        return layers.iter().try_for_each(|(own, n, out)| {
            let sizes = (m, *n, k);
            match *own {
                Numbers::F32(w) => panels::product(x, w, Side::Forward, sizes, out),
                Numbers::F16(w) => panels::product(x, w, Side::Forward, sizes, out),
                Numbers::Bf16(w) => panels::product(x, w, Side::Forward, sizes, out),
                #[cfg(target_arch = "x86_64")]
                Numbers::Pairs(w, _) => narrow.iter().try_for_each(|x| x.product(w, k, out)),
            }
        });
    }
    let wide = k.next_multiple_of(LANES);
    let x = if wide == k { Cow::Borrowed(x) } else { Cow::Owned(padded(x, k, wide)?) };
    let outputs: Vec<_> = layers.iter().map(|(_, n, out)| (*n, *out)).collect();
    for_each_stretch((m, k), &outputs, |layer, outputs, y| {
        let w = outputs.start * k..outputs.end * k;
        match layers[layer].0 {
            Numbers::F32(all) => dispatch(Dots { x: &x, w: &all[w], k, wide, y }),
            Numbers::F16(all) => dispatch(Dots { x: &x, w: &all[w], k, wide, y }),
            Numbers::Bf16(all) => dispatch(Dots { x: &x, w: &all[w], k, wide, y }),
            #[cfg(target_arch = "x86_64")]
            Numbers::Pairs(all, _) => narrow.iter().for_each(|x| x.few(&all[w.clone()], k, y)),
        }
    });
    Ok(())
}

fn padded(x: &[f32], k: usize, wide: usize) -> Result<Vec<f32>> {
    let mut padded: Vec<f32> = zeroed(x.len() / k.max(1) * wide, "padded activations")?;
    for (to, from) in padded.chunks_exact_mut(wide.max(1)).zip(x.chunks_exact(k.max(1))) {
        to[..k].copy_from_slice(from);
    }
    Ok(padded)
}

/// `y[i][j] = x[i] . w[j]`, `y` at a stride of [`STRETCH`].
struct Dots<'a, E> {
    x: &'a [f32],
    w: &'a [E],
    k: usize,
    wide: usize,
    y: &'a mut [f32],
}

impl<E: Element> WithSimd for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, k, wide, y } = self;
        if k == 0 {
            return;
        }
        let (m, count) = (x.len() / wide, w.len() / k);
        let mut i = 0;
        macro_rules! rows {
            ($r:literal) => {
                while m - i >= $r {
                    let rows = Rows { data: &x[i * wide..], stride: wide, count: m - i };
                    let w = Rows { data: w, stride: k, count };
                    let y = &mut y[i * STRETCH..];
                    streamed_dots::<S, E, $r>(simd, k, rows, w, y, STRETCH);
                    i += $r;
                }
            };
        }
        rows!(4);
        rows!(2);
        rows!(1);
    }
}
