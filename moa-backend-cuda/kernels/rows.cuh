// Arguments of the operations on rows, eight elements at a time, and sums over a block.
#pragma once
#include "common.cuh"

// Mirrored by `src/ops/launch.rs`.
struct OpArgs {
    const void* x;
    const void* y;
    const void* w;
    void* out;
    const int* ids;
    i64 x_stride;    // elements between rows
    i64 y_stride;
    i64 out_stride;
    int rows;
    int cols;
    float eps;
    int flag;
};

struct Eight {
    float x[8];
};

__device__ __forceinline__ Eight load8(const u16* p) {
    const uint4 v = *(const uint4*)p;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    Eight e;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack2(words[i]);
        e.x[2 * i] = pair.x;
        e.x[2 * i + 1] = pair.y;
    }
    return e;
}
__device__ __forceinline__ Eight load8(const float* p) {
    const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ __forceinline__ void store8(u16* p, const Eight& e) {
    *(uint4*)p = make_uint4(pack2(e.x[0], e.x[1]), pack2(e.x[2], e.x[3]), pack2(e.x[4], e.x[5]),
                            pack2(e.x[6], e.x[7]));
}
__device__ __forceinline__ void store8(float* p, const Eight& e) {
    ((float4*)p)[0] = make_float4(e.x[0], e.x[1], e.x[2], e.x[3]);
    ((float4*)p)[1] = make_float4(e.x[4], e.x[5], e.x[6], e.x[7]);
}

// Sum over a block of up to 1024 threads, a multiple of 32; every thread gets it.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? sums[lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// Eight columns a thread: grid (columns / 8 / 256, rows, more rows).
#define FOR_EIGHT(i)                                                 \
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;       \
    if (i >= args.cols) return;                                      \
    const i64 row = blockIdx.y + (i64)blockIdx.z * gridDim.y;        \
    if (row >= args.rows) return;
