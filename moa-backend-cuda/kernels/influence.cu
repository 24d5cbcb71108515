// influence: to first order, what masking one attention value does to the objective,
//   E_ij = A_ij / (1 - A_ij) * (D_i - dO_i . V_j),  D_i = dO_i . O_i,
// summed over blocks of 64 x 64 tokens and over the query heads of a KV head. The diagonal, which no
// mask can hide, counts nothing.
//
// One block per (KV head, block of queries), 4 warps of 16 queries; keys and values stream through
// two stages of shared memory. Nothing of size tokens x tokens but the block sums is stored.
//
// Grid (query blocks, kv_heads), block 128; dynamic shared memory STAGES * 2 * 64 * HEAD_DIM * 2.
#include "common.cuh"

#define STAGES (HEAD_DIM > 128 ? 1 : 2)
#define THREADS 128
#define TILE INFLUENCE_BLOCK
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define STAGE_BYTES (2 * TILE_BYTES)
#define KEY_COLUMNS (TILE / 8)
// Smallest 1 - A: where a row puts everything on one key, f32 holds no more digits of it.
#define SMALLEST 1.1920929e-7f

typedef u32 Fragments[HEAD_DIM / 16][4];

// Rows `row` and `row + 8` of a tensor as matrix fragments; zeros from row `end` on.
__device__ __forceinline__ void load_rows(Fragments& f, const Packed& tensor, int head, int row,
                                          int end, int lane) {
    const u32* a = (const u32*)((const u16*)tensor.data + row * tensor.token + head * tensor.head) +
                   lane % 4;
    const u32* b = (const u32*)((const u16*)tensor.data + (row + 8) * tensor.token +
                                head * tensor.head) + lane % 4;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        f[k][0] = row < end ? a[k * 8] : 0;
        f[k][1] = row + 8 < end ? b[k * 8] : 0;
        f[k][2] = row < end ? a[k * 8 + 4] : 0;
        f[k][3] = row + 8 < end ? b[k * 8 + 4] : 0;
    }
}

__device__ __forceinline__ float dot2(u32 a, u32 b) {
    const float2 x = unpack2(a), y = unpack2(b);
    return x.x * y.x + x.y * y.y;
}

// c[16 x 64] = a[16 x HEAD_DIM] . rows of a tile in shared memory
__device__ __forceinline__ void multiply(float (&c)[KEY_COLUMNS][4], const Fragments& a, u32 tile,
                                         int lane) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; k++) {
#pragma unroll
        for (int n = 0; n < KEY_COLUMNS; n++) {
            u32 b[4];
            load_matrices(b, tile + chunk_offset(n * 8 + lane % 8, k * 4 + lane / 8));
            mma(c[n], a[2 * k], b[0], b[1]);
            mma(c[n], a[2 * k + 1], b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    influence(const __grid_constant__ InfluenceArgs args) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float warp_sums[2][4];
    const int num_blocks = gridDim.x;
    // The last queries have the most keys: they start first.
    const int query_block = num_blocks - 1 - blockIdx.x, kv_head = blockIdx.y;
    const int group = args.query_heads / args.kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 stages = shared_address(shared);
    const u16* keys = (const u16*)args.k.data + kv_head * args.k.head;
    const u16* values = (const u16*)args.v.data + kv_head * args.v.head;

    auto load = [&](int block, int stage) {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * ROW_CHUNKS; i += THREADS) {
            const int r = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            const i64 token = min(block * TILE + r, args.tokens - 1);
            const bool valid = block * TILE + r < args.tokens;
            const u32 to = stages + stage * STAGE_BYTES + chunk_offset(r, chunk);
            copy16_async(to, keys + token * args.k.token + chunk * 8, valid);
            copy16_async(to + TILE_BYTES, values + token * args.v.token + chunk * 8, valid);
        }
        commit_copies();
    };

    const int row_0 = query_block * TILE + warp * 16 + lane / 4, row_1 = row_0 + 8;
    const float scale = args.scale * LOG2E;
    float* sums = args.blocks + ((i64)kv_head * num_blocks + query_block) * num_blocks;
    // The block of the first key that the block's first query sees.
    const int first_block = max(query_block * TILE + 1 - args.window, 0) / TILE;

    for (int g = 0; g < group; g++) {
        const int head = kv_head * group + g;
        Fragments q, d_out;
        load_rows(q, args.d_out, head, row_0, args.tokens, lane);
        load_rows(d_out, args.out, head, row_0, args.tokens, lane);
        float d_0 = 0, d_1 = 0;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            d_0 += dot2(q[k][0], d_out[k][0]) + dot2(q[k][2], d_out[k][2]);
            d_1 += dot2(q[k][1], d_out[k][1]) + dot2(q[k][3], d_out[k][3]);
#pragma unroll
            for (int i = 0; i < 4; i++) d_out[k][i] = q[k][i];
        }
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            d_0 += __shfl_xor_sync(~0u, d_0, d);
            d_1 += __shfl_xor_sync(~0u, d_1, d);
        }
        load_rows(q, args.q, head, row_0, args.tokens, lane);
        // Rows beyond the end weigh nothing.
        const float infinite = -NEG_INF;
        const float lse_0 =
            row_0 < args.tokens ? args.lse[(i64)row_0 * args.query_heads + head] * LOG2E : infinite;
        const float lse_1 =
            row_1 < args.tokens ? args.lse[(i64)row_1 * args.query_heads + head] * LOG2E : infinite;

        __syncthreads();
        if (STAGES > 1) load(first_block, first_block % STAGES);
        for (int block = first_block; block <= query_block; block++) {
            if (STAGES == 1) {
                load(block, 0);
                wait_copies<0>();
            } else {
                if (block < query_block) load(block + 1, (block + 1) % STAGES);
                else commit_copies();
                wait_copies<1>();
            }
            __syncthreads();
            const u32 tile = stages + block % STAGES * STAGE_BYTES;
            float scores[KEY_COLUMNS][4] = {}, gains[KEY_COLUMNS][4] = {};
            multiply(scores, q, tile, lane);
            multiply(gains, d_out, tile + TILE_BYTES, lane);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int key = block * TILE + n * 8 + lane % 4 * 2 + c % 2;
                    const int row = c < 2 ? row_0 : row_1;
                    const bool before = key < row && row - key < args.window;
                    const float a = exp2_fast(fmaf(scores[n][c], scale, -(c < 2 ? lse_0 : lse_1)));
                    const float e = __fdividef(a, fmaxf(1 - a, SMALLEST)) *
                                    ((c < 2 ? d_0 : d_1) - gains[n][c]);
                    sum += before ? (args.absolute ? fabsf(e) : e) : 0;
                }
            }
#pragma unroll
            for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
            if (lane == 0) warp_sums[block % 2][warp] = sum;
            __syncthreads();
            if (threadIdx.x == 0) {
                const float* w = warp_sums[block % 2];
                const float total = (w[0] + w[1]) + (w[2] + w[3]);
                // One thread adds, in order: the sum is the same every time.
                if (g == 0) sums[block] = total;
                else atomicAdd(&sums[block], total);
            }
        }
    }
}
