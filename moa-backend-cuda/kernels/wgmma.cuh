// Hopper's warpgroup matrix instructions, mbarriers and named barriers. Compiled for sm_90a only.
#pragma once
#include "common.cuh"

#if DTYPE_BF16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif

// ---- barriers -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                 "@!p bra again;}" ::"r"(barrier), "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Barriers that were initialised are seen by bulk copies.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival, and so many bytes of bulk copies that the barrier waits for.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1;}" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
// A multiple of 16 bytes that are read once, by one thread, to where `barrier` expects them.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], once;}" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
// A tensor in memory and a box of it, as `cuTensorMapEncodeTiled` describes them.
struct __align__(64) TensorMap {
    u64 opaque[16];
};
// The box at (x, y) of a tensor of two axes, to where `barrier` expects it.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* tensor, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(tensor), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
// All threads of all blocks of a cluster; each sees what the others wrote before.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// From the shared memory of a block of the cluster, where this block has `address`.
__device__ __forceinline__ float cluster_load(u32 address, u32 block) {
    float x;
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [there];}" : "=f"(x) : "r"(address), "r"(block) : "memory");
    return x;
}
// Ordinary writes to shared memory before it are seen by matrix instructions after it.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma --------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operands in shared memory: panels of 64 elements a row with 128-byte swizzle. The lower half of
// the descriptor is an address (and `leading`), to which byte offsets / 16 may be added.
// Rows along k: 8 rows are 1024 bytes, `leading` has no meaning.
__device__ __forceinline__ u32 wgmma_rows(u32 address) { return address >> 4 | 1 << 16; }
// Rows along n (transposed): `leading` bytes from one panel of 64 columns to the next, 8 rows of k
// are 1024 bytes.
__device__ __forceinline__ u32 wgmma_columns(u32 address, u32 leading) {
    return address >> 4 | leading >> 4 << 16;
}
__device__ __forceinline__ u64 wgmma_operand(u32 low) {
    return (u64)(1024 >> 4 | 1 << 30) << 32 | low;
}
// A value that all lanes of a warp share, in a register of the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// d[64 x 64] (+)= a[64 x 16] b[16 x 64], a and b (rows along k) in shared memory.
__device__ __forceinline__ void wgmma_ss(float (&d)[32], u64 a, u64 b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, 0, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"((int)add));
}

// d[64 x 64] += a[64 x 16] b[16 x 64], a in registers, b transposed (rows along n).
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d[64 x 128] (+)= a[64 x 16] b[16 x 128], a and b (rows along k) in shared memory.
__device__ __forceinline__ void wgmma_ss(float (&d)[64], u64 a, u64 b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, 0, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
          "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"((int)add));
}

// d[64 x 128] += a[64 x 16] b[16 x 128], a in registers, b transposed (rows along n).
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
          "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d[64 x N] += a[64 x 16] b[16 x N], a in registers, b (rows along k) in shared memory; N is 8 to 128.
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define WGMMA_RS_ROWS(N, D, A, B, ...)                                                             \
    __device__ __forceinline__ void wgmma_rs_rows(float (&d)[N / 2], const u32 (&a)[4], u64 b) {   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" D "}, {" A       \
                     "}, " B ", 1, 1, 1, 0;"                                                       \
                     : __VA_ARGS__                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
#define SUM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUM_NAMES_20 SUM_NAMES_16 ", %16, %17, %18, %19"
#define SUM_NAMES_24 SUM_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUM_NAMES_32                                                                               \
    SUM_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUM_NAMES_40 SUM_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SUM_NAMES_48                                                                               \
    SUM_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SUM_NAMES_56 SUM_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUM_NAMES_64                                                                               \
    SUM_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
WGMMA_RS_ROWS(8, "%0, %1, %2, %3", "%4, %5, %6, %7", "%8", SUMS_4(0))
WGMMA_RS_ROWS(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11", "%12", SUMS_4(0), SUMS_4(4))
WGMMA_RS_ROWS(32, SUM_NAMES_16, "%16, %17, %18, %19", "%20", SUMS_16(0))
WGMMA_RS_ROWS(40, SUM_NAMES_20, "%20, %21, %22, %23", "%24", SUMS_16(0), SUMS_4(16))
WGMMA_RS_ROWS(48, SUM_NAMES_24, "%24, %25, %26, %27", "%28", SUMS_16(0), SUMS_4(16), SUMS_4(20))
WGMMA_RS_ROWS(64, SUM_NAMES_32, "%32, %33, %34, %35", "%36", SUMS_16(0), SUMS_16(16))
WGMMA_RS_ROWS(80, SUM_NAMES_40, "%40, %41, %42, %43", "%44", SUMS_16(0), SUMS_16(16), SUMS_4(32), SUMS_4(36))
WGMMA_RS_ROWS(96, SUM_NAMES_48, "%48, %49, %50, %51", "%52", SUMS_16(0), SUMS_16(16), SUMS_16(32))
WGMMA_RS_ROWS(112, SUM_NAMES_56, "%56, %57, %58, %59", "%60", SUMS_16(0), SUMS_16(16), SUMS_16(32),
              SUMS_4(48), SUMS_4(52))
WGMMA_RS_ROWS(128, SUM_NAMES_64, "%64, %65, %66, %67", "%68", SUMS_16(0), SUMS_16(16), SUMS_16(32),
              SUMS_16(48))
