//! Sums of small tensors over GPUs that write into each other's memory, by `kernels/all_reduce.cu`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{DriverError, result, sys};

use crate::kernels::source::Source;
use crate::kernels::tables::DevicePointer;
use crate::ops::launch::OpKernels;
use crate::{Device, Dtype, Error, Result, Tensor};

/// Most GPUs of a group.
const MOST_RANKS: usize = 8;
/// Most blocks of a launch; all of them run at once on any GPU that has peers.
const MOST_BLOCKS: usize = 96;
/// Bytes of a buffer before its slots, as in the kernel.
const SLOTS: usize = 256;
/// Elements of a sum at most.
const CAPACITY: usize = 1 << 18;
/// Bytes of two elements and the number of their sum.
const PAIR: usize = 16;
/// Elements of a sum that a block has at least.
const SHARE: usize = 4096;

/// Names of the kernels.
const KERNELS: [&str; 2] = ["all_reduce", "all_reduce_norm"];

/// The memory into which the GPUs of a group write their parts of sums for one of them ([`PeerSums`]), 4 MiB for each.
#[derive(Debug)]
pub struct PeerBuffer {
    device: Device,
    ranks: usize,
    address: DevicePointer,
}

impl PeerBuffer {
    /// That of a device in a group of so many ranks.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device, ranks: usize) -> Result<Self> {
        device.bind()?;
        let bytes = SLOTS + 2 * ranks * CAPACITY / 2 * PAIR;
        // Not of the stream's pool, where peers may not write. SAFETY: the context is the thread's.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(Error::driver("cuMemAlloc"))?;
        let buffer = Self { device: device.clone(), ranks, address };
        // SAFETY: these are its bytes.
        unsafe { result::memset_d8_sync(address, 0, bytes) }
            .map_err(Error::driver("cuMemsetD8"))?;
        // The default stream's work is not ordered before that of others.
        // SAFETY: the context is the thread's.
        unsafe { sys::cuCtxSynchronize() }.result().map_err(Error::driver("cuCtxSynchronize"))?;
        Ok(buffer)
    }
}

impl Drop for PeerBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: whoever writes there holds it. There is nothing to do about a failure.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Two words of page-locked host memory: one that ends all waits of a device, and one in which it says who was
/// missing.
#[derive(Debug)]
struct Words(*mut u32);

// SAFETY: the words are read and written as a whole.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        // SAFETY: the context is the thread's; the memory is written before it is read.
        let words = unsafe { result::malloc_host(64, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let words = words.map_err(Error::driver("cuMemHostAlloc"))?.cast::<u32>();
        // SAFETY: there is room for 16 of them.
        unsafe { std::ptr::write_bytes(words, 0, 16) };
        Ok(Self(words))
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: no kernel that reads them runs any more: `PeerSums` waits for them.
        let _ = unsafe { result::free_host(self.0.cast()) };
    }
}

/// One rank of a group of GPUs of one process that add up small tensors by writing into each other's memory.
///
/// All ranks launch the same sums in the same order. A sum waits for the other ranks on the device, for a while.
#[derive(Debug)]
pub struct PeerSums {
    device: Device,
    rank: usize,
    buffers: Vec<Arc<PeerBuffer>>,
    kernels: OpKernels,
    words: Words,
    deadline: Duration,
    dtype: Dtype,
    /// Whether each rank has a GPU of its own.
    apart: bool,
}

/// Arguments of the kernels, field by field as in `kernels/all_reduce.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ReduceArgs {
    x: DevicePointer,
    w: DevicePointer,
    out: DevicePointer,
    peers: [DevicePointer; MOST_RANKS],
    abort: DevicePointer,
    missing: DevicePointer,
    deadline: u64,
    x_stride: i64,
    out_stride: i64,
    capacity: i64,
    rows: i32,
    cols: i32,
    rank: i32,
    ranks: i32,
    eps: f32,
    apart: i32,
}

const _: () = assert!(size_of::<ReduceArgs>() == 160);

impl PeerSums {
    /// Rank `rank` of the GPUs whose buffers these are, in the order of ranks; `None` if its device cannot write into the
    /// memory of one of them as into its own, which takes NVLink, or they are too many. Normed rows are of `dtype`. A
    /// device waits for the others for `deadline` at most.
    ///
    /// # Errors
    /// [`Error::Argument`] if the buffer of that number is not on `device`, or one is of a group of another size;
    /// [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`].
    pub fn new(
        device: &Device,
        dtype: Dtype,
        rank: usize,
        buffers: &[Arc<PeerBuffer>],
        deadline: Duration,
    ) -> Result<Option<Self>> {
        let is_own = |buffer: &Arc<PeerBuffer>| buffer.device.is_same(device);
        if !buffers.get(rank).is_some_and(is_own) {
            let expected = "the one of its number on its device";
            return Err(Error::argument("PeerSums::new", "buffers", expected, rank));
        }
        if let Some(other) = buffers.iter().find(|buffer| buffer.ranks != buffers.len()) {
            let expected = format_args!("of {} ranks", buffers.len()).to_string();
            return Err(Error::argument("PeerSums::new", "buffers", expected, other.ranks));
        }
        if buffers.len() > MOST_RANKS {
            return Ok(None);
        }
        for buffer in buffers {
            if !opened(device, &buffer.device)? {
                return Ok(None);
            }
        }
        let kernels = OpKernels::load(device, dtype, Source::AllReduce, &KERNELS)?;
        let words = Words::new(device)?;
        // Two devices may be the same GPU, whose context they share then.
        let gpus: HashSet<_> = buffers.iter().map(|own| own.device.context().cu_ctx()).collect();
        let apart = gpus.len() == buffers.len();
        let (device, buffers) = (device.clone(), buffers.to_vec());
        Ok(Some(Self { device, rank, buffers, kernels, words, deadline, dtype, apart }))
    }

    /// Whether it can add up this tensor: f32 without gaps, of at most 2^18 elements and a multiple of 4.
    pub fn fits(&self, x: &Tensor) -> bool {
        let len: usize = x.shape().iter().product();
        x.dtype() == Dtype::F32
            && x.is_contiguous()
            && len <= CAPACITY
            && len.is_multiple_of(4)
            && x.pointer().is_multiple_of(16)
    }

    /// Adds up an f32 tensor over all ranks, in its own memory, which clones share. Only launches, on the
    /// device's own stream, so it can be captured.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it [`fits`](Self::fits) and is on this device, [`Error::Driver`].
    pub fn all_reduce(&self, x: &Tensor) -> Result<()> {
        self.check("all_reduce", x)?;
        let len: usize = x.shape().iter().product();
        let args = ReduceArgs { rows: 1, cols: len as i32, ..self.args(x) };
        let blocks = len.div_ceil(SHARE).min(MOST_BLOCKS);
        // SAFETY: the shape is checked; all of it is on the device's stream, and the buffers live.
        unsafe { self.kernels.launch("all_reduce", [blocks, 1, 1], 512, &args) }
    }

    /// [`all_reduce`](Self::all_reduce) of rows of a multiple of 8 elements, and their norm as
    /// [`rms_norm`](crate::Operations::rms_norm) gives it.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce), and [`Error::Argument`] unless `weight` is f32 and as long as a row.
    pub fn all_reduce_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        const OP: &str = "all_reduce_norm";
        self.check(OP, x)?;
        let &[rows, cols] = x.shape() else {
            return Err(Error::shape(OP, "tensor", "[rows, cols]", x.shape()));
        };
        if !cols.is_multiple_of(8) {
            return Err(Error::shape(OP, "tensor", "rows of a multiple of 8", x.shape()));
        }
        let is_norm = weight.dtype() == Dtype::F32
            && weight.shape() == [cols]
            && weight.pointer().is_multiple_of(16)
            && weight.device().is_same(&self.device);
        if !is_norm {
            let expected = format_args!("f32 [{cols}] on this device").to_string();
            return Err(Error::shape(OP, "weight", expected, weight.shape()));
        }
        let out = Tensor::empty(&self.device, x.shape(), self.dtype)?;
        let args = ReduceArgs {
            w: weight.pointer(),
            out: out.pointer(),
            out_stride: cols as i64,
            rows: rows as i32,
            cols: cols as i32,
            eps,
            ..self.args(x)
        };
        // As many as `rms_norm` has, so that sums are made in the same order.
        let threads = (cols / 8).next_multiple_of(32).clamp(32, 1024);
        // SAFETY: the shapes are checked; all of it is on the device's stream, and the buffers live.
        unsafe { self.kernels.launch(OP, [rows.min(MOST_BLOCKS), 1, 1], threads, &args) }?;
        Ok(out)
    }

    fn check(&self, op: &'static str, x: &Tensor) -> Result<()> {
        if !self.fits(x) || !x.device().is_same(&self.device) {
            let expected = "f32 on this device, without gaps, of at most 2^18 elements";
            return Err(Error::shape(op, "tensor", expected, x.shape()));
        }
        Ok(())
    }

    fn args(&self, x: &Tensor) -> ReduceArgs {
        let mut peers = [0; MOST_RANKS];
        for (peer, buffer) in peers.iter_mut().zip(&self.buffers) {
            *peer = buffer.address;
        }
        let words = self.words.0 as u64;
        ReduceArgs {
            x: x.pointer(),
            x_stride: x.row_len() as i64,
            peers,
            abort: words,
            missing: words + size_of::<u32>() as u64,
            deadline: u64::try_from(self.deadline.as_nanos()).unwrap_or(u64::MAX),
            capacity: (CAPACITY / 2) as i64,
            rank: self.rank as i32,
            ranks: self.buffers.len() as i32,
            apart: i32::from(self.apart),
            ..ReduceArgs::default()
        }
    }

    /// Gives up: sums under way on this GPU end, with whatever numbers, and later ones hardly wait.
    pub fn abort(&self) {
        // SAFETY: the word is there; kernels read it as a whole.
        unsafe { self.words.0.write_volatile(1) };
    }

    /// The rank that a sum on this GPU gave up, once the device was waited for.
    pub fn missing(&self) -> Option<usize> {
        // SAFETY: the word is there; a kernel writes it as a whole.
        let word = unsafe { self.words.0.add(1).read_volatile() };
        (word as usize).checked_sub(1)
    }

    /// How long a device waits for the others.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }
}

impl Drop for PeerSums {
    fn drop(&mut self) {
        // What runs here writes into the others' memory, which may go with this. A failure is the stream's.
        let _ = self.device.synchronize();
    }
}

/// Whether kernels of `device` can now write memory of `peer`, in accesses that the memory model of PTX holds for: those
/// of GPUs that have each other's atomics.
fn opened(device: &Device, peer: &Device) -> Result<bool> {
    let (own, other) = (device.context(), peer.context());
    if own.cu_ctx() == other.cu_ctx() {
        return Ok(true);
    }
    for attribute in [
        sys::CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED,
        sys::CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
    ] {
        let (mut can, own, other) = (0, own.cu_device(), other.cu_device());
        // SAFETY: both devices are open; the driver writes a number.
        unsafe { sys::cuDeviceGetP2PAttribute(&raw mut can, attribute, own, other) }
            .result()
            .map_err(Error::driver("cuDeviceGetP2PAttribute"))?;
        if can == 0 {
            return Ok(false);
        }
    }
    device.bind()?;
    // SAFETY: both contexts are alive: devices hold them.
    match unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) } {
        sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
            Ok(true)
        }
        error => Err(Error::driver("cuCtxEnablePeerAccess")(DriverError(error))),
    }
}

#[cfg(test)]
mod tests {
    //! The protocol of `kernels/all_reduce.cu`, in every order in which its steps can happen.

    use std::collections::HashSet;

    /// What one block of a launch has done: its part for each rank, then the parts of each rank.
    type Done = u8;

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct Rank {
        /// Sums that are over here.
        sums: u8,
        blocks: Vec<Done>,
    }

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct State {
        ranks: Vec<Rank>,
        /// `[rank][slot][block][peer]`: of which sum the part is that the peer has written there.
        parts: Vec<Vec<Vec<Vec<u8>>>>,
    }

    /// Blocks of each sum, which all ranks launch alike, in so many slots.
    struct Model<'a> {
        ranks: usize,
        blocks: &'a [usize],
        slots: usize,
    }

    impl Model<'_> {
        fn first(&self) -> State {
            let most = self.blocks.iter().copied().max().unwrap_or(0);
            State {
                ranks: vec![Rank { sums: 0, blocks: vec![0; self.blocks[0]] }; self.ranks],
                parts: vec![vec![vec![vec![0; self.ranks]; most]; self.slots]; self.ranks],
            }
        }

        /// The state after the next step of a block, if it can take one; an error if it reads a wrong part.
        fn step(&self, state: &State, rank: usize, block: usize) -> Result<Option<State>, String> {
            let n = self.ranks as u8;
            let (sum, done) = (state.ranks[rank].sums + 1, state.ranks[rank].blocks[block]);
            let slot = usize::from(sum) % self.slots;
            let mut next = state.clone();
            match done {
                to if to < n => next.parts[usize::from(to)][slot][block][rank] = sum,
                reads if reads < 2 * n => {
                    let of = usize::from(reads - n);
                    match state.parts[rank][slot][block][of] {
                        part if part < sum => return Ok(None),
                        part if part > sum => {
                            return Err(format!(
                                "rank {rank} reads part {part} of {of} in sum {sum}"
                            ));
                        }
                        _ => {}
                    }
                }
                _ => return Ok(None),
            }
            next.ranks[rank].blocks[block] += 1;
            // The next launch begins once all blocks have ended.
            if next.ranks[rank].blocks.iter().all(|done| *done == 2 * n) {
                next.ranks[rank].sums = sum;
                let blocks = self.blocks.get(usize::from(sum)).copied().unwrap_or(0);
                next.ranks[rank].blocks = vec![0; blocks];
            }
            Ok(Some(next))
        }

        /// Tries all orders; how many states there are.
        fn explore(&self) -> Result<usize, String> {
            let (mut seen, mut open) = (HashSet::new(), vec![self.first()]);
            while let Some(state) = open.pop() {
                if !seen.insert(state.clone()) {
                    continue;
                }
                let mut moved = false;
                for rank in 0..self.ranks {
                    for block in 0..state.ranks[rank].blocks.len() {
                        let next = self.step(&state, rank, block)?;
                        moved |= next.is_some();
                        open.extend(next);
                    }
                }
                let over = state.ranks.iter().all(|r| usize::from(r.sums) == self.blocks.len());
                if !moved && !over {
                    return Err("all ranks wait".to_string());
                }
            }
            Ok(seen.len())
        }
    }

    #[test]
    fn every_order_of_steps_gives_the_sums_of_all_parts() {
        for (ranks, blocks) in [
            (2, &[1, 1, 1, 1][..]),
            (2, &[2, 1, 2]),
            (2, &[1, 2, 1, 2]),
            (3, &[1, 1, 1]),
            (3, &[1, 2, 1]),
            (4, &[1, 1, 1]),
        ] {
            let states = Model { ranks, blocks, slots: 2 }.explore().unwrap();
            assert!(states > 100, "{ranks} ranks, {blocks:?}: {states} states");
        }
    }

    #[test]
    fn one_slot_would_not_do() {
        let error = Model { ranks: 2, blocks: &[1, 1], slots: 1 }.explore().unwrap_err();
        assert!(error.contains("reads part 2"), "{error}");
    }
}
