//! Sums over all GPUs of a machine, or the first of them, by NCCL and by kernels that write into each other's memory:
//! microseconds a sum, alone and with the norm behind it, as in the captured step of a model.
//!
//! `cargo bench -p moa-backend-cuda --bench cuda_sums -- 2`

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use moa_backend_cuda::{
    Arena, Device, Dtype, Nccl, NcclId, Operations, PeerBuffer, PeerSums, Tensor,
};
use serde_json::json;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Elements of a row, as in models of 8B.
const COLS: usize = 4096;
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, 64];
/// Sums of a graph: two for each of 32 layers.
const SUMS: usize = 64;

fn main() -> Result<()> {
    let most = std::env::args().skip(1).find_map(|text| text.parse().ok()).unwrap_or(8);
    let opened: Vec<Device> = (0..most).map_while(|gpu| Device::open(gpu).ok()).collect();
    if opened.len() < 2 {
        eprintln!("skipped: {} GPUs", opened.len());
        return Ok(());
    }
    let ranks = opened.len();
    let id = NcclId::new()?;
    let buffers = opened.iter().map(|device| Ok(Arc::new(PeerBuffer::new(device, ranks)?)));
    let buffers = buffers.collect::<Result<Vec<_>>>()?;
    let together = Barrier::new(ranks);
    let (id, buffers, together) = (&id, &buffers, &together);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| (rank, opened[rank].clone()))
            .map(|(rank, device)| {
                scope.spawn(move || {
                    let nccl = Nccl::new(&device, id, rank, ranks)?;
                    let deadline = Duration::from_secs(20);
                    let peers = PeerSums::new(&device, Dtype::Bf16, rank, buffers, deadline)?
                        .ok_or("GPUs that cannot write into each other's memory")?;
                    measure(&device, &nccl, &peers, together)
                })
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| "a rank panicked")??;
        }
        Ok(())
    })
}

fn measure(device: &Device, nccl: &Nccl, peers: &PeerSums, together: &Barrier) -> Result<()> {
    let operations = Operations::new(device, Dtype::Bf16)?;
    for rows in ROWS {
        let x = Tensor::zeros(device, &[rows, COLS], Dtype::F32)?;
        let weight = Tensor::zeros(device, &[COLS], Dtype::F32)?;
        let time = |work: &dyn Fn() -> moa_backend_cuda::Result<()>| -> Result<f64> {
            let all = || (0..SUMS).try_for_each(|_| work());
            let arena = Arena::new();
            arena.rehearse(all)?;
            // SAFETY: the work only launches and drops what it makes; everything else outlives the graph.
            let mut graph = unsafe { device.capture(&arena, all) }?;
            let mut times = Vec::new();
            for _ in 0..12 {
                device.synchronize()?;
                together.wait();
                let begin = Instant::now();
                for _ in 0..8 {
                    // SAFETY: as above.
                    unsafe { graph.launch() }?;
                }
                device.synchronize()?;
                times.push(begin.elapsed().as_secs_f64() * 1e6 / (8 * SUMS) as f64);
            }
            times.sort_by(f64::total_cmp);
            Ok(times[times.len() / 2])
        };
        let by_nccl = time(&|| nccl.all_reduce(&x))?;
        let by_nccl_normed = time(&|| {
            nccl.all_reduce(&x)?;
            operations.rms_norm(&x, &weight, 1e-5).map(drop)
        })?;
        let by_peers = time(&|| peers.all_reduce(&x))?;
        let by_peers_normed = time(&|| peers.all_reduce_norm(&x, &weight, 1e-5).map(drop))?;
        if nccl.rank() == 0 {
            let row = json!({
                "bytes": rows * COLS * size_of::<f32>(),
                "nccl_us": by_nccl,
                "nccl_and_norm_us": by_nccl_normed,
                "peers_us": by_peers,
                "peers_with_norm_us": by_peers_normed,
            });
            println!("{} GPUs, {rows} rows of {COLS}: {row}", nccl.ranks());
        }
    }
    Ok(())
}
