// Choice of a token by temperature, top-k, top-p and min-p: one block of 1024 threads per row of
// logits. Weights are summed as whole numbers, so that equal inputs give equal tokens whatever order
// threads run in.
#include "common.cuh"

// How a row's token is chosen. Mirrored by `src/ops/sample.rs`, as the next one.
struct SampleRow {
    int unit;             // uniform random number in [0, 2^31)
    float temperature;    // 0 takes the likeliest token, the lowest of equals
    int top_k;            // tokens to keep; 0 keeps all
    float top_p;          // share of probability to keep; 1 keeps all
    float min_p;          // share of the likeliest token's probability; 0 keeps all
};

struct SampleArgs {
    const float* logits;  // [rows, stride]
    const SampleRow* rows;
    int* out;             // token, or -1 where a logit is infinite or not a number
    i64 stride;
    int vocab;
    int padding;
};

#define THREADS 1024
#define WARPS (THREADS / 32)
#define ONE 1099511627776.0f  // 2^40: 2^23 tokens of weight 1 do not overflow
#define FLIGHT 8              // reads of a thread under way
#define SLOTS 4096

// Calls `use` for every `step`th token from `first` on.
template <typename Use>
__device__ __forceinline__ void each(const float* logits, int first, int end, int step, Use use) {
    for (; first < end; first += FLIGHT * step) {
        float z[FLIGHT];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            const int i = first + j * step;
            z[j] = i < end ? __ldg(logits + i) : 0;
        }
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            const int i = first + j * step;
            if (i < end) use(i, z[j]);
        }
    }
}

struct Row {
    const float* logits;
    int vocab;
    float scale;
    float most;

    // Relative to the likeliest token's.
    __device__ __forceinline__ float weight(float logit) const {
        return fminf(exp2_fast(fmaf(logit, scale, -most)), 1.0f);
    }
};

__device__ __forceinline__ u64 mass(float weight) { return (u64)(weight * ONE); }

// Amounts by digits of the bits of weights, which are below 2^30: 9 bits, 10, and 11. Weights have few exponents, so
// that lanes of a warp often add to one digit: each has copies, for lanes of their own.
struct Bins {
    u32 low[SLOTS];
    u32 high[SLOTS];

    // There is no addition of 64 bits in shared memory.
    __device__ __forceinline__ void add(int slot, u64 amount) {
        if (amount == 0) return;
        const u32 part = (u32)amount;
        const u32 before = atomicAdd(&low[slot], part);
        const u32 rest = (u32)(amount >> 32) + (before > ~part);
        if (rest != 0) atomicAdd(&high[slot], rest);
    }
    __device__ __forceinline__ u64 at(int slot) const { return (u64)high[slot] << 32 | low[slot]; }
};

struct Shared {
    Bins bins;
    u64 warps[WARPS];
    u64 left;
    u32 bits;
    int chosen;
};

// What this thread and those after it have.
__device__ __forceinline__ u64 from_here(u64 x, u64& total, u64* warps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const u64 after = __shfl_down_sync(0xffffffff, x, offset);
        if (lane + offset < 32) x += after;
    }
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    u64 all = warps[lane];
#pragma unroll
    for (int offset = 1; offset < WARPS; offset *= 2) {
        const u64 after = __shfl_down_sync(0xffffffff, all, offset);
        if (lane + offset < WARPS) all += after;
    }
    total = __shfl_sync(0xffffffff, all, 0);
    const u64 after = __shfl_sync(0xffffffff, all, (warp + 1) % WARPS);
    return warp + 1 < WARPS ? x + after : x;
}

// The largest number t such that the numbers from t up, each with its `amount`, come to at least what is `wanted` of
// all amounts, which is no more than they are; weights below `least` do not count. Positive floats are ordered as
// their bits are.
template <typename Wanted, typename Amount>
__device__ u32 threshold(const Row& row, u32 least, Shared& shared, Wanted wanted, Amount amount) {
    u32 prefix = 0;
    u64 left = 0;
#pragma unroll 1
    for (int round = 0; round < 3; round++) {
        const int width = 9 + round, shift = round == 0 ? 21 : round == 1 ? 11 : 0;
        const int digits = 1 << width, copies = SLOTS >> width;
        __syncthreads();  // the bins may still be read
        for (int slot = threadIdx.x; slot < SLOTS; slot += THREADS)
            shared.bins.low[slot] = shared.bins.high[slot] = 0;
        __syncthreads();
        const int copy = threadIdx.x & (copies - 1);
        each(row.logits, threadIdx.x, row.vocab, THREADS, [&](int, float logit) {
            const float weight = row.weight(logit);
            const u32 bits = __float_as_uint(weight);
            if (bits >= least && bits >> (shift + width) == prefix)
                shared.bins.add((int)(bits >> shift & (digits - 1)) * copies + copy, amount(weight));
        });
        __syncthreads();
        // Two digits of a thread in the last round, in the first one only of half of the threads.
        const int mine = digits > THREADS ? 2 : 1, first = threadIdx.x * mine;
        u64 own = 0, second = 0, total;
        for (int at = 0; at < copies && first < digits; at++) {
            own += shared.bins.at(first * copies + at);
            if (mine == 2) second += shared.bins.at((first + 1) * copies + at);
        }
        const u64 here = from_here(own + second, total, shared.warps);
        if (round == 0) left = wanted(total);
        const u64 above = here - own - second;
        if (above < left && left <= here) {
            const bool is_second = left <= above + second;
            shared.bits = prefix << width | (u32)(first + is_second);
            shared.left = left - above - (is_second ? 0 : second);
        }
        __syncthreads();
        prefix = shared.bits;
        left = shared.left;
    }
    return prefix;
}

// The token at whose weight the sum of those that count, in the order of ids, exceeds the drawn share of the total. All
// threads get it.
__device__ int draw(const Row& row, u32 least, int unit, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto counted = [&](float logit) {
        const float weight = row.weight(logit);
        return __float_as_uint(weight) >= least ? mass(weight) : 0;
    };
    int first = 0, count = row.vocab;
    u64 drawn = 0;
    // A part of the row for each warp, and again of the part in which it is.
    for (bool is_whole = true; is_whole || count > 1; is_whole = false) {
        const int each_has = (count + WARPS - 1) / WARPS;
        const int own = min(first + warp * each_has, first + count);
        u64 sum = 0;
        each(row.logits, own + lane, min(own + each_has, first + count), 32,
             [&](int, float logit) { sum += counted(logit); });
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        __syncthreads();  // the last sums may still be read
        if (lane == 0) shared.warps[warp] = sum;
        __syncthreads();
        u64 through = shared.warps[lane];
#pragma unroll
        for (int offset = 1; offset < WARPS; offset *= 2) {
            const u64 before = __shfl_up_sync(0xffffffff, through, offset);
            if (lane >= offset) through += before;
        }
        if (is_whole) {
            const u64 total = __shfl_sync(0xffffffff, through, WARPS - 1);
            drawn = __umul64hi(total, (u64)(u32)unit << 33);
        }
        const int part = __ffs(__ballot_sync(0xffffffff, drawn < through)) - 1;
        const u64 before = __shfl_sync(0xffffffff, through, (part + WARPS - 1) % WARPS);
        drawn -= part > 0 ? before : 0;
        const int start = first + part * each_has;
        count = min(each_has, first + count - start);
        first = start;
    }
    return first;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(const __grid_constant__ SampleArgs args) {
    __shared__ Shared shared;
    __shared__ float largest[WARPS];
    const SampleRow how = args.rows[blockIdx.x];
    Row row;
    row.logits = args.logits + blockIdx.x * args.stride;
    row.vocab = args.vocab;
    row.scale = LOG2E / how.temperature;

    float most = NEG_INF;
    int bad = 0;
    each(row.logits, threadIdx.x, args.vocab, THREADS, [&](int, float z) {
        bad |= !(z < -NEG_INF);
        most = fmaxf(most, z);
    });
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    if (threadIdx.x == 0) shared.chosen = args.vocab;
    bad = __syncthreads_or(bad);
    most = largest[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
    if (bad || most == NEG_INF) {
        if (threadIdx.x == 0) args.out[blockIdx.x] = -1;
        return;
    }
    if (how.temperature == 0) {
        int own = args.vocab;
        each(row.logits, threadIdx.x, args.vocab, THREADS,
             [&](int i, float z) { own = z == most ? min(own, i) : own; });
        if (own < args.vocab) atomicMin(&shared.chosen, own);
        __syncthreads();
        if (threadIdx.x == 0) args.out[blockIdx.x] = shared.chosen;
        return;
    }
    row.most = most * row.scale;
    // Nearly 1: the product above is rounded.
    const u32 likeliest = __float_as_uint(row.weight(most));

    u32 least = 0;
    if (how.top_k > 0 && how.top_k < args.vocab)
        least = threshold(
            row, 0, shared, [&](u64) { return (u64)how.top_k; }, [](float) { return 1ull; });
    if (how.top_p < 1) {
        // Rounded down, and 1 at least: the likeliest token always counts.
        const auto wanted = [&](u64 total) {
            const u64 share = (u64)((double)total * (double)how.top_p);
            return share > 0 ? share : 1;
        };
        least = max(least, threshold(row, least, shared, wanted, mass));
    }
    least = min(max(least, __float_as_uint(how.min_p)), likeliest);
    const int chosen = draw(row, least, how.unit, shared);
    if (threadIdx.x == 0) args.out[blockIdx.x] = chosen;
}
