// extend_split: attention of a few new tokens (tokens * group <= 16 rows) over a long cache.
//
// One block per (sequence, KV head, split of its keys). Each of its 4 warps streams its own
// 16 keys at a time through its own stages of shared memory, so nothing but the end of a split
// synchronises the block. The block that finishes a head last merges its splits, in order: the
// result does not depend on the order in which blocks ran, nor on the rest of the batch.
//
// Tables and all keys but the new ones are read while the kernel before this still makes the queries, where nothing
// may still write them. Where the step is one token a sequence, the block of a head's last split may do what `append`
// does, and each block rotates its queries.
//
// Dynamic shared memory: 4 warps * STAGES * 2 * 16 * HEAD_DIM * 2 bytes.
// More would cost the other head dimensions blocks of a multiprocessor.
#define MERGED (HEAD_DIM == 128 ? 32 : 16)
#include "split.cuh"

#define STAGES (HEAD_DIM > 128 ? 2 : HEAD_DIM > 64 ? 3 : 4)
#define WARP_KEYS 16
#define TILE_BYTES (WARP_KEYS * HEAD_DIM * 2)
#define STAGE_BYTES (2 * TILE_BYTES)
#define COLUMNS (HEAD_DIM / 8)

// Rotates the key of a sequence's one new token and writes it and the value into the cache, by the threads of a block.
__device__ __forceinline__ void append_one(const ExtendArgs& args, const Sequence& sequence,
                                           const Head& head, int kv_head, int len) {
    constexpr int PARTS = HEAD_DIM / 8; // as in append.cu
    const bool is_key = threadIdx.x < PARTS;
    const int part = threadIdx.x % PARTS;
    if (threadIdx.x < 2 * PARTS) {
        const Packed& in = is_key ? args.k : args.v;
        const u16* const from = (const u16*)in.data + sequence.first * in.token + kv_head * in.head + part * 4;
        uint2 a = *(const uint2*)from, b = *(const uint2*)(from + HEAD_DIM / 2);
        if (is_key && args.rope != nullptr) {
            const float4* const turns =
                (const float4*)(args.rope + (i64)len * (HEAD_DIM / 2) + part * 4);
            turn2(a.x, b.x, turns[0]);
            turn2(a.y, b.y, turns[1]);
        }
        const int slot = len < head.sink_slots ? len : head.sink_slots + (len - head.sink_slots) % head.ring;
        u16* const to =
            (u16*)(is_key ? sequence.k : sequence.v) + ((i64)head.offset + slot) * HEAD_DIM + part * 4;
        *(uint2*)to = a;
        *(uint2*)(to + HEAD_DIM / 2) = b;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, HEAD_DIM > 128 ? 1 : 2)
    extend_split(const __grid_constant__ ExtendArgs args) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float2 row_state[WARPS][ROWS];
    __shared__ int is_last;

    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    const int2 item = args.items[blockIdx.x];
    const int s = item.x / args.kv_heads, kv_head = item.x % args.kv_heads;
    const Sequence sequence = args.sequences[s];
    const Head head = args.heads[item.x];
    const int len = args.lens[s];
    const int group = args.query_heads / args.kv_heads;
    const int rows = sequence.tokens * group;
    const KeyList list(head, len, len + sequence.tokens - 1);
    const int keys_per_split = split_keys(list.count);
    const int begin = item.y * keys_per_split;
    // Work lists are made for the capacity: a shorter sequence leaves its last splits empty.
    if (begin >= list.count) return;
    const int end = min(begin + keys_per_split, list.count);
    const int num_splits = (list.count + keys_per_split - 1) / keys_per_split;
    const KeySource source(args, sequence, head, kv_head, len, list);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 stages = shared_address(shared) + warp * STAGES * STAGE_BYTES;

    auto load = [&](int step) {
        const int first = begin + (step * WARPS + warp) * WARP_KEYS;
        const u32 stage = stages + step % STAGES * STAGE_BYTES;
        const int last = min(first + WARP_KEYS, end) - 1;
        if (last < first) return;
        const Stretch from = source.stretch(list, first, last);
        if (from.straight) {
#pragma unroll
            for (int i = 0; i < WARP_KEYS * ROW_CHUNKS / 32; i++) {
                const int r = (i * 32 + lane) / ROW_CHUNKS, chunk = (i * 32 + lane) % ROW_CHUNKS;
                const u32 to = stage + chunk_offset(r, chunk);
                copy16_async(to, from.k + r * from.k_stride + chunk * 8, first + r <= last);
                copy16_async(to + TILE_BYTES, from.v + r * from.v_stride + chunk * 8,
                             first + r <= last);
            }
        } else {
#pragma unroll 1
            for (int i = lane; i < WARP_KEYS * ROW_CHUNKS; i += 32) {
                const int r = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
                const int row = source.row(list.position(min(first + r, last)));
                const u32 to = stage + chunk_offset(r, chunk);
                copy16_async(to, source.key(row) + chunk * 8, first + r <= last);
                copy16_async(to + TILE_BYTES, source.value(row) + chunk * 8, first + r <= last);
            }
        }
    };

    const int steps = (end - begin + WARPS * WARP_KEYS - 1) / (WARPS * WARP_KEYS);
    // Whether some of a step's keys are new.
    auto is_new = [&](int step) {
        return begin + (step * WARPS + warp + 1) * WARP_KEYS > list.count - sequence.tokens;
    };
    // The others do not wait for the kernel before this.
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (i < steps && !is_new(i)) load(i);
    if (args.settled && args.appends && args.rope != nullptr && threadIdx.x * 16 < HEAD_DIM / 2)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(args.rope + (i64)len * (HEAD_DIM / 2) + threadIdx.x * 16));
    if (args.settled) wait_for_previous_kernel();
    if (args.appends && end == list.count) append_one(args, sequence, head, kv_head, len);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps && is_new(i)) load(i);
        commit_copies();
    }

    // Queries as matrix fragments: lane holds rows lane / 4 and lane / 4 + 8.
    u32 q[HEAD_DIM / 16][4];
    const int row_0 = lane / 4, row_1 = row_0 + 8;
    auto query_row = [&](int row) {
        const int token = row / group;
        return (const u32*)((const u16*)args.q.data + (sequence.first + token) * args.q.token +
                            (kv_head * group + row - token * group) * args.q.head) + lane % 4;
    };
    const u32* q_0 = query_row(row_0 < rows ? row_0 : 0);
    const u32* q_1 = query_row(row_1 < rows ? row_1 : 0);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        q[k][0] = q_0[k * 8];
        q[k][1] = q_1[k * 8];
        q[k][2] = q_0[k * 8 + 4];
        q[k][3] = q_1[k * 8 + 4];
    }
    if (args.appends && args.rope != nullptr) {
        const float4* const turns = (const float4*)(args.rope + (i64)len * (HEAD_DIM / 2)) + lane % 4;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                turn2(q[k][i], q[k + HEAD_DIM / 32][i], turns[k * 8 + i / 2 * 4]);
    }
    RowMask mask_0(head, list, len + min(row_0, rows - 1) / group);
    RowMask mask_1(head, list, len + min(row_1, rows - 1) / group);
    mask_0.last = min(mask_0.last, end - 1);
    mask_1.last = min(mask_1.last, end - 1);

    const Scores score(args);
    float o[COLUMNS][4] = {};
    float max_0 = NEG_INF, max_1 = NEG_INF, sum_0 = 0, sum_1 = 0;

    for (int step = 0; step < steps; step++) {
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        commit_copies();
        wait_copies<STAGES - 1>();
        __syncwarp();
        const u32 keys = stages + step % STAGES * STAGE_BYTES, values = keys + TILE_BYTES;
        const int first = begin + (step * WARPS + warp) * WARP_KEYS;
        if (first >= end) break;

        float scores[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int k = 0; k < HEAD_DIM / 32; k++) {
                u32 b[4];
                load_matrices(b, keys + chunk_offset(n * 8 + lane % 8, k * 4 + lane / 8));
                mma(scores[n], q[2 * k], b[0], b[1]);
                mma(scores[n], q[2 * k + 1], b[2], b[3]);
            }
        }
        float top_0 = max_0, top_1 = max_1;
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int index = first + n * 8 + lane % 4 * 2 + c;
                float& x = scores[n][c];
                float& y = scores[n][c + 2];
                x = mask_0.sees(index) ? score(x) : NEG_INF;
                y = mask_1.sees(index) ? score(y) : NEG_INF;
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
        for (int n = 0; n < 2; n++) {
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
        const u32 p[4] = {pack2(scores[0][0], scores[0][1]), pack2(scores[0][2], scores[0][3]),
                          pack2(scores[1][0], scores[1][1]), pack2(scores[1][2], scores[1][3])};
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, values + chunk_offset(lane % 16, n + lane / 16));
            mma(o[n], p, b[0], b[1]);
            mma(o[n + 1], p, b[2], b[3]);
        }
        __syncwarp();
    }

    // Merge the warps. Lanes of a quad hold parts of a row's sum.
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        sum_0 += __shfl_xor_sync(~0u, sum_0, d);
        sum_1 += __shfl_xor_sync(~0u, sum_1, d);
    }
    wait_copies<0>();
    __syncthreads();
    float* merged = (float*)shared;  // [WARPS][ROWS][HEAD_DIM]
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        const int column = n * 8 + lane % 4 * 2;
        // Rows that are not there would take as long as the others, which meet in the same banks.
        if (row_0 < rows)
            *(float2*)&merged[(warp * ROWS + row_0) * HEAD_DIM + column] = make_float2(o[n][0], o[n][1]);
        if (row_1 < rows)
            *(float2*)&merged[(warp * ROWS + row_1) * HEAD_DIM + column] = make_float2(o[n][2], o[n][3]);
    }
    if (lane % 4 == 0) {
        row_state[warp][row_0] = make_float2(max_0, sum_0);
        row_state[warp][row_1] = make_float2(max_1, sum_1);
    }
    __syncthreads();

    auto store = [&](int row, const LaneRow& o, float maximum, float sum) {
        const int token = row / group, query_head = kv_head * group + row - token * group;
        // A single token sees all keys that its block read.
        if (sequence.tokens > 1) {
            u32 largest = 0;
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; c++) largest = max(largest, magnitude(o.x[c]));
            if (__builtin_expect(__any_sync(~0u, is_none(largest)), 0))
                return write_pairs(args, sequence, head, kv_head, len, row);
        }
        const Finish finish(args, query_head, maximum, sum);
        const float inverse = finish.inverse;
        u16* to = (u16*)args.out.data + (sequence.first + token) * args.out.token +
                  query_head * args.out.head + lane * LANE_COLUMNS;
#if HEAD_DIM % 64 == 0
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c += 2)
            *(u32*)&to[c] = pack2(o.x[c] * inverse, o.x[c + 1] * inverse);
#else
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) to[c] = (u16)pack2(o.x[c] * inverse, 0);
#endif
        if (args.lse != nullptr && lane == 0)
            args.lse[(sequence.first + token) * args.query_heads + query_head] =
                finish.lse;
    };

    merge_splits(args, item, rows, num_splits, shared, row_state, is_last, store);
}
