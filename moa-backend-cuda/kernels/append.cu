// append: rotates q and k (RoPE) and writes k and v of new tokens into the ring caches.
// advance: moves the sequences' lengths on, so that a captured step can be replayed.
// put: brings small tables of a step to the device, as its argument.
//
// A row is the vector of one (token, head) and has HEAD_DIM / 8 threads: grid (ceil(max tokens * heads /
// ROWS), sequences), block 256, where heads = query_heads + 2 * kv_heads (q, then k, then v).
#include "common.cuh"

constexpr int ROW_THREADS = HEAD_DIM / 8;
constexpr int ROWS = 256 / ROW_THREADS;

extern "C" __global__ void __launch_bounds__(256) append(const __grid_constant__ AppendArgs args) {
    start();
    const Sequence sequence = args.sequences[blockIdx.y];
    const int heads = args.query_heads + 2 * args.kv_heads;
    const int row = threadIdx.x / ROW_THREADS, part = threadIdx.x % ROW_THREADS;
    const int task = blockIdx.x * ROWS + row;
    const int token = task / heads;
    int head = task % heads;
    if (row >= ROWS || token >= sequence.tokens) return;
    const int len = args.lens[blockIdx.y];
    const int position = len + token;

    const bool is_query = head < args.query_heads;
    head -= is_query ? 0 : args.query_heads;
    const bool is_key = !is_query && head < args.kv_heads;
    head -= is_query || is_key ? 0 : args.kv_heads;
    const Packed in = is_query ? args.q : is_key ? args.k : args.v;
    if (in.data == nullptr) return;

    // A thread holds the element pairs 4 * part to 4 * part + 3: (i, i + HEAD_DIM / 2), or (2i, 2i + 1).
    const int half = HEAD_DIM / 2;
    const int first = args.interleaved ? 8 * part : 4 * part;
    const int second = args.interleaved ? first + 4 : first + half;
    const u16* from = (const u16*)in.data + (sequence.first + token) * in.token + head * in.head;
    uint2 a = *(const uint2*)(from + first), b = *(const uint2*)(from + second);
    if (args.rope != nullptr && (is_query || is_key)) {
        const float4* table = (const float4*)(args.rope + (i64)position * half + 4 * part);
        const float4 low = table[0], high = table[1];
        if (args.interleaved) {
            // Two pairs' first elements, then their second ones.
            auto turn = [](uint2& pairs, const float4& turns) {
                u32 x = __byte_perm(pairs.x, pairs.y, 0x5410), y = __byte_perm(pairs.x, pairs.y, 0x7632);
                turn2(x, y, turns);
                pairs = make_uint2(__byte_perm(x, y, 0x5410), __byte_perm(x, y, 0x7632));
            };
            turn(a, low);
            turn(b, high);
        } else {
            turn2(a.x, b.x, low);
            turn2(a.y, b.y, high);
        }
        if (is_key && args.key_shift != nullptr) {
            const float* const shift = args.key_shift + head * HEAD_DIM;
            add4(a, *(const float4*)(shift + first));
            add4(b, *(const float4*)(shift + second));
        }
    }
    auto write = [&](u16* to) {
        *(uint2*)(to + first) = a;
        *(uint2*)(to + second) = b;
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
    wait_for_previous_kernel();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) lens[i] += sequences[i].tokens;
}

extern "C" __global__ void __launch_bounds__(256) put(const __grid_constant__ PutArgs args) {
    wait_for_previous_kernel();
    for (int i = threadIdx.x; i < args.words; i += blockDim.x) args.to[i] = args.data[i];
}
