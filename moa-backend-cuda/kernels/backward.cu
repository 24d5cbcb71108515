// Gradients of a Llama layer by its activations, and influence, for profiling. Matrix products are
// cuBLASLt's; here is what lies between them. Rows as in ops.cu.
#include "rows.cuh"

// Mirrored by `src/ops/backward.rs`. A stretch of queries of one head against all keys before them.
struct BackwardArgs {
    const float* scores;    // q . k, [rows, stride]
    const float* gains;     // d_out . v, the same
    u16* probabilities;     // [rows, stride], written up to `keys`
    u16* d_scores;          // gradient by q . k, the same
    float* sums;            // [rows, side]: influence summed over blocks of keys
    float* blocks;          // [side, side]: the same over blocks of queries, added to
    i64 stride;
    int first;              // position of the first query
    int rows;
    int keys;               // first + rows
    int block;              // a multiple of 64
    int side;
    int absolute;           // 1: sums of absolute values
    float scale;
    int gradients;          // 0: probabilities and d_scores are not written
    int window;             // most recent keys that a query sees
    int padding;
};

__device__ __forceinline__ float block_max(float x) {
    __shared__ float most[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) most[warp] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? most[lane] : NEG_INF;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

// One block per query, 256 threads. With e_j = exp(score_j - largest), g = gains and m the key of the
// largest score, sums over the other keys alone give
//   others = sum of e,  D - g_m = sum of e_j (g_j - g_m) / (1 + others),
// so that nothing cancels where a query puts nearly everything on one key:
//   influence_j = p_j / (1 - p_j) (D - g_j) = e_j / (1 + others - e_j) (D - g_j).
extern "C" __global__ void __launch_bounds__(256)
    attend_backward(const __grid_constant__ BackwardArgs args) {
    const int query = args.first + blockIdx.x;
    const float* scores = args.scores + blockIdx.x * args.stride;
    const float* gains = args.gains + blockIdx.x * args.stride;
    const float scale = args.scale * LOG2E;
    const int first_key = max(query + 1 - args.window, 0);

    float most = NEG_INF;
    for (int j = first_key + threadIdx.x; j <= query; j += 256) most = fmaxf(most, scores[j] * scale);
    most = block_max(most);
    // The lowest of equals; the rest count as others.
    __shared__ int top;
    if (threadIdx.x == 0) top = 0x7fffffff;
    __syncthreads();
    for (int j = first_key + threadIdx.x; j <= query; j += 256)
        if (scores[j] * scale == most) atomicMin(&top, j);
    __syncthreads();
    const int key = min(top, query);
    const float top_gain = gains[key];

    float others = 0, gain = 0;
    for (int j = first_key + threadIdx.x; j <= query; j += 256) {
        const float e = j == key ? 0.0f : exp2_fast(scores[j] * scale - most);
        others += e;
        gain += e * (gains[j] - top_gain);
    }
    others = block_sum(others);
    __syncthreads();
    gain = block_sum(gain);
    const float sum = 1.0f + others, inverse = 1.0f / sum;
    const float top_lead = gain * inverse;  // D - g of the key of the largest score

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int b = warp; b * args.block < args.keys; b += 8) {
        const int end = min((b + 1) * args.block, args.keys);
        float total = 0;
        for (int j = b * args.block + lane; j < end; j += 32) {
            float p = 0, d = 0, influence = 0;
            if (j >= first_key && j <= query) {
                const bool is_top = j == key;
                // 1 of the largest, unless that is no number.
                const float e = exp2_fast(scores[j] * scale - most);
                const float lead = is_top ? top_lead : top_lead + (top_gain - gains[j]);
                p = e * inverse;
                d = -p * lead * args.scale;
                const float rest = is_top ? others : sum - e;
                if (j < query) influence = e / fmaxf(rest, 1e-30f) * lead;
            }
            total += args.absolute ? fabsf(influence) : influence;
            if (args.gradients) {
                const u32 pair = pack2(p, d);
                args.probabilities[blockIdx.x * args.stride + j] = (u16)pair;
                args.d_scores[blockIdx.x * args.stride + j] = (u16)(pair >> 16);
            }
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            total += __shfl_xor_sync(0xffffffff, total, offset);
        if (lane == 0) args.sums[(i64)blockIdx.x * args.side + b] = total;
    }
}

// What is finite, and else 0: for products with rows of probabilities or of gradients by scores, which hold 0 where the mask
// hides, and no numbers where it keeps what is none.
extern "C" __global__ void __launch_bounds__(256) finite(const __grid_constant__ OpArgs args) {
    FOR_EIGHT(i)
    Eight e = load8((const u16*)args.x + row * args.x_stride + i);
#pragma unroll
    for (int n = 0; n < 8; n++) e.x[n] = is_none(magnitude(e.x[n])) ? 0 : e.x[n];
    store8((u16*)args.out + row * args.out_stride + i, e);
}

// Adds the sums of the queries of each block: grid (blocks of keys / 256, blocks of queries from that
// of the first query on).
extern "C" __global__ void __launch_bounds__(256)
    add_blocks(const __grid_constant__ BackwardArgs args) {
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = args.first / args.block + blockIdx.y;
    if (b * args.block >= args.keys || row >= args.side) return;
    const int from = max(row * args.block - args.first, 0);
    const int to = min((row + 1) * args.block - args.first, args.rows);
    float sum = 0;
    for (int i = from; i < to; i++) sum += args.sums[(i64)i * args.side + b];
    args.blocks[(i64)row * args.side + b] += sum;
}

// Gradient of rms_norm by x: out = r (y w - x r^2 mean(y w x)), r = 1 / sqrt(mean(x^2) + eps). All f32;
// y is the gradient of the result. One block a row.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_backward(const __grid_constant__ OpArgs args) {
    const float* x = (const float*)args.x + blockIdx.x * args.x_stride;
    const float* y = (const float*)args.y + blockIdx.x * args.y_stride;
    const float* w = (const float*)args.w;
    float* out = (float*)args.out + blockIdx.x * args.out_stride;
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    float squares = 0, dot = 0;
    for (int i = first; i < args.cols; i += step) {
        const Eight a = load8(x + i), b = load8(y + i), c = load8(w + i);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            squares += a.x[n] * a.x[n];
            dot += a.x[n] * b.x[n] * c.x[n];
        }
    }
    squares = block_sum(squares);
    __syncthreads();
    dot = block_sum(dot);
    const float r = rsqrtf(squares / (float)args.cols + args.eps);
    const float back = r * r * dot / (float)args.cols;
    for (int i = first; i < args.cols; i += step) {
        const Eight a = load8(x + i), b = load8(y + i), c = load8(w + i);
        Eight d;
#pragma unroll
        for (int n = 0; n < 8; n++) d.x[n] = r * (b.x[n] * c.x[n] - a.x[n] * back);
        store8(out + i, d);
    }
}

// Gradients of swiglu: x gate, y up, w the gradient of the result (f32, rows of cols); out [rows,
// 2 cols] elements, those by gate, then those by up.
extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(const __grid_constant__ OpArgs args) {
    FOR_EIGHT(i)
    const Eight gate = load8((const u16*)args.x + row * args.x_stride + i);
    const Eight up = load8((const u16*)args.y + row * args.y_stride + i);
    const Eight d = load8((const float*)args.w + row * args.cols + i);
    Eight by_gate, by_up;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float g = gate.x[n], sigmoid = 1.0f / (1.0f + exp2_fast(-LOG2E * g));
        by_up.x[n] = d.x[n] * g * sigmoid;
        by_gate.x[n] = d.x[n] * up.x[n] * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
    u16* out = (u16*)args.out + row * args.out_stride + i;
    store8(out, by_gate);
    store8(out + args.cols, by_up);
}
