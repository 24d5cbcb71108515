// Weights in quantised blocks (moa-core, `BlockType`): out (+)= x . w^T for decode steps, where all that counts is
// how fast the blocks come from memory, and the same weights as rows of elements.
//
// The 8 warps of a block take every eighth record of 16 rows; their sums are added in order at the end. What a token
// gets depends neither on the others nor on their number.
#include "blocks.cuh"

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

    u32 by[4];
    make_summing<KIND>(by);

    float sums[GROUPS][4] = {};
    int slot = 0;
    for (int record = warp; record < args.records; record += WARPS) {
        // Groups whose tokens are in registers at once.
        constexpr int BATCH = (F::LEAST && GROUPS == 1 ? 2 : 4) / GROUPS;
        Record<KIND> from;
        from.codes = own + slot * F::RECORD;
        from.factors = factors;
#pragma unroll
        for (int batch = 0; batch < 8 / BATCH; batch++) {
            u32 tokens[BATCH][GROUPS][4];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    const u16* const at = args.x + (x[i] + record * 256) + (batch * BATCH + b) * 32;
                    uint2 first = {0, 0}, second = {0, 0};
                    if (F::LONG || record * 256 + (batch * BATCH + b) * 32 < args.k) {
                        if (F::HALVES) {
                            first = *(const uint2*)at;
                            second = *(const uint2*)(at + F::SECOND);
                        } else {
                            const uint4 both = *(const uint4*)at;
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
                from.begin(lane);
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                Group group;
                from.group(lane, batch * BATCH + b, group);
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    float all[4], after[4];
                    sum_tokens<KIND>(by, tokens[b][i], all, after);
                    add_group<KIND, 1>(group, tokens[b][i], all, after, sums[i]);
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
