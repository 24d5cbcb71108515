//! Products of few rows.

use crate::Operations;
use crate::graph::is_capturing;
use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::GEMV;
use crate::{Dtype, Result, Tensor};

/// As in `kernels/gemv.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GemvArgs {
    x: DevicePointer,
    weight: DevicePointer,
    out: DevicePointer,
    x_stride: i64,
    weight_stride: i64,
    out_stride: i64,
    n: i32,
    k: i32,
    wide: i32,
    accumulate: i32,
    settled: i32,
    padding: i32,
}

const _: () = assert!(size_of::<GemvArgs>() == 72);

/// Rows of the weight that a block takes.
const BLOCK_ROWS: usize = 8;

impl Operations {
    /// Whether [`gemv`](Self::gemv) has a kernel for so many rows of `x`.
    pub(crate) fn has_gemv(x: &Tensor) -> bool {
        let rows = x.shape()[0];
        (1..=GEMV.len()).contains(&rows) && x.stride().is_multiple_of(8)
    }

    /// `d (+)= x . weight^T`; shapes, types and places were checked.
    pub(crate) fn gemv(
        &self,
        x: &Tensor,
        weight: &Tensor,
        d: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let &[n, k] = weight.shape() else { return Ok(()) };
        let args = GemvArgs {
            x: x.pointer(),
            weight: weight.pointer(),
            out: d.pointer(),
            x_stride: x.stride() as i64,
            weight_stride: weight.stride() as i64,
            out_stride: d.stride() as i64,
            n: n as i32,
            k: k as i32,
            wide: i32::from(d.dtype() == Dtype::F32),
            accumulate: i32::from(accumulate),
            settled: i32::from(is_capturing()),
            padding: 0,
        };
        let name = GEMV[x.shape()[0] - 1];
        let kernels = self.lazily(&self.gemv, Source::Gemv, &GEMV)?;
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { kernels.launch(name, [n.div_ceil(BLOCK_ROWS), 1, 1], 128, &args) }
    }
}
