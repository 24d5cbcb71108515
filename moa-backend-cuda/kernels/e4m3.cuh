// Weights of 8-bit floats (e4m3), as they lie in memory and as elements.
#pragma once
#include "common.cuh"

typedef unsigned char u8;

// For warpgroup instructions weights lie in tiles of 64 rows by a stretch of 64 k, all of a row of tiles after each
// other, row by row in a tile. Of a row's 64 bytes, lane t of the four that share the row in a fragment takes the 16 from
// 16 t on: a word for each of four steps of 16 k. Rows and columns are filled up: nobody reads what rows come to, and
// columns, which are numbers, meet zeros.
#define STRETCH 64
#define TILE_ROWS 64
#define TILE_BYTES (TILE_ROWS * STRETCH)

// Numbers below are off by this power of two.
#if DTYPE_BF16
#define UNIT 1.0f
#else
#define UNIT 256.0f
#endif

// Elements of two bytes of e4m3, whose signs and other bits are at their places in `signs` and `others`. Exact; there
// are no infinities, and a weight is never NaN.
#if DTYPE_BF16
// The exponent's bias is 120 more, also for subnormal numbers.
__device__ __forceinline__ u32 widen2(u32 signs, u32 others) {
    const u32 moved = (signs & 0x80008000u) | (others & 0x07f007f0u);
    u32 pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(moved), "r"(0x7b807b80u), "r"(0x80008000u));
    return pair;
}
#define MOVED 4
#else
// 8 more: left to UNIT, since no product of these is too small for f32.
__device__ __forceinline__ u32 widen2(u32 signs, u32 others) {
    return (signs & 0x80008000u) | (others & 0x3f803f80u);
}
#define MOVED 1
#endif

// A word's four elements of a step of 16 k: 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9.
__device__ __forceinline__ u32 widen_front(u32 word) { return widen2(word, word >> MOVED); }
__device__ __forceinline__ u32 widen_back(u32 word) { return widen2(word << 8, word << (8 - MOVED)); }

// A lane's fragment of a step, of words of its two rows.
__device__ __forceinline__ void widen_step(u32 (&a)[4], u32 top, u32 bottom) {
    a[0] = widen_front(top);
    a[1] = widen_front(bottom);
    a[2] = widen_back(top);
    a[3] = widen_back(bottom);
}
