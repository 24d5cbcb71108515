// extend_tile: attention of many new tokens, on tensor cores through mma.sync (sm_80 and later).
//
// One block per (sequence, KV head, tile of TILE_ROWS query rows), 4 warps of 16 rows each. Keys
// come in tiles of TILE_KEYS, from the last to the first, through two stages of shared memory.
// Only tiles that some row sees are loaded, only tiles at the edge of the mask evaluate it.
//
// Dynamic shared memory: STAGES * 2 * TILE_KEYS * HEAD_DIM * 2 bytes.
#include "common.cuh"

#define TILE_ROWS 64
#define TILE_KEYS (HEAD_DIM > 128 ? 16 : 64)
#define STAGES 2
#define THREADS 128
#define TILE_BYTES (TILE_KEYS * HEAD_DIM * 2)
#define STAGE_BYTES (2 * TILE_BYTES)
#define COLUMNS (HEAD_DIM / 8)
#define KEY_COLUMNS (TILE_KEYS / 8)

extern "C" __global__ void __launch_bounds__(THREADS)
    extend_tile(const __grid_constant__ ExtendArgs args) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int group = args.query_heads / args.kv_heads;

    int s = 0;
    while (s + 1 < args.num_sequences && args.sequences[s + 1].first_item <= (int)blockIdx.x) s++;
    const Sequence sequence = args.sequences[s];
    const int rows = sequence.tokens * group;
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int item = blockIdx.x - sequence.first_item;
    const int kv_head = args.order[(i64)s * args.kv_heads + item / tiles];
    // The last tile sees the most keys: it starts first.
    const int first_row = (tiles - 1 - item % tiles) * TILE_ROWS;
    const Head head = args.heads[(i64)s * args.kv_heads + kv_head];
    const int len = args.lens[s];
    const int first_query = len + first_row / group;
    const int last_query = len + (min(first_row + TILE_ROWS, rows) - 1) / group;
    const KeyList list(head, first_query, last_query);
    const KeySource source(args, sequence, head, kv_head, len, list);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 stages = shared_address(shared);
    const int steps = (list.count + TILE_KEYS - 1) / TILE_KEYS;

    auto load = [&](int step) {
        const u32 stage = stages + step % STAGES * STAGE_BYTES;
        const int first = (steps - 1 - step) * TILE_KEYS;
        const int last = min(first + TILE_KEYS, list.count) - 1;
        const Stretch from = source.stretch(list, first, last);
        if (from.straight) {
            // Not unrolled: the accumulators need the registers.
#pragma unroll 1
            for (int i = threadIdx.x; i < TILE_KEYS * ROW_CHUNKS; i += THREADS) {
                const int r = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
                const u32 to = stage + chunk_offset(r, chunk);
                copy16_async(to, from.k + r * from.k_stride + chunk * 8, first + r <= last);
                copy16_async(to + TILE_BYTES, from.v + r * from.v_stride + chunk * 8,
                             first + r <= last);
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < TILE_KEYS * ROW_CHUNKS; i += THREADS) {
                const int r = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
                const int row = source.row(list.position(min(first + r, last)));
                const u32 to = stage + chunk_offset(r, chunk);
                copy16_async(to, source.key(row) + chunk * 8, first + r <= last);
                copy16_async(to + TILE_BYTES, source.value(row) + chunk * 8, first + r <= last);
            }
        }
    };
    load(0);
    commit_copies();

    u32 q[HEAD_DIM / 16][4];
    const int row_0 = first_row + warp * 16 + lane / 4, row_1 = row_0 + 8;
    auto query_row = [&](int row) {
        const int token = row / group;
        return (const u32*)((const u16*)args.q.data + (sequence.first + token) * args.q.token +
                            (kv_head * group + row - token * group) * args.q.head) + lane % 4;
    };
    const u32* q_0 = query_row(min(row_0, rows - 1));
    const u32* q_1 = query_row(min(row_1, rows - 1));
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        q[k][0] = q_0[k * 8];
        q[k][1] = q_1[k * 8];
        q[k][2] = q_0[k * 8 + 4];
        q[k][3] = q_1[k * 8 + 4];
    }
    const RowMask mask_0(head, list, len + min(row_0, rows - 1) / group);
    const RowMask mask_1(head, list, len + min(row_1, rows - 1) / group);

    const Scores score(args);
    float o[COLUMNS][4] = {};
    float max_0 = NEG_INF, max_1 = NEG_INF, sum_0 = 0, sum_1 = 0;

    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const u32 keys = stages + step % STAGES * STAGE_BYTES, values = keys + TILE_BYTES;
        const int first = (steps - 1 - step) * TILE_KEYS;

        float scores[KEY_COLUMNS][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++) {
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++) {
                u32 b[4];
                load_matrices(b, keys + chunk_offset(n * 8 + lane % 8, k * 4 + lane / 8));
                mma(scores[n], q[2 * k], b[0], b[1]);
                mma(scores[n], q[2 * k + 1], b[2], b[3]);
            }
        }
        const int low = list.position(first), high = list.position(first + TILE_KEYS - 1);
        const bool whole = high <= first_query && (high < head.sink || last_query - low < head.window);
        float top_0 = max_0, top_1 = max_1;
#pragma unroll
        for (int n = 0; n < KEY_COLUMNS; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float& x = scores[n][c];
                float& y = scores[n][c + 2];
                x = score(x);
                y = score(y);
                if (!whole) {
                    const int index = first + n * 8 + lane % 4 * 2 + c;
                    x = mask_0.sees(index) ? x : NEG_INF;
                    y = mask_1.sees(index) ? y : NEG_INF;
                }
                top_0 = fmaxf(top_0, x);
                top_1 = fmaxf(top_1, y);
            }
        }
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            top_0 = fmaxf(top_0, __shfl_xor_sync(~0u, top_0, d));
            top_1 = fmaxf(top_1, __shfl_xor_sync(~0u, top_1, d));
        }
        // A row that has seen no key yet: any finite maximum gives weights of 0.
        const float base_0 = top_0 == NEG_INF ? 0 : top_0, base_1 = top_1 == NEG_INF ? 0 : top_1;
        const float decay_0 = exp2_fast(max_0 - base_0), decay_1 = exp2_fast(max_1 - base_1);
        max_0 = top_0;
        max_1 = top_1;
        float part_0 = 0, part_1 = 0;
#pragma unroll
        for (int n = 0; n < KEY_COLUMNS; n++) {
            scores[n][0] = exp2_fast(scores[n][0] - base_0);
            scores[n][1] = exp2_fast(scores[n][1] - base_0);
            scores[n][2] = exp2_fast(scores[n][2] - base_1);
            scores[n][3] = exp2_fast(scores[n][3] - base_1);
            part_0 += scores[n][0] + scores[n][1];
            part_1 += scores[n][2] + scores[n][3];
        }
        sum_0 = sum_0 * decay_0 + part_0;
        sum_1 = sum_1 * decay_1 + part_1;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            o[n][0] *= decay_0;
            o[n][1] *= decay_0;
            o[n][2] *= decay_1;
            o[n][3] *= decay_1;
        }
#pragma unroll
        for (int k = 0; k < TILE_KEYS / 16; k++) {
            const u32 p[4] = {pack2(scores[2 * k][0], scores[2 * k][1]),
                              pack2(scores[2 * k][2], scores[2 * k][3]),
                              pack2(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                              pack2(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, values + chunk_offset(k * 16 + lane % 16, n + lane / 16));
                mma(o[n], p, b[0], b[1]);
                mma(o[n + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        sum_0 += __shfl_xor_sync(~0u, sum_0, d);
        sum_1 += __shfl_xor_sync(~0u, sum_1, d);
    }
    auto store = [&](int row, float maximum, float sum, int part) {
        if (row >= rows) return;
        const int token = row / group, query_head = kv_head * group + row - token * group;
        const Finish finish(args, query_head, maximum, sum);
        const float inverse = finish.inverse;
        u32* to = (u32*)((u16*)args.out.data + (sequence.first + token) * args.out.token +
                         query_head * args.out.head) + lane % 4;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            to[n * 4] = pack2(o[n][part] * inverse, o[n][part + 1] * inverse);
        if (args.lse != nullptr && lane % 4 == 0)
            args.lse[(sequence.first + token) * args.query_heads + query_head] =
                finish.lse;
    };
    store(row_0, max_0, sum_0, 0);
    store(row_1, max_1, sum_1, 2);
    u32 largest_0 = 0, largest_1 = 0;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        largest_0 = max(largest_0, max(magnitude(o[n][0]), magnitude(o[n][1])));
        largest_1 = max(largest_1, max(magnitude(o[n][2]), magnitude(o[n][3])));
    }
    mend_rows(args, sequence, head, kv_head, len, first_row + warp * 16, rows, is_none(largest_0),
              is_none(largest_1));
}
