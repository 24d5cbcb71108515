// Sums of small tensors over the GPUs that share a model, with the norm behind them: each GPU writes its part into the
// memory of all others (peer access over NVLink) and adds up what has come, in the order of ranks, so that all have the
// same bits. One launch a sum, and one way over NVLink in it; can be captured.
//
// The protocol. Each rank has a buffer that all can write: two slots, in each a place for the part of every rank. In
// sum e a block
//   1. writes its share of its own part into slot e % 2 of all other ranks, two elements at a time, with e beside them,
//   2. reads the same share of all other parts from slot e % 2 of its own buffer, again and again until e stands there,
//      and adds.
// Two elements and e are one access of 128 bits, which PTX makes as a whole: whoever sees e has the elements, without a
// fence and without a flag that would have to follow them.
// Two slots are enough. A rank writes slot e % 2 again in sum e + 2, after its own launch of sum e + 1 has ended. That
// needed a part e + 1 of every rank, and a rank writes those once its launch of e has ended (launches of one stream
// follow each other), so after it has read slot e % 2. That sums have different numbers of blocks, or lengths, does not
// matter to this. Numbers of sums only grow, and have 64 bits, which no run exhausts: what no part of the last sums
// reached has an old number, never a newer one. `peers.rs` tries all interleavings of a model of this.
//
// A wait ends after `deadline` nanoseconds, or when the host says so, and then for good: numbers are wrong from
// there on, later sums hardly wait, and the host is told which rank was missing.
#include "rows.cuh"

#define MOST_RANKS 8
#define SLOTS 256  // bytes before the slots

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
    i64 capacity;      // pairs of a part
    int rows;
    int cols;
    int rank;
    int ranks;
    float eps;
    int apart;         // 1: each rank has a GPU of its own
};

// The beginning of a buffer.
struct Control {
    u64 sums;     // that have begun
    u32 began;    // blocks of the sum under way that know its number
    u32 broken;   // 1 once a wait was given up
};

// Two elements of a part, and of which sum they are.
struct Pair {
    float x[2];
    u64 sum;
};

__device__ __forceinline__ void store_pair(Pair* p, float a, float b, u64 sum) {
    const u64 both = (u64)__float_as_uint(b) << 32 | __float_as_uint(a);
    asm volatile("{\n\t.reg .b128 pair;\n\tmov.b128 pair, {%1, %2};\n\t"
                 "st.relaxed.sys.global.b128 [%0], pair;\n\t}"
                 :
                 : "l"(p), "l"(both), "l"(sum)
                 : "memory");
}

__device__ __forceinline__ Pair load_pair(const Pair* p) {
    u64 both, sum;
    asm volatile("{\n\t.reg .b128 pair;\n\tld.relaxed.sys.global.b128 pair, [%2];\n\t"
                 "mov.b128 {%0, %1}, pair;\n\t}"
                 : "=l"(both), "=l"(sum)
                 : "l"(p)
                 : "memory");
    return {{__uint_as_float((u32)both), __uint_as_float((u32)(both >> 32))}, sum};
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Since when a wait for a rank goes on, or 0 if it does not. `since` is 0 at first.
__device__ __noinline__ u64 waits_since(const ReduceArgs& args, int peer, u64 since, u32 tries) {
    volatile Control* own = (Control*)args.peers[args.rank];
    if (own->broken != 0) return 0;
    const u64 now = nanoseconds();
    if (since == 0) since = now;
    const bool late = now - since > args.deadline;
    if (late) *(volatile u32*)args.missing = 1 + peer;
    if (late || (tries % 1024 == 0 && *(volatile const u32*)args.abort != 0)) own->broken = 1;
    return own->broken != 0 ? 0 : since;
}

// One block's share of a sum.
struct Sum {
    const ReduceArgs& args;
    u64 number;
    bool all_came;

    __device__ __forceinline__ explicit Sum(const ReduceArgs& args) : args(args), all_came(true) {
        // Kernels that start wait on the multiprocessors, which another rank of this GPU may need.
        if (args.apart) let_next_kernel_start();
        wait_for_previous_kernel();
        number = ((volatile Control*)control())->sums + 1;
    }

    __device__ __forceinline__ Control* control() const { return (Control*)args.peers[args.rank]; }

    // Where `to` finds what `from` has sent it of elements `at` and the N - 1 behind it: the first pair of them, and 32
    // pairs behind it the next. What a warp writes at once lies side by side then, as NVLink wants it.
    template <int N>
    __device__ __forceinline__ Pair* place(int to, int from, i64 at) const {
        const i64 part = (i64)(number & 1) * args.ranks + from, run = at / N;
        return (Pair*)(args.peers[to] + SLOTS) + part * args.capacity + run / 32 * (16 * N) + run % 32;
    }

    // Elements `at` and behind it, to all others.
    template <int N>
    __device__ __forceinline__ void send(i64 at, const float (&x)[N]) const {
        for (int peer = 0; peer < args.ranks; peer++) {
            if (peer == args.rank) continue;
            Pair* to = place<N>(peer, args.rank, at);
#pragma unroll
            for (int i = 0; i < N / 2; i++) store_pair(to + 32 * i, x[2 * i], x[2 * i + 1], number);
        }
    }

    // Once the block has sent all: the last block that knows the number counts the sum.
    __device__ __forceinline__ void sent() const {
        __syncthreads();
        if (threadIdx.x != 0) return;
        Control* own = control();
        if (gridDim.x == 1) {
            own->sums = number;
        } else if (atomicAdd(&own->began, 1) == gridDim.x - 1) {
            own->began = 0;
            own->sums = number;
        }
    }

    // Adds up elements `at` and behind it of all ranks, of which `x` are the own ones.
    template <int N>
    __device__ __forceinline__ void receive(i64 at, float (&x)[N]) {
        float all[N];
#pragma unroll
        for (int i = 0; i < N; i++) all[i] = 0;
        for (int peer = 0; peer < args.ranks; peer++) {
            float part[N];
            if (peer == args.rank) {
#pragma unroll
                for (int i = 0; i < N; i++) part[i] = x[i];
            } else {
                wait_for(peer, at, part);
            }
            // The first part as it is: -0 + 0 would be 0.
#pragma unroll
            for (int i = 0; i < N; i++) all[i] = peer == 0 ? part[i] : all[i] + part[i];
        }
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = all[i];
    }

    template <int N>
    __device__ __forceinline__ void wait_for(int peer, i64 at, float (&part)[N]) {
        const Pair* from = place<N>(args.rank, peer, at);
        u64 since = 0;
        for (u32 tries = 1;; tries++) {
            bool here = true;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const Pair pair = load_pair(from + 32 * i);
                part[2 * i] = pair.x[0];
                part[2 * i + 1] = pair.x[1];
                here = here && pair.sum >= number;
            }
            if (here) return;
            if (tries % 64 != 0) continue;
            since = waits_since(args, peer, since, tries);
            if (since == 0) {
                all_came = false;
                return;
            }
        }
    }
};

// x = the sum of all ranks' x, `cols` elements in all, a multiple of 4; the blocks share them evenly.
extern "C" __global__ void __launch_bounds__(512) all_reduce(const __grid_constant__ ReduceArgs args) {
    Sum sum(args);
    const int quads = args.cols / 4, share = (quads + gridDim.x - 1) / gridDim.x;
    const int from = blockIdx.x * share, to = min(from + share, quads);
    float4* x = (float4*)args.x;
    auto load = [&](int i, float (&part)[4]) {
        const float4 v = x[i];
        part[0] = v.x, part[1] = v.y, part[2] = v.z, part[3] = v.w;
    };
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
        float part[4];
        load(i, part);
        sum.send((i64)i * 4, part);
    }
    sum.sent();
    for (int i = from + threadIdx.x; i < to && sum.all_came; i += blockDim.x) {
        float part[4];
        load(i, part);
        sum.receive((i64)i * 4, part);
        x[i] = make_float4(part[0], part[1], part[2], part[3]);
    }
}

// The same of rows of a multiple of 8 elements, a row for each block, and then the next. out = x / sqrt(mean(x^2) + eps) * w,
// bit for bit as `rms_norm` gives it.
extern "C" __global__ void __launch_bounds__(1024, 1)
    all_reduce_norm(const __grid_constant__ ReduceArgs args) {
    Sum sum(args);
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const float* x = args.x + row * args.x_stride;
        for (int i = first; i < args.cols; i += step) {
            sum.send((i64)row * args.cols + i, load8(x + i).x);
        }
    }
    sum.sent();
    Eight weight = {};
    if (first < args.cols) weight = load8(args.w + first);
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        float* x = args.x + row * args.x_stride;
        float squares = 0;
        Eight v = {};
        for (int i = first; i < args.cols; i += step) {
            v = load8(x + i);
            sum.receive((i64)row * args.cols + i, v.x);
            store8(x + i, v);
#pragma unroll
            for (int n = 0; n < 8; n++) squares += v.x[n] * v.x[n];
        }
        const float scale = rsqrtf(block_sum(squares) / (float)args.cols + args.eps);
        u16* out = args.out + row * args.out_stride;
        for (int i = first; i < args.cols; i += step) {
            if (step < args.cols) {
                v = load8(x + i);
                weight = load8(args.w + i);
            }
#pragma unroll
            for (int n = 0; n < 8; n++) v.x[n] = v.x[n] * scale * weight.x[n];
            store8(out + i, v);
        }
        // The sums of warps are the next row's.
        __syncthreads();
    }
}
