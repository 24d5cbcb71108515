// Weights in quantised blocks (moa-core, `BlockType`): products with one row, the decode steps of one sequence, and
// what stands before and after them in a layer: the norm of the row, the gate of two halves.
//
// One block of threads a multiprocessor streams tiles of 16 rows through its shared memory, one or two at a time, and asks
// for its first records before the kernel before this has ended. A warp takes a record into registers before it
// multiplies, so that the next one is on its way meanwhile; two tiles beside each other have twice as many instructions
// that need not wait for each other, and read the row once. The sums are those of `blocks.cu`, `rms_norm` and `swiglu`,
// in the same order: a row gets the same bits here and there.
#include "blocks.cuh"

// Mirrored by `src/linear/block_row.rs`.
struct RowArgs {
    const void* x;      // [k]: element, or f32 where there is a norm
    const float* norm;  // [k], or null: x is normed first, with eps
    const u8* w;        // records [n / 16, records]
    void* out;          // [n], or [n / 2] if gated: f32 if wide, else element
    int n;
    int k;
    int records;        // k / 256, rounded up
    float eps;
    int wide;
    int accumulate;     // 1: added to what out holds
    int gated;          // 1: silu(first half) * second half, n a multiple of 32
    int settled;        // 1: no kernel that may still run writes w or norm
};

// Tiles whose sums wait in shared memory until all warps have theirs; even.
#define CHUNK 16

// Records of a warp whose part of a row that is normed stays in registers.
#define HELD 4

template <int N>
struct Number {
    static constexpr int value = N;
};

// STAGES in memory of a record of each of PAIR tiles.
template <int KIND, int STAGES, int PAIR>
__device__ __forceinline__ void product_of_row(const RowArgs& args) {
    using F = Format<KIND>;
    constexpr bool SUMMED = F::BASED || F::LEAST;
    constexpr int THREADS = WARPS * 32;
    constexpr int STAGE = PAIR * F::RECORD;
    constexpr int OWN = STAGES * STAGE + PAIR * F::HELD_FACTORS;
    let_next_kernel_start();
    if (!args.settled) wait_for_previous_kernel();
    extern __shared__ __align__(16) u8 memory[];
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32, t = lane % 4;
    u8* const own = memory + column * OWN;
    float* const factors = (float*)(own + STAGES * STAGE);
    // Sums of the row's groups, four times each, as products begin with them.
    float4* const alls = (float4*)(memory + WARPS * OWN);
    const int groups = args.records * 8;
    u16* const xs = (u16*)(alls + (SUMMED ? (F::HALVES ? 2 : 1) * groups : 0));
    float* const norm_sums = (float*)(xs + args.records * 256);  // 32
    float* const partial = norm_sums + 32;                       // [CHUNK][WARPS][16]
    float* const before = partial + CHUNK * WARPS * 16;          // [CHUNK][16]

    // Tiles of the block: a gated one follows its gate.
    const int tiles = (args.n + 15) / 16, of = args.gated ? tiles / 2 : tiles;
    const int mine = (of - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    const int count = args.gated ? 2 * mine : mine;
    auto tile_at = [&](int i) {
        return args.gated ? (int)blockIdx.x + i / 2 * (int)gridDim.x + i % 2 * of
                          : (int)blockIdx.x + i * (int)gridDim.x;
    };
    // In units of 16 bytes.
    auto record_at = [&](int i, int record) {
        return (u32)(tile_at(i) * args.records + record) * (F::RECORD / 16);
    };

    // From a tile to the one beside it, which is the same way for all where tiles are taken by two.
    const u32 beside = (u32)((args.gated ? of : (int)gridDim.x) * args.records) * (F::RECORD / 16);
    // What is copied next: the first tile's number and the record.
    int next = column < args.records ? 0 : count, next_record = column;
    u32 source = record_at(next, column) + lane;
    const u32 to = shared_address(own) + lane * 16;
    auto load = [&](int slot) {
        if (next < count) {
            auto copy = [&](u32 at, u32 place) {
                const u8* const from = args.w + (i64)at * 16;
#pragma unroll
                for (int i = 0; i < F::RECORD; i += 512)
                    if (i + 512 <= F::RECORD || i + lane * 16 < F::RECORD)
                        copy16_async(place + i, from + i, true);
            };
            copy(source, to + slot * STAGE);
            if (PAIR == 2 && next + 1 < count) copy(source + beside, to + slot * STAGE + F::RECORD);
            next_record += WARPS;
            source += WARPS * (F::RECORD / 16);
            if (next_record >= args.records) {
                next_record = column;
                next += PAIR;
                source = record_at(next, column) + lane;
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int slot = 0; slot < STAGES; slot++) load(slot);
    auto at_record = [&](int h) { return (column + h * WARPS) * 256 + lane * 8; };
    Eight weights[HELD];
    if (args.norm != nullptr) {
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (at_record(h) < args.k) weights[h] = load8(args.norm + at_record(h));
    }
    // The weights come while the kernel before this still makes x.
    if (args.settled) wait_for_previous_kernel();

    // The element of out that a thread ends.
    auto place_of = [&](int first, int at) {
        const int i = args.gated ? first + at / 16 * 2 : first + at / 16;
        return tile_at(i) * 16 + at % 16;
    };
    if (args.accumulate && (int)threadIdx.x < min(count, CHUNK) * 16) {
        const int n = place_of(0, threadIdx.x);
        if (n < args.n) before[threadIdx.x] = args.wide ? ((float*)args.out)[n] : unpack2(((u16*)args.out)[n]).x;
    }

    // Each warp makes the parts of the row that it multiplies.
    if (args.norm != nullptr) {
        const float* const x = (const float*)args.x;
        // A record is what a warp of `rms_norm` begins with; those of 32 records on go on with others.
        Eight parts[HELD];
        float sums[HELD] = {};
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            parts[h] = {};
            if (at_record(h) < args.k) parts[h] = load8(x + at_record(h));
        }
#pragma unroll
        for (int h = 0; h < HELD; h++) {
#pragma unroll
            for (int n = 0; n < 8; n++) sums[h] += parts[h].x[n] * parts[h].x[n];
            for (int i = at_record(h) + 8192; i < args.k; i += 8192) {
                const Eight more = load8(x + i);
#pragma unroll
                for (int n = 0; n < 8; n++) sums[h] += more.x[n] * more.x[n];
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                sums[h] += __shfl_xor_sync(0xffffffff, sums[h], offset);
            if (lane == 0) norm_sums[column + h * WARPS] = sums[h];
        }
        __syncthreads();
        float sum = norm_sums[lane];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        const float scale = rsqrtf(sum / (float)args.k + args.eps);
        auto store = [&](int i, const Eight& part, const Eight& weight) {
            Eight v = {};
            if (i < args.k) {
#pragma unroll
                for (int n = 0; n < 8; n++) v.x[n] = part.x[n] * scale * weight.x[n];
            }
            store8(xs + i, v);
        };
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (column + h * WARPS < args.records) store(at_record(h), parts[h], weights[h]);
        for (int h = HELD; column + h * WARPS < args.records; h++) {
            const int i = at_record(h);
            Eight part = {}, weight = {};
            if (i < args.k) part = load8(x + i), weight = load8(args.norm + i);
            store(i, part, weight);
        }
    } else {
        const u16* const x = (const u16*)args.x;
        for (int first = 0; column + first * WARPS < args.records; first += 8) {
            // All loads, then all stores.
            uint4 parts[8];
#pragma unroll
            for (int h = 0; h < 8; h++) {
                parts[h] = make_uint4(0, 0, 0, 0);
                if (at_record(first + h) < args.k) parts[h] = *(const uint4*)(x + at_record(first + h));
            }
#pragma unroll
            for (int h = 0; h < 8; h++)
                if (column + (first + h) * WARPS < args.records)
                    *(uint4*)(xs + at_record(first + h)) = parts[h];
        }
    }
    __syncwarp();
    // A lane's part of a group of the row; all 8 columns of a fragment are this row.
    auto tokens_of = [&](int group, u32(&tokens)[4]) {
        const u16* const at = xs + group * 32 + t * F::FIRST;
        if (F::HALVES) {
            const uint2 first = *(const uint2*)at, second = *(const uint2*)(at + F::SECOND);
            tokens[0] = first.x, tokens[1] = first.y, tokens[2] = second.x, tokens[3] = second.y;
        } else {
            const uint4 both = *(const uint4*)at;
            tokens[0] = both.x, tokens[1] = both.y, tokens[2] = both.z, tokens[3] = both.w;
        }
    };
    if (SUMMED) {
        u32 by[4];
        make_summing<KIND>(by);
        for (int first = column; first < args.records; first += 4 * WARPS) {
            // A column of the fragments is a group here, so that two products make the sums of a record.
            float all[4][4], after[4][4];
#pragma unroll
            for (int h = 0; h < 4; h++) {
                u32 tokens[4];
                tokens_of(min(first + h * WARPS, args.records - 1) * 8 + lane / 4, tokens);
                sum_tokens<KIND>(by, tokens, all[h], after[h]);
            }
#pragma unroll
            for (int h = 0; h < 4; h++) {
                const int record = first + h * WARPS;
                if (lane < 8 && record < args.records) {
                    const int c = lane / 4, group = record * 8 + t * 2 + c;
                    const float sum = c ? all[h][1] : all[h][0];
                    alls[group] = make_float4(sum, sum, sum, sum);
                    if (F::HALVES) {
                        const float other = c ? after[h][1] : after[h][0];
                        alls[groups + group] = make_float4(other, other, other, other);
                    }
                }
            }
            __syncwarp();
        }
        __syncwarp();
    }

    int slot = 0;
#pragma unroll 1
    for (int i = 0; i < count; i += PAIR) {
        float sums[PAIR][4] = {};
        auto multiply = [&](auto tiles, int record) {
            constexpr int TILES = decltype(tiles)::value;
            Record<KIND, true> from[TILES];
#pragma unroll
            for (int p = 0; p < TILES; p++) {
                from[p].codes = own + slot * STAGE + p * F::RECORD;
                from[p].factors = factors + p * (F::HELD_FACTORS / 4);
                from[p].begin(lane);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (j % 4 == 0) {
#pragma unroll
                    for (int p = 0; p < TILES; p++) from[p].hold(lane, j / 4);
                }
                if (j == 4) {
                    // All lanes are done with the slot, which is filled again.
                    __syncwarp();
                    load(slot);
                }
                u32 tokens[4];
                tokens_of(record * 8 + j, tokens);
                float all[4] = {}, other[4] = {};
                if (SUMMED) {
                    const float4 a = alls[record * 8 + j];
                    all[0] = a.x, all[1] = a.y, all[2] = a.z, all[3] = a.w;
                    if (F::HALVES) {
                        const float4 b = alls[groups + record * 8 + j];
                        other[0] = b.x, other[1] = b.y, other[2] = b.z, other[3] = b.w;
                    }
                }
#pragma unroll
                for (int p = 0; p < TILES; p++) {
                    Group group;
                    from[p].group(lane, j, group);
                    float after[4] = {other[0], other[1], other[2], other[3]};
                    add_group<KIND, 2>(group, tokens, all, after, sums[p]);
                }
            }
        };
        const bool whole = i + PAIR <= count;
#pragma unroll 1
        for (int record = column; record < args.records; record += WARPS) {
            wait_copies<STAGES - 1>();
            __syncwarp();
            if (whole)
                multiply(Number<PAIR>(), record);
            else
                multiply(Number<1>(), record);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        if (t == 0) {
#pragma unroll
            for (int p = 0; p < PAIR; p++) {
                if (i + p >= count) break;
                float* const sum = partial + ((i % CHUNK + p) * WARPS + column) * 16;
                sum[lane / 4] = sums[p][0];
                sum[lane / 4 + 8] = sums[p][2];
            }
        }
        // Warps do not wait for each other before the end of all these tiles.
        const int last = min(i + PAIR, count), first = i - i % CHUNK;
        if (last < count && last - first < CHUNK) continue;
        __syncthreads();
        auto sum_of = [&](int tile, int row) {
            float sum = 0;
#pragma unroll
            for (int other = 0; other < WARPS; other++) sum += partial[(tile * WARPS + other) * 16 + row];
            return sum;
        };
        const int wanted = (last - first) * (args.gated ? 8 : 16);
#pragma unroll 1
        for (int at = threadIdx.x; at < wanted; at += THREADS) {
            const int n = place_of(first, at);
            if (args.gated) {
                // As `swiglu` gets them.
                const float2 pair = unpack2(pack2(sum_of(at / 16 * 2, at % 16), sum_of(at / 16 * 2 + 1, at % 16)));
                float up = pair.y;
                up *= pair.x / (1.0f + exp2_fast(-LOG2E * pair.x));
                ((u16*)args.out)[n] = (u16)pack2(up, 0.0f);
            } else if (n < args.n) {
                float sum = sum_of(at / 16, at % 16);
                if (args.accumulate) {
                    if (first > 0)
                        before[at] = args.wide ? ((float*)args.out)[n] : unpack2(((u16*)args.out)[n]).x;
                    sum = before[at] + sum;
                }
                if (args.wide)
                    ((float*)args.out)[n] = sum;
                else
                    ((u16*)args.out)[n] = (u16)pack2(sum, 0.0f);
            }
        }
        if (last < count) __syncthreads();
    }
}

// Blocks of a multiprocessor, of which one starts while the one before it still runs where kernels overlap.
#define BLOCKS (__CUDA_ARCH__ < 900 ? 1 : 2)

// Stages that each warp has in memory, and tiles at a time.
#define PRODUCT(NAME, KIND, STAGES, PAIR)                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)          \
        NAME##_1(const __grid_constant__ RowArgs args) {                      \
        product_of_row<KIND, STAGES, PAIR>(args);                             \
    }
PRODUCT(q4_0, Q4_0, 2, 2)
PRODUCT(q4_1, Q4_1, 4, 1)
PRODUCT(q5_0, Q5_0, 4, 1)
PRODUCT(q5_1, Q5_1, 3, 1)
PRODUCT(q8_0, Q8_0, 2, 1)
PRODUCT(q4_k, Q4_K, 4, 1)
PRODUCT(q5_k, Q5_K, 3, 1)
PRODUCT(q6_k, Q6_K, 3, 1)
