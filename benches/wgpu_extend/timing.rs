use std::sync::OnceLock;
use std::time::Instant;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use moa_backend_wgpu::Device;
use moa_backend_wgpu::cubecl::future::block_on;
use serde_json::{Value, json};

use super::Result;

/// Seconds of one run.
#[derive(Clone, Debug)]
pub(crate) struct Time {
    /// By the host's clock, several runs queued before their end is awaited; median.
    pub(crate) wall: f64,
    /// By the device's clock, where there is one and it is not the host's; median.
    pub(crate) device: Option<f64>,
    /// Runs of a sample.
    pub(crate) runs: usize,
    /// What the device's median is of.
    pub(crate) windows: Vec<f64>,
}

impl Time {
    pub(crate) fn json(&self) -> Value {
        let windows: Vec<f64> = self.windows.iter().map(|seconds| seconds * 1e6).collect();
        json!({
            "wall_us": self.wall * 1e6,
            "device_us": self.device.map(|s| s * 1e6),
            "runs": self.runs,
            "device_windows_us": windows,
        })
    }
}

/// Most runs that are queued at a time, and samples of a median.
const MOST_RUNS: usize = 256;
const SAMPLES: usize = 7;

/// Windows of the device's clock.
const WINDOWS: usize = 3;

/// Runs before the first that counts, and after the one that compiles.
const WARM_UP: usize = 5;

/// Runs that one measurement makes at most.
#[allow(dead_code, reason = "only benches that open caches leave room for them")]
pub(crate) const MOST: usize = 1 + WARM_UP + (SAMPLES + WINDOWS) * MOST_RUNS;

/// Most seconds of copies before anything counts.
const HEAT: f64 = 0.25;

/// Keeps the device busy: drivers lower the clocks of one that mostly waits, by a factor of four on an H200,
/// and raise them after a while.
fn heat(client: &Client, seconds: f64) -> Result<()> {
    static BUFFERS: OnceLock<[Handle; 2]> = OnceLock::new();
    let bytes = (256 << 20).min(client.properties().memory.max_page_size as usize) / 16 * 16;
    let [from, to] = BUFFERS.get_or_init(|| [client.empty(bytes), client.empty(bytes)]);
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        for _ in 0..4 {
            queue_copy(client, from, to, bytes);
        }
        block_on(client.sync()).map_err(|error| format!("{error:?}"))?;
    }
    Ok(())
}

/// Times `run`, which queues work, for about `seconds`.
pub(crate) fn time(
    device: &Device,
    seconds: f64,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Time> {
    let client = device.client();
    let sync = || block_on(client.sync()).map_err(|error| format!("{error:?}"));
    // The first compiles, and the next ones still find memory to be had and clocks to rise.
    let mut one = f64::INFINITY;
    for number in 0..=WARM_UP {
        let start = Instant::now();
        run()?;
        sync()?;
        let taken = start.elapsed().as_secs_f64();
        one = one.min(taken);
        if number > 0 && taken > seconds {
            break;
        }
    }
    heat(client, HEAT.min(seconds))?;
    let runs = ((seconds / SAMPLES as f64 / one) as usize).clamp(1, MOST_RUNS);
    let samples = if seconds > one { SAMPLES.min((seconds / one) as usize + 1) } else { 1 };
    let mut walls = Vec::new();
    for _ in 0..samples {
        let start = Instant::now();
        for _ in 0..runs {
            run()?;
        }
        sync()?;
        walls.push(start.elapsed().as_secs_f64() / runs as f64);
    }
    walls.sort_by(f64::total_cmp);
    let mut windows = Vec::new();
    for _ in 0..samples.min(WINDOWS) {
        let window = client.profile_start().map_err(|error| format!("{error:?}"))?;
        for _ in 0..runs {
            run()?;
        }
        let ticks = client.profile_end(window).ok().and_then(|ticks| block_on(ticks.resolve()));
        sync()?;
        windows.extend(ticks.map(|ticks| ticks.duration().as_secs_f64() / runs as f64));
    }
    windows.retain(|&seconds| seconds > 0.0);
    windows.sort_by(f64::total_cmp);
    Ok(Time {
        wall: walls[walls.len() / 2],
        device: windows.get(windows.len() / 2).copied(),
        runs,
        windows,
    })
}

/// Copies vectors of words.
#[cube(launch_unchecked)]
fn copy<N: Size>(from: &[Vector<u32, N>], to: &mut [Vector<u32, N>], len: u32) {
    if ABSOLUTE_POS < len as usize {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}

/// Queues a copy of `bytes`, a multiple of 16.
fn queue_copy(client: &Client, from: &Handle, to: &Handle, bytes: usize) {
    let (vectors, dim) = (bytes / 16, CubeDim::new_1d(256));
    let cubes = cubecl::calculate_cube_count_elemwise(client, vectors, dim);
    // SAFETY: both buffers have that many vectors of four words.
    unsafe {
        let [from, to] =
            [from, to].map(|handle| BufferArg::from_raw_parts(handle.clone(), bytes / 4));
        copy::launch_unchecked(client, cubes, dim, 4, from, to, vectors as u32);
    }
}

/// Bytes read and written a second where that many are copied.
pub(crate) fn copy_rate(device: &Device, bytes: usize, seconds: f64) -> Result<f64> {
    let client = device.client();
    let (from, to) = (client.empty(bytes), client.empty(bytes));
    let taken = time(device, seconds, || {
        queue_copy(client, &from, &to, bytes);
        Ok(())
    })?;
    Ok(2.0 * bytes as f64 / taken.wall)
}
