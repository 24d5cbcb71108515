// Weights in quantised blocks: their records, and what a warp makes of one.
//
// Blocks are packed again when they are loaded. 16 rows by 256 k make a record: first the codes as the left
// fragments of the tensor cores want them, so that a warp copies what lies together and a lane reads back what
// it multiplies, then the steps. A record has as many bytes as its blocks. Codes are integers, which 16 bits hold
// exactly; sums over a step's elements are f32 and are multiplied by the step then. So a product has no rounding but
// that of f32 sums.
#pragma once
#include "rows.cuh"

typedef unsigned char u8;

#define WARPS 8

// As `BlockType::ALL` of moa-core counts them.
enum Kind { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

// Integers in the last places of elements.
#if DTYPE_BF16
#define ONE 0x3f803f80u
#define BASE 0x43004300u // 128, whose last places are ones
#define BASE_IS 128.0f
#else
#define ONE 0x3c003c00u
#define BASE 0x64006400u
#define BASE_IS 1024.0f
#endif

template <int KIND>
struct Format {
    static constexpr bool WIDE = KIND == Q8_0;       // codes of 8 bits, signed
    static constexpr bool LONG = KIND >= Q4_K;       // blocks of 256
    static constexpr bool HALVES = KIND == Q6_K;     // a step for 16 elements
    static constexpr bool LEAST = KIND == Q4_1 || KIND == Q5_1 || KIND == Q4_K || KIND == Q5_K;
    static constexpr int HIGH = KIND == Q6_K ? 2 : KIND == Q5_0 || KIND == Q5_1 || KIND == Q5_K;
    static constexpr int OFFSET = KIND == Q4_0 ? 8 : KIND == Q5_0 ? 16 : KIND == Q6_K ? 32 : 0;
    // Tokens times the base are taken off sums before, which costs fewer instructions than taking it off each code. 1024
    // would cost digits.
    static constexpr bool BASED = !WIDE && BASE_IS < 1000.0f;
    static constexpr int BLOCK = KIND == Q4_0   ? 18
                                 : KIND == Q4_1 ? 20
                                 : KIND == Q5_0 ? 22
                                 : KIND == Q5_1 ? 24
                                 : KIND == Q8_0 ? 34
                                 : KIND == Q4_K ? 144
                                 : KIND == Q5_K ? 176
                                                : 210;
    static constexpr int RECORD = BLOCK * (LONG ? 16 : 128);
    // Codes' low bits, then the high ones, then steps.
    static constexpr int HIGH_AT = WIDE ? 4096 : 2048;
    static constexpr int STEPS_AT = HIGH_AT + HIGH * 512;
    // Of blocks of 256, 16 rows of steps and what goes with them, as f32.
    static constexpr int FACTOR_ROW = 20;
    static constexpr int FACTORS = LONG ? 16 * FACTOR_ROW * 4 : 0;
    // Of a record that is held, of any kind.
    static constexpr int HELD_FACTORS = LONG ? FACTORS : LEAST ? 1024 : 512;
    // A lane's eight elements of 32: where the second four begin, behind the first.
    static constexpr int SECOND = HALVES ? 16 : 4;
    static constexpr int FIRST = HALVES ? 4 : 8; // between lanes
};

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    u32 sum;
#if DTYPE_BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(ONE), "r"(b));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(ONE), "r"(b));
#endif
    return sum;
}

// One instruction, which the compiler does not make of two constants by itself: (a & b) | c and (a & b) ^ c.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 x;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}
__device__ __forceinline__ u32 and_xor(u32 a, u32 b, u32 c) {
    u32 x;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}

// Signed bytes in the lower halves of the halves; the others are ignored.
__device__ __forceinline__ u32 signed_bytes(u32 halves) {
#if DTYPE_BF16
    // Seven bits hold 128 + x for x >= 0; else they hold 256 + x.
    return add2(and_or(halves, 0x007f007fu, BASE), and_or(halves, 0x00800080u, 0xc300c300u));
#else
    return add2(and_xor(halves, 0x00ff00ffu, 0x64806480u), 0xe480e480u);
#endif
}

__device__ __forceinline__ u32 shifted(u32 x, int right) {
    return right >= 0 ? x >> right : x << -right;
}

// Two f16, whatever the element is.
__device__ __forceinline__ float2 halves_of(u32 packed) {
    float2 pair;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
    return pair;
}

__device__ __forceinline__ float half_at(const u8* p) {
    return halves_of(p[0] | p[1] << 8).x;
}

// Steps and least elements of 8 groups, 6 bits each in three words: those of four groups, as bytes.
__device__ __forceinline__ void six_bits(const u32 (&words)[4], int half, u32& steps, u32& least) {
    const u32 a = words[1], b = words[2], c = words[3];
    steps = half ? (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u) : a & 0x3f3f3f3fu;
    least = half ? (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u) : b & 0x3f3f3f3fu;
}

__device__ __forceinline__ float byte_of(u32 word, int i) {
    return (float)(word >> 8 * i & 0xff);
}
__device__ __forceinline__ float signed_byte_of(u32 word, int i) {
    return (float)(signed char)(word >> 8 * i & 0xff);
}

__device__ __forceinline__ void words_of(const u8* p, u32* words) {
    const uint4 v = *(const uint4*)p;
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
}

// ---- a record ---------------------------------------------------------------------------------

// A lane's part of one group of 32 elements of 16 rows: codes as left fragments, in two halves of the group, and steps
// and least elements (or steps of the second half) of rows g and g + 8.
struct Group {
    u32 a[2][4];
    float step[2];
    float second[2];
};

// What a warp has read of one record in shared memory; `factors` is the warp's, for FACTORS bytes. One that is HELD leaves
// steps and least elements as f32 in HELD_FACTORS bytes when it begins, and reads the codes by halves.
template <int KIND, bool HELD = false>
struct Record {
    using F = Format<KIND>;
    static constexpr bool STEPS = HELD && !F::LONG;
    // What least elements are multiplied with.
    static constexpr float TIMES = F::BASED ? -1.0f / (BASE_IS + F::OFFSET) : 1.0f;
    const u8* codes;
    float* factors;
    u32 high[F::HIGH * 4 + 1];
    u32 low[HELD ? (F::WIDE ? 16 : 8) : 4];
    float4 pairs[2];

    __device__ __forceinline__ const u8* scales() const { return codes + F::STEPS_AT; }

    // Once the record is there, for all lanes.
    __device__ __forceinline__ void begin(int lane) {
#pragma unroll
        for (int i = 0; i < F::HIGH; i++) words_of(codes + F::HIGH_AT + i * 512 + lane * 16, high + i * 4);
        if (STEPS) {
            // Of two groups and rows g and g + 8 each.
            auto widen = [&](int from, int to) {
                const uint2 two = *(const uint2*)(scales() + from + lane * 8);
                const float2 a = halves_of(two.x), b = halves_of(two.y);
                const float times = to > 0 ? TIMES : 1.0f;
                ((float4*)factors)[to + lane] = make_float4(a.x * times, a.y * times, b.x * times, b.y * times);
            };
            widen(0, 0);
            if (F::LEAST) widen(256, 32);
            __syncwarp();
        }
        if (!F::LONG) return;
        // Half a row's numbers a lane.
        const int r = lane / 2, half = lane % 2;
        u32 words[4];
        words_of(scales() + r * 16, words);
        float made[8];
        if (F::HALVES) {
            const float by_all = halves_of(*(const u16*)(scales() + 256 + r * 2)).x;
#pragma unroll
            for (int n = 0; n < 8; n++)
                made[n] = by_all * signed_byte_of(half ? words[2 + n / 4] : words[n / 4], n % 4);
        } else {
            u32 six_steps, six_least;
            six_bits(words, half, six_steps, six_least);
            const float2 by_all = halves_of(words[0]);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                made[2 * n] = by_all.x * byte_of(six_steps, n);
                made[2 * n + 1] = -TIMES * by_all.y * byte_of(six_least, n);
            }
        }
        float4* const to = (float4*)(factors + r * F::FACTOR_ROW + half * 8);
        to[0] = make_float4(made[0], made[1], made[2], made[3]);
        to[1] = make_float4(made[4], made[5], made[6], made[7]);
        __syncwarp();
    }

    // The codes of four groups of a held record.
    __device__ __forceinline__ void hold(int lane, int half) {
        constexpr int WORDS = F::WIDE ? 4 : 2;
#pragma unroll
        for (int i = 0; i < WORDS; i++) words_of(codes + (half * WORDS + i) * 512 + lane * 16, low + i * 4);
    }

    // Group `j` of 8, in order.
    __device__ __forceinline__ void group(int lane, int j, Group& to) {
        const int g = lane / 4;
        const int own = F::WIDE ? j : j / 2;
        if (!HELD && (F::WIDE || j % 2 == 0)) words_of(codes + own * 512 + lane * 16, low);
        const u32* const words = HELD ? low + own % (F::WIDE ? 4 : 2) * 4 : low;
        if (F::WIDE) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                to.a[h][0] = signed_bytes(words[h]);
                to.a[h][1] = signed_bytes(words[2 + h]);
                to.a[h][2] = signed_bytes(words[h] >> 8);
                to.a[h][3] = signed_bytes(words[2 + h] >> 8);
            }
        } else {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 bits = and_or(words[j % 2 * 2 + r] >> 4 * i, 0x000f000fu, BASE);
                    if (F::HIGH == 1)
                        bits = and_or(shifted(high[j / 2], (j % 2 * 2 + r) * 4 + i - 4), 0x00100010u,
                                      bits);
                    if (F::HIGH == 2)
                        bits = and_or(shifted(high[j], (r * 4 + i) * 2 - 4), 0x00300030u, bits);
                    to.a[i / 2][i % 2 * 2 + r] =
                        F::BASED ? bits : add2(bits, (BASE | 0x80008000u) + F::OFFSET * 0x10001u);
                }
        }
        if (F::LONG) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (j % 2 == 0)
                    pairs[r] = *(const float4*)(factors + (g + r * 8) * F::FACTOR_ROW + j * 2);
                to.step[r] = j % 2 ? pairs[r].z : pairs[r].x;
                to.second[r] = j % 2 ? pairs[r].w : pairs[r].y;
            }
        } else if (STEPS) {
            const float4* const at = (const float4*)factors + g * 4 + j / 2;
            if (j % 2 == 0) pairs[0] = at[0];
            to.step[0] = j % 2 ? pairs[0].z : pairs[0].x;
            to.step[1] = j % 2 ? pairs[0].w : pairs[0].y;
            if (F::LEAST) {
                if (j % 2 == 0) pairs[1] = at[32];
                to.second[0] = j % 2 ? pairs[1].z : pairs[1].x;
                to.second[1] = j % 2 ? pairs[1].w : pairs[1].y;
            }
        } else {
            const u8* const at = scales() + g * 32 + j * 4;
            const float2 both = halves_of(*(const u32*)at);
            to.step[0] = both.x;
            to.step[1] = both.y;
            if (F::LEAST) {
                const float2 least = halves_of(*(const u32*)(at + 256));
                to.second[0] = least.x * TIMES;
                to.second[1] = least.y * TIMES;
            }
        }
    }
};

// What tokens are summed with, opaque so that the compiler does not make it again for each product.
template <int KIND>
__device__ __forceinline__ void make_summing(u32 (&by)[4]) {
    using F = Format<KIND>;
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("mov.b32 %0, %1;"
                     : "=r"(by[i])
                     : "n"(F::BASED ? (BASE | 0x80008000u) + F::OFFSET * 0x10001u : ONE));
}

// Sums of tokens of a group, which the base and least elements are multiplied with; of the two halves apart where they
// have steps of their own.
template <int KIND>
__device__ __forceinline__ void sum_tokens(const u32 (&by)[4], const u32 (&of)[4], float (&all)[4],
                                           float (&after)[4]) {
    using F = Format<KIND>;
#pragma unroll
    for (int c = 0; c < 4; c++) all[c] = after[c] = 0;
    if (F::BASED || F::LEAST) {
        mma(all, by, of[0], of[1]);
        if (F::HALVES)
            mma(after, by, of[2], of[3]);
        else
            mma(all, by, of[2], of[3]);
    }
}

// sums += the group times 8 tokens; every STEPth sum of a lane is wanted.
template <int KIND, int STEP>
__device__ __forceinline__ void add_group(const Group& group, const u32 (&of)[4], const float (&all)[4],
                                          float (&after)[4], float (&sums)[4]) {
    using F = Format<KIND>;
    float sum[4] = {};
#pragma unroll
    for (int c = 0; c < 4; c++) {
        if (F::LEAST && c % STEP == 0) sums[c] = fmaf(group.second[c / 2], all[c], sums[c]);
        if (F::BASED) sum[c] = all[c];
    }
    mma(sum, group.a[0], of[0], of[1]);
    if (F::HALVES)
        mma(after, group.a[1], of[2], of[3]);
    else
        mma(sum, group.a[1], of[2], of[3]);
#pragma unroll
    for (int c = 0; c < 4; c += STEP) {
        sums[c] = fmaf(group.step[c / 2], sum[c], sums[c]);
        if (F::HALVES) sums[c] = fmaf(group.second[c / 2], after[c], sums[c]);
    }
}
