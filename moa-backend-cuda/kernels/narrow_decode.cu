// extend_narrow_8, extend_narrow_16: attention of a few new tokens (tokens * group <= 8 or 16 rows) over a long cache
// of codes, by blocks, warps and splits as in decode.cu.
//
// Scores are keys times queries, so that the 16 rows of a matrix product are keys and its 8 columns queries, and the
// output is values times weights: nothing is multiplied for rows that are not there. A product sums over elements in any
// order: lanes read whole words of their own rows, and queries are permuted to fit. Keys of int8 and int4 meet queries of
// 16 bits in whole numbers, exactly; those of e4m3 become f16. Values become f16 in registers, by masks alone: a code in
// the lowest bits of an f16 is a subnormal number, 2^-24 of what it counts. Codes without signs are more than they stand
// for by the same number everywhere, which is taken off sums of products. A key's scale multiplies its scores. A value's
// scale multiplies its weights, as a share of the largest one so far, rounded up to a power of two, so that they stay in
// the range of f16.
//
// Dynamic shared memory: 4 warps * STAGES * STAGE_BYTES of the largest kind of head.
#include "narrow.cuh"
#include "split.cuh"

#define STAGES 3
// Sums are rescaled once a maximum has grown by 2^SLACK.
#define SLACK 4.0f
// Weights times 2^WEIGHT_BITS are below 2^(SLACK + 1 + WEIGHT_BITS) <= 2^15.
#define WEIGHT_BITS 10
// Words of a row of queries: f16, or the upper bytes of whole numbers and then the lower ones; after them lie what products
// of codes without signs are less, and the row's own key.
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
    // Of a value: the same chunk of eight rows lies in all banks.
    static __device__ __forceinline__ int value_chunk(int row, int chunk) {
        const int swap = V_BYTES % 128 == 0 ? row & 7 : V_BYTES == 64 ? row >> 1 & 3 : V_BYTES == 32 ? row >> 2 & 1 : 0;
        return V_AT + row * V_BYTES + (chunk ^ swap) * 16;
    }
};

// What a lane reads at once of its share of a key: as many of 16, 8 or 4 bytes as make it up.
constexpr int unit_of(int share) { return share % 16 == 0 ? 16 : share % 8 == 0 ? 8 : 4; }

template <int UNIT>
struct Words {
    static constexpr int COUNT = UNIT / 4;
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
            x[0] = *(const u32*)from;
        }
    }
};

// d[16 x 8] += a[16 x 32] b[32 x 8] in whole numbers: codes times the upper bytes of queries, and the lower ones.
__device__ __forceinline__ void mma_upper(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_lower(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What is not computed again: that would cost more than its register, where there are registers.
__device__ __forceinline__ const char* keep(const char* x) {
    if (HEAD_DIM <= 128) asm volatile("" : "+l"(x));
    return x;
}
__device__ __forceinline__ u32 keep(u32 x) {
    if (HEAD_DIM <= 128) asm volatile("" : "+r"(x));
    return x;
}

// 8 rows of 16 bytes, two such matrices, transposed in units of two bytes.
__device__ __forceinline__ void load_two_transposed(u32& a, u32& b, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(a), "=r"(b)
                 : "r"(address)
                 : "memory");
}

// Bytes `first` of two pairs of whole numbers.
__device__ __forceinline__ u32 bytes_of(const int (&x)[8], int first, u32 select) {
    const u32 low = __byte_perm(x[first], x[first + 1], select), high = __byte_perm(x[first + 2], x[first + 3], select);
    return __byte_perm(low, high, 0x5410);
}

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
    constexpr int OUT_TILES = HEAD_DIM / 16, HALF = HEAD_DIM / 2;
    constexpr int K_UNIT = unit_of(S::K_BYTES / 4), K_PIECES = S::K_BYTES / 4 / K_UNIT;
    constexpr int K_CHUNKS = S::K_BYTES / 16, V_CHUNKS = S::V_BYTES / 16;
    // Products of 32 elements in whole numbers, of 16 in f16.
    constexpr bool IS_WHOLE = KEY != FP8;
    constexpr int STEPS_OF_DIM = HEAD_DIM / (IS_WHOLE ? 32 : 16);
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

    // List entries before `straight_end` that lie `straight_low` slots after their index.
    int straight_end = 0, straight_low = 0;
    const char* k_lane = keep(k_codes + lane * 16);
    const char* v_lane = keep(v_codes + lane * 16);
    const char* scale_lane = keep(scale_pairs + lane * 4);
    const u32 k_to = keep(S::key_chunk(lane / K_CHUNKS, lane % K_CHUNKS));
    const u32 v_to = keep(S::value_chunk(lane / V_CHUNKS, lane % V_CHUNKS) - S::V_AT);
    auto load = [&](int first, u32 stage) {
        if (first + KEYS > straight_end) {
            if (first >= end) return;
            straight_low = source.row(list.position(first)) - first;
            straight_end = first + min(source.straight(list, first), end - first);
            if (first + KEYS > straight_end) {
                const int last = min(first + KEYS, end) - 1;
                if (lane < KEYS) {
                    const i64 row = source.row(list.position(min(first + lane, last)));
                    copy4_async(stage + S::SCALES_AT + lane * 4, scale_pairs + row * 4, first + lane <= last);
                }
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
                return;
            }
        }
        const int slot = first + straight_low;
        if (KEYS == 32 || lane < KEYS)
            copy4_async(stage + S::SCALES_AT + lane * 4, scale_lane + (i64)slot * 4, true);
        const char* k_from = k_lane + (i64)slot * S::K_BYTES;
        const char* v_from = v_lane + (i64)slot * S::V_BYTES;
        static_assert(KEYS * K_CHUNKS % 32 == 0, "keys are whole warps");
#pragma unroll
        for (int i = 0; i < KEYS * K_CHUNKS / 32; i++) {
            // 32 chunks on lie as these do.
            const int at = 32 % K_CHUNKS == 0 ? k_to + i * 512
                                              : S::key_chunk((i * 32 + lane) / K_CHUNKS, (i * 32 + lane) % K_CHUNKS);
            copy16_async(stage + at, k_from + i * 512, true);
        }
#pragma unroll
        for (int i = 0; i < (KEYS * V_CHUNKS + 31) / 32; i++) {
            const int r = (i * 32 + lane) / V_CHUNKS;
            // 16 rows of three chunks are no whole number of warps.
            if (KEYS * V_CHUNKS % 32 != 0 && r >= KEYS) break;
            // So many rows on, other chunks have changed places.
            constexpr int ROWS_ON = 32 / V_CHUNKS;
            const u32 swap = S::V_BYTES % 128 == 0 ? (i * ROWS_ON & 7) * 16 : 0;
            const int at = 32 % V_CHUNKS == 0 ? S::V_AT + i * 512 + (v_to ^ swap)
                                              : S::value_chunk(r, (i * 32 + lane) % V_CHUNKS);
            copy16_async(stage + at, v_from + i * 512, true);
        }
    };
    // Of the warp's first keys, and from one of its steps to the next.
    const int warp_begin = begin + warp * KEYS;
    constexpr int STEP = WARPS * KEYS;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        load(warp_begin + i * STEP, stages + i * S::STAGE_BYTES);
        commit_copies();
    }

    // Queries, rotated as keys are, with a largest element of 1 to 2: as whole numbers of 2^-14, or as f16 pairs of
    // elements (0, 2), (1, 3), and so on, which are those that a word of codes gives together.
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
        // Of a warp without rows all are zeros.
        const bool has_rows = row - threadIdx.x % 32 / ROW_LANES < work.rows;
        if (has_rows && rotates(KEY)) rotate(x, part);
        const u32 most_of_row = has_rows ? largest(x) : 0, exponent = min(max(most_of_row >> 23, 1u), 253u);
        const float factor = __uint_as_float((254 - exponent) << 23);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= factor;
        const bool is_own = row < 8 * TILES && part * 8 < HEAD_DIM;
        if (IS_WHOLE) {
            int whole[8], all = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) all += whole[i] = min(__float2int_rn(x[i] * 16384), 32767);
#pragma unroll
            for (int d = 1; d < ROW_LANES; d *= 2) all += __shfl_xor_sync(~0u, all, d);
            if (is_own) {
                *(uint2*)&queries[row][part * 2] = make_uint2(bytes_of(whole, 0, 0x0051), bytes_of(whole, 4, 0x0051));
                *(uint2*)&queries[row][HEAD_DIM / 4 + part * 2] =
                    make_uint2(bytes_of(whole, 0, 0x0040), bytes_of(whole, 4, 0x0040));
                // 7.5 of each; the half of a whole number does not count.
                if (part == 0) queries[row][HEAD_DIM / 2] = KEY == INT4 ? -15 * all >> 1 : 0;
            }
        } else if (is_own) {
            *(uint4*)&queries[row][part * 4] = make_uint4(pack_halves(x[0], x[2]), pack_halves(x[1], x[3]),
                                                          pack_halves(x[4], x[6]), pack_halves(x[5], x[7]));
        }
        if (is_own && part == 0) {
            // Whole numbers do not say that a query is none.
            factors[row] = __uint_as_float(is_none(most_of_row) ? 0x7fc00000u : exponent << 23);
            // The list entry of the row's own key.
            queries[row][HEAD_DIM / 2 + 1] = work.len + min(row, work.rows - 1) / work.group - list.gap;
        }
    }
    __syncthreads();
    // The lane's queries for a step of 32 elements, upper bytes and lower ones, or of 16: in registers, where there is room.
    struct Query {
        uint2 x, y;
    };
    auto query = [&](int step, int n) {
        const u32* row = queries[n * 8 + g];
        if (KEY == INT4) {
            constexpr int PER_PIECE = K_UNIT / 4;
            const int at = (step / PER_PIECE * 4 + t) * PER_PIECE + step % PER_PIECE;
            return Query{make_uint2(row[at], row[at + HALF / 4]),
                         make_uint2(row[at + HEAD_DIM / 4], row[at + HEAD_DIM / 4 + HALF / 4])};
        }
        if (KEY == INT8) {
            constexpr int PER_PIECE = K_UNIT / 8;
            const int at = (step / PER_PIECE * 4 + t) * (K_UNIT / 4) + step % PER_PIECE * 2;
            return Query{*(const uint2*)&row[at], *(const uint2*)&row[at + HEAD_DIM / 4]};
        }
        constexpr int PER_PIECE = K_UNIT / 4;
        const int at = (step / PER_PIECE * 4 + t) * K_UNIT + step % PER_PIECE * 4;
        return Query{*(const uint2*)&row[at / 2], make_uint2(0, 0)};
    };
    constexpr bool HELD = HEAD_DIM * TILES <= 256;
    Query q[HELD ? STEPS_OF_DIM : 1][TILES];
    if (HELD) {
#pragma unroll
        for (int i = 0; i < STEPS_OF_DIM; i++) {
#pragma unroll
            for (int n = 0; n < TILES; n++) q[i % (HELD ? STEPS_OF_DIM : 1)][n] = query(i, n);
        }
    }
    auto held = [&](int step, int n) { return HELD ? q[step % (HELD ? STEPS_OF_DIM : 1)][n] : query(step, n); };
    // A lane's scores are of its two query rows of each tile.
    float scale[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int row = n * 8 + t * 2 + c;
            const float unit = KEY == FP8 ? 256.0f : 1.0f / (16384.0f * ROTATION);
            scale[n][c] = factors[row] * (args.scale * LOG2E * unit);
        }
    }
    const int sinks = list.gap > 0 ? list.sinks : work.head.sink, window = work.head.window;
    // Steps that end before `seen_end` and begin after `seen_begin` are seen by every row.
    const int seen_end = min(end, list.count - work.sequence.tokens + 1), seen_begin = list.count - 1 - window;

    float o[OUT_TILES][TILES][4] = {};
    // Sums of weights as products have them, of values whose codes have no signs.
    float weights[TILES][4] = {};
    float top[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) top[n][0] = top[n][1] = -1e30f;
    // Exponent of the largest scale of a value so far, as an f32 has it.
    u32 most = 27;

    // Where a lane finds keys in a stage, and values: rows of 16, and of two chunks its own.
    const u32 k_at = keep(S::key_chunk(g, t * K_UNIT / 16) + t * K_UNIT % 16);
    const u32 v_at = keep(S::value_chunk(lane & 15, V_CHUNKS % 2 == 0 ? lane >> 4 : 0) - S::V_AT);
    const unsigned char* const warp_stages = shared + keep(warp * STAGES * S::STAGE_BYTES);
    int biases[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) biases[n][c] = KEY == INT4 ? queries[n * 8 + t * 2 + c][HEAD_DIM / 2] : 0;
    }
    // Stages are taken in turn.
    auto after = [](u32 stage) { return stage == (STAGES - 1) * S::STAGE_BYTES ? 0u : stage + S::STAGE_BYTES; };
    u32 reading = 0, writing = (STAGES - 1) * S::STAGE_BYTES;
    for (int first = warp_begin; first < end; first += STEP) {
        load(first + (STAGES - 1) * STEP, stages + writing);
        commit_copies();
        wait_copies<STAGES - 1>();
        __syncwarp();

        float scores[KEY_TILES][TILES][4];
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            const unsigned char* tile = warp_stages + reading + m * 16 * S::K_BYTES;
            if (IS_WHOLE) {
                int upper[TILES][4] = {}, lower[TILES][4];
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) lower[n][c] = lower[n][2 + c] = biases[n][c];
                }
#pragma unroll
                for (int i = 0; i < K_PIECES; i++) {
                    Words<K_UNIT> a, b;
                    const u32 at = S::K_BYTES % 128 == 0 ? k_at ^ i * 4 * K_UNIT : k_at + i * 4 * K_UNIT;
                    a.load(tile + at);
                    b.load(tile + at + 8 * S::K_BYTES);
                    constexpr int PER_PIECE = KEY == INT4 ? K_UNIT / 4 : K_UNIT / 8;
#pragma unroll
                    for (int j = 0; j < PER_PIECE; j++) {
                        u32 x[4];
                        if (KEY == INT4) {
                            x[0] = a.x[j] & 0x0f0f0f0fu;
                            x[1] = b.x[j] & 0x0f0f0f0fu;
                            x[2] = a.x[j] >> 4 & 0x0f0f0f0fu;
                            x[3] = b.x[j] >> 4 & 0x0f0f0f0fu;
                        } else {
                            constexpr int COUNT = Words<K_UNIT>::COUNT;
                            x[0] = a.x[2 * j % COUNT];
                            x[1] = b.x[2 * j % COUNT];
                            x[2] = a.x[(2 * j + 1) % COUNT];
                            x[3] = b.x[(2 * j + 1) % COUNT];
                        }
#pragma unroll
                        for (int n = 0; n < TILES; n++) {
                            const Query own = held(i * PER_PIECE + j, n);
                            mma_upper(upper[n], x[0], x[1], x[2], x[3], own.x.x, own.x.y);
                            mma_lower(lower[n], x[0], x[1], x[2], x[3], own.y.x, own.y.y);
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) scores[m][n][c] = (float)(upper[n][c] * 256 + lower[n][c]);
                }
            } else {
                // Two sums, as each product waits for the one before it.
                float parts[2][TILES][4] = {};
#pragma unroll
                for (int i = 0; i < K_PIECES; i++) {
                    Words<K_UNIT> a, b;
                    const u32 at = S::K_BYTES % 128 == 0 ? k_at ^ i * 4 * K_UNIT : k_at + i * 4 * K_UNIT;
                    a.load(tile + at);
                    b.load(tile + at + 8 * S::K_BYTES);
#pragma unroll
                    for (int j = 0; j < K_UNIT / 4; j++) {
                        const int word = i * (K_UNIT / 4) + j;
                        u32 x[4];
                        widen_e4m3(a.x[j], x[0], x[2]);
                        widen_e4m3(b.x[j], x[1], x[3]);
#pragma unroll
                        for (int n = 0; n < TILES; n++) {
                            const Query own = held(word, n);
                            mma_halves(parts[word % 2][n], x[0], x[1], x[2], x[3], own.x.x, own.x.y);
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) scores[m][n][c] = parts[0][n][c] + parts[1][n][c];
                }
            }
        }
        float v_scale[KEY_TILES][2];
        u32 largest_pair = 0;
        const bool whole = first + KEYS <= seen_end && (first > seen_begin || first + KEYS <= sinks);
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 pair = *(const u32*)(warp_stages + reading + S::SCALES_AT + (m * 16 + h * 8 + g) * 4);
                const float k_scale = __uint_as_float(pair << 16);
                v_scale[m][h] = __uint_as_float(pair & 0xffff0000u);
                largest_pair = max(largest_pair, pair);
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float& x = scores[m][n][2 * h + c];
                        x *= k_scale * scale[n][c];
#if SOFTCAP
                        x = args.softcap * LOG2E * tanh_fine(x / (args.softcap * LOG2E));
#endif
                    }
                }
            }
        }
        if (!whole) {
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int index = first + m * 16 + h * 8 + g;
#pragma unroll
                    for (int n = 0; n < TILES; n++) {
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            const int own = queries[n * 8 + t * 2 + c][HEAD_DIM / 2 + 1];
                            const bool sees =
                                (index <= own) & (index < end) & ((index < sinks) | (index > own - window));
                            if (!sees) scores[m][n][2 * h + c] = NEG_INF;
                        }
                    }
                }
            }
        }
        bool grows = largest_pair > (most << 23 | 0x7fffffu);
        float highest[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                highest[n][c] = fmaxf(scores[0][n][c], scores[0][n][2 + c]);
#pragma unroll
                for (int m = 1; m < KEY_TILES; m++)
                    highest[n][c] = fmaxf(highest[n][c], fmaxf(scores[m][n][c], scores[m][n][2 + c]));
                grows |= highest[n][c] > top[n][c] + SLACK;
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
                    float most_of_all = highest[n][c];
#pragma unroll
                    for (int d = 4; d < 32; d *= 2)
                        most_of_all = fmaxf(most_of_all, __shfl_xor_sync(~0u, most_of_all, d));
                    const float now = most_of_all > top[n][c] + SLACK ? most_of_all : top[n][c];
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
#pragma unroll
            for (int h = 0; h < 2; h++) {
                v_scale[m][h] *= share;
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float& x = scores[m][n][2 * h + c];
                        x = exp2_fast(x - top[n][c]);
                        sum[n][c] += x;
                    }
                }
            }
        }
        if (!whole) {
            // A value that is hidden may be no number. The barrier keeps this a branch.
            __syncwarp();
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
                for (int i = 0; i < 2 * TILES; i++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float& x = scores[m][i / 2][2 * h + i % 2];
                        x = x == 0 ? 0 : x * v_scale[m][h];
                    }
                }
            }
        } else {
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++) {
#pragma unroll
                for (int i = 0; i < 2 * TILES; i++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) scores[m][i / 2][2 * h + i % 2] *= v_scale[m][h];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            u32 p[TILES][2];
#pragma unroll
            for (int n = 0; n < TILES; n++) {
#pragma unroll
                for (int h = 0; h < 2; h++)
                    p[n][h] = transpose_halves(pack_halves(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
            }
            if (VALUE != FP8) {
                const u32 one = 0x3c003c00u;
#pragma unroll
                for (int n = 0; n < TILES; n++) mma_halves(weights[n], one, one, one, one, p[n][0], p[n][1]);
            }
            constexpr int AT_ONCE = V_CHUNKS % 2 == 0 ? 2 : 1;
#pragma unroll
            for (int i = 0; i < V_CHUNKS; i += AT_ONCE) {
                // Of each chunk its keys 0 to 7, and 8 to 15: two bytes of a key, and the same of the next one.
                u32 v[4];
                const u32 at = V_CHUNKS % 3 == 0 ? v_at + i * 16 : v_at ^ i * 16;
                const u32 address = stages + reading + S::V_AT + m * 16 * S::V_BYTES + at;
                if (AT_ONCE == 2) load_matrices_transposed(v, address);
                else load_two_transposed(v[0], v[1], address);
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    u32 x[2][4];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const u32 word = v[2 * j + h];
                        if (VALUE == INT4) {
                            x[h][0] = word & 0x000f000fu;
                            x[h][1] = word >> 8 & 0x000f000fu;
                            x[h][2] = word & 0x00f000f0u;
                            x[h][3] = word >> 8 & 0x00f000f0u;
                        } else if (VALUE == INT8) {
                            x[h][0] = mask_flip<0x00ff00ffu, 0x00800080u>(word);
                            x[h][1] = mask_flip<0x00ff00ffu, 0x00800080u>(word >> 8);
                        } else {
                            widen_e4m3(word, x[h][0], x[h][1]);
                        }
                    }
#pragma unroll
                    for (int high = 0; high < (VALUE == INT4 ? 2 : 1); high++) {
                        const int tile = VALUE == INT4 ? 2 * (i + j) + high : i + j;
#pragma unroll
                        for (int n = 0; n < TILES; n++)
                            mma_halves(o[tile][n], x[0][2 * high], x[0][2 * high + 1], x[1][2 * high],
                                       x[1][2 * high + 1], p[n][0], p[n][1]);
                    }
                }
            }
        }
        __syncwarp();
        reading = after(reading);
        writing = after(writing);
    }

    wait_copies<0>();
    __syncthreads();
    float* merged = (float*)shared;  // [WARPS][ROWS][HEAD_DIM]
    const float unit = __uint_as_float((most - WEIGHT_BITS) << 23);
#pragma unroll
    for (int tile = 0; tile < OUT_TILES; tile++) {
        // The lane's two columns of a tile, as they came in a pair of bytes.
        const int column = (VALUE == INT4 ? tile / 2 * 16 + tile % 2 * HALF : tile * 16) + g * 2;
        // What codes count for, and how much less they stand for.
        const float count = VALUE == FP8 ? 0x1p8f : VALUE == INT4 && tile % 2 == 1 ? 0x1p20f : 0x1p24f;
        const float bias = VALUE == FP8 ? 0 : VALUE == INT4 ? 7.5f : 128;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int row = n * 8 + t * 2 + c;
                if (row >= work.rows) continue;
                float* to = merged + (warp * ROWS + row) * HEAD_DIM;
                const float less = bias * weights[n][c];
                const float x = (o[tile][n][c] * count - less) * unit, y = (o[tile][n][2 + c] * count - less) * unit;
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
