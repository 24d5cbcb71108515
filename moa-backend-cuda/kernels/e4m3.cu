// out (+)= x . w^T with a weight of 8-bit floats (e4m3) and one f32 factor for each of its rows: decode steps,
// where all that counts is how fast the weights come from memory. Activations stay of 16 bits.
//
// Weights are the left operand of the tensor cores, tokens the right one, 8 at a time. A product does not
// ask in which order its k come, so a lane takes 16 consecutive ones of each of its rows, one copy of
// 16 bytes, for four steps of 16; the same lane reads back what it has copied. Tokens are shared by two
// warps that work on the same k. Four such pairs take every fourth stretch of 64 k each; their sums are
// added in order at the end. So what a token gets depends neither on the others nor on their number.
#include "e4m3.cuh"
#include "rows.cuh"

// Mirrored by `src/linear/e4m3_weight.rs`.
struct E4m3Args {
    const u16* x;         // [rows, k]
    const u8* w;          // [n, k]
    const float* scales;  // [n]
    void* out;            // [rows, n]: f32 if wide, else element
    i64 x_stride;         // elements between rows
    i64 out_stride;
    int rows;
    int n;
    int k;                // a multiple of 16
    int wide;
    int accumulate;       // 1: added to what out holds
    int settled;          // 1: no kernel that may still run writes w
};

#define PAIRS 4         // of warps, each pair on k of its own
#define TOKEN_BYTES 128 // of a stretch

// Two bytes of e4m3, in the upper bytes of the halves, as elements.
__device__ __forceinline__ u32 widen2(u32 halves) {
    return widen2(halves, halves >> MOVED);
}
__device__ __forceinline__ u32 low_pair(u32 word) {
    return widen2(__byte_perm(word, 0, 0x1404));
}
__device__ __forceinline__ u32 high_pair(u32 word) {
    return widen2(__byte_perm(word, 0, 0x3424));
}

// GROUPS of 8 tokens; TILES of 16 weight rows a warp; STRETCHES copied as one stage, STAGES in memory.
template <int GROUPS, int TILES, int STRETCHES, int STAGES>
__device__ __forceinline__ void product(const E4m3Args& args) {
    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    constexpr int WEIGHT_BYTES = TILES * 2 * 64 * 16;
    constexpr int STRETCH_BYTES = WEIGHT_BYTES + GROUPS * 8 * TOKEN_BYTES;
    constexpr int STAGE_BYTES = STRETCHES * STRETCH_BYTES;
    extern __shared__ __align__(16) u8 memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pair = warp / 2, thread = threadIdx.x % 64;
    const int g = lane / 4, t = lane % 4;
    const int first = (blockIdx.y * 2 + warp % 2) * 16 * TILES;
    const int token = blockIdx.x * 8 * GROUPS;
    u8* const stages = memory + pair * STAGES * STAGE_BYTES;
    const u32 to_w = shared_address(stages) + thread * 16;
    // Chunks of odd tokens change places in pairs: lanes read every second chunk of two tokens at once.
    const u32 to_x = shared_address(stages) + WEIGHT_BYTES + thread / 8 * TOKEN_BYTES +
                     (thread % 8 ^ thread / 8 % 2) * 16;

    // Of the stage that is copied next.
    int weight_k = pair * STRETCH, token_k = weight_k;
    const u8* w = args.w + (i64)(first + g) * args.k + t * 16 + weight_k;
    const u16* x = args.x + (i64)(token + thread / 8) * args.x_stride + thread % 8 * 8 + token_k;
    auto load_weights = [&](int slot) {
#pragma unroll
        for (int b = 0; b < STRETCHES; b++) {
            const u32 at = slot * STAGE_BYTES + b * STRETCH_BYTES;
#pragma unroll
            for (int h = 0; h < 2 * TILES; h++)
                copy16_async(to_w + at + h * 64 * 16, w + (i64)h * 8 * args.k,
                             first + h * 8 + g < args.n && weight_k + t * 16 < args.k);
            weight_k += PAIRS * STRETCH;
            w += PAIRS * STRETCH;
        }
    };
    auto load_tokens = [&](int slot) {
#pragma unroll
        for (int b = 0; b < STRETCHES; b++) {
            const u32 at = slot * STAGE_BYTES + b * STRETCH_BYTES;
#pragma unroll
            for (int p = 0; p < GROUPS; p++)
                copy16_async(to_x + at + p * 8 * TOKEN_BYTES, x + p * 8 * args.x_stride,
                             token + p * 8 + thread / 8 < args.rows &&
                                 token_k + thread % 8 * 8 < args.k);
            token_k += PAIRS * STRETCH;
            x += PAIRS * STRETCH;
        }
        commit_copies();
    };
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; slot++) load_weights(slot);
    // The weights come while the kernel before this still makes x.
    if (args.settled) wait_for_previous_kernel();
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; slot++) load_tokens(slot);

    float sums[TILES][GROUPS][4] = {};
    int slot = 0;
    const int depth = PAIRS * STRETCH * STRETCHES;
    for (int done = 0; done < args.k; done += depth) {
        wait_copies<STAGES - 2>();
        // What the others have copied is there, and they are done with the slot that is filled next.
        __syncthreads();
        const int next = slot == 0 ? STAGES - 1 : slot - 1;
        load_weights(next);
        load_tokens(next);
        const u8* const stage = stages + slot * STAGE_BYTES;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
        for (int b = 0; b < STRETCHES; b++) {
            const u8* const stretch = stage + b * STRETCH_BYTES;
            uint4 weights[2 * TILES];
#pragma unroll
            for (int h = 0; h < 2 * TILES; h++)
                weights[h] = *(const uint4*)(stretch + (h * 64 + thread) * 16);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[TILES][2][4];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const uint4 top = weights[2 * tile], bottom = weights[2 * tile + 1];
                    const u32 words[2][2] = {
                        {half ? top.z : top.x, half ? top.w : top.y},
                        {half ? bottom.z : bottom.x, half ? bottom.w : bottom.y}};
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        a[tile][i][0] = low_pair(words[0][i]);
                        a[tile][i][1] = low_pair(words[1][i]);
                        a[tile][i][2] = high_pair(words[0][i]);
                        a[tile][i][3] = high_pair(words[1][i]);
                    }
                }
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    const uint4 tokens =
                        *(const uint4*)(stretch + WEIGHT_BYTES + (j * 8 + g) * TOKEN_BYTES +
                                        t * 32 + (half ^ g % 2) * 16);
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        mma(sums[tile][j], a[tile][0], tokens.x, tokens.y);
                        mma(sums[tile][j], a[tile][1], tokens.z, tokens.w);
                    }
                }
            }
        }
    }

    // Sums of the other pairs, in the memory that the copies no longer need.
    wait_all_copies();
    __syncthreads();
    float* const partial = (float*)memory;
    auto place = [&](int of, int tile, int j, int c) {
        return (((of * 2 + warp % 2) * TILES + tile) * GROUPS + j) * 128 + c * 32 + lane;
    };
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int j = 0; j < GROUPS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (pair > 0) partial[place(pair - 1, tile, j, c)] = sums[tile][j][c];
    __syncthreads();
    if (pair > 0) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int n = first + tile * 16 + c / 2 * 8 + g;
            const float scale = n < args.n ? args.scales[n] * UNIT : 0.0f;
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                float sum = sums[tile][j][c];
#pragma unroll
                for (int other = 0; other < PAIRS - 1; other++)
                    sum += partial[place(other, tile, j, c)];
                sum *= scale;
                const int row = token + j * 8 + t * 2 + c % 2;
                if (n >= args.n || row >= args.rows) continue;
                const i64 at = row * args.out_stride + n;
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
}

// Blocks of a multiprocessor are as many as its shared memory holds.
#define PRODUCT(TOKENS, GROUPS, TILES, STRETCHES, STAGES, BLOCKS)             \
    extern "C" __global__ void __launch_bounds__(PAIRS * 64, BLOCKS)          \
        e4m3_##TOKENS(const __grid_constant__ E4m3Args args) {                \
        product<GROUPS, TILES, STRETCHES, STAGES>(args);                      \
    }
PRODUCT(8, 1, 1, 2, 3, 3)
PRODUCT(16, 2, 2, 1, 4, 2)
PRODUCT(32, 4, 2, 1, 3, 2)
PRODUCT(64, 8, 2, 1, 4, 1)

// ---- by elements, sixteen a thread: grid (columns / 16 / 256, rows, more rows) -------------------

#define FOR_SIXTEEN(i)                                               \
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 16;      \
    if (i >= args.cols) return;                                      \
    const i64 row = blockIdx.y + (i64)blockIdx.z * gridDim.y;        \
    if (row >= args.rows) return;

// out = x * w, x bytes of e4m3, w an f32 factor for each row, out element.
extern "C" __global__ void __launch_bounds__(256) widen_e4m3(const __grid_constant__ OpArgs args) {
    start();
    FOR_SIXTEEN(i)
    const uint4 v = *(const uint4*)((const u8*)args.x + row * args.x_stride + i);
    const float scale = ((const float*)args.w)[row] * UNIT;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    u32 pairs[8];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float2 low = unpack2(low_pair(words[n])), high = unpack2(high_pair(words[n]));
        pairs[2 * n] = pack2(low.x * scale, low.y * scale);
        pairs[2 * n + 1] = pack2(high.x * scale, high.y * scale);
    }
    uint4* out = (uint4*)((u16*)args.out + row * args.out_stride + i);
    out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// The same of tiles.
extern "C" __global__ void __launch_bounds__(256)
    widen_tiles_e4m3(const __grid_constant__ OpArgs args) {
    start();
    FOR_SIXTEEN(i)
    const int stretches = (args.cols + STRETCH - 1) / STRETCH;
    const u8* const from = (const u8*)args.x + (row / TILE_ROWS * stretches + i / STRETCH) * TILE_BYTES +
                           row % TILE_ROWS * STRETCH + i % STRETCH / 16 * 4;
    const float scale = ((const float*)args.w)[row] * UNIT;
    u32 pairs[8];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const u32 word = *(const u32*)(from + t * 16);
        const float2 front = unpack2(widen_front(word)), back = unpack2(widen_back(word));
        pairs[t] = pack2(front.x * scale, front.y * scale);
        pairs[t + 4] = pack2(back.x * scale, back.y * scale);
    }
    uint4* out = (uint4*)((u16*)args.out + row * args.out_stride + i);
    out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// The nearest e4m3, ties to even; |x| is at most 448.
__device__ __forceinline__ u32 round_e4m3(float x) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80;
    const float size = fabsf(x);
    // Below the smallest normal number, multiples of 2^-9: the last bit of a number at 2^14.
    if (size < 0x1p-6f) return sign | (__float_as_uint(size + 0x1p14f) & 0xf);
    const u32 bits = __float_as_uint(size);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

// out = uniform in [-eps, eps) in e4m3, by a counter hashed with flag, as `randomise`.
extern "C" __global__ void __launch_bounds__(256)
    randomise_e4m3(const __grid_constant__ OpArgs args) {
    start();
    FOR_SIXTEEN(i)
    const i64 at = row * args.out_stride + i;
    u32 words[4] = {};
#pragma unroll
    for (int n = 0; n < 16; n++) {
        u64 z = (u64)(at + n) + 0x9e3779b97f4a7c15ull * (u64)(u32)args.flag;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        const float x = ((float)(u32)(z >> 40) * 0x1p-23f - 1.0f) * args.eps;
        words[n / 4] |= round_e4m3(x) << n % 4 * 8;
    }
    *(uint4*)((u8*)args.out + at) = make_uint4(words[0], words[1], words[2], words[3]);
}
