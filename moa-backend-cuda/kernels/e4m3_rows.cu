// Rows of activations in 8-bit floats (e4m3) with one f32 factor each: the left operand of 8-bit products.
#include "rows.cuh"

// The largest of a block's numbers; up to 1024 threads, a multiple of 32; every thread gets it.
__device__ __forceinline__ u32 block_max(u32 x) {
    __shared__ u32 most[32];
    x = __reduce_max_sync(0xffffffff, x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) most[warp] = x;
    __syncthreads();
    return __reduce_max_sync(0xffffffff, lane < blockDim.x / 32 ? most[lane] : 0);
}

// The nearest e4m3 of both, ties to even; what is larger than 448 becomes that.
__device__ __forceinline__ u32 round2(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// out = x / y in e4m3, y f32, one for each row: the smallest power of two by which none of the row is larger
// than 448, 1 for a row of zeros, NaN where not all are finite. x element. As `linear::e4m3::encode_row`.
extern "C" __global__ void __launch_bounds__(1024)
    round_rows_e4m3(const __grid_constant__ OpArgs args) {
    start();
    const u16* x = (const u16*)args.x + blockIdx.x * args.x_stride;
    u32* out = (u32*)((char*)args.out + blockIdx.x * args.out_stride);
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    u32 most = 0;
    for (int i = first; i < args.cols; i += step) {
        const Eight v = load8(x + i);
#pragma unroll
        for (int n = 0; n < 8; n++) most = max(most, __float_as_uint(v.x[n]) & 0x7fffffff);
    }
    most = block_max(most);
    // 448 is 1.75 * 2^8; factors stay normal numbers.
    const int power =
        most == 0 ? 0 : max((int)(most >> 23) - 127 - 8 + ((most & 0x7fffff) > 0x600000), -126);
    const float inverse = __uint_as_float((u32)(127 - power) << 23);
    if (threadIdx.x == 0) {
        const u32 scale = most < 0x7f800000 ? (u32)(127 + power) << 23 : 0x7fffffff;
        ((u32*)args.y)[blockIdx.x] = scale;
    }
    for (int i = first; i < args.cols; i += step) {
        const Eight v = load8(x + i);
        u32 words[2];
#pragma unroll
        for (int n = 0; n < 2; n++)
            words[n] = round2(v.x[4 * n] * inverse, v.x[4 * n + 1] * inverse) |
                       round2(v.x[4 * n + 2] * inverse, v.x[4 * n + 3] * inverse) << 16;
        *(uint2*)(out + i / 4) = make_uint2(words[0], words[1]);
    }
}
