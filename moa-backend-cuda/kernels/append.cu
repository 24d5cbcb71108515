// append: rotates q and k (RoPE) and writes k and v of new tokens into the ring caches.
// advance: moves the sequences' lengths on, so that a captured step can be replayed.
//
// One warp per (token, head): grid (ceil(max tokens * heads / 8), sequences), block 256, where
// heads = query_heads + 2 * kv_heads (q, then k, then v).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) append(const __grid_constant__ AppendArgs args) {
    const Sequence sequence = args.sequences[blockIdx.y];
    const int heads = args.query_heads + 2 * args.kv_heads;
    const int task = blockIdx.x * 8 + threadIdx.x / 32;
    const int token = task / heads;
    int head = task % heads;
    if (token >= sequence.tokens) return;
    const int lane = threadIdx.x % 32;
    const int len = args.lens[blockIdx.y];
    const int position = len + token;

    const bool is_query = head < args.query_heads;
    head -= is_query ? 0 : args.query_heads;
    const bool is_key = !is_query && head < args.kv_heads;
    head -= is_query || is_key ? 0 : args.kv_heads;
    const Packed in = is_query ? args.q : is_key ? args.k : args.v;
    if (in.data == nullptr) return;

    // Element pairs (i, i + HEAD_DIM / 2), or (2i, 2i + 1): lane holds i = lane, lane + 32, ...
    const u16* from = (const u16*)in.data + (sequence.first + token) * in.token + head * in.head;
    const int half = HEAD_DIM / 2;
    const bool rotate = args.rope != nullptr && (is_query || is_key);
    u16 low[(HEAD_DIM + 63) / 64], high[(HEAD_DIM + 63) / 64];
#pragma unroll
    for (int n = 0; n < (HEAD_DIM + 63) / 64; n++) {
        int i = n * 32 + lane;
        if (i >= half) break;
        int a = args.interleaved ? 2 * i : i;
        int b = args.interleaved ? 2 * i + 1 : i + half;
        low[n] = from[a];
        high[n] = from[b];
        if (rotate) {
            float2 turn = args.rope[(i64)position * half + i];
            float2 x = unpack2((u32)low[n] | (u32)high[n] << 16);
            u32 y = pack2(x.x * turn.x - x.y * turn.y, x.y * turn.x + x.x * turn.y);
            low[n] = (u16)y;
            high[n] = (u16)(y >> 16);
        }
    }
    auto write = [&](u16* to) {
#pragma unroll
        for (int n = 0; n < (HEAD_DIM + 63) / 64; n++) {
            int i = n * 32 + lane;
            if (i >= half) break;
            to[args.interleaved ? 2 * i : i] = low[n];
            to[args.interleaved ? 2 * i + 1 : i + half] = high[n];
        }
    };
    if (is_query || is_key) {
        const Packed out = is_query ? args.q_out : args.k_out;
        if (out.data != nullptr)
            write((u16*)out.data + (sequence.first + token) * out.token + head * out.head);
        if (is_query) return;
    }
    if (!args.commit) return;
    const Head layout = args.heads[(i64)blockIdx.y * args.kv_heads + head];
    i64 slot;
    if (position < layout.sink_slots) {
        slot = position;
    } else {
        // The same append would overwrite it again.
        if (position + layout.ring < len + sequence.tokens) return;
        slot = layout.sink_slots + (position - layout.sink_slots) % layout.ring;
    }
    write((u16*)(is_key ? sequence.k : sequence.v) + (layout.offset + slot) * HEAD_DIM);
}

extern "C" __global__ void advance(int* lens, const Sequence* sequences, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) lens[i] += sequences[i].tokens;
}
