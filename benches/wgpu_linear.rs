//! Linear layers against the copy rate, where few rows read the weight, and cubek's product, which many rows
//! take where the device has matrix units, with each of its strategies.
//!
//! `cargo bench -p moa-backend-wgpu --features peer,vulkan --bench wgpu_linear -- --json out.json`; `--test`
//! measures a tiny size.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::TensorBinding;
use cubecl::server::Handle;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::double_buffering::DoubleBufferingArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::routine::BlueprintStrategy;
use cubek::std::InputBinding;
use half::f16;
use moa_backend_wgpu::ops::{self, Layer};
use moa_backend_wgpu::{Device, Dtype, Matrix, Tensor};
use serde_json::{Map, Value, json};

#[path = "wgpu_extend/timing.rs"]
mod timing;

use timing::{Time, copy_rate, time};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const F16: ElemType = ElemType::Float(FloatKind::F16);
const F32: ElemType = ElemType::Float(FloatKind::F32);

/// Rows, features, columns: layers of Llama-3-8B.
const SIZES: [[usize; 3]; 12] = [
    [1, 4096, 4096],
    [1, 14336, 4096],
    [1, 4096, 14336],
    [1, 128_256, 4096],
    [4, 14336, 4096],
    [8, 14336, 4096],
    [16, 14336, 4096],
    [64, 14336, 4096],
    [512, 4096, 4096],
    [2048, 4096, 4096],
    [2048, 14336, 4096],
    [2048, 4096, 14336],
];

fn main() -> Result<()> {
    let (mut sizes, mut seconds, mut file) = (SIZES.to_vec(), 0.5, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--bench" => {}
            "--test" => (sizes, seconds) = (vec![[1, 64, 64], [40, 64, 64]], 0.01),
            "--seconds" => seconds = arguments.next().ok_or("--seconds needs a number")?.parse()?,
            "--json" => file = Some(arguments.next().ok_or("--json needs a file")?),
            _ => {
                return Err(
                    format!("unknown option {name}: --seconds S, --json FILE, --test").into()
                );
            }
        }
    }
    let device = match Device::open() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    println!("{} over {}", device.name(), device.client().name());
    let copy = copy_rate(&device, if seconds < 0.1 { 1 << 20 } else { 512 << 20 }, seconds)?;
    println!("copy: {:.1} GB/s read and written", copy / 1e9);
    let mut all = Map::new();
    all.insert("device".into(), json!(device.name()));
    all.insert("copy_GB_s".into(), json!(copy / 1e9));
    for size in sizes {
        let [rows, features, columns] = size;
        println!("{rows} rows, {features} x {columns}, f16:");
        all.insert(format!("{rows}x{features}x{columns}"), measure(&device, size, seconds, copy)?);
    }
    if let Some(path) = file {
        std::fs::write(path, serde_json::to_string_pretty(&Value::Object(all))?)?;
    }
    Ok(())
}

fn measure(device: &Device, size: [usize; 3], seconds: f64, copy: f64) -> Result<Value> {
    let [rows, features, columns] = size;
    let numbers = |len: usize, by: u32| -> Vec<f32> {
        let hash = |i: u32| i.wrapping_mul(by).rotate_left(13).wrapping_mul(40_503);
        (0..len as u32).map(|i| (hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    };
    let x = numbers(rows * columns, 2_654_435_761);
    let halves =
        |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect() };
    let weights = halves(&numbers(features * columns, 1_597_334_677));
    let weight = Matrix::new(device, &weights, features, columns, Dtype::F16)?;
    let input = Tensor::new(device, &x, &[rows, columns])?;
    let mut values = Map::new();
    let mut show = |name: &str, taken: &Time| {
        let operations = 2.0 * (rows * features * columns) as f64;
        let bytes = 2.0 * (features * columns) as f64;
        let tera = operations / taken.wall / 1e12;
        let share = bytes / taken.wall / copy;
        let on_device = taken.device.map_or_else(|| "-".to_string(), |s| format!("{:.1}", s * 1e6));
        println!(
            "  {name:<28} {:>9.1} us, device {on_device:>9} us, {tera:.1} TFLOP/s, weight at {:.0} % of copy",
            taken.wall * 1e6,
            100.0 * share
        );
        let mut value = taken.json();
        value["TFLOP_s"] = json!(tera);
        value["of_copy"] = json!(share);
        values.insert(name.into(), value);
    };
    for (name, inner) in [("ours, f32", Dtype::F32), ("ours, f16", Dtype::F16)] {
        let layer = Layer { weight: &weight, bias: None };
        let taken = time(device, seconds, || Ok(ops::linears(&input, &[layer], inner).map(drop)?))?;
        show(name, &taken);
    }
    if rows <= 16 || !device.multiplies(Dtype::F16) {
        return Ok(Value::Object(values));
    }
    let (x, w) = (
        device.client().create_from_slice(&halves(&x)),
        device.client().create_from_slice(&weights),
    );
    for (name, strategy) in strategies() {
        let product = || product(device, &strategy, size, &x, &w);
        match product() {
            Ok(_) => show(name, &time(device, seconds, || product().map(drop))?),
            Err(error) => println!("  {name}: {error}"),
        }
    }
    Ok(Value::Object(values))
}

fn strategies() -> [(&'static str, Strategy); 3] {
    let tile_matmul = TileMatmulKind::Cmma;
    let simple = |multi_rows| {
        let args = SimpleArgs { multi_rows, tile_matmul };
        Strategy::SimpleCyclicCmma(BlueprintStrategy::Inferred(args))
    };
    let double = DoubleBufferingArgs { specialized: false, tile_matmul };
    [
        ("cubek, simple", simple(false)),
        ("cubek, simple, rows", simple(true)),
        ("cubek, double buffers", Strategy::DoubleCyclicCmma(BlueprintStrategy::Inferred(double))),
    ]
}

/// `x . w^T` of f16 matrices, summed in f32.
fn product(
    device: &Device,
    strategy: &Strategy,
    [rows, features, columns]: [usize; 3],
    x: &Handle,
    w: &Handle,
) -> Result<Handle> {
    let out = device.client().empty(4 * rows * features);
    let binding = |handle: &Handle, strides: [usize; 2], shape: [usize; 2]| {
        // SAFETY: each buffer holds a matrix of this shape.
        unsafe { TensorBinding::from_raw_parts(handle.clone(), strides.into(), shape.into()) }
    };
    let types = MatmulGlobalElems { lhs: F16, rhs: F16, out: F32 };
    let mut elements = MatmulElems::from_globals(&types);
    launch_ref(
        &strategy.clone().into(),
        device.client(),
        InputBinding::new(binding(x, [columns, 1], [rows, columns]), F16),
        InputBinding::new(binding(w, [1, columns], [columns, features]), F16),
        binding(&out, [features, 1], [rows, features]),
        &mut elements,
    )
    .map_err(|error| format!("{error:?}"))?;
    Ok(out)
}
