//! Sums of GPUs that write into each other's memory: two ranks on one GPU, and on two where there are two.

use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moa_backend_cuda::{Arena, Device, Dtype, Error, Operations, PeerBuffer, PeerSums, Tensor};
use moa_conformance::{Stop, Trial, Verdict, trials};

use super::gpu;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        two_ranks_of_one_gpu_add_up,
        two_gpus_add_up,
        a_captured_sum_meets_each_time_it_is_launched,
        a_rank_that_does_not_come_is_named_and_later_sums_do_not_wait,
        a_sum_that_is_given_up_ends,
        tensors_that_do_not_fit_are_refused,
    ]
}

const LONG: Duration = Duration::from_secs(20);

/// What `work` does as each rank of a group on these GPUs. Calls of the driver that wait for a whole GPU would wait for a
/// sum of the other rank there: what needs them comes before the first sum, and one trial runs at a time.
fn on<T: Send>(
    ordinals: [usize; 2],
    deadline: Duration,
    work: impl Fn(usize, &Operations, &PeerSums) -> T + Sync,
) -> Result<Vec<T>, Stop> {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    gpu::device()?;
    let open = |ordinal| match Device::open(ordinal) {
        Err(Error::NoDevice { .. }) => Err(Stop::ignored(format!("no GPU {ordinal}"))),
        device => Ok(device?),
    };
    let devices = ordinals.map(open).into_iter().collect::<Result<Vec<Device>, Stop>>()?;
    let buffers = devices.iter().map(|device| Ok(Arc::new(PeerBuffer::new(device, 2)?)));
    let buffers = buffers.collect::<Result<Vec<_>, Error>>()?;
    let (buffers, work, ready) = (&buffers, &work, &Barrier::new(2));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = devices.iter().enumerate().collect();
        let run = |(rank, device): (usize, &'_ Device)| {
            let sums = PeerSums::new(device, Dtype::Bf16, rank, buffers, deadline);
            let operations = Operations::new(device, Dtype::Bf16);
            ready.wait();
            let sums = sums?
                .ok_or_else(|| Stop::ignored("GPUs that cannot write into each other's memory"))?;
            Ok::<_, Stop>(work(rank, &operations?, &sums))
        };
        let threads: Vec<_> = ranks.into_iter().map(|own| scope.spawn(move || run(own))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A rank's part of a sum.
fn part(rank: usize, round: usize, shape: [usize; 2]) -> Vec<f32> {
    let number = |i: usize| {
        let mixed = (i * 2_654_435_761 + round * 40_503 + rank * 97) % 10_007;
        mixed as f32 / 5_003.0 - 1.0
    };
    (0..shape[0] * shape[1]).map(number).collect()
}

/// One row and many, more than there are blocks, rows of other lengths in turn.
const SHAPES: [[usize; 2]; 7] =
    [[1, 4096], [1, 64], [16, 1024], [5, 264], [150, 256], [1, 8192], [64, 4096]];

fn add_up(ordinals: [usize; 2]) -> Verdict {
    let all = on(ordinals, LONG, |rank, operations, sums| {
        let device = operations.device();
        let mut made = Vec::new();
        // The host does not wait in between: ranks may be apart as far as the protocol lets them.
        let inputs: Vec<Tensor> = (0..140)
            .map(|round| {
                let shape = SHAPES[round % SHAPES.len()];
                Tensor::from_f32(device, &part(rank, round, shape), &shape, Dtype::F32).unwrap()
            })
            .collect();
        for (round, x) in inputs.iter().enumerate() {
            let cols = x.shape()[1];
            let weight = Tensor::from_f32(device, &part(7, 0, [1, cols]), &[cols], Dtype::F32);
            let weight = weight.unwrap();
            if round % 3 == 2 {
                sums.all_reduce(x).unwrap();
                made.push(None);
            } else {
                let normed = sums.all_reduce_norm(x, &weight, 1e-5).unwrap();
                made.push(Some((normed, operations.rms_norm(x, &weight, 1e-5).unwrap())));
            }
        }
        let values = inputs.iter().map(|x| x.to_f32().unwrap()).collect::<Vec<_>>();
        for (round, (own, other)) in
            made.iter().enumerate().filter_map(|(r, m)| Some((r, m.as_ref()?)))
        {
            assert!(own.to_f32().unwrap() == other.to_f32().unwrap(), "norm of round {round}");
        }
        assert_eq!(sums.missing(), None);
        values
    })?;
    for (round, values) in all[0].iter().enumerate() {
        let shape = SHAPES[round % SHAPES.len()];
        let parts = [part(0, round, shape), part(1, round, shape)];
        let expected: Vec<f32> = parts[0].iter().zip(&parts[1]).map(|(a, b)| a + b).collect();
        assert!(*values == expected, "round {round}");
        assert!(all[1][round] == expected, "round {round} on the other rank");
    }
    Ok(())
}

fn two_ranks_of_one_gpu_add_up() -> Verdict {
    add_up([0, 0])
}

fn two_gpus_add_up() -> Verdict {
    add_up([0, 1])
}

fn a_captured_sum_meets_each_time_it_is_launched() -> Verdict {
    let _undisturbed = crate::graph::undisturbed();
    let other = usize::from(Device::open(1).is_ok());
    let got = on([0, other], LONG, |rank, operations, sums| {
        let device = operations.device();
        let x = Tensor::from_f32(device, &[1.0 + rank as f32; 512], &[2, 256], Dtype::F32).unwrap();
        let weight = Tensor::from_f32(device, &[1.0; 256], &[256], Dtype::F32).unwrap();
        let work = || -> Result<(), Error> {
            sums.all_reduce(&x)?;
            sums.all_reduce_norm(&x, &weight, 1e-5)?;
            sums.all_reduce(&x)
        };
        let arena = Arena::new();
        arena.rehearse(work).unwrap();
        // SAFETY: the work only launches and drops what it makes; everything else outlives the graph.
        let mut graph = unsafe { device.capture(&arena, work) }.unwrap();
        for _ in 0..30 {
            // SAFETY: as above.
            unsafe { graph.launch() }.unwrap();
        }
        x.to_f32().unwrap()
    })?;
    // 1 + 2, then twice as much with every sum.
    let expected = 3.0 * 2f32.powi(31 * 3 - 1);
    assert!(got.iter().flatten().all(|x| *x == expected), "{} {}", got[0][0], got[1][0]);
    Ok(())
}

fn a_rank_that_does_not_come_is_named_and_later_sums_do_not_wait() -> Verdict {
    let deadline = Duration::from_millis(400);
    on([0, 0], deadline, |rank, operations, sums| {
        let device = operations.device();
        let x = Tensor::zeros(device, &[4, 256], Dtype::F32).unwrap();
        sums.all_reduce(&x).unwrap();
        device.synchronize().unwrap();
        if rank == 1 {
            // It stays for as long as the other one may look at its memory.
            std::thread::sleep(4 * deadline);
            return;
        }
        let begin = Instant::now();
        for _ in 0..50 {
            sums.all_reduce(&x).unwrap();
        }
        device.synchronize().unwrap();
        let took = begin.elapsed();
        assert!(took >= deadline && took < 3 * deadline, "{took:?}");
        assert_eq!(sums.missing(), Some(1));
    })
    .map(drop)
}

fn a_sum_that_is_given_up_ends() -> Verdict {
    on([0, 0], LONG, |rank, operations, sums| {
        let device = operations.device();
        if rank == 1 {
            std::thread::sleep(Duration::from_secs(2));
            return;
        }
        let x = Tensor::zeros(device, &[4, 256], Dtype::F32).unwrap();
        let begin = Instant::now();
        sums.all_reduce(&x).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        sums.abort();
        device.synchronize().unwrap();
        assert!(begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
        assert_eq!(sums.missing(), None);
    })
    .map(drop)
}

fn tensors_that_do_not_fit_are_refused() -> Verdict {
    on([0, 0], LONG, |_, operations, sums| {
        let device = operations.device();
        for (shape, dtype) in
            [([1, 6], Dtype::F32), ([1 << 8, 1028], Dtype::F32), ([1, 8], Dtype::Bf16)]
        {
            let x = Tensor::zeros(device, &shape, dtype).unwrap();
            assert!(!sums.fits(&x) && sums.all_reduce(&x).is_err(), "{shape:?}");
        }
        let x = Tensor::zeros(device, &[2, 12], Dtype::F32).unwrap();
        let weight = Tensor::zeros(device, &[12], Dtype::F32).unwrap();
        assert!(sums.all_reduce_norm(&x, &weight, 1e-5).is_err(), "rows of 12");
        let x = Tensor::zeros(device, &[2, 16], Dtype::F32).unwrap();
        assert!(sums.all_reduce_norm(&x, &weight, 1e-5).is_err(), "a weight of 12 for rows of 16");
    })
    .map(drop)
}
