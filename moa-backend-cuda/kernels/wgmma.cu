// extend_wgmma: attention of long chunks on Hopper (sm_90a), head_dim 64 and 128.
//
// A tile is 128 query rows of a (sequence, KV head). Blocks stay and take tiles by ticket, or gangs of them what the host
// divided among them, the next tile's copies running beside the last one's end: a producer warpgroup copies keys and values into
// two stages each, two consumer warpgroups of 64 rows multiply. While one consumer
// exponentiates, the other one's products run (named barriers take turns), and within a consumer the
// next scores are multiplied beside the current values. Keys come in tiles of TILE_KEYS from the
// last to the first; only tiles at the edge of the mask evaluate it.
//
// The producer uses cp.async rather than the bulk copy engine: a tile may be any mix of sinks, two
// stretches of a ring and new tokens, and unused rows must be zeros whatever memory holds.
//
// Dynamic shared memory: (2 * TILE_ROWS + STAGES * 2 * TILE_KEYS) * HEAD_DIM * 2 + 1024 bytes.
#include "wgmma.cuh"

#define TILE_ROWS 128
#define TILE_KEYS 128
#define STAGES 2
#define GROUP_THREADS 128
#define CONSUMERS 2
#define THREADS (GROUP_THREADS * (1 + CONSUMERS))
#define PANELS (HEAD_DIM / 64)
#define QUERY_PANEL_BYTES (TILE_ROWS * 128)
#define KEY_PANEL_BYTES (TILE_KEYS * 128)
#define TILE_BYTES (PANELS * KEY_PANEL_BYTES)
#define OUTPUT (HEAD_DIM / 2)    // accumulators of 64 x HEAD_DIM in a thread
#define SCORES (TILE_KEYS / 2)   // accumulators of 64 x TILE_KEYS in a thread

// Named barriers; 0 is __syncthreads.
#define TURN 1  // + consumer

struct Shared {
    u64 query_full, query_empty;
    u64 key_full[STAGES], key_empty[STAGES];
    u64 value_full[STAGES], value_empty[STAGES];
    u64 item_full[STAGES], item_empty[STAGES];
    int items[STAGES];
};

// Where 16 bytes of a row lie in a panelled, swizzled tile.
__device__ __forceinline__ u32 panel_offset(int row, int chunk, u32 panel_bytes) {
    return chunk / 8 * panel_bytes + row * 128 + ((chunk % 8) ^ (row & 7)) * 16;
}

// Scores of 64 rows against one tile of keys.
__device__ __forceinline__ void multiply_keys(float (&scores)[SCORES], u32 queries, u32 keys) {
    const u32 a = wgmma_rows(queries), b = wgmma_rows(keys);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        wgmma_ss(scores, wgmma_operand(a + (k / 4 * QUERY_PANEL_BYTES + k % 4 * 32) / 16),
                 wgmma_operand(b + (k / 4 * KEY_PANEL_BYTES + k % 4 * 32) / 16), k > 0);
}

__device__ __forceinline__ void multiply_values(float (&o)[OUTPUT], const u32 (&p)[TILE_KEYS / 16][4],
                                                u32 values) {
    const u32 b = wgmma_columns(values, KEY_PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < TILE_KEYS / 16; k++) wgmma_rs(o, p[k], wgmma_operand(b + k * 2048 / 16));
}

// One thread's part of the online softmax: rows `0` and `1` are 8 apart.
//
// The reference that is subtracted before exponentiating follows the maximum only when that has
// grown by more than SLACK: weights stay below 2^SLACK, and sums are hardly ever rescaled.
#define SLACK 8.0f
struct Softmax {
    // In units of log2.
    float base_0 = NEG_INF, base_1 = NEG_INF, sum_0 = 0, sum_1 = 0;

    // Scores become weights; returns the decay of what was summed before.
    template <bool EDGE>
    __device__ __forceinline__ float2 update(float (&x)[SCORES], float scale) {
        float top_0 = x[0], top_1 = x[2];
#pragma unroll
        for (int i = 0; i < SCORES; i += 4) {
            top_0 = fmaxf(top_0, fmaxf(x[i], x[i + 1]));
            top_1 = fmaxf(top_1, fmaxf(x[i + 2], x[i + 3]));
        }
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            top_0 = fmaxf(top_0, __shfl_xor_sync(~0u, top_0, d));
            top_1 = fmaxf(top_1, __shfl_xor_sync(~0u, top_1, d));
        }
        top_0 *= scale;
        top_1 *= scale;
        const float new_0 = top_0 > base_0 + SLACK ? top_0 : base_0;
        const float new_1 = top_1 > base_1 + SLACK ? top_1 : base_1;
        // A row that has seen no key yet: any finite reference gives weights of 0.
        const float sub_0 = EDGE && new_0 == NEG_INF ? 0 : new_0;
        const float sub_1 = EDGE && new_1 == NEG_INF ? 0 : new_1;
        const float2 decay = make_float2(exp2_fast(base_0 - sub_0), exp2_fast(base_1 - sub_1));
        base_0 = new_0;
        base_1 = new_1;
        float part_0 = 0, part_1 = 0;
#pragma unroll
        for (int i = 0; i < SCORES; i += 4) {
            x[i] = exp2_fast(fmaf(x[i], scale, -sub_0));
            x[i + 1] = exp2_fast(fmaf(x[i + 1], scale, -sub_0));
            x[i + 2] = exp2_fast(fmaf(x[i + 2], scale, -sub_1));
            x[i + 3] = exp2_fast(fmaf(x[i + 3], scale, -sub_1));
            part_0 += x[i] + x[i + 1];
            part_1 += x[i + 2] + x[i + 3];
        }
        sum_0 = sum_0 * decay.x + part_0;
        sum_1 = sum_1 * decay.y + part_1;
        return decay;
    }
};

__device__ __forceinline__ void pack_weights(u32 (&p)[TILE_KEYS / 16][4], const float (&x)[SCORES]) {
#pragma unroll
    for (int k = 0; k < TILE_KEYS / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack2(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
    }
}

// What a block is to do of a tile.
struct Part {
    int sequence, kv_head, tile, first_step, end_step;
};

// Of gangs `item` is a piece, else a tile of the launch.
template <bool GANGS>
__device__ __forceinline__ Part part_of(const ExtendArgs& args, int item) {
    if (GANGS) {
        const Piece piece = args.pieces[item];
        const int tile = piece.first_tile + blockIdx.y;
        return {piece.sequence, piece.kv_head, tile, piece.first_step, piece.end_step};
    }
    int s = 0;
    while (s + 1 < args.num_sequences && args.sequences[s + 1].first_item <= item) s++;
    const int rows = args.sequences[s].tokens * (args.query_heads / args.kv_heads);
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    item -= args.sequences[s].first_item;
    const int kv_head = args.order[(i64)s * args.kv_heads + item / tiles];
    // The last tile sees the most keys: it starts first.
    return {s, kv_head, tiles - 1 - item % tiles, 0, 0x7fffffff};
}

// What a block knows of the tile it works on.
struct Tile {
    Sequence sequence;
    Head head;
    int kv_head, len, group, rows, first_row, first_query, last_query;
    int steps;      // that this block takes
    int last_step;  // first keys of the tile's step 0, counted from the list's end
    KeyList list;

    __device__ __forceinline__ Tile(const ExtendArgs& args, const Part& part)
        : list(Head(), 0, 0) {
        sequence = args.sequences[part.sequence];
        kv_head = part.kv_head;
        group = args.query_heads / args.kv_heads;
        rows = sequence.tokens * group;
        first_row = part.tile * TILE_ROWS;
        head = args.heads[(i64)part.sequence * args.kv_heads + kv_head];
        len = args.lens[part.sequence];
        first_query = len + first_row / group;
        last_query = len + (min(first_row + TILE_ROWS, rows) - 1) / group;
        list = KeyList(head, first_query, last_query);
        const int all = (list.count + TILE_KEYS - 1) / TILE_KEYS;
        // Blocks of a gang may have no tile.
        steps = first_row < rows ? max(min(part.end_step, all) - part.first_step, 0) : 0;
        last_step = all - 1 - part.first_step;
    }
    // First list entry of a step.
    __device__ __forceinline__ int first_key(int step) const { return (last_step - step) * TILE_KEYS; }
    __device__ __forceinline__ int query(int row) const { return len + min(row, rows - 1) / group; }
    __device__ __forceinline__ int query_head(int row) const { return kv_head * group + row % group; }
    // Where a row of q or out begins, in elements.
    __device__ __forceinline__ i64 offset(const Packed& tensor, int row) const {
        const int token = row / group;
        return (sequence.first + token) * tensor.token +
               (kv_head * group + row - token * group) * tensor.head;
    }
};

// What one of several blocks that share a tile's keys found: rows before division by their sum, and
// (reference, sum) of each row.
struct Partial {
    float* rows;    // [TILE_ROWS][HEAD_DIM]
    float2* state;  // [TILE_ROWS]

    __device__ __forceinline__ Partial(const ExtendArgs& args, i64 item)
        : rows(args.partial + item * TILE_ROWS * HEAD_DIM),
          state((float2*)(args.partial + (i64)args.num_items * TILE_ROWS * HEAD_DIM) +
                item * TILE_ROWS) {}

    __device__ __forceinline__ void store(int row, int lane, const float (&o)[OUTPUT], float base_0,
                                          float sum_0, float base_1, float sum_1) const {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            float* to = rows + row * HEAD_DIM + n * 8 + lane % 4 * 2;
            *(float2*)to = make_float2(o[4 * n], o[4 * n + 1]);
            *(float2*)(to + 8 * HEAD_DIM) = make_float2(o[4 * n + 2], o[4 * n + 3]);
        }
        if (lane % 4 == 0) {
            state[row] = make_float2(base_0, sum_0);
            state[row + 8] = make_float2(base_1, sum_1);
        }
    }
};

// The tiles that a block works on: its own number, then tickets. One producer thread fetches, all
// warps read.
struct Queue {
    u32 full, empty;
    int* items;
    int count = 0;  // tiles taken after the first

    __device__ __forceinline__ void fetch(const ExtendArgs& args) {
        const int slot = count % STAGES;
        barrier_wait(empty + slot * 8, (count / STAGES & 1) ^ 1);
        items[slot] = gridDim.x + atomicAdd(&args.tickets[0], 1);
        barrier_arrive(full + slot * 8);
    }
    __device__ __forceinline__ int next(int lane) {
        const int slot = count % STAGES;
        barrier_wait(full + slot * 8, count / STAGES & 1);
        // The lane that reads is the one that frees the slot.
        int item = 0;
        if (lane == 0) {
            item = items[slot];
            barrier_arrive(empty + slot * 8);
        }
        item = uniform(item);
        count++;
        return item;
    }
};

template <bool GANGS>
__device__ __forceinline__ void extend(const ExtendArgs& args) {
    extern __shared__ unsigned char unaligned[];
    __shared__ Shared barriers;
    const u32 queries = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 outputs = queries + PANELS * QUERY_PANEL_BYTES;
    const u32 key_stages = outputs + PANELS * QUERY_PANEL_BYTES;
    const u32 value_stages = key_stages + STAGES * TILE_BYTES;

    const u32 query_full = shared_address(&barriers.query_full);
    const u32 query_empty = shared_address(&barriers.query_empty);
    const u32 key_full = shared_address(&barriers.key_full[0]);
    const u32 key_empty = shared_address(&barriers.key_empty[0]);
    const u32 value_full = shared_address(&barriers.value_full[0]);
    const u32 value_empty = shared_address(&barriers.value_empty[0]);
    const int warpgroup = uniform(threadIdx.x / GROUP_THREADS);
    const int thread = threadIdx.x % GROUP_THREADS;
    const int warp = thread / 32, lane = thread % 32;
    Queue queue{shared_address(&barriers.item_full[0]), shared_address(&barriers.item_empty[0]),
                barriers.items};
    if (threadIdx.x == 0) {
        barrier_init(query_full, GROUP_THREADS / 2);
        barrier_init(query_empty, CONSUMERS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(key_full + i * 8, GROUP_THREADS / 2);
            barrier_init(value_full + i * 8, GROUP_THREADS / 2);
            barrier_init(key_empty + i * 8, CONSUMERS * 4);
            barrier_init(value_empty + i * 8, CONSUMERS * 4);
            barrier_init(queue.full + i * 8, 1);
            barrier_init(queue.empty + i * 8, (1 + CONSUMERS) * 4);
        }
    }
    __syncthreads();
    wait_for_previous_kernel();
    // After it: `merge_tiles` reads tables before it waits.
    let_next_kernel_start();

    // Of gangs each block has its own pieces, one after the other.
    auto next = [&](int item) { return GANGS ? uniform(item + gridDim.x) : queue.next(lane); };
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        // Two warps copy keys; two copy the queries, then values. A thread copies the same chunk of
        // every row, so its place in the swizzle is the same too.
        constexpr int HALF = GROUP_THREADS / 2, ROWS_AT_ONCE = HALF / ROW_CHUNKS;
        const bool values = thread >= HALF;
        const int chunk = thread % ROW_CHUNKS, row = thread % HALF / ROW_CHUNKS;
        const u32 full = values ? value_full : key_full, empty = values ? value_empty : key_empty;
        const u32 stages = values ? value_stages : key_stages;
        auto hand_over = [&](u32 barrier) {
            wait_all_copies();
            fence_async_proxy();
            barrier_arrive(barrier);
        };
        int filled = 0;  // stages filled so far, over all tiles
        int started = 0;
        for (int item = blockIdx.x; item < args.num_tiles; item = next(item)) {
            const Tile tile(args, part_of<GANGS>(args, item));
            if (!GANGS && thread == HALF) queue.fetch(args);
            if (tile.steps == 0) continue;
            const KeySource source(args, tile.sequence, tile.head, tile.kv_head, tile.len, tile.list);
            if (values) {
                barrier_wait(query_empty, (started++ & 1) ^ 1);
#pragma unroll 4
                for (int r = row; r < TILE_ROWS; r += ROWS_AT_ONCE) {
                    const u16* from = (const u16*)args.q.data +
                                      tile.offset(args.q, min(tile.first_row + r, tile.rows - 1));
                    copy16_async(queries + panel_offset(r, chunk, QUERY_PANEL_BYTES),
                                 from + chunk * 8, true);
                }
                hand_over(query_full);
            }
            for (int step = 0; step < tile.steps; step++, filled++) {
                const int stage = filled % STAGES;
                const int first = tile.first_key(step);
                const int last = min(first + TILE_KEYS, tile.list.count) - 1;
                const Stretch stretch = source.stretch(tile.list, first, last);
                const u32 to = stages + stage * TILE_BYTES;
                barrier_wait(empty + stage * 8, (filled / STAGES & 1) ^ 1);
                if (stretch.straight && last - first == TILE_KEYS - 1) {
                    const i64 stride = (values ? stretch.v_stride : stretch.k_stride) * ROWS_AT_ONCE;
                    const u16* from = (values ? stretch.v : stretch.k) +
                                      row * (stride / ROWS_AT_ONCE) + chunk * 8;
                    // The swizzle repeats after two strides.
                    const u32 even = to + panel_offset(row, chunk, KEY_PANEL_BYTES);
                    const u32 odd = to + panel_offset(row + ROWS_AT_ONCE, chunk, KEY_PANEL_BYTES);
#pragma unroll
                    for (int r = 0; r < TILE_KEYS; r += 2 * ROWS_AT_ONCE) {
                        copy16_async(even + r * 128, from, true);
                        copy16_async(odd + r * 128, from + stride, true);
                        from += 2 * stride;
                    }
                } else {
                    // A few stretches, each row by row.
                    int done = 0;
                    while (first + done <= last) {
                        const int end = done + min(source.straight(tile.list, first + done),
                                                   last + 1 - first - done);
                        const Stretch part = source.stretch(tile.list, first + done, first + done);
                        const i64 stride = values ? part.v_stride : part.k_stride;
                        int r = done + ((row - done) & (ROWS_AT_ONCE - 1));
                        const u16* from = (values ? part.v : part.k) + (r - done) * stride + chunk * 8;
#pragma unroll 1
                        for (; r < end; r += ROWS_AT_ONCE, from += stride * ROWS_AT_ONCE)
                            copy16_async(to + panel_offset(r, chunk, KEY_PANEL_BYTES), from, true);
                        done = end;
                    }
                    for (int r = done + ((row - done) & (ROWS_AT_ONCE - 1)); r < TILE_KEYS;
                         r += ROWS_AT_ONCE)
                        copy16_async(to + panel_offset(r, chunk, KEY_PANEL_BYTES),
                                     (const u16*)args.q.data, false);
                }
                hand_over(full + stage * 8);
            }
        }
        if (!GANGS && thread == 0) {
            // The last block leaves the tickets as it found them.
            if (atomicAdd(&args.tickets[1], 1) == (int)gridDim.x - 1) {
                args.tickets[0] = 0;
                args.tickets[1] = 0;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int consumer = warpgroup - 1;
    const int my_row = consumer * 64 + warp * 16 + lane / 4;  // and my_row + 8
    const u32 my_queries = queries + consumer * 64 * 128;
    const Scores score(args);
    // Every warp has read its share.
    auto release = [&](u32 barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    auto take_turn = [&]() { named_sync(TURN + consumer, 2 * GROUP_THREADS); };
    auto pass_turn = [&]() { named_arrive(TURN + (consumer ^ 1), 2 * GROUP_THREADS); };
    if (consumer == 1) pass_turn();

    int used = 0;  // stages used so far, over all tiles
    int started = 0;
    for (int item = blockIdx.x; item < args.num_tiles; item = next(item)) {
        const Tile tile(args, part_of<GANGS>(args, item));
        if (tile.steps == 0) continue;
        const RowMask mask_0(tile.head, tile.list, tile.query(tile.first_row + my_row));
        const RowMask mask_1(tile.head, tile.list, tile.query(tile.first_row + my_row + 8));
        float o[OUTPUT];
        u32 p[TILE_KEYS / 16][4];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < OUTPUT; i++) o[i] = 0;

        // Scores become weights, masked where some row of the tile does not see all its keys.
        auto weigh = [&](float (&x)[SCORES], int step) {
#if SOFTCAP
#pragma unroll
            for (int i = 0; i < SCORES; i++) x[i] = score(x[i]);
            constexpr float scale = 1;
#else
            const float scale = score.scale;
#endif
            const int first = tile.first_key(step);
            const int low = tile.list.position(first);
            const int high = tile.list.position(first + TILE_KEYS - 1);
            if (high <= tile.first_query &&
                (high < tile.head.sink || tile.last_query - low < tile.head.window))
                return softmax.update<false>(x, scale);
            const RowMask row_0 = mask_0.relative_to(first + lane % 4 * 2);
            const RowMask row_1 = mask_1.relative_to(first + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < SCORES; i += 4) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    x[i + c] = row_0.sees(i * 2 + c) ? x[i + c] : NEG_INF;
                    x[i + 2 + c] = row_1.sees(i * 2 + c) ? x[i + 2 + c] : NEG_INF;
                }
            }
            return softmax.update<true>(x, scale);
        };

        barrier_wait(query_full, started++ & 1);
        {
            const int stage = used % STAGES;
            float x[SCORES];
            barrier_wait(key_full + stage * 8, used / STAGES & 1);
            take_turn();
            wgmma_fence();
            multiply_keys(x, my_queries, key_stages + stage * TILE_BYTES);
            wgmma_commit();
            pass_turn();
            wgmma_wait<0>();
            release(key_empty + stage * 8);
            weigh(x, 0);
            pack_weights(p, x);
        }
        for (int step = 1; step < tile.steps; step++) {
            const int before = used % STAGES, before_parity = used / STAGES & 1;
            used++;
            const int stage = used % STAGES;
            float x[SCORES];
            barrier_wait(key_full + stage * 8, used / STAGES & 1);
            take_turn();
            wgmma_fence();
            multiply_keys(x, my_queries, key_stages + stage * TILE_BYTES);
            wgmma_commit();
            barrier_wait(value_full + before * 8, before_parity);
            wgmma_fence();
            multiply_values(o, p, value_stages + before * TILE_BYTES);
            wgmma_commit();
            pass_turn();
            wgmma_wait<1>();
            release(key_empty + stage * 8);
            const float2 decay = weigh(x, step);
            wgmma_wait<0>();
            release(value_empty + before * 8);
            pack_weights(p, x);
            if (__builtin_expect(__any_sync(~0u, decay.x != 1 || decay.y != 1), 0)) {
#pragma unroll
                for (int i = 0; i < OUTPUT; i += 4) {
                    o[i] *= decay.x;
                    o[i + 1] *= decay.x;
                    o[i + 2] *= decay.y;
                    o[i + 3] *= decay.y;
                }
            }
        }
        release(query_empty);
        {
            const int stage = used % STAGES;
            barrier_wait(value_full + stage * 8, used / STAGES & 1);
            wgmma_fence();
            multiply_values(o, p, value_stages + stage * TILE_BYTES);
            wgmma_commit();
            wgmma_wait<0>();
            release(value_empty + stage * 8);
            used++;
        }

        float sum_0 = softmax.sum_0, sum_1 = softmax.sum_1;
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            sum_0 += __shfl_xor_sync(~0u, sum_0, d);
            sum_1 += __shfl_xor_sync(~0u, sum_1, d);
        }
        // Read anew: it would take a register of the main loop.
        const int partial = GANGS ? args.pieces[item].partial : -1;
        if (partial >= 0) {
            Partial(args, partial + blockIdx.y).store(consumer * 64 + warp * 16 + lane / 4, lane, o, softmax.base_0,
                                      sum_0, softmax.base_1, sum_1);
            continue;
        }
        const int row_0 = tile.first_row + my_row, row_1 = row_0 + 8;
        const Finish finish_0(args, tile.query_head(row_0), softmax.base_0, sum_0);
        const Finish finish_1(args, tile.query_head(row_1), softmax.base_1, sum_1);
        if (args.lse != nullptr && lane % 4 == 0) {
            auto store = [&](int row, float lse) {
                if (row >= tile.rows) return;
                args.lse[(tile.sequence.first + row / tile.group) * args.query_heads +
                         tile.query_head(row)] = lse;
            };
            store(row_0, finish_0.lse);
            store(row_1, finish_1.lse);
        }
        u32 largest_0 = 0, largest_1 = 0;
#pragma unroll
        for (int i = 0; i < OUTPUT; i += 4) {
            largest_0 = max(largest_0, max(magnitude(o[i]), magnitude(o[i + 1])));
            largest_1 = max(largest_1, max(magnitude(o[i + 2]), magnitude(o[i + 3])));
        }
        const bool none_0 = is_none(largest_0), none_1 = is_none(largest_1);
        // Through shared memory, so that a row is written 16 bytes a lane; each warp its own rows.
        const float inverse_0 = finish_0.inverse, inverse_1 = finish_1.inverse;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            const u32 at = outputs + panel_offset(my_row, n, QUERY_PANEL_BYTES) + lane % 4 * 4;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at),
                         "r"(pack2(o[4 * n] * inverse_0, o[4 * n + 1] * inverse_0)) : "memory");
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 8 * 128),
                         "r"(pack2(o[4 * n + 2] * inverse_1, o[4 * n + 3] * inverse_1)) : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16 * ROW_CHUNKS / 32; i++) {
            const int at = i * 32 + lane, chunk = at % ROW_CHUNKS;
            const int local = consumer * 64 + warp * 16 + at / ROW_CHUNKS;
            const int row = tile.first_row + local;
            if (row >= tile.rows) continue;
            uint4 data;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                         : "r"(outputs + panel_offset(local, chunk, QUERY_PANEL_BYTES)));
            *(uint4*)((u16*)args.out.data + tile.offset(args.out, row) + chunk * 8) = data;
        }
        __syncwarp();
        mend_rows(args, tile.sequence, tile.head, tile.kv_head, tile.len,
                  tile.first_row + consumer * 64 + warp * 16, tile.rows, none_0, none_1);
    }
    // Takes up the other consumer's last pass.
    if (consumer == 0) take_turn();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    extend_wgmma(const __grid_constant__ ExtendArgs args) {
    extend<false>(args);
}

// The same of pieces: grid (gangs, blocks of a gang), each gang its own of `num_tiles` rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    extend_gangs(const __grid_constant__ ExtendArgs args) {
    extend<true>(args);
}

// merge_tiles: puts together what blocks that share a tile's keys found. The same arguments, right after
// extend_gangs; grid (merges, gang * TILE_ROWS / 8), block 256: one warp a row.
#define AT_ONCE 8
struct alignas(HEAD_DIM / 8) LaneColumns {
    float x[HEAD_DIM / 32];
};
extern "C" __global__ void __launch_bounds__(256) merge_tiles(const __grid_constant__ ExtendArgs args) {
    let_next_kernel_start();
    const Merge merge = args.merges[blockIdx.x];
    const int gang = gridDim.y / (TILE_ROWS / 8), member = blockIdx.y % gang;
    const int group = args.query_heads / args.kv_heads;
    const Sequence sequence = args.sequences[merge.sequence];
    const int lane = threadIdx.x % 32, r = blockIdx.y / gang * 8 + threadIdx.x / 32;
    const int row = (merge.first_tile + member) * TILE_ROWS + r;
    if (row >= sequence.tokens * group) return;
    const int token = row / group, query_head = merge.kv_head * group + row - token * group;
    wait_for_previous_kernel();
    // One part's state a lane; the first parts of a row at once.
    auto part = [&](int i) { return Partial(args, merge.partial + i * gang + member); };
    const float2 mine = lane < merge.parts ? __ldcg(&part(lane).state[r]) : make_float2(NEG_INF, 0);
    LaneColumns o = {};
    float base, weight, sum;
    for (int first = 0; first < merge.parts; first += AT_ONCE) {
        LaneColumns x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= merge.parts) break;
            x[i] = ((const LaneColumns*)&part(first + i).rows[r * HEAD_DIM])[lane];
        }
        if (first == 0) {
            base = mine.x;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) base = fmaxf(base, __shfl_xor_sync(~0u, base, d));
            weight = exp2_fast(mine.x - base);
            sum = weight * mine.y;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= merge.parts) break;
            const float w = __shfl_sync(~0u, weight, first + i);
#pragma unroll
            for (int c = 0; c < HEAD_DIM / 32; c++) o.x[c] += w * x[i].x[c];
        }
    }
    u32 largest = 0;
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 32; c++) largest = max(largest, magnitude(o.x[c]));
    if (__builtin_expect(__any_sync(~0u, is_none(largest)), 0)) {
        const Head head = args.heads[(i64)merge.sequence * args.kv_heads + merge.kv_head];
        return write_pairs(args, sequence, head, merge.kv_head, args.lens[merge.sequence], row);
    }
    const Finish finish(args, query_head, base, sum);
    u32* to = (u32*)((u16*)args.out.data + (sequence.first + token) * args.out.token +
                     query_head * args.out.head) + lane * (HEAD_DIM / 64);
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 64; c++)
        to[c] = pack2(o.x[2 * c] * finish.inverse, o.x[2 * c + 1] * finish.inverse);
    if (args.lse != nullptr && lane == 0)
        args.lse[(sequence.first + token) * args.query_heads + query_head] = finish.lse;
}
