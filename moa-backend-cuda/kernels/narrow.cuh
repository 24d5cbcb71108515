// Rows of 8 and 4 bits as caches hold them, `moa_core::RowType`: codes, and a scale for each row.
#pragma once
#include "common.cuh"

#define INT8 1
#define FP8 2
#define INT4 3

// Kinds of heads: `moa_core::CacheType` of keys and values.
#define HEAD_PLAIN 0
#define HEAD_INT8 1
#define HEAD_FP8 2
#define HEAD_K8V4 3
#define HEAD_INT4 4

__device__ __forceinline__ int key_type(int kind) {
    return kind == HEAD_FP8 ? FP8 : kind == HEAD_INT4 ? INT4 : INT8;
}
__device__ __forceinline__ int value_type(int kind) {
    return kind == HEAD_FP8 ? FP8 : kind == HEAD_INT8 ? INT8 : INT4;
}

// Bytes of a row's codes. Those of 4 bits: byte i holds element i in its low half, element i + HEAD_DIM / 2 in its
// high half.
template <int TYPE>
constexpr int ROW_BYTES = TYPE == INT4 ? HEAD_DIM / 2 : HEAD_DIM;

// Elements that a Hadamard matrix mixes: the largest power of two that divides HEAD_DIM.
#define ROTATION (HEAD_DIM & -HEAD_DIM)
__device__ __forceinline__ bool rotates(int type) { return type != FP8; }

// Lanes of a row, eight neighbouring elements each; of 96 elements, the last four lanes have none.
#define ROW_LANES (HEAD_DIM == 96 ? 16 : HEAD_DIM / 8)

// Multiplies a row by the Hadamard matrix of 1 and -1: elements at a distance of 1 first, then 2, 4 and so on.
__device__ __forceinline__ void rotate(float (&x)[8], int lane) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i & step) continue;
            const float a = x[i], b = x[i + step];
            x[i] = __fadd_rn(a, b);
            x[i + step] = __fsub_rn(a, b);
        }
    }
#pragma unroll
    for (int step = 1; step < ROTATION / 8; step *= 2) {
        const float sign = lane & step ? -1.0f : 1.0f;
        // Exact but for the sum's one rounding.
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(~0u, x[i], step));
    }
}

// Largest element of a row by size, as bits; a comparison of floats would pass over those that are no number.
__device__ __forceinline__ u32 largest(const float (&x)[8]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
    for (int step = 1; step < ROW_LANES; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    return most;
}

// The least bf16 whose product with the type's top is at least the row's largest element, given as bits.
__device__ __forceinline__ u32 scale_of(u32 most, int type) {
    if (most >= 0x7f800000u) return 0x7fc0;
    const float top = type == INT8 ? 127.0f : type == FP8 ? 448.0f : 8.0f;
    const float size = __uint_as_float(most);
    // Two steps below the quotient, which is cut and rounded as it may be, all is well.
    const float inverse = type == INT8 ? 1.0f / 127 : type == FP8 ? 1.0f / 448 : 0.125f;
    u32 scale = max(__float_as_uint(size * inverse) >> 16, 2u) - 2;
    while (__fmul_rn(__uint_as_float(scale << 16), top) < size) scale++;
    return scale < 0x80 ? 0 : scale;
}

// The size that a code of e4m3 stands for.
__device__ __forceinline__ float e4m3_size(u32 code) {
    return code < 8 ? (float)code * 0.001953125f : __uint_as_float((code << 20) + 0x3c000000u);
}

// A code of e4m3, given its row's scale and one over it. Decided by comparison with products that are exact.
__device__ __forceinline__ u32 e4m3_of(float x, float scale, float inverse) {
    const float size = fabsf(x), quotient = __fmul_rn(size, inverse);
    const u32 bits = __float_as_uint(quotient);
    // Below 2^-6 all steps are equal.
    u32 code = bits < 0x3c800000u ? (u32)(int)rintf(quotient * 512)
                                  : ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960;
    code = min(code, 126u);
    const bool odd = code & 1;
    const float own = e4m3_size(code);
    const float upper = __fmul_rn((own + e4m3_size(code + 1)) * 0.5f, scale);
    const float lower = __fmul_rn((own + e4m3_size(max(code, 1u) - 1)) * 0.5f, scale);
    if (size > upper || (size == upper && odd)) code += 1;
    else if (code > 0 && (size < lower || (size == lower && odd))) code -= 1;
    return code | (__float_as_uint(x) >> 24 & 0x80);
}

__device__ __forceinline__ float e4m3_value(u32 code) {
    return __uint_as_float(__float_as_uint(e4m3_size(code & 0x7f)) | (code & 0x80) << 24);
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Added to a small number it leaves the nearest whole number in the lowest bits.
#define WHOLE 12582912.0f

// The cell of 4 bits, from -8 to 7, that an element lies in, given its row's scale and one over it.
__device__ __forceinline__ float cell_of(float x, float scale, float inverse) {
    // Elements that feedback was added to may lie outside of all cells.
    const float quotient = fminf(fmaxf(__fmul_rn(x, inverse), -9.0f), 9.0f);
    float cell = __fadd_rn(__fadd_rn(quotient, -0.5f), WHOLE) - WHOLE;
    if (x < __fmul_rn(cell, scale)) cell -= 1;
    else if (x >= __fmul_rn(cell + 1, scale)) cell += 1;
    return fminf(fmaxf(cell, -8.0f), 7.0f);
}

// Gives what is left of each element of rows that are `fed`, once it has its code, to those before it:
// `moa_core::key_feedback`. All lanes of a warp come here; a product of 12 bits by 12 is exact. A lane chooses its eight codes
// by itself, and those before it learn then what is left.
__device__ __forceinline__ void feed_back(float (&x)[8], u32 scale_bits, bool fed, const float* feedback, int lane) {
    // From 2^-60 to 2^60.
    fed = fed && scale_bits >= 0x2180 && scale_bits <= 0x5d80;
    if (!__any_sync(~0u, fed)) return;
    const float scale = __uint_as_float(scale_bits << 16), inverse = reciprocal(scale);
    for (int last = HEAD_DIM / 8 - 1; last >= 0; last--) {
        // Eight rows at once: what is chosen does not wait for each.
        float shares[8][8] = {};
        if (fed && lane <= last) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float4* const row = (const float4*)(feedback + (last * 8 + i) * HEAD_DIM + lane * 8);
                const float4 low = row[0], high = row[1];
                shares[i][0] = low.x, shares[i][1] = low.y, shares[i][2] = low.z, shares[i][3] = low.w;
                shares[i][4] = high.x, shares[i][5] = high.y, shares[i][6] = high.z, shares[i][7] = high.w;
            }
        }
        float left[8];
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            left[i] = x[i];
#pragma unroll
            for (int j = 7; j > i; j--) left[i] = __fmaf_rn(shares[j][i], left[j], left[i]);
            const float value = (cell_of(left[i], scale, inverse) + 0.5f) * scale;
            if (fed && lane == last) x[i] = left[i];
            left[i] = __uint_as_float(__float_as_uint(__fsub_rn(left[i], value)) & 0xfffff000u);
        }
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            const float given = __shfl_sync(~0u, left[i], last, ROW_LANES);
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = fed && lane < last ? __fmaf_rn(shares[i][j], given, x[j]) : x[j];
        }
    }
}

// Rounds a lane's eight elements to codes, one in a byte, those of 4 bits in its low half. The elements become what
// the codes stand for. Quotients are not exact: what is near a boundary is decided by exact products.
__device__ __forceinline__ uint2 round_row(float (&x)[8], u32 scale_bits, int type) {
    const float scale = __uint_as_float(scale_bits << 16);
    // Of a scale that is 0 or no number, every code is that of 0.
    if (scale_bits == 0 || scale_bits >= 0x7f80) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = type == INT4 ? 0.5f * scale : 0 * scale;
        const u32 zero = type == INT4 ? 0x08080808u : 0;
        return make_uint2(zero, zero);
    }
    u32 codes[8];
    const float inverse = reciprocal(scale);
    if (type == INT8) {
        const float half = 0.5f * scale;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float moved = __fadd_rn(__fmul_rn(x[i], inverse), WHOLE);
            float whole = moved - WHOLE;
            codes[i] = __float_as_uint(moved);
            const float rest = __fmaf_rn(-whole, scale, x[i]);
            if (fabsf(rest) >= half && (fabsf(rest) > half || (codes[i] & 1))) {
                whole += rest > 0 ? 1 : -1;
                codes[i] += rest > 0 ? 1 : -1;
            }
            x[i] = whole * scale;
        }
    } else if (type == INT4) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float cell = cell_of(x[i], scale, inverse);
            codes[i] = __float_as_uint(cell + (WHOLE + 8)) - __float_as_uint(WHOLE);
            x[i] = (cell + 0.5f) * scale;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            codes[i] = e4m3_of(x[i], scale, inverse);
            x[i] = e4m3_value(codes[i]) * scale;
        }
    }
    auto join = [](u32 a, u32 b, u32 c, u32 d) {
        return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    };
    return make_uint2(join(codes[0], codes[1], codes[2], codes[3]), join(codes[4], codes[5], codes[6], codes[7]));
}

// The numbers that such codes stand for.
__device__ __forceinline__ void widen_codes(float (&x)[8], uint2 codes, u32 scale_bits, int type) {
    const float scale = __uint_as_float(scale_bits << 16);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 code = (i < 4 ? codes.x : codes.y) >> (i % 4 * 8) & 0xff;
        const float size = type == INT8   ? (float)(int)(signed char)code
                           : type == INT4 ? (float)(int)code - 7.5f
                                          : e4m3_value(code);
        x[i] = size * scale;
    }
}

// Rows of 4 bits: the lane's eight bytes of the row, from its codes and those of the other half's lane. Lanes of
// the first half have them.
__device__ __forceinline__ uint2 join_halves(uint2 codes, int lane) {
    constexpr int HALF_LANES = HEAD_DIM / 16;
    // Rows of 96 have idle lanes; a row's lanes are within a warp.
    const int from = threadIdx.x % 32 + HALF_LANES;
    const u32 x = __shfl_sync(~0u, codes.x, from & 31), y = __shfl_sync(~0u, codes.y, from & 31);
    return make_uint2(codes.x | x << 4, codes.y | y << 4);
}

// ---- codes as pairs of f16 ---------------------------------------------------------------------

// (a & mask) ^ flip
template <u32 MASK, u32 FLIP>
__device__ __forceinline__ u32 mask_flip(u32 a) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "n"(MASK), "n"(FLIP));
    return d;
}

// 2^-8 of what four codes of e4m3 stand for: bytes 0 and 2, and bytes 1 and 3. The sign stays, exponent and mantissa move
// by one bit.
__device__ __forceinline__ void widen_e4m3(u32 word, u32& even, u32& odd) {
    even = ((word << 8) & 0x80008000u) | ((word << 7) & 0x3f803f80u);
    odd = (word & 0x80008000u) | ((word >> 1) & 0x3f803f80u);
}

__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float2 unpack_halves(u32 packed) {
    float2 pair;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
    return pair;
}

// d[16 x 8] += a[16 x 16] b[16 x 8] in f16, whatever the type of tensors.
__device__ __forceinline__ void mma_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                           u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of f16, a row in four lanes, transposed.
__device__ __forceinline__ u32 transpose_halves(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
