// out (+)= x . w^T for 1 or 2 rows of x: decode steps of few sequences, where all that counts is how fast
// the weights come from memory.
//
// A warp takes two rows of w, 8 elements a lane and step, and keeps seven steps of both on their way to
// shared memory, where each lane reads back what it has copied itself; x comes from the L1 cache. What a
// row of x gets does not depend on how many there are.
#include "common.cuh"

// Mirrored by `src/linear/gemv.rs`.
struct GemvArgs {
    const u16* x;    // [M, k]
    const u16* w;    // [n, k]
    void* out;       // [M, n]: f32 if wide, else element
    i64 x_stride;    // elements between rows
    i64 w_stride;
    i64 out_stride;
    int n;
    int k;           // a multiple of 8
    int wide;
    int accumulate;  // 1: added to what out holds
    int settled;     // 1: no kernel that may still run writes w
    int padding;
};

#define WARPS 4
#define ROWS 2
#define STAGES 8
#define STEP 256

__device__ __forceinline__ float add_dot(float sum, const uint4& a, const uint4& b) {
    const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 p = unpack2(left[i]), q = unpack2(right[i]);
        sum = fmaf(p.x, q.x, sum);
        sum = fmaf(p.y, q.y, sum);
    }
    return sum;
}

template <int M>
__device__ __forceinline__ void gemv(const GemvArgs& args) {
    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    const int lane = threadIdx.x % 32;
    const int first = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    if (first >= args.n) return;
    const u16* w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        // The last row twice where there is no other.
        w[r] = args.w + min(first + r, args.n - 1) * args.w_stride;

    __shared__ uint4 stages[STAGES][ROWS][WARPS * 32];
    const int steps = (args.k + STEP - 1) / STEP;
    auto load = [&](int step) {
        const int i = step * STEP + lane * 8;
        if (step < steps) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                copy16_async(shared_address(&stages[step % STAGES][r][threadIdx.x]), w[r] + i,
                             i < args.k);
        }
        commit_copies();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) load(step);
    // The weights come while the kernel before this still makes x.
    if (args.settled) wait_for_previous_kernel();

    float sums[ROWS][M] = {};
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        uint4 weights[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) weights[r] = stages[step % STAGES][r][threadIdx.x];
        load(step + STAGES - 1);
        const int i = step * STEP + lane * 8;
        if (i >= args.k) break;
#pragma unroll
        for (int m = 0; m < M; m++) {
            const uint4 x = *(const uint4*)(args.x + m * args.x_stride + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r][m] = add_dot(sums[r][m], weights[r], x);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            float sum = sums[r][m];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                sum += __shfl_xor_sync(0xffffffff, sum, offset);
            if (lane != r * M + m || first + r >= args.n) continue;
            const i64 at = m * args.out_stride + first + r;
            if (args.wide) {
                float* out = (float*)args.out + at;
                *out = args.accumulate ? *out + sum : sum;
            } else {
                u16* out = (u16*)args.out + at;
                if (args.accumulate) sum += unpack2(*out).x;
                *out = (u16)pack2(sum, 0.0f);
            }
        }
}

#define GEMV(M)                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                  \
        gemv_##M(const __grid_constant__ GemvArgs args) {                     \
        gemv<M>(args);                                                        \
    }
GEMV(1)
GEMV(2)
