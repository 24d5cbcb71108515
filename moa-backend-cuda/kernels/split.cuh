// Splits of a head's keys, put together: what the kernels for few new tokens share.
#pragma once
#include "common.cuh"

#define WARPS 4
#define ROWS 16
// Splits of a row that are read at once when they are merged.
#ifndef MERGED
#define MERGED 16
#endif
// Neighbouring floats that a lane holds of one row, so that a warp holds the row.
#define LANE_COLUMNS (HEAD_DIM / 32)

struct alignas(LANE_COLUMNS % 4 == 0 ? 16 : LANE_COLUMNS % 2 == 0 ? 8 : 4) LaneRow {
    float x[LANE_COLUMNS];

    // From L2: other blocks wrote it.
    __device__ __forceinline__ void load(const LaneRow* from) {
#if HEAD_DIM % 128 == 0
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c += 4)
            *(float4*)&x[c] = __ldcg((const float4*)&from->x[c]);
#else
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) x[c] = __ldcg(&from->x[c]);
#endif
    }
    __device__ __forceinline__ void add(float weight, const LaneRow& other) {
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) x[c] += weight * other.x[c];
    }
};

// Merges what the warps of a block found, in rows of HEAD_DIM columns, [WARPS][ROWS], at the start of shared memory,
// with the maximum and the sum of each row. The block that finishes a head last merges its splits, in order. `store`
// gets a row in a warp, its maximum and its sum.
template <class Store>
__device__ __forceinline__ void merge_splits(const ExtendArgs& args, const int2 item, int rows, int num_splits,
                                             unsigned char* shared, float2 (&row_state)[WARPS][ROWS],
                                             int& is_last, Store store) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* merged = (const float*)shared;
    LaneRow* partial = (LaneRow*)args.partial;  // [items][ROWS][32 lanes]
    float2* states = (float2*)(partial + (i64)args.num_items * ROWS * 32);  // [items][ROWS]
    for (int row = warp; row < rows; row += WARPS) {
        float maximum = NEG_INF, sum = 0;
        LaneRow o = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, row_state[w][row].x);
        const float base = maximum == NEG_INF ? 0 : maximum;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2_fast(row_state[w][row].x - base);
            sum += weight * row_state[w][row].y;
            o.add(weight, ((const LaneRow*)merged)[(w * ROWS + row) * 32 + lane]);
        }
        if (num_splits == 1) {
            store(row, o, maximum, sum);
        } else {
            const i64 at = (i64)blockIdx.x * ROWS + row;
            partial[at * 32 + lane] = o;
            if (lane == 0) states[at] = make_float2(maximum, sum);
        }
    }
    if (num_splits == 1) return;

    // The last block of this head merges its splits.
    __syncthreads();
    if (threadIdx.x == 0) {
        int before;
        // Releases this block's partial results, acquires the other blocks'.
        asm volatile("atom.add.acq_rel.gpu.s32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(&args.finished[item.x])
                     : "memory");
        is_last = before == num_splits - 1;
        if (is_last) args.finished[item.x] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const i64 first = (i64)args.splits[item.x].x * ROWS;
    // Few rows: the warps share the splits of each row. Many rows: each warp takes its own.
    const bool share = rows < WARPS;
    constexpr int AT_ONCE = HEAD_DIM > 128 ? 8 : MERGED;
    for (int row = share ? 0 : warp; row < rows; row += share ? 1 : WARPS) {
        float maximum = NEG_INF, sum = 0;
        LaneRow o = {};
        const int stride = share ? WARPS : 1;
        for (int i = share ? warp : 0; i < num_splits; i += AT_ONCE * stride) {
            // All loads first: the merge is a chain of latencies, not of bytes.
            float2 state[AT_ONCE];
            LaneRow part[AT_ONCE];
            float top = maximum;
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                const int split = min(i + n * stride, num_splits - 1);
                const i64 at = first + split * ROWS + row;
                state[n] = __ldcg(&states[at]);
                part[n].load(&partial[at * 32 + lane]);
                if (i + n * stride >= num_splits) state[n] = make_float2(NEG_INF, 0);
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) top = fmaxf(top, state[n].x);
            const float base = top == NEG_INF ? 0 : top, decay = exp2_fast(maximum - base);
            maximum = top;
            sum *= decay;
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; c++) o.x[c] *= decay;
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                const float weight = exp2_fast(state[n].x - base);
                sum += weight * state[n].y;
                o.add(weight, part[n]);
            }
        }
        if (share) {
            LaneRow* shared_rows = (LaneRow*)shared;  // [WARPS][32 lanes]
            shared_rows[warp * 32 + lane] = o;
            if (lane == 0) row_state[warp][0] = make_float2(maximum, sum);
            __syncthreads();
            if (warp == 0) {
                for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, row_state[w][0].x);
                sum = 0;
                o = {};
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    const float weight = exp2_fast(row_state[w][0].x - maximum);
                    sum += weight * row_state[w][0].y;
                    o.add(weight, shared_rows[w * 32 + lane]);
                }
            }
            __syncthreads();
        }
        if (!share || warp == 0) store(row, o, maximum, sum);
    }
}
