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
#define ONE 1099511627776.0f  // 2^40: 2^23 tokens of weight 1 do not overflow

struct Row {
    const float* logits;
    int vocab;
    float scale;
    float most;

    // Relative to the likeliest token's.
    __device__ __forceinline__ float weight(int i) const {
        return fminf(exp2_fast(fmaf(logits[i], scale, -most)), 1.0f);
    }
};

__device__ __forceinline__ u64 mass(float weight) { return (u64)(weight * ONE); }

// The largest number t such that the numbers from t up, each with its `amount`, come to `wanted` at
// least; weights below `least` do not count. Positive floats are ordered as their bits are, of which
// four rounds find eight each. `wanted` is at most what all of them come to.
template <typename Amount>
__device__ u32 threshold(const Row& row, u32 least, u64 wanted, u64* bins, Amount amount) {
    __shared__ u32 found_bits;
    __shared__ u64 found_left;
    u32 prefix = 0;
    u64 left = wanted;
    __syncthreads();  // `bins` may still be read
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
            const float weight = row.weight(i);
            const u32 bits = __float_as_uint(weight);
            const bool counts = bits >= least && (shift == 24 || bits >> (shift + 8) == prefix);
            if (counts) atomicAdd(&bins[bits >> shift & 255], amount(weight));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            u64 rest = left;
            while (bin > 0 && bins[bin] < rest) rest -= bins[bin--];
            found_bits = prefix << 8 | (u32)bin;
            found_left = rest;
        }
        __syncthreads();
        prefix = found_bits;
        left = found_left;
    }
    return prefix;
}

// Sum over the block; every thread gets it.
__device__ u64 block_total(u64 x, u64* scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = scratch[lane];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const __grid_constant__ SampleArgs args) {
    __shared__ u64 bins[THREADS];
    __shared__ float largest[32];
    __shared__ int chosen;
    const SampleRow how = args.rows[blockIdx.x];
    Row row;
    row.logits = args.logits + blockIdx.x * args.stride;
    row.vocab = args.vocab;
    row.scale = LOG2E / how.temperature;

    float most = NEG_INF;
    int bad = 0;
    for (int i = threadIdx.x; i < args.vocab; i += THREADS) {
        const float z = row.logits[i];
        bad |= !(z < -NEG_INF);
        most = fmaxf(most, z);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    if (threadIdx.x == 0) chosen = how.temperature == 0 ? args.vocab : -1;
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
        for (int i = threadIdx.x; i < args.vocab; i += THREADS) {
            if (row.logits[i] == most) {
                atomicMin(&chosen, i);
                break;
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) args.out[blockIdx.x] = chosen;
        return;
    }
    row.most = most * row.scale;
    // Nearly 1: the product above is rounded.
    const u32 likeliest =
        __float_as_uint(fminf(exp2_fast(fmaf(most, row.scale, -row.most)), 1.0f));

    u32 least = 0;
    if (how.top_k > 0 && how.top_k < args.vocab)
        least = threshold(row, 0, how.top_k, bins, [](float) { return 1ull; });
    auto total_from = [&](u32 bits) {
        u64 sum = 0;
        for (int i = threadIdx.x; i < args.vocab; i += THREADS) {
            const float weight = row.weight(i);
            sum += __float_as_uint(weight) >= bits ? mass(weight) : 0;
        }
        return block_total(sum, bins);
    };
    if (how.top_p < 1) {
        // Rounded down, and 1 at least: the likeliest token always counts.
        const u64 wanted = (u64)((double)total_from(least) * (double)how.top_p);
        least = max(least, threshold(row, least, wanted > 0 ? wanted : 1, bins, mass));
    }
    least = min(max(least, __float_as_uint(how.min_p)), likeliest);

    // The token at whose weight the sum, in the order of ids, exceeds the drawn share of the total.
    const int each = (args.vocab + THREADS - 1) / THREADS;
    const int first = threadIdx.x * each, end = min(first + each, args.vocab);
    u64 own = 0;
    for (int i = first; i < end; i++) {
        const float weight = row.weight(i);
        own += __float_as_uint(weight) >= least ? mass(weight) : 0;
    }
    __syncthreads();
    bins[threadIdx.x] = own;
    __syncthreads();
    for (int offset = 1; offset < THREADS; offset *= 2) {
        const u64 before = threadIdx.x >= offset ? bins[threadIdx.x - offset] : 0;
        __syncthreads();
        bins[threadIdx.x] += before;
        __syncthreads();
    }
    const u64 total = bins[THREADS - 1];
    const u64 drawn = __umul64hi(total, (u64)(u32)how.unit << 33);
    u64 sum = bins[threadIdx.x] - own;
    if (sum <= drawn && drawn < sum + own) {
        for (int i = first; i < end; i++) {
            const float weight = row.weight(i);
            sum += __float_as_uint(weight) >= least ? mass(weight) : 0;
            if (drawn < sum) {
                chosen = i;
                break;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) args.out[blockIdx.x] = chosen;
}
