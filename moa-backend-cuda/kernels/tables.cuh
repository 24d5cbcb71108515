// What the host passes to every kernel. Mirrored by `src/kernels/tables.rs`; sizes are asserted there.
// Plain pointers, element strides and small tables, so that any engine can launch the kernels on
// its own memory and stream. No standard headers: NVRTC needs no include path.
#pragma once

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// One sequence of the batch. Positions of its new tokens begin at lens[sequence].
struct Sequence {
    void* k;         // cached keys, [slots, HEAD_DIM]
    void* v;         // cached values, the same
    i64 first;       // packed row of its first new token in q, k, v and out
    int tokens;      // new tokens, at least 1
    int first_item;  // tile kernels: tiles of the sequences before it in this launch
    int committed;   // 1: `append` has already put the new tokens into the cache
    int padding;
};

// One KV head of one sequence, [sequences, kv_heads]: moa-core's HeadRow, whose numbers but the offset fit
// 31 bits.
struct Head {
    u32 offset;      // first slot
    int sink_slots;  // slots 0.. of the head hold positions 0..sink_slots
    int ring;        // then a ring: position p lies in slot sink_slots + (p - sink_slots) % ring
    int sink;        // the mask: key <= query && (key < sink || query - key < window)
    int window;
};

// extend_gangs: what a gang of blocks does next. Each block takes a tile of its own, all take the same steps of 128
// keys, so that keys are in the L2 cache for all but the first.
struct Piece {
    int sequence;
    u16 kv_head;
    u16 first_tile;  // of the gang's first block; blocks after the last tile do nothing
    u16 first_step;  // counted from the last keys that a tile sees
    u16 end_step;    // 0xffff: all the rest
    int partial;     // partial result of the first block, then those of the others; -1: the piece is all of its tiles
};

// merge_tiles: tiles that gangs share.
struct Merge {
    int sequence;
    u16 kv_head;
    u16 first_tile;
    int partial;     // the first of the results [parts, blocks of a gang]
    int parts;       // at most 32
};

// Where one KV head of one sequence keeps codes and scales, [sequences, kv_heads], in bytes from Sequence::k. Plain
// heads of caches that have narrow ones too lie first, as in other caches, with offsets among themselves.
struct Narrow {
    i64 k;       // codes of keys, [slots, bytes of a row]
    i64 v;       // codes of values
    i64 scales;  // bf16 pairs (key, value), [slots]
    int kind;    // narrow.cuh; 0: a plain head
    int padding;
};

// A packed tensor [tokens, heads, HEAD_DIM]; strides in elements, the innermost is 1.
struct Packed {
    void* data;
    i64 token;
    i64 head;
};

// Query rows are (token, query head of the group) pairs, token * group + query head: a tile of rows
// belongs to one KV head and reads its keys once for the whole group.
//
// Tile kernels: a sequence has ceil(tokens * group / TILE_ROWS) * kv_heads tiles, TILE_ROWS = 128
// (wgmma.cu, any grid up to num_tiles blocks, or gangs of blocks) or 64 (tile.cu, one block a tile). Split kernels:
// tokens * group <= 16; the keys that a (sequence, KV head) sees are cut every split_keys(count) keys, whatever else is
// in the batch.
#define MAX_SPLITS 32
#ifndef MIN_SPLIT_KEYS
#define MIN_SPLIT_KEYS 512
#endif
__device__ __forceinline__ int split_keys(int count) {
    const int keys = (count + MAX_SPLITS * 64 - 1) / (MAX_SPLITS * 64) * 64;
    return keys > MIN_SPLIT_KEYS ? keys : MIN_SPLIT_KEYS;
}

struct ExtendArgs {
    Packed q, k, v, out;          // k and v: new tokens; not read where committed
    float* lse;                   // [tokens, query_heads], or null
    const Sequence* sequences;
    const Head* heads;
    const int* lens;              // tokens cached before this call, [sequences]
    int num_sequences;
    int query_heads;
    int kv_heads;
    float scale;
    // Tile kernels: KV heads of each sequence in the order in which to start them, [sequences, kv_heads].
    const int* order;
    union {
        // Split kernel: work items (sequence * kv_heads + kv head, split), one block each.
        const int2* items;
        // extend_gangs: [rounds, gangs].
        const Piece* pieces;
    };
    // Partial results: [items, 16, HEAD_DIM] then [items, 16, 2] (maximum, sum) of the split kernel;
    // [num_items, 128, HEAD_DIM] then [num_items, 128, 2] of extend_gangs.
    float* partial;
    // Splits finished, [sequences * kv_heads], 0 between launches.
    int* finished;
    union {
        // First item and number of splits of each (sequence, kv head), [sequences * kv_heads].
        const int2* splits;
        // merge_tiles.
        const Merge* merges;
    };
    // wgmma.cu: next tile and blocks that are done, [2], 0 between launches.
    int* tickets;
    const float* sinks;           // a logit of each query head that is in its denominator alone, or null
    int num_items;
    int num_tiles;                // wgmma.cu: tiles of the launch, which blocks take in turn; or `pieces`
    float softcap;                // modules compiled with SOFTCAP: scores become softcap * tanh(score / softcap)
    // decode.cu, 1: no kernel that may still run writes tables, lengths, or keys and values before the new tokens'.
    int settled;
    // Added to Sequence::k and v: where widened copies of narrow heads lie, or 0.
    i64 base;
    const Narrow* narrow;         // narrow_decode.cu, [sequences, kv_heads]
    // decode.cu, of one token a sequence, 1: q and k come as they are before `append`, which is not launched.
    int appends;
    int padding;
    const float2* rope;           // with it, as AppendArgs::rope, pairs (i, i + HEAD_DIM / 2)
};

struct AppendArgs {
    Packed q, k, v;               // q.data null: only k and v
    Packed q_out, k_out;          // rotated; may be q and k themselves; data null: not written
    const float2* rope;           // [positions, HEAD_DIM / 2] (cos, sin) by absolute position, or null
    const Sequence* sequences;
    const Head* heads;
    const int* lens;
    int num_sequences;
    int query_heads;
    int kv_heads;
    int interleaved;              // rotate pairs (2i, 2i + 1) instead of (i, i + HEAD_DIM / 2)
    int commit;                   // write k and v into the caches: 1 of plain heads, 2 of narrow ones
    int padding;
    // narrow.cu: [sequences, kv_heads], and where narrow heads of the new tokens go in 16 bits, as `Widened` says.
    const Narrow* narrow;
    const Head* wide_heads;
    i64 wide_k;
    i64 wide_v;
    const float* key_shift;       // [kv_heads, HEAD_DIM], added to keys that were rotated; or null
    const float* key_feedback;    // append_narrow_fed: [kv_heads, HEAD_DIM, HEAD_DIM] of `moa_core::key_feedback`, or null
};

// Copies of what the new tokens' queries see of narrow heads, rounded and of the tensors' type: a cache whose
// rings are long enough for all of it.
struct WidenArgs {
    const Sequence* sequences;
    const Head* heads;
    const Narrow* narrow;
    const Head* wide_heads;       // offset, sink_slots and ring of the copy
    const int* lens;
    i64 wide_k;                   // addresses, [slots, HEAD_DIM]
    i64 wide_v;
    int num_sequences;
    int kv_heads;
};

// A few words on their way to the device: 4096 bytes, as many as an argument may have.
struct PutArgs {
    unsigned* to;
    int words;
    int padding;
    unsigned data[1020];
};

// One sequence under full causal attention. Blocks are INFLUENCE_BLOCK tokens a side.
#define INFLUENCE_BLOCK 64
struct InfluenceArgs {
    Packed q, k, v, out, d_out;
    const float* lse;  // [tokens, query_heads]
    float* blocks;     // [kv_heads, ceil(tokens / 64), ceil(tokens / 64)], written up to the diagonal
    int tokens;
    int query_heads;
    int kv_heads;
    int absolute;      // 1: sums of absolute values
    float scale;
    int window;        // most recent keys that a query sees; at most the tokens
};
