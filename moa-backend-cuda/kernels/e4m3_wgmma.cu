// out (+)= x . w^T as in `e4m3.cu`, by Hopper's warpgroup instructions: the weight, widened in registers, is their left
// operand, tokens the right one.
//
// A block takes a tile of 64 rows and a part of its stretches. They come into a ring of stages by bulk copies that one
// thread starts, weights before the kernel before this has ended. Four warps widen a stretch while they multiply the one
// before. What decides the bits of a sum is the number of parts alone, whose blocks, a cluster, add their sums up in
// order; it follows from the weight's shape and the device. So what a token gets depends neither on the others nor on
// their number.
#include "e4m3.cuh"
#include "wgmma.cuh"

// Mirrored by `src/linear/e4m3_grouped.rs`.
struct E4m3WgmmaArgs {
    TensorMap x;          // [rows, k], boxes of `tokens` by a stretch, swizzled
    const u8* w;          // [n, k], in tiles
    const float* scales;  // [n]
    void* out;            // [rows, n]: f32 if wide, else element
    i64 out_stride;       // elements between rows
    int rows;
    int n;
    int k;
    int wide;
    int accumulate;       // 1: added to what out holds
    int settled;          // 1: no kernel that may still run writes w
    int stages;
    int tokens;           // of a block, at most TOKENS
};

#define THREADS 160  // four warps that multiply and one that copies
#define WARPS (THREADS / 32)
#define FULL(slot) (barriers + (slot) * 16)
#define EMPTY(slot) (FULL(slot) + 8)

// Grid: parts of k, tiles, rows / tokens.
template <int TOKENS>
__device__ __forceinline__ void product(const E4m3WgmmaArgs& args) {
    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    constexpr int STAGE_BYTES = TILE_BYTES + TOKENS * 128;
    // Rows of a token's sums, apart so that a fragment's lie in different banks.
    constexpr int PITCH = TILE_ROWS + 4;
    extern __shared__ __align__(1024) u8 memory[];
    const u32 stages = shared_address(memory), barriers = stages + args.stages * STAGE_BYTES;
    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const int part = blockIdx.x, parts = gridDim.x;
    const int token = blockIdx.z * args.tokens, tokens = min(args.rows - token, args.tokens);
    const int stretches = (args.k + STRETCH - 1) / STRETCH;
    const int first = stretches * part / parts, count = stretches * (part + 1) / parts - first;
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < args.stages; i++) {
            barrier_init(FULL(i), 1);
            barrier_init(EMPTY(i), 4);
        }
        fence_barrier_init();
    }
    __syncthreads();
    float sums[TOKENS / 2] = {};
    if (warp < 4) {
        const u8* const words = memory + warp * 1024 + lane * 16;
        int slot = 0, turn = 0, before = -1;
        u32 even[4][4], odd[4][4];
        auto multiply = [&](u32 (&a)[4][4]) {
            barrier_wait(FULL(slot), turn & 1);
            const uint4 top = *(const uint4*)(words + slot * STAGE_BYTES);
            const uint4 bottom = *(const uint4*)(words + slot * STAGE_BYTES + 512);
            widen_step(a[0], top.x, bottom.x);
            widen_step(a[1], top.y, bottom.y);
            widen_step(a[2], top.z, bottom.z);
            widen_step(a[3], top.w, bottom.w);
            const u32 x = wgmma_rows(stages + slot * STAGE_BYTES + TILE_BYTES);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++)
                wgmma_rs_rows(sums, a[step], wgmma_operand(x + step * 2));
            wgmma_commit();
            wgmma_wait<1>();
            // All lanes have read what may be overwritten.
            __syncwarp();
            if (lane == 0 && before >= 0) barrier_arrive(EMPTY(before));
            before = slot;
            if (++slot == args.stages) slot = 0, turn++;
        };
        int left = count;
        for (; left > 1; left -= 2) {
            multiply(even);
            multiply(odd);
        }
        if (left > 0) multiply(even);
        wgmma_wait<0>();
    } else if (lane == 0) {
        const u8* const w = args.w + ((i64)blockIdx.y * stretches + first) * TILE_BYTES;
        auto load_weights = [&](int index, int slot) {
            barrier_expect(FULL(slot), TILE_BYTES + args.tokens * 128);
            copy_bulk(stages + slot * STAGE_BYTES, w + (i64)index * TILE_BYTES, TILE_BYTES, FULL(slot));
        };
        // Of k beyond the last come zeros. A box has no rows that do not exist, which cost more than others: what lies
        // there in shared memory becomes sums that nobody reads.
        auto load_tokens = [&](int index, int slot) {
            copy_box(stages + slot * STAGE_BYTES + TILE_BYTES, &args.x, (first + index) * STRETCH, token,
                     FULL(slot));
        };
        const int ahead = min(args.stages, count);
        for (int i = 0; i < ahead; i++) load_weights(i, i);
        // The weights come while the kernel before this still makes x.
        if (args.settled) wait_for_previous_kernel();
        for (int i = 0; i < ahead; i++) load_tokens(i, i);
        int slot = 0, turn = 0;
        for (int index = ahead; index < count; index++) {
            barrier_wait(EMPTY(slot), turn & 1);
            load_weights(index, slot);
            load_tokens(index, slot);
            if (++slot == args.stages) slot = 0, turn++;
        }
    }
    __syncwarp();

    // Sums, in the memory that the copies no longer need.
    __syncthreads();
    float* const partial = (float*)memory;
    if (warp < 4) {
        const int row = warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                partial[(j * 8 + lane % 4 * 2 + c % 2) * PITCH + row + c / 2 * 8] = sums[j * 4 + c];
    }
    cluster_sync();
    wait_for_previous_kernel();
    // Each block of the cluster adds up a part of the rows.
    const int rows = (TILE_ROWS + parts - 1) / parts;
    const int end = min(min((part + 1) * rows, TILE_ROWS), args.n - (int)blockIdx.y * TILE_ROWS);
    for (int row = part * rows + lane; row < end; row += 32) {
        const int n = blockIdx.y * TILE_ROWS + row;
        const float scale = args.scales[n] * UNIT;
#pragma unroll 4
        for (int i = warp; i < tokens; i += WARPS) {
            const int at = i * PITCH + row;
            float sum = parts == 1 ? partial[at] : cluster_load(stages + at * 4, 0);
            for (int other = 1; other < parts; other++) sum += cluster_load(stages + at * 4, other);
            sum *= scale;
            const i64 to = (token + i) * args.out_stride + n;
            if (args.wide) {
                float* out = (float*)args.out + to;
                *out = args.accumulate ? *out + sum : sum;
            } else {
                u16* out = (u16*)args.out + to;
                if (args.accumulate) sum += unpack2(*out).x;
                *out = (u16)pack2(sum, 0.0f);
            }
        }
    }
    // Others may still read this block's sums.
    cluster_sync();
}

// BLOCKS of a multiprocessor, at most.
#define PRODUCT(TOKENS, BLOCKS)                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)         \
        e4m3_wgmma_##TOKENS(const __grid_constant__ E4m3WgmmaArgs args) { \
        product<TOKENS>(args);                                            \
    }
PRODUCT(8, 4)
PRODUCT(16, 4)
PRODUCT(32, 4)
PRODUCT(40, 4)
PRODUCT(48, 4)
PRODUCT(64, 4)
PRODUCT(80, 3)
PRODUCT(96, 3)
PRODUCT(112, 3)
PRODUCT(128, 3)
