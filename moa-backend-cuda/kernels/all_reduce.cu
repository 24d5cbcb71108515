// Sums of small tensors over the GPUs that share a model, with the norm behind them: each GPU reads the parts of all
// others from their memory (peer access over NVLink or PCIe) and adds them up in the order of ranks, so that all have
// the same bits. One launch a sum, and one meeting of the GPUs in it; can be captured.
//
// The protocol. Each rank has a buffer that all can read and write: two slots for parts, and for every block of a launch
// and every rank a flag, which holds the number of the last sum that this rank has begun. In sum e a block
//   1. copies its share of its own part into its own slot e % 2,
//   2. writes e into its flag in every rank's buffer, by a release of the whole system,
//   3. waits until its flags in its own buffer, by which the others told it, are e or more, by acquires,
//   4. reads the same share from slot e % 2 of all ranks, and adds.
// Step 3 sees the parts that the other ranks wrote in step 1: the barrier of the block orders the writes of all of its
// threads before the release, the acquire comes after it, and the second barrier before the reads.
// One meeting is enough. A rank writes slot e % 2 again in sum e + 2, after its own launch of sum e + 1 has ended. That
// needed a flag e + 1 of every rank, from whichever block; a rank writes those once its launch of e has ended (launches of
// one stream follow each other), so after it has read slot e % 2 of all. That sums have different numbers of blocks does
// not matter to this. Flags only grow, and have 64 bits, which no run exhausts: a block that took no part in the last
// sums has an old flag, never a newer one. `peers.rs` tries all interleavings of a model of this.
//
// A wait ends after `deadline` nanoseconds, or when the host says so, and then for good: numbers are wrong from
// there on, later sums do not wait, and the host is told which rank was missing.
#include "rows.cuh"

#define MOST_RANKS 8
#define MOST_BLOCKS 128
#define FLAGS 256  // bytes before the flags
#define SLOTS (FLAGS + MOST_BLOCKS * MOST_RANKS * 8)

// Mirrored by `src/peers.rs`.
struct ReduceArgs {
    float* x;          // a part, then the sum
    const float* w;    // weight of the norm
    u16* out;          // normed rows, element
    char* peers[MOST_RANKS];
    const u32* abort;  // host memory: not 0 ends every wait
    u32* missing;      // host memory: 1 + the rank that did not come
    u64 deadline;      // nanoseconds
    i64 x_stride;      // elements between rows
    i64 out_stride;
    i64 capacity;      // elements of a slot
    int rows;
    int cols;
    int rank;
    int ranks;
    float eps;
    int padding;
};

// The beginning of a buffer.
struct Control {
    u64 sums;      // that are done
    u32 finished;  // blocks of the sum under way that are done
    u32 broken;    // 1 once a wait was given up
};

__device__ __forceinline__ u64* flag_of(char* buffer, int rank) {
    return (u64*)(buffer + FLAGS) + blockIdx.x * MOST_RANKS + rank;
}

__device__ __forceinline__ float* slot_of(const ReduceArgs& args, int rank, u64 sum) {
    return (float*)(args.peers[rank] + SLOTS) + (sum & 1 ? args.capacity : 0);
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

__device__ __forceinline__ u64 acquire(const u64* flag) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    return value;
}

// Past every cache that does not know of other GPUs' writes.
__device__ __forceinline__ float4 load_fresh(const float* p) {
    float4 v;
    asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ u64 begin(const ReduceArgs& args) {
    wait_for_previous_kernel();
    return ((volatile Control*)args.peers[args.rank])->sums + 1;
}

// Waits for one rank; whether it came.
__device__ __forceinline__ bool came(const ReduceArgs& args, int peer, u64 sum) {
    Control* own = (Control*)args.peers[args.rank];
    const u64* flag = flag_of(args.peers[args.rank], peer);
    const bool broken = ((volatile Control*)own)->broken != 0;
    const u64 since = nanoseconds();
    for (u32 tries = 1;; tries++) {
        if (acquire(flag) >= sum) return true;
        if (broken) return false;
        if (tries % 64 != 0) continue;
        const bool late = nanoseconds() - since > args.deadline;
        if (late) *(volatile u32*)args.missing = 1 + peer;
        if (late || (tries % 1024 == 0 && *(volatile const u32*)args.abort != 0)) {
            ((volatile Control*)own)->broken = 1;
            return false;
        }
    }
}

// Steps 2 and 3; whether all came.
__device__ __forceinline__ bool meet(const ReduceArgs& args, u64 sum) {
    __syncthreads();
    bool here = true;
    if (threadIdx.x < args.ranks) {
        const int peer = threadIdx.x;
        __threadfence_system();
        asm volatile("st.release.sys.global.u64 [%0], %1;"
                     :
                     : "l"(flag_of(args.peers[peer], args.rank)), "l"(sum)
                     : "memory");
        here = came(args, peer, sum);
    }
    const bool all = __syncthreads_and(here);
    // Not before: those that start wait on the multiprocessors, which another rank of this GPU may need.
    let_next_kernel_start();
    return all;
}

__device__ __forceinline__ float4 total(const ReduceArgs& args, u64 sum, i64 at) {
    float4 all = load_fresh(slot_of(args, 0, sum) + at);
#pragma unroll 4
    for (int rank = 1; rank < args.ranks; rank++) {
        const float4 part = load_fresh(slot_of(args, rank, sum) + at);
        all.x += part.x;
        all.y += part.y;
        all.z += part.z;
        all.w += part.w;
    }
    return all;
}

// The last block counts the sum as done.
__device__ __forceinline__ void finish(const ReduceArgs& args, u64 sum) {
    __syncthreads();
    if (threadIdx.x == 0) {
        Control* own = (Control*)args.peers[args.rank];
        __threadfence();
        if (atomicAdd(&own->finished, 1) == gridDim.x - 1) {
            own->finished = 0;
            own->sums = sum;
        }
    }
}

// x = the sum of all ranks' x, `cols` elements in all, a multiple of 4; the blocks share them evenly.
extern "C" __global__ void __launch_bounds__(1024, 1)
    all_reduce(const __grid_constant__ ReduceArgs args) {
    const u64 sum = begin(args);
    const int quads = args.cols / 4, share = (quads + gridDim.x - 1) / gridDim.x;
    const int from = blockIdx.x * share, to = min(from + share, quads);
    float4* x = (float4*)args.x;
    float4* own = (float4*)slot_of(args, args.rank, sum);
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) own[i] = x[i];
    if (meet(args, sum)) {
        for (int i = from + threadIdx.x; i < to; i += blockDim.x) x[i] = total(args, sum, (i64)i * 4);
    }
    finish(args, sum);
}

// The same of rows of a multiple of 8 elements, a row for each block, and then the next. out = x / sqrt(mean(x^2) + eps) * w,
// bit for bit as `rms_norm` gives it.
extern "C" __global__ void __launch_bounds__(1024, 1)
    all_reduce_norm(const __grid_constant__ ReduceArgs args) {
    const u64 sum = begin(args);
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    float* own = slot_of(args, args.rank, sum);
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const float* x = args.x + row * args.x_stride;
        for (int i = first; i < args.cols; i += step) {
            store8(own + (i64)row * args.cols + i, load8(x + i));
        }
    }
    const bool all = meet(args, sum);
    for (int row = blockIdx.x; all && row < args.rows; row += gridDim.x) {
        float* x = args.x + row * args.x_stride;
        float squares = 0;
        for (int i = first; i < args.cols; i += step) {
            const i64 at = (i64)row * args.cols + i;
            const float4 a = total(args, sum, at), b = total(args, sum, at + 4);
            const Eight v = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
            store8(x + i, v);
#pragma unroll
            for (int n = 0; n < 8; n++) squares += v.x[n] * v.x[n];
        }
        const float scale = rsqrtf(block_sum(squares) / (float)args.cols + args.eps);
        u16* out = args.out + row * args.out_stride;
        for (int i = first; i < args.cols; i += step) {
            Eight v = load8(x + i);
            const Eight weight = load8(args.w + i);
#pragma unroll
            for (int n = 0; n < 8; n++) v.x[n] = v.x[n] * scale * weight.x[n];
            store8(out + i, v);
        }
        // The sums of warps are the next row's.
        __syncthreads();
    }
    finish(args, sum);
}
