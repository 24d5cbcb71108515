//! Linear layers. Few rows take a kernel that reads the weight once, many rows matrix units where the device has
//! them for the type that is asked for, and tiles in f32 everywhere else.

mod blocks;
pub(crate) mod matrix;
#[cfg(feature = "vulkan")]
mod products;

use cubecl::prelude::SequenceArg;
use cubecl::server::Handle;
use cubecl::{CubeCount, CubeDim};

use crate::attention::{Limits, Row, arg, square, words};
use crate::kernels::copy::copy;
use crate::kernels::few_rows::{LayerLaunch, Shape, UNITS, few_rows};
use crate::kernels::linear::many_rows;
use crate::kernels::quants::Elements;
use crate::kernels::words::per_word;
use crate::ops::{add, add_rows, rms_norm, swiglu};
use crate::{Device, Dtype, Error, Matrix, Result, Tensor};
#[cfg(feature = "vulkan")]
use products::product;

const OP: &str = "linear";

/// Most rows for which reading the weight is all that counts, without matrix units.
const FEW: usize = 16;

/// Most layers of one dispatch.
const MOST_LAYERS: usize = 3;

/// A linear layer: a weight `[features, columns]`, and a number per feature to add.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The weight.
    pub weight: &'a Matrix,
    /// The bias.
    pub bias: Option<&'a Tensor>,
}

/// `x . weight^T + bias`, `[rows, weight rows]`, in f32 throughout.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    one(x, Layer { weight, bias }, None, Dtype::F32)
}

/// Each of several layers of one input.
///
/// More than 8 rows may be rounded to `inner` before they are multiplied: where that is the weights' type and
/// the device has matrix units for it ([`Device::multiplies`]), which sum in f32. A row's result then depends on how many
/// there are, to within what rounding costs, and numbers beyond the type's range become infinite.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn linears(x: &Tensor, layers: &[Layer<'_>], inner: Dtype) -> Result<Vec<Tensor>> {
    each(x, layers, None, inner)
}

/// `plus + x . weight^T + bias`; of `inner` see [`linears`].
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn linear_add(plus: &Tensor, x: &Tensor, layer: Layer<'_>, inner: Dtype) -> Result<Tensor> {
    one(x, layer, Some(plus), inner)
}

/// [`linears`] of [`rms_norm`], in one kernel where there is one row: the same to within rounding.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn normed_linears(
    x: &Tensor,
    norm: &Tensor,
    eps: f32,
    layers: &[Layer<'_>],
    inner: Dtype,
) -> Result<Vec<Tensor>> {
    match normed(x, norm, layers, inner)? {
        Some(shape) => {
            let mut outs = Vec::with_capacity(layers.len());
            for layers in layers.chunks(shape.layers) {
                let shape = Shape { layers: layers.len(), ..shape };
                outs.extend(launch_few(
                    x,
                    layers,
                    Beside { norm: Some((norm, eps)), plus: None },
                    shape,
                )?);
            }
            Ok(outs)
        }
        None => linears(&rms_norm(x, norm, eps)?, layers, inner),
    }
}

/// [`swiglu`] of the two layers of [`normed_linears`], in one kernel where there is one row: the same to within rounding.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn normed_swiglu(
    x: &Tensor,
    norm: &Tensor,
    eps: f32,
    [gate, up]: [Layer<'_>; 2],
    inner: Dtype,
) -> Result<Tensor> {
    if let Some(shape) = normed(x, norm, &[gate, up], inner)?
        && shape.layers == 2
        && gate.weight.rows() == up.weight.rows()
    {
        let beside = Beside { norm: Some((norm, eps)), plus: None };
        let mut outs = launch_few(x, &[gate, up], beside, Shape { pair: true, ..shape })?;
        return Ok(outs.swap_remove(0));
    }
    let mut outs = normed_linears(x, norm, eps, &[gate, up], inner)?;
    let up = outs.swap_remove(1);
    swiglu(&outs.swap_remove(0), &up)
}

/// The kernel of few rows for one row's norm, where the layers have one.
fn normed(x: &Tensor, norm: &Tensor, layers: &[Layer<'_>], inner: Dtype) -> Result<Option<Shape>> {
    layers.iter().try_for_each(|&layer| check(x, layer))?;
    if norm.shape() != [x.row_len()] {
        let expected = format_args!("[{}]", x.row_len()).to_string();
        return Err(Error::shape(OP, "norm", expected, norm.shape()));
    }
    let alike = layers.windows(2).all(|two| two[0].weight.elements == two[1].weight.elements);
    if x.rows() != 1 || !alike {
        return Ok(None);
    }
    Ok(few(x, layers, false, inner).map(|shape| Shape { norm: true, ..shape }))
}

fn one(x: &Tensor, layer: Layer<'_>, plus: Option<&Tensor>, inner: Dtype) -> Result<Tensor> {
    let mut outs = each(x, &[layer], plus, inner)?;
    outs.pop().ok_or_else(|| Error::argument(OP, "layers", "1", 0))
}

/// Each layer's output, with `plus` added to it.
fn each(
    x: &Tensor,
    layers: &[Layer<'_>],
    plus: Option<&Tensor>,
    inner: Dtype,
) -> Result<Vec<Tensor>> {
    for &layer in layers {
        check(x, layer)?;
        let features = layer.weight.rows();
        if let Some(plus) = plus.filter(|plus| plus.shape() != [x.rows(), features]) {
            let expected = format_args!("[{}, {features}]", x.rows()).to_string();
            return Err(Error::shape(OP, "plus", expected, plus.shape()));
        }
    }
    // Layers of one input may be in different blocks.
    let alike = layers.chunk_by(|a, b| a.weight.elements == b.weight.elements);
    let mut outs = Vec::with_capacity(layers.len());
    for layers in alike {
        outs.extend(each_alike(x, layers, plus, inner)?);
    }
    Ok(outs)
}

fn each_alike(
    x: &Tensor,
    layers: &[Layer<'_>],
    plus: Option<&Tensor>,
    inner: Dtype,
) -> Result<Vec<Tensor>> {
    let Some(shape) = few(x, layers, plus.is_some(), inner) else {
        let narrowed = narrowed(x, layers, inner)?;
        let many = |&layer: &Layer<'_>| {
            let wide = layer.weight.blocks().map(|_| layer.weight.as_plain(inner)).transpose()?;
            let layer = Layer { weight: wide.as_ref().unwrap_or(layer.weight), ..layer };
            let out = many(x, narrowed.as_ref(), layer)?;
            match plus {
                Some(plus) => add(plus, &out),
                None => Ok(out),
            }
        };
        return layers.iter().map(many).collect();
    };
    let mut outs = Vec::with_capacity(layers.len());
    for layers in layers.chunks(shape.layers) {
        let beside = Beside { norm: None, plus };
        outs.extend(launch_few(x, layers, beside, Shape { layers: layers.len(), ..shape })?);
    }
    Ok(outs)
}

/// What the kernel of few rows reads beside its input.
#[derive(Clone, Copy, Debug, Default)]
struct Beside<'a> {
    /// Weights of the input's norm, and its `eps`.
    norm: Option<(&'a Tensor, f32)>,
    plus: Option<&'a Tensor>,
}

fn check(x: &Tensor, layer: Layer<'_>) -> Result<()> {
    let Layer { weight, bias } = layer;
    if x.row_len() != weight.cols() {
        let expected = format_args!("[rows, {}]", weight.cols()).to_string();
        return Err(Error::shape(OP, "x", expected, x.shape()));
    }
    match bias.filter(|bias| bias.shape() != [weight.rows()]) {
        Some(bias) => {
            let expected = format_args!("[{}]", weight.rows()).to_string();
            Err(Error::shape(OP, "bias", expected, bias.shape()))
        }
        None => Ok(()),
    }
}

/// Most rows that [`few_rows`] is for.
fn most_rows(device: &Device, weight: &Matrix, inner: Dtype) -> usize {
    match weight.elements {
        // Twice four bytes of traffic for each element that is widened, unless no buffer holds them.
        Elements::Blocks(_) if 4 * weight.len() as u64 > device.max_buffer_bytes() => usize::MAX,
        Elements::Blocks(_) => 2 * FEW,
        Elements::Plain(dtype) if device.multiplies(inner) && dtype == inner => Shape::MOST,
        Elements::Plain(_) => FEW,
    }
}

/// The kernel for few rows, and how many layers a dispatch takes; `None` for many rows, and for rows that are
/// not whole loads.
fn few(x: &Tensor, layers: &[Layer<'_>], plus: bool, inner: Dtype) -> Option<Shape> {
    let first = layers.first()?;
    let (elements, device) = (first.weight.elements, x.device());
    let fits = |layer: &Layer<'_>| layer.weight.cols().is_multiple_of(elements.per_load());
    let limits = Limits::of(device);
    let rows = Shape::ROWS.into_iter().find(|&n| n >= x.rows()).unwrap_or(Shape::MOST);
    let layers_at_once = (limits.bindings.saturating_sub(3) / 3).clamp(1, MOST_LAYERS);
    let shape = Shape {
        layers: layers_at_once.min(layers.len()),
        rows,
        elements,
        planes: Shape::fits_planes(device.plane_units()),
        native: elements == Elements::Plain(Dtype::F16) && device.converts_f16(),
        plus,
        norm: false,
        pair: false,
    };
    let possible = shape.shared_bytes() <= limits.shared_bytes && UNITS <= limits.units;
    (x.rows() <= most_rows(device, first.weight, inner) && layers.iter().all(fits) && possible)
        .then_some(shape)
}

fn launch_few(
    x: &Tensor,
    layers: &[Layer<'_>],
    beside: Beside<'_>,
    shape: Shape,
) -> Result<Vec<Tensor>> {
    let (device, rows) = (x.device(), x.rows());
    // A pair has one output.
    let own = if shape.pair { &layers[..1] } else { layers };
    let lens: Vec<usize> = own.iter().map(|layer| rows * layer.weight.rows()).collect();
    let outs = device.alloc_each("tensor", &lens)?.into_iter().zip(own);
    let tensor = |(out, layer): (Handle, &Layer<'_>)| {
        Tensor::from_handle(device, out, &[rows, layer.weight.rows()])
    };
    let outs: Vec<Tensor> = outs.map(tensor).collect::<Result<_>>()?;
    queue_few(x, layers, beside, shape, &outs);
    Ok(outs)
}

/// Queues the kernel of few rows, with an output for each layer, or one for a pair.
fn queue_few(x: &Tensor, layers: &[Layer<'_>], beside: Beside<'_>, shape: Shape, outs: &[Tensor]) {
    let (device, rows) = (x.device(), x.rows());
    let (mut args, mut tiles) = (SequenceArg::new(), 0);
    for (number, layer) in layers.iter().enumerate() {
        let features = layer.weight.rows();
        args.push(LayerLaunch::new(
            arg(&layer.weight.words),
            arg(layer.bias.unwrap_or(x).handle()),
            arg(outs[number.min(outs.len() - 1)].handle()),
            features as u32,
            if shape.pair { 0 } else { tiles as u32 },
            u32::from(layer.bias.is_some()),
            layer.weight.steps as u32,
        ));
        if number < outs.len() {
            tiles += features.div_ceil(shape.features());
        }
    }
    if rows == 0 {
        return;
    }
    let along_x = tiles.min(Limits::of(device).cubes as usize);
    let cubes = [along_x, rows.div_ceil(shape.rows), tiles.div_ceil(along_x)].map(|n| n as u32);
    let columns = x.row_len() / shape.elements.per_load();
    let (norm, eps) = beside.norm.unwrap_or((x, 0.0));
    // SAFETY: there is a cube for each tile of features and group of rows; shapes were checked.
    unsafe {
        few_rows::launch_unchecked(
            device.client(),
            CubeCount::Static(cubes[0], cubes[1], cubes[2]),
            CubeDim::new_1d(UNITS as u32),
            arg(x.handle()),
            arg(beside.plus.unwrap_or(x).handle()),
            arg(norm.handle()),
            args,
            rows as u32,
            tiles as u32,
            columns as u32,
            eps,
            shape,
        );
    }
}

/// [`linear`] into a tensor of the same shape as its result.
///
/// # Errors
/// As [`linear`].
pub(crate) fn linear_into(x: &Tensor, weight: &Matrix, out: &Tensor) -> Result<()> {
    let layer = Layer { weight, bias: None };
    check(x, layer)?;
    match few(x, &[layer], false, Dtype::F32) {
        Some(shape) => queue_few(x, &[layer], Beside::default(), shape, std::slice::from_ref(out)),
        None => {
            let made = linear(x, weight, None)?;
            let (cubes, dim) = x.device().cubes(out.len());
            let [from, to] = [&made, out].map(|tensor| arg(tensor.handle()));
            // SAFETY: both have that many elements.
            unsafe {
                let client = x.device().client();
                copy::launch_unchecked(client, cubes, dim, from, to, out.len() as u32);
            }
        }
    }
    Ok(())
}

/// `x` rounded to `inner`, if matrix units multiply it with one of the layers.
fn narrowed(x: &Tensor, layers: &[Layer<'_>], inner: Dtype) -> Result<Option<Handle>> {
    let fits = layers.iter().any(|layer| layer.weight.dtype().unwrap_or(inner) == inner);
    match fits && x.device().multiplies(inner) && x.len() > 0 {
        true => words(x.device(), x, inner).map(Some),
        false => Ok(None),
    }
}

/// By matrix units where there is an input for them, and a kernel for the layer.
fn many(x: &Tensor, narrowed: Option<&Handle>, layer: Layer<'_>) -> Result<Tensor> {
    if let Some(narrowed) = narrowed.filter(|_| layer.weight.dtype() == Some(Dtype::F16))
        && let Some(out) = product(OP, narrowed, x.rows(), layer.weight)?
    {
        return match layer.bias {
            Some(bias) => add_rows(&out, bias),
            None => Ok(out),
        };
    }
    by_tiles(x, layer)
}

/// CubeCL reaches matrix units over Vulkan alone, and cubek comes with it.
#[cfg(not(feature = "vulkan"))]
fn product(_: &'static str, _: &Handle, _: usize, _: &Matrix) -> Result<Option<Tensor>> {
    Ok(None)
}

/// A weight in blocks was widened before.
fn by_tiles(x: &Tensor, Layer { weight, bias }: Layer<'_>) -> Result<Tensor> {
    let dtype = weight.dtype().unwrap_or_default();
    let (device, rows, features) = (x.device(), x.rows(), weight.rows());
    let out = Tensor::uninitialised(device, OP, &[rows, features])?;
    if rows == 0 {
        return Ok(out);
    }
    let row = Row::of(weight.cols());
    let limits = Limits::of(device);
    let tile = square(&limits, rows, row.width);
    let cubes = [features.div_ceil(tile.keys()), rows.div_ceil(tile.rows())];
    if let Some(cubes) = cubes.into_iter().find(|&n| n > limits.cubes as usize) {
        return Err(Error::argument(OP, "tiles", format_args!("at most {}", limits.cubes), cubes));
    }
    // SAFETY: there is a cube for each tile of the output; shapes were checked.
    unsafe {
        many_rows::launch_unchecked(
            device.client(),
            CubeCount::Static(cubes[0] as u32, cubes[1] as u32, 1),
            CubeDim::new_1d(tile.units() as u32),
            row.width,
            row.width / per_word(dtype),
            arg(x.handle()),
            arg(&weight.words),
            arg(bias.unwrap_or(x).handle()),
            arg(out.handle()),
            rows as u32,
            features as u32,
            row.vectors as u32,
            u32::from(bias.is_some()),
            tile,
            dtype,
        );
    }
    Ok(out)
}
