//! Products of many rows on matrix units, by cubek.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::TensorBinding;
use cubecl::server::Handle;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::routine::BlueprintStrategy;
use cubek::std::InputBinding;

use crate::{Matrix, Result, Tensor};

const F16: ElemType = ElemType::Float(FloatKind::F16);
const F32: ElemType = ElemType::Float(FloatKind::F32);

/// From this many rows on, planes that take several rows of tiles were faster on an H200.
const MANY_ROWS: usize = 1024;

/// `x . weight^T` of f16 matrices, `x` of that many rows, summed in f32; `None` where cubek has no kernel for the
/// shape or the device.
pub(crate) fn product(
    op: &'static str,
    x: &Handle,
    rows: usize,
    weight: &Matrix,
) -> Result<Option<Tensor>> {
    let (features, columns) = (weight.rows(), weight.cols());
    let device = weight.device();
    let out = Tensor::uninitialised(device, op, &[rows, features])?;
    let binding = |handle: &Handle, strides: [usize; 2], shape: [usize; 2]| {
        // SAFETY: each buffer holds a matrix of this shape.
        unsafe { TensorBinding::from_raw_parts(handle.clone(), strides.into(), shape.into()) }
    };
    let args = SimpleArgs { multi_rows: rows >= MANY_ROWS, tile_matmul: TileMatmulKind::Cmma };
    let types = MatmulGlobalElems { lhs: F16, rhs: F16, out: F32 };
    let mut elements = MatmulElems::from_globals(&types);
    let launched = launch_ref(
        &Strategy::SimpleCyclicCmma(BlueprintStrategy::Inferred(args)).into(),
        device.client(),
        InputBinding::new(binding(x, [columns, 1], [rows, columns]), F16),
        InputBinding::new(binding(&weight.words, [1, columns], [columns, features]), F16),
        binding(out.handle(), [features, 1], [rows, features]),
        &mut elements,
    );
    match launched {
        Ok(()) => Ok(Some(out)),
        Err(_) => Ok(None),
    }
}
