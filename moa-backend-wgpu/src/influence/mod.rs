//! Influence of every attention value on the objective, in blocks, and the gradients.

use cubecl::{CubeCount, CubeDim};
use moa_core::{
    AttentionShape, Gradients, InfluenceInputs, InfluenceOutput, InfluenceSign, check_influence,
};

use crate::attention::{Limits, Row, arg, square};
use crate::kernels::influence::{influence as blocks, key_gradient, query_gradient, row_dots};
use crate::kernels::tile::Tile;
use crate::{Device, Error, MAX_HEAD_DIM, Result, Tensor};

const OP: &str = "influence";

/// See [`moa_core::SparseAttentionBackend::influence`].
pub(crate) fn influence(
    device: &Device,
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
) -> Result<InfluenceOutput<Tensor>> {
    let call = Call::new(device, inputs, scale)?;
    let gradients = match inputs.gradients {
        true => Some(call.gradients(inputs)?),
        false => None,
    };
    let sums = call.blocks(inputs)?.to_vec()?;
    Ok(InfluenceOutput { blocks: sums.into_iter().map(f64::from).collect(), gradients })
}

/// One call, checked, with `D = dO . O` of each row on the device.
struct Call<'a> {
    device: &'a Device,
    delta: Tensor,
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    window: u32,
    row: Row,
    scale: f32,
    limits: Limits,
}

impl<'a> Call<'a> {
    fn new(device: &'a Device, inputs: &InfluenceInputs<'_, Tensor>, scale: f32) -> Result<Self> {
        let limits = Limits::of(device);
        let shape = check(device, inputs, &limits)?;
        let AttentionShape { tokens, query_heads, kv_heads, head_dim } = shape;
        let row = Row::of(head_dim);
        let delta = Tensor::uninitialised(device, OP, &[tokens, query_heads])?;
        let (cubes, dim) = device.cubes(tokens * query_heads);
        // SAFETY: both tensors have that many rows.
        unsafe {
            row_dots::launch_unchecked(
                device.client(),
                cubes,
                dim,
                row.width,
                arg(inputs.out.handle()),
                arg(inputs.d_out.handle()),
                arg(delta.handle()),
                (tokens * query_heads) as u32,
                row.vectors as u32,
            );
        }
        let window = inputs.window.min(tokens) as u32;
        let [tokens, query_heads, kv_heads] = [tokens, query_heads, kv_heads].map(|n| n as u32);
        Ok(Self { device, delta, tokens, query_heads, kv_heads, window, row, scale, limits })
    }

    fn tile(&self, rows: usize) -> (Tile, CubeDim) {
        let tile = square(&self.limits, rows, self.row.width);
        (tile, CubeDim::new_1d(tile.units() as u32))
    }

    fn blocks(&self, inputs: &InfluenceInputs<'_, Tensor>) -> Result<Tensor> {
        let block = inputs.block.min(self.tokens as usize);
        let side = self.tokens.div_ceil(block as u32);
        let shape = [self.kv_heads as usize, side as usize, side as usize];
        let sums = Tensor::uninitialised(self.device, OP, &shape)?;
        let (tile, dim) = self.tile(block);
        // SAFETY: the shapes were checked; there is one cube per sum.
        unsafe {
            blocks::launch_unchecked(
                self.device.client(),
                CubeCount::Static(side, side, self.kv_heads),
                dim,
                self.row.width,
                arg(inputs.q.handle()),
                arg(inputs.k.handle()),
                arg(inputs.v.handle()),
                arg(inputs.d_out.handle()),
                arg(inputs.lse.handle()),
                arg(self.delta.handle()),
                arg(sums.handle()),
                self.tokens,
                self.query_heads,
                self.kv_heads,
                self.window,
                block as u32,
                self.row.vectors as u32,
                u32::from(inputs.sign == InfluenceSign::Absolute),
                self.scale,
                tile,
            );
        }
        Ok(sums)
    }

    fn gradients(&self, inputs: &InfluenceInputs<'_, Tensor>) -> Result<Gradients<Tensor>> {
        let of = |like: &Tensor| Tensor::uninitialised(self.device, OP, like.shape());
        let gradients = Gradients { d_q: of(inputs.q)?, d_k: of(inputs.k)?, d_v: of(inputs.v)? };
        let (tile, dim) = self.tile(self.tokens as usize);
        let tiles = self.tokens.div_ceil(tile.rows() as u32);
        // SAFETY: the shapes were checked; the cubes cover the gradients' rows.
        unsafe {
            query_gradient::launch_unchecked(
                self.device.client(),
                CubeCount::Static(tiles, self.query_heads, 1),
                dim,
                self.row.width,
                arg(inputs.q.handle()),
                arg(inputs.k.handle()),
                arg(inputs.v.handle()),
                arg(inputs.d_out.handle()),
                arg(inputs.lse.handle()),
                arg(self.delta.handle()),
                arg(gradients.d_q.handle()),
                self.tokens,
                self.query_heads,
                self.kv_heads,
                self.window,
                self.row.vectors as u32,
                self.scale,
                tile,
                self.row.vectors.div_ceil(tile.units_x),
            );
        }
        for (gradient, by_values) in [(&gradients.d_k, false), (&gradients.d_v, true)] {
            // SAFETY: as above.
            unsafe {
                key_gradient::launch_unchecked(
                    self.device.client(),
                    CubeCount::Static(tiles, self.kv_heads, 1),
                    dim,
                    self.row.width,
                    arg(inputs.q.handle()),
                    arg(inputs.k.handle()),
                    arg(inputs.v.handle()),
                    arg(inputs.d_out.handle()),
                    arg(inputs.lse.handle()),
                    arg(self.delta.handle()),
                    arg(gradient.handle()),
                    self.tokens,
                    self.query_heads,
                    self.kv_heads,
                    self.window,
                    self.row.vectors as u32,
                    self.scale,
                    by_values,
                    tile,
                    self.row.vectors.div_ceil(tile.units_x),
                );
            }
        }
        Ok(gradients)
    }
}

/// Everything about a call that can be wrong.
fn check(
    device: &Device,
    inputs: &InfluenceInputs<'_, Tensor>,
    limits: &Limits,
) -> Result<AttentionShape> {
    let shape = check_influence(inputs, Tensor::shape)?;
    let InfluenceInputs { q, k, v, out, d_out, lse, .. } = *inputs;
    let all = [("q", q), ("k", k), ("v", v), ("out", out), ("d_out", d_out), ("lse", lse)];
    for (what, tensor) in all {
        if !tensor.device().is(device) {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    if shape.head_dim > MAX_HEAD_DIM {
        let expected = format_args!("1 to {MAX_HEAD_DIM}").to_string();
        return Err(Error::argument(OP, "head dim", expected, shape.head_dim));
    }
    let least = shape.tokens.div_ceil(limits.cubes as usize);
    if inputs.block < least {
        return Err(Error::argument(OP, "block", format_args!("at least {least}"), inputs.block));
    }
    Ok(shape)
}
