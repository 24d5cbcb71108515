// Weights in quantised blocks (moa-core, `BlockType`): out (+)= x . w^T for decode steps, where all that counts is
// how fast the blocks come from memory, and the same weights as rows of elements.
//
// Blocks are packed again when they are loaded. 16 rows by 256 k make a record: first the codes as the left
// fragments of the tensor cores want them, so that a warp copies what lies together and a lane reads back what
// it multiplies, then the steps. A record has as many bytes as its blocks. Codes are integers, which 16 bits hold
// exactly; sums over a step's elements are f32 and are multiplied by the step then. So a product has no rounding but
// that of f32 sums.
//
// The 8 warps of a block take every eighth record of 16 rows; their sums are added in order at the end. What a token
// gets depends neither on the others nor on their number.
#include "rows.cuh"

typedef unsigned char u8;

// Mirrored by `src/linear/block_weight.rs`.
struct BlockArgs {
    const u16* x;   // [rows, k]
    const u8* w;    // records [n / 16, records]
    void* out;      // [rows, n]: f32 if wide, else element
    i64 x_stride;   // elements between rows
    i64 out_stride;
    int rows;
    int n;
    int k;          // a multiple of 32
    int records;    // k / 256, rounded up
    int wide;
    int accumulate; // 1: added to what out holds
    int settled;    // 1: no kernel that may still run writes w
    int padding;
};

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

__device__ __forceinline__ void words_of(const u8* p, u32 (&words)[4]) {
    const uint4 v = *(const uint4*)p;
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
}

// ---- products -----------------------------------------------------------------------------------

// GROUPS of 8 tokens; STAGES of records in memory.
template <int KIND, int GROUPS, int STAGES>
__device__ __forceinline__ void product(const BlockArgs& args) {
    using F = Format<KIND>;
    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    extern __shared__ __align__(16) u8 memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    constexpr int OWN = STAGES * F::RECORD + F::FACTORS;
    u8* const own = memory + warp * OWN;
    float* const factors = (float*)(own + STAGES * F::RECORD);
    const u8* const tile = args.w + (i64)blockIdx.y * args.records * F::RECORD;
    const u32 to = shared_address(own) + lane * 16;
    auto load = [&](int record, int slot) {
        if (record < args.records) {
            const u8* const source = tile + (u32)(record * F::RECORD + lane * 16);
#pragma unroll
            for (int at = 0; at < F::RECORD; at += 512)
                if (at + 512 <= F::RECORD || at + lane * 16 < F::RECORD)
                    copy16_async(to + slot * F::RECORD + at, source + at, true);
        }
        commit_copies();
    };
#pragma unroll
    for (int slot = 0; slot < STAGES; slot++) load(warp + slot * WARPS, slot);
    // The weights come while the kernel before this still makes x.
    if (args.settled) wait_for_previous_kernel();

    const int token = blockIdx.x * (8 * GROUPS);
    u32 x[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        // The last token again where there is no other.
        x[i] = (u32)min(token + i * 8 + g, args.rows - 1) * (u32)args.x_stride + t * F::FIRST;

    // What tokens are summed with, opaque so that the compiler does not make it again for each product.
    u32 by[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("mov.b32 %0, %1;"
                     : "=r"(by[i])
                     : "n"(F::BASED ? (BASE | 0x80008000u) + F::OFFSET * 0x10001u : ONE));

    float sums[GROUPS][4] = {};
    int slot = 0;
    for (int record = warp; record < args.records; record += WARPS) {
        // Groups whose tokens are in registers at once.
        constexpr int BATCH = (F::LEAST && GROUPS == 1 ? 2 : 4) / GROUPS;
        // What least elements are multiplied with.
        constexpr float TIMES = F::BASED ? -1.0f / (BASE_IS + F::OFFSET) : 1.0f;
        u32 high[F::HIGH * 4 + 1];
        float4 pairs[2];
        const u8* const codes = own + slot * F::RECORD;
        const u8* const scales = codes + F::STEPS_AT;
#pragma unroll
        for (int batch = 0; batch < 8 / BATCH; batch++) {
            u32 tokens[BATCH][GROUPS][4];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    const u16* const from = args.x + (x[i] + record * 256) + (batch * BATCH + b) * 32;
                    uint2 first = {0, 0}, second = {0, 0};
                    if (F::LONG || record * 256 + (batch * BATCH + b) * 32 < args.k) {
                        if (F::HALVES) {
                            first = *(const uint2*)from;
                            second = *(const uint2*)(from + F::SECOND);
                        } else {
                            const uint4 both = *(const uint4*)from;
                            first = make_uint2(both.x, both.y);
                            second = make_uint2(both.z, both.w);
                        }
                    }
                    tokens[b][i][0] = first.x;
                    tokens[b][i][1] = first.y;
                    tokens[b][i][2] = second.x;
                    tokens[b][i][3] = second.y;
                }
            if (batch == 0) {
                wait_copies<STAGES - 1>();
                __syncwarp();
#pragma unroll
                for (int i = 0; i < F::HIGH; i++) {
                    u32 words[4];
                    words_of(codes + F::HIGH_AT + i * 512 + lane * 16, words);
#pragma unroll
                    for (int n = 0; n < 4; n++) high[i * 4 + n] = words[n];
                }
                if (F::LONG) {
                    // Half a row's numbers a lane.
                    const int r = lane / 2, half = lane % 2;
                    u32 words[4];
                    words_of(scales + r * 16, words);
                    float made[8];
                    if (F::HALVES) {
                        const float by_all = halves_of(*(const u16*)(scales + 256 + r * 2)).x;
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
            }
            u32 low[4];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const int j = batch * BATCH + b;
                u32 a[2][4];
                if (F::WIDE) {
                    words_of(codes + j * 512 + lane * 16, low);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        a[h][0] = signed_bytes(low[h]);
                        a[h][1] = signed_bytes(low[2 + h]);
                        a[h][2] = signed_bytes(low[h] >> 8);
                        a[h][3] = signed_bytes(low[2 + h] >> 8);
                    }
                } else {
                    if (j % 2 == 0) words_of(codes + j / 2 * 512 + lane * 16, low);
#pragma unroll
                    for (int r = 0; r < 2; r++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            u32 bits = and_or(low[j % 2 * 2 + r] >> 4 * i, 0x000f000fu, BASE);
                            if (F::HIGH == 1)
                                bits = and_or(shifted(high[j / 2], (j % 2 * 2 + r) * 4 + i - 4),
                                              0x00100010u, bits);
                            if (F::HIGH == 2)
                                bits = and_or(shifted(high[j], (r * 4 + i) * 2 - 4), 0x00300030u, bits);
                            a[i / 2][i % 2 * 2 + r] =
                                F::BASED ? bits
                                         : add2(bits, (BASE | 0x80008000u) + F::OFFSET * 0x10001u);
                        }
                }
                float step[2], second[2];
                if (F::LONG) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        if (j % 2 == 0)
                            pairs[r] = *(const float4*)(factors + (g + r * 8) * F::FACTOR_ROW + j * 2);
                        step[r] = j % 2 ? pairs[r].z : pairs[r].x;
                        second[r] = j % 2 ? pairs[r].w : pairs[r].y;
                    }
                } else {
                    const float2 both = halves_of(*(const u32*)(scales + g * 32 + j * 4));
                    step[0] = both.x;
                    step[1] = both.y;
                    if (F::LEAST) {
                        const float2 least = halves_of(*(const u32*)(scales + 256 + g * 32 + j * 4));
                        second[0] = least.x * TIMES;
                        second[1] = least.y * TIMES;
                    }
                }
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    const u32(&of)[4] = tokens[b][i];
                    float sum[4] = {}, after[4] = {}, all[4] = {};
                    if (F::BASED || F::LEAST) {
                        mma(all, by, of[0], of[1]);
                        if (F::HALVES)
                            mma(after, by, of[2], of[3]);
                        else
                            mma(all, by, of[2], of[3]);
                    }
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        if (F::LEAST) sums[i][c] = fmaf(second[c / 2], all[c], sums[i][c]);
                        if (F::BASED) sum[c] = all[c];
                    }
                    mma(sum, a[0], of[0], of[1]);
                    if (F::HALVES)
                        mma(after, a[1], of[2], of[3]);
                    else
                        mma(sum, a[1], of[2], of[3]);
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        sums[i][c] = fmaf(step[c / 2], sum[c], sums[i][c]);
                        if (F::HALVES) sums[i][c] = fmaf(second[c / 2], after[c], sums[i][c]);
                    }
                }
            }
        }
        // All lanes are done with the slot that is filled next.
        __syncwarp();
        load(record + STAGES * WARPS, slot);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }

    // Sums of the warps, each in the memory that its copies no longer need.
    wait_all_copies();
    __syncwarp();
    constexpr int WIDTH = 20; // between tokens, for banks of their own
    float* const partial = (float*)own;
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            partial[(i * 8 + t * 2 + c % 2) * WIDTH + g + c / 2 * 8] = sums[i][c];
    __syncthreads();
    const int row = threadIdx.x % 16, at = threadIdx.x / 16;
    const int n = blockIdx.y * 16 + row;
    if (at >= GROUPS * 8 || token + at >= args.rows || n >= args.n) return;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < WARPS; other++)
        sum += ((const float*)(memory + other * OWN))[at * WIDTH + row];
    const i64 place = (token + at) * args.out_stride + n;
    if (args.wide) {
        float* out = (float*)args.out + place;
        *out = args.accumulate ? *out + sum : sum;
    } else {
        u16* out = (u16*)args.out + place;
        if (args.accumulate) sum += unpack2(*out).x;
        *out = (u16)pack2(sum, 0.0f);
    }
}

// Records in memory at once, and blocks of a multiprocessor, which its shared memory must hold: up to 8 rows; one fewer
// up to 16.
#define PRODUCT(NAME, KIND, STAGES, BLOCKS)                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)          \
        NAME##_8(const __grid_constant__ BlockArgs args) {                    \
        product<KIND, 1, STAGES>(args);                                       \
    }                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS - 1)      \
        NAME##_16(const __grid_constant__ BlockArgs args) {                   \
        product<KIND, 2, STAGES>(args);                                       \
    }
PRODUCT(q4_0, Q4_0, 3, 3)
PRODUCT(q4_1, Q4_1, 3, 3)
PRODUCT(q5_0, Q5_0, 3, 3)
PRODUCT(q5_1, Q5_1, 2, 3)
PRODUCT(q8_0, Q8_0, 2, 3)
PRODUCT(q4_k, Q4_K, 3, 3)
#if __CUDA_ARCH__ < 900
// Before Hopper its addresses take more registers than three blocks leave.
PRODUCT(q5_k, Q5_K, 2, 2)
#else
PRODUCT(q5_k, Q5_K, 2, 3)
#endif
PRODUCT(q6_k, Q6_K, 2, 3)

// ---- elements -----------------------------------------------------------------------------------

#define WITH_FORMAT(kind, call)                \
    switch (kind) {                            \
        case Q4_0: call<Q4_0>(args); break;    \
        case Q4_1: call<Q4_1>(args); break;    \
        case Q5_0: call<Q5_0>(args); break;    \
        case Q5_1: call<Q5_1>(args); break;    \
        case Q8_0: call<Q8_0>(args); break;    \
        case Q4_K: call<Q4_K>(args); break;    \
        case Q5_K: call<Q5_K>(args); break;    \
        default: call<Q6_K>(args);             \
    }

__device__ __forceinline__ void store4(u16* p, const float* x) {
    *(uint2*)p = make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3]));
}
__device__ __forceinline__ void store4(float* p, const float* x) {
    *(float4*)p = make_float4(x[0], x[1], x[2], x[3]);
}

// out = factor (eps) times rows `ids` of packed weights, or those from `y_stride` on: a thread takes the eight elements
// of a lane. The numbers are those of `BlockType::widen`, bit for bit.
template <typename OUT>
struct Widen {
    template <int KIND>
    static __device__ __forceinline__ void run(const OpArgs& args) {
        using F = Format<KIND>;
        const int unit = blockIdx.x * blockDim.x + threadIdx.x;
        const int record = unit / 32, j = unit / 4 % 8, t = unit % 4;
        const int k = record * 256 + j * 32 + t * F::FIRST;
        const i64 to = blockIdx.y + (i64)blockIdx.z * gridDim.y;
        if (record * 256 + j * 32 >= args.cols || to >= args.rows) return;
        const i64 row = args.ids ? (i64)args.ids[to] : args.y_stride + to;
        const int g = row % 8, r = row / 8 % 2, lane = g * 4 + t;
        const u8* const from = (const u8*)args.x + (row / 16 * args.x_stride + record) * F::RECORD;
        const u8* const scales = from + F::STEPS_AT;
        float steps[2], least = 0;
        if (F::HALVES) {
            const float factor = half_at(scales + 256 + (g + r * 8) * 2);
            for (int h = 0; h < 2; h++)
                steps[h] = factor * (float)(signed char)scales[(g + r * 8) * 16 + j * 2 + h];
        } else if (F::LONG) {
            u32 words[4], six_steps, six_least;
            words_of(scales + (g + r * 8) * 16, words);
            six_bits(words, j / 4, six_steps, six_least);
            const float2 factors = halves_of(words[0]);
            steps[0] = steps[1] = factors.x * byte_of(six_steps, j % 4);
            least = -(factors.y * byte_of(six_least, j % 4));
        } else {
            steps[0] = steps[1] = half_at(scales + g * 32 + j * 4 + r * 2);
            if (F::LEAST) least = half_at(scales + 256 + g * 32 + j * 4 + r * 2);
        }
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = e / 2, odd = e % 2 * 16;
            int code;
            if (F::WIDE) {
                const u32 word = *(const u32*)(from + j * 512 + lane * 16 + r * 8 + e / 4 * 4);
                code = (signed char)(word >> (e / 2 % 2 * 8 + odd) & 0xff);
            } else {
                const u32 word = *(const u32*)(from + j / 2 * 512 + lane * 16 + (j % 2 * 2 + r) * 4);
                code = word >> (4 * i + odd) & 15;
                const u8* const high = from + F::HIGH_AT + lane * 16;
                if (F::HIGH == 1)
                    code |= (*(const u32*)(high + j / 2 * 4) >> ((j % 2 * 2 + r) * 4 + i + odd) & 1) << 4;
                if (F::HIGH == 2)
                    code |= (*(const u32*)(high + j / 4 * 512 + j % 4 * 4) >> ((r * 4 + i) * 2 + odd) & 3) << 4;
                code -= F::OFFSET;
            }
            x[e] = __fmul_rn(steps[e / 4], (float)code);
            if (F::LEAST) x[e] = __fadd_rn(x[e], least);
            x[e] = __fmul_rn(x[e], args.eps);
        }
        OUT* const out = (OUT*)args.out + to * args.out_stride + k;
        store4(out, x);
        store4(out + F::SECOND, x + 4);
    }
};

// As elements.
extern "C" __global__ void __launch_bounds__(256) widen_blocks(const __grid_constant__ OpArgs args) {
    start();
    WITH_FORMAT(args.flag, Widen<u16>::template run)
}

// As f32.
extern "C" __global__ void __launch_bounds__(256) embed_blocks(const __grid_constant__ OpArgs args) {
    start();
    WITH_FORMAT(args.flag, Widen<float>::template run)
}

// Code `e` of the 32 of group `j` of a block as it lies in its file.
template <int KIND>
__device__ __forceinline__ u32 code_of(const u8* block, int j, int e) {
    if (KIND == Q8_0) return block[2 + e];
    if (KIND == Q4_K || KIND == Q5_K) {
        u32 code = block[(KIND == Q4_K ? 16 : 48) + j / 2 * 32 + e] >> j % 2 * 4 & 15;
        if (KIND == Q5_K) code |= (block[16 + e] >> j & 1) << 4;
        return code;
    }
    if (KIND == Q6_K) {
        const int side = j / 4, quarter = j % 4;
        const u32 low = block[64 * side + 32 * (quarter % 2) + e] >> quarter / 2 * 4 & 15;
        return low | (block[128 + 32 * side + e] >> 2 * quarter & 3) << 4;
    }
    constexpr int HIGH_AT = KIND == Q4_1 || KIND == Q5_1 ? 4 : 2;
    constexpr bool FIVE = KIND == Q5_0 || KIND == Q5_1;
    u32 code = block[HIGH_AT + FIVE * 4 + e % 16] >> e / 16 * 4 & 15;
    if (FIVE) code |= (block[HIGH_AT + e / 8] >> e % 8 & 1) << 4;
    return code;
}

// A block of threads makes a record of blocks as they lie in a file, x of rows of x_stride bytes: grid (records, tiles of
// 16 rows). What is beyond the last row and element has steps of 0.
template <int KIND>
__device__ __forceinline__ void pack(const OpArgs& args) {
    using F = Format<KIND>;
    const int j = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int record = blockIdx.x, group = record * 8 + j;
    u8* const to = (u8*)args.out + ((i64)blockIdx.y * gridDim.x + record) * F::RECORD;
    u8* const scales = to + F::STEPS_AT;
    u32 bits[2] = {}, steps = 0, leasts = 0;
    for (int r = 0; r < 2; r++) {
        const i64 row = (i64)blockIdx.y * 16 + g + r * 8;
        const bool is_there = row < args.rows && group * 32 < args.cols;
        const u8* const block = (const u8*)args.x + row * args.x_stride +
                                (i64)(F::LONG ? record : group) * F::BLOCK;
        u32 words[2] = {};
        for (int e = 0; e < 8; e++) {
            const int at = t * F::FIRST + (e < 4 ? e : F::SECOND + e - 4);
            const u32 code = is_there ? code_of<KIND>(block, j, at) : 0;
            const int i = e / 2, odd = e % 2 * 16;
            if (F::WIDE)
                words[e / 4] |= code << (i % 2 * 8 + odd);
            else
                words[0] |= (code & 15) << (4 * i + odd);
            if (F::HIGH == 1) bits[0] |= code >> 4 << (r * 4 + i + odd);
            if (F::HIGH == 2) bits[0] |= code >> 4 << ((r * 4 + i) * 2 + odd);
        }
        if (F::WIDE)
            *(uint2*)(to + j * 512 + lane * 16 + r * 8) = make_uint2(words[0], words[1]);
        else
            *(u32*)(to + j / 2 * 512 + lane * 16 + (j % 2 * 2 + r) * 4) = words[0];
        if (t > 0) continue;
        if (!F::LONG && is_there) {
            steps |= (block[0] | block[1] << 8) << r * 16;
            if (F::LEAST) leasts |= (block[2] | block[3] << 8) << r * 16;
        }
        if (F::LONG && j == 0) {
            const int from = F::HALVES ? 192 : 0;
            for (int i = 0; i < 16; i++)
                scales[(g + r * 8) * 16 + i] = is_there ? block[from + i] : 0;
            for (int i = 0; i < 2; i++)
                if (F::HALVES) scales[256 + (g + r * 8) * 2 + i] = is_there ? block[208 + i] : 0;
        }
    }
    u8* const high = to + F::HIGH_AT + lane * 16;
    if (F::HIGH == 1) {
        // A word is shared with the group beside.
        high[j / 2 * 4 + j % 2] = bits[0];
        high[j / 2 * 4 + j % 2 + 2] = bits[0] >> 16;
    }
    if (F::HIGH == 2) *(u32*)(high + j / 4 * 512 + j % 4 * 4) = bits[0];
    if (!F::LONG && t == 0) {
        *(u32*)(scales + g * 32 + j * 4) = steps;
        if (F::LEAST) *(u32*)(scales + 256 + g * 32 + j * 4) = leasts;
    }
}

extern "C" __global__ void __launch_bounds__(256) pack_blocks(const __grid_constant__ OpArgs args) {
    start();
    WITH_FORMAT(args.flag, pack)
}
