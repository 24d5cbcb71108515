// append_narrow, append_narrow_fed: `append` for caches with narrow heads, whose rows it rounds to codes and scales.
// widen: 16-bit copies of what a narrow head's cache holds, for the kernels of long chunks.
//
// A row has ROW_LANES threads of eight neighbouring elements, all in one warp, which keeps together: grids
// (ceil(max tokens * heads / ROWS), sequences) where heads = query_heads + 2 * kv_heads (q, then k, then v), and
// (ceil(max keys / ROWS), sequences * kv_heads); block 256.
#include "narrow.cuh"

constexpr int ROWS = 256 / ROW_LANES;
constexpr int HALF_LANES = HEAD_DIM / 16;

__device__ __forceinline__ int slot_of(const Head& head, int position) {
    return position < head.sink_slots
               ? position
               : head.sink_slots + (position - head.sink_slots) % head.ring;
}

__device__ __forceinline__ void unpack8(float (&x)[8], const u32 (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack2(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void store_row(i64 rows, i64 row, int lane, const float (&x)[8]) {
    *(uint4*)((u16*)rows + row * HEAD_DIM + lane * 8) =
        make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}

// Rotated and back multiplies by ROTATION.
__device__ __forceinline__ void rotate_if(bool wanted, float factor, float (&x)[8], int lane) {
    if (!__any_sync(~0u, wanted)) return;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = x[i];
    rotate(y, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = wanted ? y[i] * factor : x[i];
}

template <bool FED>
__device__ __forceinline__ void append_rows(const AppendArgs& args) {
    start();
    const Sequence sequence = args.sequences[blockIdx.y];
    const int heads = args.query_heads + 2 * args.kv_heads;
    const int row = threadIdx.x / ROW_LANES, lane = threadIdx.x % ROW_LANES;
    const int task = blockIdx.x * ROWS + row;
    const int token = task / heads;
    int head = task % heads;
    const int len = args.lens[blockIdx.y];
    const int position = len + token;

    const bool is_query = head < args.query_heads;
    head -= is_query ? 0 : args.query_heads;
    const bool is_key = !is_query && head < args.kv_heads;
    head -= is_query || is_key ? 0 : args.kv_heads;
    const Packed in = is_query ? args.q : is_key ? args.k : args.v;
    const bool active = token < sequence.tokens && lane * 8 < HEAD_DIM && in.data != nullptr;

    u32 words[4] = {};
    if (active) {
        const u16* from = (const u16*)in.data + (sequence.first + token) * in.token + head * in.head;
        const uint4 all = *(const uint4*)(from + lane * 8);
        words[0] = all.x;
        words[1] = all.y;
        words[2] = all.z;
        words[3] = all.w;
    }
    if (args.rope != nullptr) {
        // (i, i + HEAD_DIM / 2) are in two lanes, (2i, 2i + 1) in one.
        const bool lower = lane < HALF_LANES;
        const int other = (threadIdx.x + (lower ? HALF_LANES : 32 - HALF_LANES)) % 32;
        u32 partner[4];
#pragma unroll
        for (int i = 0; i < 4; i++) partner[i] = __shfl_sync(~0u, words[i], other);
        if (active && (is_query || is_key)) {
            const float2* table = args.rope + (i64)position * (HEAD_DIM / 2);
            if (args.interleaved) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 angle = table[lane * 4 + i], x = unpack2(words[i]);
                    words[i] = pack2(x.x * angle.x - x.y * angle.y, x.y * angle.x + x.x * angle.y);
                }
            } else {
                const float4* angles = (const float4*)(table + (lower ? lane : lane - HALF_LANES) * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float4 angle = angles[i];
                    const float2 x = unpack2(words[i]), y = unpack2(partner[i]);
                    // As `append` and `rope` do, to the bit.
                    const float a = __fmul_rn(y.x, angle.y), b = __fmul_rn(y.y, angle.w);
                    words[i] = pack2(__fmaf_rn(x.x, angle.x, lower ? -a : a), __fmaf_rn(x.y, angle.z, lower ? -b : b));
                }
            }
            if (is_key && args.key_shift != nullptr) {
                const float4* const shift = (const float4*)(args.key_shift + head * HEAD_DIM + lane * 8);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint2 four = make_uint2(words[2 * i], words[2 * i + 1]);
                    add4(four, shift[i]);
                    words[2 * i] = four.x;
                    words[2 * i + 1] = four.y;
                }
            }
        }
    }
    const uint4 all = make_uint4(words[0], words[1], words[2], words[3]);
    if (active && (is_query || is_key)) {
        const Packed out = is_query ? args.q_out : args.k_out;
        if (out.data != nullptr)
            *(uint4*)((u16*)out.data + (sequence.first + token) * out.token + head * out.head + lane * 8) = all;
    }

    const bool stored = active && !is_query;
    const i64 at = (i64)blockIdx.y * args.kv_heads + (stored ? head : 0);
    const Head layout = args.heads[at];
    const Narrow narrow = args.narrow[at];
    // The same append would overwrite the others again.
    const bool kept = position < layout.sink_slots || position + layout.ring >= len + sequence.tokens;
    if (stored && narrow.kind == HEAD_PLAIN && kept && (args.commit & 1))
        *(uint4*)((u16*)(is_key ? sequence.k : sequence.v) +
                  (layout.offset + (i64)slot_of(layout, position)) * HEAD_DIM + lane * 8) = all;
    const bool rounded = stored && narrow.kind != HEAD_PLAIN && ((args.commit & 2) || args.wide_k != 0);
    if (!__any_sync(~0u, rounded)) return;

    const int type = is_key ? key_type(narrow.kind) : value_type(narrow.kind);
    float x[8];
    unpack8(x, words);
    rotate_if(rounded && rotates(type), 1, x, lane);
    const u32 scale = scale_of(largest(x), type);
    if constexpr (FED) {
        const bool fed = rounded && is_key && type == INT4;
        feed_back(x, scale, fed, args.key_feedback + (fed ? (i64)head * HEAD_DIM * HEAD_DIM : 0), lane);
    }
    const uint2 codes = round_row(x, scale, type);
    const uint2 joined = join_halves(codes, lane);
    if (rounded && kept && (args.commit & 2)) {
        const int slot = slot_of(layout, position);
        char* to = (char*)sequence.k + (is_key ? narrow.k : narrow.v);
        if (type != INT4) *(uint2*)(to + (i64)slot * ROW_BYTES<INT8> + lane * 8) = codes;
        else if (lane < HALF_LANES) *(uint2*)(to + (i64)slot * ROW_BYTES<INT4> + lane * 8) = joined;
        if (lane == 0)
            *(u16*)((char*)sequence.k + narrow.scales + (i64)slot * 4 + (is_key ? 0 : 2)) = (u16)scale;
    }
    if (args.wide_k == 0) return;
    rotate_if(rounded && rotates(type), 1.0f / ROTATION, x, lane);
    if (rounded) {
        const Head wide = args.wide_heads[at];
        store_row(is_key ? args.wide_k : args.wide_v, wide.offset + (i64)slot_of(wide, position), lane, x);
    }
}

extern "C" __global__ void __launch_bounds__(256) append_narrow(const __grid_constant__ AppendArgs args) {
    append_rows<false>(args);
}
// With feedback, which takes three times the registers.
extern "C" __global__ void __launch_bounds__(256) append_narrow_fed(const __grid_constant__ AppendArgs args) {
    append_rows<true>(args);
}

// A lane's codes of a row, one in a byte.
__device__ __forceinline__ uint2 load_codes(const char* rows, i64 row, int lane, int type) {
    if (type != INT4) return *(const uint2*)(rows + row * ROW_BYTES<INT8> + lane * 8);
    const bool lower = lane < HALF_LANES;
    const uint2 both = *(const uint2*)(rows + row * ROW_BYTES<INT4> + (lower ? lane : lane - HALF_LANES) * 8);
    const int shift = lower ? 0 : 4;
    return make_uint2(both.x >> shift & 0x0f0f0f0fu, both.y >> shift & 0x0f0f0f0fu);
}

extern "C" __global__ void __launch_bounds__(256) widen(const __grid_constant__ WidenArgs args) {
    const Narrow narrow = args.narrow[blockIdx.y];
    if (narrow.kind == HEAD_PLAIN) return;
    const int s = blockIdx.y / args.kv_heads;
    const Sequence sequence = args.sequences[s];
    const Head head = args.heads[blockIdx.y], wide = args.wide_heads[blockIdx.y];
    const int len = args.lens[s];
    const KeyList list(head, len, len + sequence.tokens - 1);
    const int index = blockIdx.x * ROWS + threadIdx.x / ROW_LANES, lane = threadIdx.x % ROW_LANES;
    // All keys but the new ones are cached.
    const bool active = index < list.count - sequence.tokens && lane * 8 < HEAD_DIM;
    if (!__any_sync(~0u, active)) return;
    const int position = active ? list.position(index) : 0;
    const int slot = active ? slot_of(head, position) : 0;
    const char* base = (const char*)sequence.k;
    uint2 codes[2] = {};
    u32 scales = 0;
    if (active) {
        codes[0] = load_codes(base + narrow.k, slot, lane, key_type(narrow.kind));
        codes[1] = load_codes(base + narrow.v, slot, lane, value_type(narrow.kind));
        scales = *(const u32*)(base + narrow.scales + (i64)slot * 4);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int type = i == 0 ? key_type(narrow.kind) : value_type(narrow.kind);
        float x[8];
        widen_codes(x, codes[i], i == 0 ? scales & 0xffff : scales >> 16, type);
        rotate_if(rotates(type), 1.0f / ROTATION, x, lane);
        if (active)
            store_row(i == 0 ? args.wide_k : args.wide_v, wide.offset + (i64)slot_of(wide, position), lane, x);
    }
}
