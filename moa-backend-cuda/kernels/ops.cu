// What a Llama layer needs besides attention and matrix products. Row-major, rows of a multiple of 8
// elements that begin at multiples of 16 bytes; a row's result depends on that row alone.
//
// "element" is the 16-bit type; the residual stream, norm weights and biases are f32.
#include "rows.cuh"

// ---- by rows: one block each ------------------------------------------------------------------

// out = x / sqrt(mean(x^2) + eps) * w; x f32, out element.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ OpArgs args) {
    start();
    const float* x = (const float*)args.x + blockIdx.x * args.x_stride;
    const float* w = (const float*)args.w;
    u16* out = (u16*)args.out + blockIdx.x * args.out_stride;
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    float sum = 0;
    for (int i = first; i < args.cols; i += step) {
        const Eight v = load8(x + i);
#pragma unroll
        for (int n = 0; n < 8; n++) sum += v.x[n] * v.x[n];
    }
    const float scale = rsqrtf(block_sum(sum) / (float)args.cols + args.eps);
    for (int i = first; i < args.cols; i += step) {
        Eight v = load8(x + i);
        const Eight weight = load8(w + i);
#pragma unroll
        for (int n = 0; n < 8; n++) v.x[n] = v.x[n] * scale * weight.x[n];
        store8(out + i, v);
    }
}

// ---- by elements: grid (columns / 8 / 256, rows) ------------------------------------------------

// out = x[ids] * eps; x element, out f32.
extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const u16* x = (const u16*)args.x + args.ids[row] * args.x_stride;
    Eight v = load8(x + i);
#pragma unroll
    for (int n = 0; n < 8; n++) v.x[n] *= args.eps;
    store8((float*)args.out + row * args.out_stride + i, v);
}

// out = x[ids]; both f32 (flag) or both element.
extern "C" __global__ void __launch_bounds__(256) rows(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const i64 from = args.ids[row] * args.x_stride + i, to = row * args.out_stride + i;
    if (args.flag) {
        store8((float*)args.out + to, load8((const float*)args.x + from));
    } else {
        *(uint4*)((u16*)args.out + to) = *(const uint4*)((const u16*)args.x + from);
    }
}

// out = silu(x) * y; all element.
extern "C" __global__ void __launch_bounds__(256) swiglu(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const Eight gate = load8((const u16*)args.x + row * args.x_stride + i);
    Eight up = load8((const u16*)args.y + row * args.y_stride + i);
#pragma unroll
    for (int n = 0; n < 8; n++) up.x[n] *= gate.x[n] / (1.0f + exp2_fast(-LOG2E * gate.x[n]));
    store8((u16*)args.out + row * args.out_stride + i, up);
}

// out = x + y; x and out f32, may be the same; y f32 (flag) or element.
extern "C" __global__ void __launch_bounds__(256) add(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    Eight x = load8((const float*)args.x + row * args.x_stride + i);
    const i64 from = row * args.y_stride + i;
    const Eight y = args.flag ? load8((const float*)args.y + from) : load8((const u16*)args.y + from);
#pragma unroll
    for (int n = 0; n < 8; n++) x.x[n] += y.x[n];
    store8((float*)args.out + row * args.out_stride + i, x);
}

// out += x[ids]; x f32, out f32 (flag) or element.
extern "C" __global__ void __launch_bounds__(256) add_rows(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const Eight y = load8((const float*)args.x + args.ids[row] * args.x_stride + i);
    const i64 at = row * args.out_stride + i;
    Eight x = args.flag ? load8((const float*)args.out + at) : load8((const u16*)args.out + at);
#pragma unroll
    for (int n = 0; n < 8; n++) x.x[n] += y.x[n];
    if (args.flag) {
        store8((float*)args.out + at, x);
    } else {
        store8((u16*)args.out + at, x);
    }
}

// out += w, one bias per column; out f32 (flag) or element.
extern "C" __global__ void __launch_bounds__(256) add_bias(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const Eight bias = load8((const float*)args.w + i);
    const i64 at = row * args.out_stride + i;
    Eight x = args.flag ? load8((const float*)args.out + at) : load8((const u16*)args.out + at);
#pragma unroll
    for (int n = 0; n < 8; n++) x.x[n] += bias.x[n];
    if (args.flag) {
        store8((float*)args.out + at, x);
    } else {
        store8((u16*)args.out + at, x);
    }
}

// out = x, f32 to element.
extern "C" __global__ void __launch_bounds__(256) cast(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    store8((u16*)args.out + row * args.out_stride + i,
           load8((const float*)args.x + row * args.x_stride + i));
}

// out = x with the pairs (i, i + n / 2) of each head of n elements rotated by w, f32 [rows, n / 2]
// pairs (cos, sin); back if flag. n is y_stride: this module serves all head dimensions. Both f32 if y
// is not null, else element. One thread a pair.
extern "C" __global__ void __launch_bounds__(256) rope(const __grid_constant__ OpArgs args) {
    start();
    const int task = blockIdx.x * blockDim.x + threadIdx.x;
    const i64 row = blockIdx.y + (i64)blockIdx.z * gridDim.y;
    if (task >= args.cols / 2 || row >= args.rows) return;
    const int half = (int)args.y_stride / 2;
    const int head = task / half, pair = task % half;
    float2 turn = ((const float2*)args.w)[row * half + pair];
    if (args.flag) turn.y = -turn.y;
    const i64 from = row * args.x_stride + head * 2 * half + pair;
    const i64 to = row * args.out_stride + head * 2 * half + pair;
    if (args.y != nullptr) {
        const float* x = (const float*)args.x + from;
        float* out = (float*)args.out + to;
        const float a = x[0], b = x[half];
        out[0] = a * turn.x - b * turn.y;
        out[half] = b * turn.x + a * turn.y;
    } else {
        const u16* x = (const u16*)args.x + from;
        u16* out = (u16*)args.out + to;
        const float2 v = unpack2((u32)x[0] | (u32)x[half] << 16);
        const u32 rotated = pack2(v.x * turn.x - v.y * turn.y, v.y * turn.x + v.x * turn.y);
        out[0] = (u16)rotated;
        out[half] = (u16)(rotated >> 16);
    }
}

// Rotary angles, out f32 [rows, cols / 2] pairs (cos, sin). ids: pairs (table, position) for each row.
// w: tables of cols / 2 frequencies in half turns a position, then a factor of cosine and sine; f64,
// so that positions of any context are exact to the f32 that they are rounded to. A pair of frequency 0
// is left as it is, without the factor. One thread a pair.
extern "C" __global__ void __launch_bounds__(256) turns(const __grid_constant__ OpArgs args) {
    start();
    const int pair = blockIdx.x * blockDim.x + threadIdx.x;
    const i64 row = blockIdx.y + (i64)blockIdx.z * gridDim.y;
    const int half = args.cols / 2;
    if (pair >= half || row >= args.rows) return;
    const int2 id = ((const int2*)args.ids)[row];
    const double* table = (const double*)args.w + (i64)id.x * (half + 1);
    double sine, cosine;
    sincospi(table[pair] * (double)id.y, &sine, &cosine);
    const double factor = table[pair] == 0 ? 1 : table[half];
    ((float2*)args.out)[row * half + pair] =
        make_float2((float)(cosine * factor), (float)(sine * factor));
}

// ---- choice of tokens -------------------------------------------------------------------------

// The largest element of a row or of a part of it, the first of equals, by a block of up to 1024 threads: its first
// thread gets it.
struct Largest {
    float value = NEG_INF;
    int at = 0x7fffffff;  // this for none
    bool bad = false;     // one is infinite or not a number

    __device__ __forceinline__ void take(float z, int i) {
        if (z > value || (z == value && i < at)) {
            value = z;
            at = i;
        }
    }
    __device__ __forceinline__ void of_warp() {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            take(__shfl_xor_sync(0xffffffff, value, offset), __shfl_xor_sync(0xffffffff, at, offset));
    }
    __device__ __forceinline__ void of_block() {
        __shared__ float values[32];
        __shared__ int places[32];
        of_warp();
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) {
            values[warp] = value;
            places[warp] = at;
        }
        bad = __syncthreads_or(bad);
        const bool is_warp = lane < blockDim.x / 32;
        value = is_warp ? values[lane] : NEG_INF;
        at = is_warp ? places[lane] : 0x7fffffff;
        of_warp();
    }
};

// out = (largest element, its index or -1 if one is bad) of each f32 row's parts: grid (rows, parts). One block would
// take ten times as long for a whole vocabulary.
#define PART 4096
extern "C" __global__ void __launch_bounds__(256) argmax_parts(const __grid_constant__ OpArgs args) {
    start();
    const float* x = (const float*)args.x + blockIdx.x * args.x_stride;
    constexpr int EACH = PART / 256;
    // All loads are on their way at once.
    float z[EACH];
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int i = blockIdx.y * PART + n * 256 + threadIdx.x;
        z[n] = i < args.cols ? x[i] : NEG_INF;
    }
    Largest own;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        own.bad |= !(z[n] < -NEG_INF);
        // Those after it are further right.
        if (z[n] > own.value) {
            own.value = z[n];
            own.at = blockIdx.y * PART + n * 256 + threadIdx.x;
        }
    }
    own.of_block();
    if (threadIdx.x == 0)
        ((float2*)args.out)[(i64)blockIdx.x * gridDim.y + blockIdx.y] =
            make_float2(own.value, __int_as_float(own.bad ? -1 : own.at));
}

// out = index of the largest of each f32 row, the lowest of equals; -1 where one is not a number or
// infinite, or none is finite. x: the row's parts, cols of them.
extern "C" __global__ void __launch_bounds__(32) argmax(const __grid_constant__ OpArgs args) {
    start();
    const float2* x = (const float2*)args.x + (i64)blockIdx.x * args.cols;
    Largest own;
    for (int i = threadIdx.x; i < args.cols; i += 32) {
        const float2 part = x[i];
        const int at = __float_as_int(part.y);
        own.bad |= at < 0;
        own.take(part.x, at);
    }
    own.of_warp();
    const bool bad = __any_sync(0xffffffff, own.bad);
    if (threadIdx.x == 0) ((int*)args.out)[blockIdx.x] = bad || own.value == NEG_INF ? -1 : own.at;
}

// ---- weights for measurements -----------------------------------------------------------------

// out = uniform in [-eps, eps), by a counter hashed with flag (splitmix64's finaliser). Element, or
// f32 if y is not null.
extern "C" __global__ void __launch_bounds__(256) randomise(const __grid_constant__ OpArgs args) {
    start();
    FOR_EIGHT(i)
    const i64 at = row * args.out_stride + i;
    Eight values;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        u64 z = (u64)(at + n) + 0x9e3779b97f4a7c15ull * (u64)(u32)args.flag;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        values.x[n] = ((float)(u32)(z >> 40) * 0x1p-23f - 1.0f) * args.eps;
    }
    if (args.y != nullptr) {
        store8((float*)args.out + at, values);
    } else {
        store8((u16*)args.out + at, values);
    }
}
