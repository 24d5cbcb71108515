// Element types, asynchronous copies, matrix fragments and the key list, shared by all kernels.
#pragma once
#include "tables.cuh"

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NEG_INF __int_as_float(0xff800000)

// ---- 16-bit elements, two in a register -------------------------------------------------------

__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 packed;
#if DTYPE_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

__device__ __forceinline__ float2 unpack2(u32 packed) {
    float2 pair;
#if DTYPE_BF16
    pair.x = __uint_as_float(packed << 16);
    pair.y = __uint_as_float(packed & 0xffff0000u);
#else
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
#endif
    return pair;
}

// Pairs (x, y) of two neighbouring elements each, turned by (cos, sin) in the halves of `turns`.
__device__ __forceinline__ void turn2(u32& x, u32& y, const float4& turns) {
    const float2 a = unpack2(x), b = unpack2(y);
    x = pack2(fmaf(a.x, turns.x, -(b.x * turns.y)), fmaf(a.y, turns.z, -(b.y * turns.w)));
    y = pack2(fmaf(b.x, turns.x, a.x * turns.y), fmaf(b.y, turns.z, a.y * turns.w));
}

// Adds to four neighbouring elements.
__device__ __forceinline__ void add4(uint2& x, const float4& y) {
    const float2 a = unpack2(x.x), b = unpack2(x.y);
    x = make_uint2(pack2(a.x + y.x, a.y + y.y), pack2(b.x + y.z, b.y + y.w));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- scores ---------------------------------------------------------------------------------------
// In units of log2, as the exponentials that they become.

#ifndef SOFTCAP
#define SOFTCAP 0
#endif

// With an error of 2^-21 of the result. tanh.approx has 2^-11, which a softcap would multiply.
__device__ __forceinline__ float tanh_fine(float x) {
    const float size = fabsf(x), square = x * x;
    const float fading = exp2_fast(-2 * LOG2E * size);
    const float far = __fdividef(1 - fading, 1 + fading);
    // Taylor, where that difference would lose digits.
    float slope = fmaf(62.0f / 2835, square, -17.0f / 315);
    slope = fmaf(slope, square, 2.0f / 15);
    slope = fmaf(slope, square, -1.0f / 3);
    const float near = fmaf(size * square, slope, size);
    return copysignf(size < 0.3f ? near : far, x);
}

struct Scores {
    float scale;
    float cap;  // not read without SOFTCAP

    __device__ __forceinline__ Scores(const ExtendArgs& args)
        : scale(SOFTCAP ? args.scale / args.softcap : args.scale * LOG2E),
          cap(args.softcap * LOG2E) {}
    __device__ __forceinline__ float operator()(float product) const {
#if SOFTCAP
        return cap * tanh_fine(product * scale);
#else
        return product * scale;
#endif
    }
};

// A row's maximum and the sum of its weights when all keys are in them: the sink joins, if there is one.
struct Finish {
    float inverse;  // factor of the weighted values
    float lse;

    __device__ __forceinline__ Finish(const ExtendArgs& args, int query_head, float maximum, float sum) {
        float share = 1;
        if (args.sinks != nullptr) {
            const float sink = args.sinks[query_head] * LOG2E, top = fmaxf(maximum, sink);
            share = exp2_fast(maximum - top);
            sum = sum * share + exp2_fast(sink - top);
            maximum = top;
        }
        inverse = share * (1 / sum);
        lse = maximum * LN2 + __logf(sum);
    }
};

// ---- consecutive kernels ----------------------------------------------------------------------
// A kernel launched with programmatic serialization may start before the one before it has ended, and
// reads and writes nothing that a kernel before it writes or reads before this. Every kernel launched so waits,
// so that the wait holds for all earlier ones too; and lets the next one start first, which then waits in its place
// on the multiprocessors instead of being launched.

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void start() {
    let_next_kernel_start();
    wait_for_previous_kernel();
}

// ---- shared memory ----------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Rows of HEAD_DIM elements in 16-byte chunks, permuted so that the 8 rows of a matrix fragment
// lie in 8 different bank groups.
#define ROW_CHUNKS (HEAD_DIM / 8)
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
#if HEAD_DIM == 96
    return (u32)(row * ROW_CHUNKS + (chunk ^ ((row >> 1) & 3))) * 16;
#else
    return (u32)(row * ROW_CHUNKS + (chunk ^ (row & 7))) * 16;
#endif
}

// 16 bytes from global to shared memory; zeros if not `valid` (the address is then not read).
__device__ __forceinline__ void copy16_async(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_all_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8]
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if DTYPE_BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- which keys, and where ----------------------------------------------------------------------

// The keys that queries at positions first_query..=last_query see together, as one list without
// gaps: sinks, then the window of the first query up to the last query's own key.
struct KeyList {
    int sinks;  // list entries before the gap
    int gap;    // position - index after it
    int count;

    __device__ __forceinline__ KeyList(const Head& head, int first_query, int last_query) {
        int start = first_query + 1 - head.window;
        bool gapless = start <= head.sink;
        sinks = gapless ? 0 : head.sink;
        gap = gapless ? 0 : start - head.sink;
        count = last_query + 1 - gap;
    }
    __device__ __forceinline__ int position(int index) const {
        return index < sinks ? index : index + gap;
    }
};

// The mask of moa-core for one query, `key <= query && (key < sink || query - key < window)`, on
// indices of a key list.
struct RowMask {
    int last;    // the query's own key
    int first;   // of its window
    int sinks;   // entries below are sinks

    __device__ __forceinline__ RowMask(const Head& head, const KeyList& list, int query)
        : last(query - list.gap),
          first(query + 1 - head.window - list.gap),
          sinks(list.gap > 0 ? list.sinks : head.sink) {}

    // No short cuts: branches would cost more than the comparisons.
    __device__ __forceinline__ bool sees(int index) const {
        return (index <= last) & ((index < sinks) | (index >= first));
    }
    __device__ __forceinline__ RowMask relative_to(int index) const {
        RowMask moved = *this;
        moved.last -= index;
        moved.first -= index;
        moved.sinks -= index;
        return moved;
    }
};

// One stretch of consecutive rows in memory.
struct Stretch {
    const u16* k;
    const u16* v;
    i64 k_stride;
    i64 v_stride;
    bool straight;  // else the rows must be looked up one by one
};

// Where one KV head of one sequence keeps its keys and values: cache, or the new tokens' tensors.
struct KeySource {
    const u16* k_cache;
    const u16* v_cache;
    const u16* k_new;
    const u16* v_new;
    i64 k_stride;
    i64 v_stride;
    int cached;  // positions below lie in the cache
    int len;     // position of the first new token
    int sink_slots;
    int ring;
    int turn;    // ring slots before the window's first position, whole turns

    __device__ __forceinline__ KeySource(const ExtendArgs& args, const Sequence& sequence,
                                         const Head& head, int kv_head, int length,
                                         const KeyList& list) {
        i64 offset = (i64)head.offset * HEAD_DIM;
        k_cache = (const u16*)((const char*)sequence.k + args.base) + offset;
        v_cache = (const u16*)((const char*)sequence.v + args.base) + offset;
        k_new = (const u16*)args.k.data + sequence.first * args.k.token + kv_head * args.k.head;
        v_new = (const u16*)args.v.data + sequence.first * args.v.token + kv_head * args.v.head;
        k_stride = args.k.token;
        v_stride = args.v.token;
        len = length;
        cached = sequence.committed ? 0x7fffffff : length;
        sink_slots = head.sink_slots;
        ring = head.ring;
        int start = max(list.sinks + list.gap - head.sink_slots, 0);
        turn = ring > 0 ? start / ring * ring : 0;
    }

    // Row in the cache if >= 0, else ~(row of the new tokens).
    __device__ __forceinline__ int row(int position) const {
        if (position >= cached) return ~(position - len);
        if (position < sink_slots) return position;
        int r = position - sink_slots - turn;
        return sink_slots + (r >= ring ? r - ring : r);
    }
    __device__ __forceinline__ const u16* key(int row) const {
        return row >= 0 ? k_cache + (i64)row * HEAD_DIM : k_new + (i64)~row * k_stride;
    }
    __device__ __forceinline__ const u16* value(int row) const {
        return row >= 0 ? v_cache + (i64)row * HEAD_DIM : v_new + (i64)~row * v_stride;
    }

    // List entries from `first` on that are consecutive in memory; ends of tensors are not looked at.
    __device__ __forceinline__ int straight(const KeyList& list, int first) const {
        const int p = list.position(first);
        const int in_list = first < list.sinks ? list.sinks - first : 0x7fffffff;
        if (p >= cached) return in_list;
        const int r = p - sink_slots - turn;
        const int in_cache = p < sink_slots ? sink_slots - p : r < ring ? ring - r : 2 * ring - r;
        return min(in_list, min(in_cache, cached - p));
    }

    // Rows of list entries first..=last; almost always one stretch.
    __device__ __forceinline__ Stretch stretch(const KeyList& list, int first, int last) const {
        const int low = row(list.position(first)), high = row(list.position(last));
        Stretch s;
        const bool is_new = low < 0;
        s.straight = is_new == (high < 0) && (is_new ? low - high : high - low) == last - first;
        s.k = key(low);
        s.v = value(low);
        s.k_stride = is_new ? k_stride : HEAD_DIM;
        s.v_stride = is_new ? v_stride : HEAD_DIM;
        return s;
    }
};

// ---- rows that are no numbers -------------------------------------------------------------------
// A product of whole tiles multiplies what the mask hides by 0, and 0 times infinity is no number. Rows that end so are
// computed anew, pair by pair; they stay so if a pair that the mask keeps makes them so.

// Whether one of these is infinite or no number, given the largest `magnitude` of them.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ bool is_none(u32 largest) { return largest >= 0x7f800000u; }

// One row's output, by one warp.
__device__ __forceinline__ void write_pairs(const ExtendArgs& args, const Sequence& sequence,
                                            const Head& head, int kv_head, int len, int row) {
    constexpr int PAIRS = (HEAD_DIM + 63) / 64;
    const int lane = threadIdx.x % 32, group = args.query_heads / args.kv_heads;
    const int token = row / group, query_head = kv_head * group + row - token * group;
    const KeyList list(head, len + token, len + token);
    const KeySource source(args, sequence, head, kv_head, len, list);
    const u32* q = (const u32*)((const u16*)args.q.data + (sequence.first + token) * args.q.token +
                                query_head * args.q.head);
    const Scores scores(args);
    float2 o[PAIRS] = {};
    float maximum = NEG_INF, sum = 0;
#pragma unroll 1
    for (int index = 0; index < list.count; index++) {
        const int from = source.row(list.position(index));
        const u32* k = (const u32*)source.key(from);
        const u32* v = (const u32*)source.value(from);
        float score = 0;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int pair = i * 32 + lane;
            if (pair * 2 >= HEAD_DIM) continue;
            const float2 a = unpack2(q[pair]), b = unpack2(k[pair]);
            score += a.x * b.x + a.y * b.y;
        }
#pragma unroll
        for (int d = 1; d < 32; d *= 2) score += __shfl_xor_sync(~0u, score, d);
        score = scores(score);
        const float top = fmaxf(maximum, score), base = top == NEG_INF ? 0 : top;
        const float decay = exp2_fast(maximum - base), weight = exp2_fast(score - base);
        maximum = top;
        sum = sum * decay + weight;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int pair = i * 32 + lane;
            const float2 value = unpack2(pair * 2 < HEAD_DIM ? v[pair] : 0);
            o[i].x = o[i].x * decay + weight * value.x;
            o[i].y = o[i].y * decay + weight * value.y;
        }
    }
    const Finish finish(args, query_head, maximum, sum);
    u32* to = (u32*)((u16*)args.out.data + (sequence.first + token) * args.out.token +
                     query_head * args.out.head);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = i * 32 + lane;
        if (pair * 2 < HEAD_DIM) to[pair] = pack2(o[i].x * finish.inverse, o[i].y * finish.inverse);
    }
    if (args.lse != nullptr && lane == 0)
        args.lse[(sequence.first + token) * args.query_heads + query_head] = finish.lse;
}

// Writes those of a warp's 16 rows anew of which a lane found something that is no number: lanes 4 r .. 4 r + 3 hold
// parts of rows r and r + 8.
__device__ __forceinline__ void mend_rows(const ExtendArgs& args, const Sequence& sequence,
                                          const Head& head, int kv_head, int len, int first_row,
                                          int rows, bool none_0, bool none_1) {
    const u32 lanes_0 = __ballot_sync(~0u, none_0), lanes_1 = __ballot_sync(~0u, none_1);
    if (__builtin_expect((lanes_0 | lanes_1) == 0, 1)) return;
    // Other lanes wrote them.
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < 16; r++) {
        const u32 lanes = (r < 8 ? lanes_0 : lanes_1) >> r % 8 * 4 & 15;
        if (lanes != 0 && first_row + r < rows)
            write_pairs(args, sequence, head, kv_head, len, first_row + r);
    }
}
