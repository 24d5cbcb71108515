// extend_narrow_8, extend_narrow_16: attention of a few new tokens (tokens * group <= 8 or 16 rows) over a long cache
// of codes, by blocks, warps and splits as in decode.cu.
//
// Codes become f16 in registers, exactly. Scores are keys times queries, so that the 16 rows of a matrix product are
// keys and its 8 columns queries, and the output is values times weights: nothing is multiplied for rows that are not
// there. A product sums over keys, or elements, in any order: lanes read whole words of their own rows, and queries
// and output are permuted to fit. A key's scale multiplies its scores. A value's scale multiplies its weights, as a
// share of the largest one so far, rounded up to a power of two, so that they stay in the range of f16.
//
// Dynamic shared memory: 4 warps * STAGES * STAGE_BYTES of the largest kind of head.
#include "narrow.cuh"
#include "split.cuh"

#define STAGES 3
// Sums are rescaled once a maximum has grown by 2^SLACK.
#define SLACK 4.0f
// Weights times 2^WEIGHT_BITS are below 2^(SLACK + 1 + WEIGHT_BITS) <= 2^15.
#define WEIGHT_BITS 10
// Words of a row of queries; after its elements lie what products of biased codes are less, and its own key.
#define QUERY_WORDS (HEAD_DIM / 2 + 4)

// How a stage of a warp's keys lies in shared memory.
template <int KEY, int VALUE>
struct Shape {
    static constexpr int KEYS = KEY == INT4 ? 32 : 16;
    static constexpr int K_BYTES = ROW_BYTES<KEY>, V_BYTES = ROW_BYTES<VALUE>;
    static constexpr int V_AT = KEYS * K_BYTES, SCALES_AT = V_AT + KEYS * V_BYTES;
    static constexpr int STAGE_BYTES = SCALES_AT + KEYS * 4;

    // Where 16 bytes of a key lie: two rows of 128 bytes and more would share banks.
    static __device__ __forceinline__ int key_chunk(int row, int chunk) {
        return row * K_BYTES + (K_BYTES % 128 == 0 ? chunk ^ (row & 1) << 2 : chunk) * 16;
    }
    // Of a value: lanes of a quad read rows that are two apart.
    static __device__ __forceinline__ int value_chunk(int row, int chunk) {
        const int swap = V_BYTES % 128 == 0 ? row & 6 : V_BYTES == 64 ? row >> 1 & 3 : 0;
        return V_AT + row * V_BYTES + (chunk ^ swap) * 16;
    }
};

// What a lane reads at once of its share of a row: as many of 16, 8, 4 or 2 bytes as make it up.
constexpr int unit_of(int share) { return share % 16 == 0 ? 16 : share % 8 == 0 ? 8 : share % 4 == 0 ? 4 : 2; }

template <int UNIT>
struct Words {
    static constexpr int COUNT = UNIT < 4 ? 1 : UNIT / 4;
    u32 x[COUNT];

    __device__ __forceinline__ void load(const unsigned char* from) {
        if (UNIT == 16) {
            const uint4 all = *(const uint4*)from;
            x[0] = all.x;
            x[1 % COUNT] = all.y;
            x[2 % COUNT] = all.z;
            x[3 % COUNT] = all.w;
        } else if (UNIT == 8) {
            const uint2 both = *(const uint2*)from;
            x[0] = both.x;
            x[1 % COUNT] = both.y;
        } else {
            x[0] = UNIT == 4 ? *(const u32*)from : *(const u16*)from;
        }
    }
};

// 4 bytes; zeros if not `valid`.
__device__ __forceinline__ void copy4_async(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// What a block works on.
struct Work {
    int2 item;
    Sequence sequence;
    Head head;
    Narrow narrow;
    KeyList list;
    int kv_head, len, group, rows, begin, end, num_splits;
};

template <int KEY, int VALUE, int TILES>
__device__ __forceinline__ void attend(const ExtendArgs& args, const Work& work, unsigned char* shared,
                                       u32 (&queries)[8 * TILES][QUERY_WORDS], float (&factors)[8 * TILES],
                                       float2 (&row_state)[WARPS][ROWS], int& is_last) {
    typedef Shape<KEY, VALUE> S;
    constexpr int KEYS = S::KEYS, KEY_TILES = KEYS / 16;
    constexpr int STEPS_OF_DIM = HEAD_DIM / 16, OUT_TILES = HEAD_DIM / 16, HALF = HEAD_DIM / 2;
    constexpr int K_UNIT = unit_of(S::K_BYTES / 4), K_PIECES = S::K_BYTES / 4 / K_UNIT;
    constexpr int V_UNIT = unit_of(S::V_BYTES / 8), V_PIECES = S::V_BYTES / 8 / V_UNIT;
    const KeyList& list = work.list;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 stages = shared_address(shared) + warp * STAGES * S::STAGE_BYTES;
    const char* base = (const char*)work.sequence.k;
    const char* k_codes = base + work.narrow.k;
    const char* v_codes = base + work.narrow.v;
    const char* scale_pairs = base + work.narrow.scales;
    const int begin = work.begin, end = work.end;
    // Slots alone, of a cache that already holds the new tokens.
    Sequence committed = work.sequence;
    committed.committed = 1;
    const KeySource source(args, committed, work.head, work.kv_head, work.len, list);

    auto load = [&](int step) {
        const int first = begin + (step * WARPS + warp) * KEYS;
        const int last = min(first + KEYS, end) - 1;
        if (last < first) return;
        const u32 stage = stages + step % STAGES * S::STAGE_BYTES;
        const int low = source.row(list.position(first)), high = source.row(list.position(last));
        const bool straight = high - low == last - first;
        constexpr int K_CHUNKS = S::K_BYTES / 16, V_CHUNKS = S::V_BYTES / 16;
        const int mine = first + lane, slot = straight ? low + lane : source.row(list.position(min(mine, last)));
        if (lane < KEYS) copy4_async(stage + S::SCALES_AT + lane * 4, scale_pairs + (i64)slot * 4, mine <= last);
        if (straight) {
            const char* k_from = k_codes + (i64)low * S::K_BYTES + lane * 16;
            const char* v_from = v_codes + (i64)low * S::V_BYTES + lane * 16;
            static_assert(KEYS * K_CHUNKS % 32 == 0, "keys are whole warps");
#pragma unroll
            for (int i = 0; i < KEYS * K_CHUNKS / 32; i++) {
                const int r = (i * 32 + lane) / K_CHUNKS, chunk = (i * 32 + lane) % K_CHUNKS;
                copy16_async(stage + S::key_chunk(r, chunk), k_from + i * 512, first + r <= last);
            }
#pragma unroll
            for (int i = 0; i < (KEYS * V_CHUNKS + 31) / 32; i++) {
                const int r = (i * 32 + lane) / V_CHUNKS, chunk = (i * 32 + lane) % V_CHUNKS;
                // 16 rows of three chunks are no whole number of warps.
                if (KEYS * V_CHUNKS % 32 != 0 && r >= KEYS) break;
                copy16_async(stage + S::value_chunk(r, chunk), v_from + i * 512, first + r <= last);
            }
        } else {
#pragma unroll 1
            for (int i = lane; i < KEYS * K_CHUNKS; i += 32) {
                const int r = i / K_CHUNKS, chunk = i % K_CHUNKS;
                const i64 row = source.row(list.position(min(first + r, last)));
                copy16_async(stage + S::key_chunk(r, chunk), k_codes + row * S::K_BYTES + chunk * 16, first + r <= last);
            }
#pragma unroll 1
            for (int i = lane; i < KEYS * V_CHUNKS; i += 32) {
                const int r = i / V_CHUNKS, chunk = i % V_CHUNKS;
                const i64 row = source.row(list.position(min(first + r, last)));
                copy16_async(stage + S::value_chunk(r, chunk), v_codes + row * S::V_BYTES + chunk * 16,
                             first + r <= last);
            }
        }
    };
    const int steps = (end - begin + WARPS * KEYS - 1) / (WARPS * KEYS);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps) load(i);
        commit_copies();
    }

    // Queries, rotated as keys are, with a largest element of 1 to 2, as f16 pairs of elements (0, 2), (1, 3), and so
    // on: those that a word of codes gives together.
    for (int row = threadIdx.x / ROW_LANES; row < max(8 * TILES, WARPS * 32 / ROW_LANES); row += WARPS * 32 / ROW_LANES) {
        const int part = threadIdx.x % ROW_LANES;
        float x[8] = {};
        if (row < work.rows && part * 8 < HEAD_DIM) {
            const int token = row / work.group;
            const u16* from = (const u16*)args.q.data + (work.sequence.first + token) * args.q.token +
                              (work.kv_head * work.group + row - token * work.group) * args.q.head;
            const uint4 all = *(const uint4*)(from + part * 8);
            const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 pair = unpack2(words[i]);
                x[2 * i] = pair.x;
                x[2 * i + 1] = pair.y;
            }
        }
        if (rotates(KEY)) rotate(x, part);
        const u32 exponent = min(max(largest(x) >> 23, 1u), 253u);
        const float factor = __uint_as_float((254 - exponent) << 23);
        u32 packed[4] = {};
        if (row < 8 * TILES && part * 8 < HEAD_DIM) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= factor;
            packed[0] = pack_halves(x[0], x[2]);
            packed[1] = pack_halves(x[1], x[3]);
            packed[2] = pack_halves(x[4], x[6]);
            packed[3] = pack_halves(x[5], x[7]);
            *(uint4*)&queries[row][part * 4] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            if (part == 0) {
                factors[row] = __uint_as_float(exponent << 23);
                // The list entry of the row's own key.
                queries[row][HEAD_DIM / 2 + 1] = work.len + min(row, work.rows - 1) / work.group - list.gap;
            }
        }
        if (KEY == INT4) {
            float all = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 pair = unpack_halves(packed[i]);
                all += pair.x + pair.y;
            }
#pragma unroll
            for (int d = 1; d < ROW_LANES; d *= 2) all += __shfl_xor_sync(~0u, all, d);
            if (row < 8 * TILES && part == 0) queries[row][HEAD_DIM / 2] = __float_as_uint(-BIAS4 * all);
        }
    }
    __syncthreads();
    // The lane's queries for a step of 16 elements: in registers, where there is room.
    auto query = [&](int step, int n) {
        constexpr int PER_PIECE = K_UNIT / 4;
        const int word = KEY == INT4 ? step / 2 : step;
        const int at = (word / PER_PIECE * 4 + t) * K_UNIT + word % PER_PIECE * 4 + (KEY == INT4 ? step % 2 * HALF : 0);
        return *(const uint2*)&queries[n * 8 + g][at / 2];
    };
    constexpr bool HELD = HEAD_DIM * TILES <= 256;
    uint2 q[HELD ? STEPS_OF_DIM : 1][TILES];
    if (HELD) {
#pragma unroll
        for (int i = 0; i < STEPS_OF_DIM; i++) {
#pragma unroll
            for (int n = 0; n < TILES; n++) q[i % (HELD ? STEPS_OF_DIM : 1)][n] = query(i, n);
        }
    }
    // A lane's scores are of its two query rows of each tile.
    float scale[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int row = n * 8 + t * 2 + c;
            const float unit = (KEY == FP8 ? 256.0f : 1.0f) / (rotates(KEY) ? ROTATION : 1);
            scale[n][c] = factors[row] * (args.scale * LOG2E * unit);
        }
    }
    const int sinks = list.gap > 0 ? list.sinks : work.head.sink, window = work.head.window;
    // Steps that end before `seen_end` and begin after `seen_begin` are seen by every row.
    const int seen_end = min(end, list.count - work.sequence.tokens + 1), seen_begin = list.count - 1 - window;

    float o[OUT_TILES][TILES][4] = {};
    // Sums of weights as products have them, of values whose codes are biased.
    float weights[TILES][4] = {};
    float top[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) top[n][0] = top[n][1] = -1e30f;
    // Exponent of the largest scale of a value so far, as an f32 has it.
    u32 most = 27;

    for (int step = 0; step < steps; step++) {
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        commit_copies();
        wait_copies<STAGES - 1>();
        __syncwarp();
        const unsigned char* stage = shared + (warp * STAGES + step % STAGES) * S::STAGE_BYTES;
        const int first = begin + (step * WARPS + warp) * KEYS;
        if (first >= end) break;

        float scores[KEY_TILES][TILES][4];
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            // Two sums, as each product waits for the one before it.
            float parts[2][TILES][4] = {};
            if (KEY == INT4) {
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++)
                        parts[0][n][c] = parts[0][n][2 + c] =
                            __uint_as_float(queries[n * 8 + t * 2 + c][HEAD_DIM / 2]);
                }
            }
#pragma unroll
            for (int i = 0; i < K_PIECES; i++) {
                Words<K_UNIT> a, b;
                const int byte = (i * 4 + t) * K_UNIT, row = m * 16 + g;
                const unsigned char* at = stage + S::key_chunk(row, byte / 16) + byte % 16;
                a.load(at);
                b.load(at + 8 * S::K_BYTES);
#pragma unroll
                for (int j = 0; j < K_UNIT / 4; j++) {
                    const int word = i * (K_UNIT / 4) + j;
                    u32 x[2][4];
                    if (KEY == INT4) {
                        widen4(a.x[j], x[0][0], x[0][1], x[0][2], x[0][3]);
                        widen4(b.x[j], x[1][0], x[1][1], x[1][2], x[1][3]);
                    } else {
                        widen8<KEY>(a.x[j], x[0][0], x[0][1]);
                        widen8<KEY>(b.x[j], x[1][0], x[1][1]);
                    }
#pragma unroll
                    for (int half = 0; half < (KEY == INT4 ? 2 : 1); half++) {
                        const int k = KEY == INT4 ? 2 * word + half : word;
#pragma unroll
                        for (int n = 0; n < TILES; n++) {
                            const uint2 own = HELD ? q[k % (HELD ? STEPS_OF_DIM : 1)][n] : query(k, n);
                            mma_halves(parts[k % 2][n], x[0][2 * half], x[1][2 * half], x[0][2 * half + 1],
                                       x[1][2 * half + 1], own.x, own.y);
                        }
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) scores[m][n][c] = parts[0][n][c] + parts[1][n][c];
            }
        }
        float v_scale[KEY_TILES][2];
        bool grows = false;
        const bool whole = first + KEYS <= seen_end && (first > seen_begin || first + KEYS <= sinks);
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int local = m * 16 + h * 8 + g, index = first + local;
                const u32 pair = *(const u32*)(stage + S::SCALES_AT + local * 4);
                const float k_scale = __uint_as_float(pair << 16);
                v_scale[m][h] = __uint_as_float(pair & 0xffff0000u);
                grows |= pair >> 23 > most;
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float& x = scores[m][n][2 * h + c];
                        x *= k_scale * scale[n][c];
#if SOFTCAP
                        x = args.softcap * LOG2E * tanh_fine(x / (args.softcap * LOG2E));
#endif
                        if (!whole) {
                            const int own = queries[n * 8 + t * 2 + c][HEAD_DIM / 2 + 1];
                            const bool sees =
                                (index <= own) & (index < end) & ((index < sinks) | (index > own - window));
                            x = sees ? x : NEG_INF;
                        }
                        grows |= x > top[n][c] + SLACK;
                    }
                }
            }
        }
        if (__any_sync(~0u, grows)) {
            u32 largest_scale = 0;
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 bits = magnitude(v_scale[m][h]);
                    largest_scale = max(largest_scale, is_none(bits) ? 0 : bits);
                }
            }
            const u32 before = most;
            most = max(most, __reduce_max_sync(~0u, largest_scale) >> 23);
            const float shrink = exp2_fast((float)(int)(before - most));
#pragma unroll
            for (int n = 0; n < TILES; n++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float highest = NEG_INF;
#pragma unroll
                    for (int m = 0; m < KEY_TILES; m++)
                        highest = fmaxf(highest, fmaxf(scores[m][n][c], scores[m][n][2 + c]));
#pragma unroll
                    for (int d = 4; d < 32; d *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
                    const float now = highest > top[n][c] + SLACK ? highest : top[n][c];
                    const float decay = exp2_fast(top[n][c] - now);
                    top[n][c] = now;
                    sum[n][c] *= decay;
                    weights[n][c] *= decay * shrink;
#pragma unroll
                    for (int m = 0; m < OUT_TILES; m++) {
                        o[m][n][c] *= decay * shrink;
                        o[m][n][2 + c] *= decay * shrink;
                    }
                }
            }
        }
        const float share = __uint_as_float((254 + WEIGHT_BITS - most) << 23);
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            u32 p[TILES][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float weight = v_scale[m][h] * share;
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const float x = exp2_fast(scores[m][n][2 * h] - top[n][0]);
                    const float y = exp2_fast(scores[m][n][2 * h + 1] - top[n][1]);
                    sum[n][0] += x;
                    sum[n][1] += y;
                    // A value that is hidden may be no number.
                    p[n][h] = transpose_halves(pack_halves(x == 0 ? 0 : x * weight, y == 0 ? 0 : y * weight));
                }
            }
            if (VALUE == INT4) {
                const u32 one = 0x3c003c00u;
#pragma unroll
                for (int n = 0; n < TILES; n++) mma_halves(weights[n], one, one, one, one, p[n][0], p[n][1]);
            }
#pragma unroll
            for (int i = 0; i < V_PIECES; i++) {
                Words<V_UNIT> v[4];
                // Neighbours and rows that are 8 apart have the same order of chunks.
                const int byte = (i * 8 + g) * V_UNIT;
                const unsigned char* at = stage + S::value_chunk(m * 16 + t * 2, byte / 16) + byte % 16;
                v[0].load(at);
                v[1].load(at + S::V_BYTES);
                v[2].load(at + 8 * S::V_BYTES);
                v[3].load(at + 9 * S::V_BYTES);
#pragma unroll
                for (int j = 0; j < Words<V_UNIT>::COUNT; j++) {
#pragma unroll
                    for (int half = 0; half < (V_UNIT < 4 ? 1 : 2); half++) {
                        const u32 select = half ? 0x7632 : 0x5410;
                        const u32 ab = __byte_perm(v[0].x[j], v[1].x[j], select);
                        const u32 cd = __byte_perm(v[2].x[j], v[3].x[j], select);
                        const int pair = V_UNIT < 4 ? i : (i * Words<V_UNIT>::COUNT + j) * 2 + half;
                        u32 x[2][4];
                        if (VALUE == INT4) {
                            widen4(ab, x[0][0], x[0][1], x[0][2], x[0][3]);
                            widen4(cd, x[1][0], x[1][1], x[1][2], x[1][3]);
                        } else {
                            widen8<VALUE>(ab, x[0][0], x[0][1]);
                            widen8<VALUE>(cd, x[1][0], x[1][1]);
                        }
#pragma unroll
                        for (int high = 0; high < (VALUE == INT4 ? 2 : 1); high++) {
                            const int tile = VALUE == INT4 ? 2 * pair + high : pair;
#pragma unroll
                            for (int n = 0; n < TILES; n++)
                                mma_halves(o[tile][n], x[0][2 * high], x[0][2 * high + 1], x[1][2 * high],
                                           x[1][2 * high + 1], p[n][0], p[n][1]);
                        }
                    }
                }
            }
        }
        __syncwarp();
    }

    wait_copies<0>();
    __syncthreads();
    float* merged = (float*)shared;  // [WARPS][ROWS][HEAD_DIM]
    const float unit = (VALUE == FP8 ? 256.0f : 1.0f) * __uint_as_float((most - WEIGHT_BITS) << 23);
#pragma unroll
    for (int tile = 0; tile < OUT_TILES; tile++) {
        // The lane's two columns of a tile, as they came in a pair of bytes.
        const int pair = VALUE == INT4 ? tile / 2 : tile;
        constexpr int PAIRS = V_UNIT / 2;
        const int column = (pair / PAIRS * 8 + g) * V_UNIT + pair % PAIRS * 2 + (VALUE == INT4 ? tile % 2 * HALF : 0);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int row = n * 8 + t * 2 + c;
                if (row >= work.rows) continue;
                float* to = merged + (warp * ROWS + row) * HEAD_DIM;
                const float less = VALUE == INT4 ? BIAS4 * weights[n][c] : 0;
                const float x = (o[tile][n][c] - less) * unit, y = (o[tile][n][2 + c] - less) * unit;
#if HEAD_DIM == 96
                to[column % 32 * 3 + column / 32] = x;
                to[(column + 1) % 32 * 3 + column / 32] = y;
#else
                *(float2*)(to + column) = make_float2(x, y);
#endif
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum[n][c] += __shfl_xor_sync(~0u, sum[n][c], d);
            if (g == 0)
                row_state[warp][n * 8 + t * 2 + c] = make_float2(sum[n][c] == 0 ? NEG_INF : top[n][c], sum[n][c]);
        }
    }
    __syncthreads();

    auto store = [&](int row, LaneRow& out, float maximum, float total) {
        const int token = row / work.group, query_head = work.kv_head * work.group + row - token * work.group;
        const Finish finish(args, query_head, maximum, total);
        float inverse = finish.inverse;
        if (rotates(VALUE)) {
            inverse *= 1.0f / ROTATION;
#if HEAD_DIM != 96
#pragma unroll
            for (int step = 1; step < LANE_COLUMNS; step *= 2) {
#pragma unroll
                for (int c = 0; c < LANE_COLUMNS; c++) {
                    if (c & step) continue;
                    const float a = out.x[c], b = out.x[c + step];
                    out.x[c] = a + b;
                    out.x[c + step] = a - b;
                }
            }
#endif
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
#pragma unroll
                for (int c = 0; c < LANE_COLUMNS; c++) {
                    const float other = __shfl_xor_sync(~0u, out.x[c], step);
                    out.x[c] = lane & step ? other - out.x[c] : other + out.x[c];
                }
            }
        }
        u16* to = (u16*)args.out.data + (work.sequence.first + token) * args.out.token + query_head * args.out.head;
#if HEAD_DIM == 96
        // Of each block of 32 columns one.
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) to[c * 32 + lane] = (u16)pack2(out.x[c] * inverse, 0);
#else
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c += 2)
            *(u32*)&to[lane * LANE_COLUMNS + c] = pack2(out.x[c] * inverse, out.x[c + 1] * inverse);
#endif
        if (args.lse != nullptr && lane == 0)
            args.lse[(work.sequence.first + token) * args.query_heads + query_head] = finish.lse;
    };
    merge_splits(args, work.item, work.rows, work.num_splits, shared, row_state, is_last, store);
}

template <int TILES>
__device__ __forceinline__ void extend_narrow(const ExtendArgs& args) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(16) u32 queries[8 * TILES][QUERY_WORDS];
    __shared__ float factors[8 * TILES];
    __shared__ float2 row_state[WARPS][ROWS];
    __shared__ int is_last;
    start();
    const int2 item = args.items[blockIdx.x];
    const int s = item.x / args.kv_heads;
    const Sequence sequence = args.sequences[s];
    const Head head = args.heads[item.x];
    const int len = args.lens[s], group = args.query_heads / args.kv_heads;
    Work work = {item, sequence, head, args.narrow[item.x], KeyList(head, len, len + sequence.tokens - 1)};
    work.kv_head = item.x % args.kv_heads;
    work.len = len;
    work.group = group;
    work.rows = sequence.tokens * group;
    const int count = work.list.count, keys_per_split = split_keys(count);
    work.begin = item.y * keys_per_split;
    // Work lists are made for the capacity: a shorter sequence leaves its last splits empty.
    if (work.begin >= count) return;
    work.end = min(work.begin + keys_per_split, count);
    work.num_splits = (count + keys_per_split - 1) / keys_per_split;
    switch (work.narrow.kind) {
        case HEAD_INT8:
            return attend<INT8, INT8, TILES>(args, work, shared, queries, factors, row_state, is_last);
        case HEAD_FP8:
            return attend<FP8, FP8, TILES>(args, work, shared, queries, factors, row_state, is_last);
        case HEAD_K8V4:
            return attend<INT8, INT4, TILES>(args, work, shared, queries, factors, row_state, is_last);
        case HEAD_INT4:
            return attend<INT4, INT4, TILES>(args, work, shared, queries, factors, row_state, is_last);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, HEAD_DIM > 128 ? 2 : 4)
    extend_narrow_8(const __grid_constant__ ExtendArgs args) {
    extend_narrow<1>(args);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, HEAD_DIM > 128 ? 1 : 2)
    extend_narrow_16(const __grid_constant__ ExtendArgs args) {
    extend_narrow<2>(args);
}
