//! Attention on the wgpu device and queue that an application already has: the output is copied on
//! the device to a buffer of the application's own.
//!
//! `cargo run --release -p moa-backend-wgpu --example shared_device`

use std::error::Error;

use moa_backend_wgpu::cubecl::future::block_on;
use moa_backend_wgpu::cubecl::wgpu::{AutoCompiler, WgpuServer, WgpuSetup, wgpu};
use moa_backend_wgpu::{Device, Dtype, Tensor, WgpuBackend};
use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

fn main() -> Result<(), Box<dyn Error>> {
    // The application's own setup.
    let description = wgpu::InstanceDescriptor::new_without_display_handle();
    let instance = wgpu::Instance::new(description);
    let adapter = block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        // What the adapter can do is what kernels may use.
        required_features: adapter.features() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        required_limits: adapter.limits(),
        // SAFETY: the list of features includes experimental ones, none of which is used here.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }))?;

    let backend = adapter.get_info().backend;
    let shared = Device::from_setup(WgpuSetup {
        instance,
        adapter,
        device: device.clone(),
        queue: queue.clone(),
        backend,
    })?;
    println!("on {}", shared.name());
    let attention = WgpuBackend::new(&shared, Dtype::Bf16);

    // Two KV heads: one sees everything, one 4 sinks and 60 recent keys.
    let (tokens, head_dim) = (300, 64);
    let spans = [Span::full(1024), Span::new(4, 60)?];
    let mut cache = attention.open(&LayerLayout::new(&spans, 1024, 0)?, head_dim)?;
    let values = |heads: usize, by: usize| -> Vec<f32> {
        (0..tokens * heads * head_dim).map(|i| (i * by % 199) as f32 / 99.0 - 1.0).collect()
    };
    let q = Tensor::new(&shared, &values(4, 31), &[tokens, 4, head_dim])?;
    let k = Tensor::new(&shared, &values(2, 37), &[tokens, 2, head_dim])?;
    let v = Tensor::new(&shared, &values(2, 41), &[tokens, 2, head_dim])?;
    let inputs = ExtendInputs::new(&q, &k, &v, 0.125);
    let out = attention.extend(&mut [Append { cache: &mut cache, tokens }], &inputs)?.out;

    // The output as a wgpu buffer, and a copy of it that the application encodes itself. What
    // CubeCL has queued is submitted first.
    let resource =
        shared.client().get_resource::<WgpuServer<AutoCompiler>>(out.handle().clone())?;
    shared.client().flush()?;
    let from = resource.resource();
    let size = 4 * (tokens * 4 * head_dim) as u64;
    let own = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("the application's"),
        size,
        usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &own, 0, size);
    queue.submit([encoder.finish()]);

    own.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let copied = own.slice(..).get_mapped_range()?;
    let read = out.to_vec()?;
    let same = copied.chunks_exact(4).zip(&read).all(|(bytes, x)| bytes == x.to_ne_bytes());
    println!("{} bytes of cache, output of {} numbers", attention.bytes(&cache), read.len());
    println!("the application's copy is the same: {same}");
    if same { Ok(()) } else { Err("the copy differs".into()) }
}
