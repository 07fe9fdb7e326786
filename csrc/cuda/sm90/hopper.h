// What Hopper (sm_90a) has that C++ does not name: barriers in shared memory, box copies, asynchronous matrix products.
// One function an instruction; no other file has assembly or names what only nvcc knows, but __device__, __global__,
// threadIdx and the like. tests/cuda/hopper.h is this file's twin on a CPU: the same kernels run there, in tests.
//
// Addresses are 32-bit addresses in this block's shared memory. PTX ISA 8.0: mbarrier, cp.async.bulk.tensor, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace smoothie {
namespace hopper {

using TensorMap = CUtensorMap;
using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline void narrow(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, Half& to) { to = __float2half_rn(x); }

// Two numbers as they lie in memory, the first below.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// The block's shared memory, all of it given at the launch.
__device__ inline uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

__device__ inline uint32_t address_of(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// --- barriers in shared memory: a phase ends when all arrivals and all expected bytes are there

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers just initialised visible to box copies and to the other blocks of the cluster.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and tells the phase to wait for so many bytes of box copies.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The same barrier of a block of the cluster; also of this one. The next barrier is 8 further, as here.
__device__ inline uint32_t barrier_of_block(uint32_t barrier, uint32_t block) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(barrier), "r"(block));
  return remote;
}

// Arrives at a barrier_of_block.
__device__ inline void barrier_arrive(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Waits for the end of the phase of that parity: 0 for the first, 1 for the second, 0 for the third, ...
// With SMOOTHIE_WATCHDOG a wait that takes longer than 4 to 9 seconds (globaltimer_hi counts 2^32 ns) ends the launch
// with an error: a kernel that hangs would never give the GPU back. In PTX, because the same in C++ spills.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
#ifdef SMOOTHIE_WATCHDOG
      ".reg .pred late;\n"
      ".reg .u32 begin, passed;\n"
      "mov.u32 begin, %%globaltimer_hi;\n"
#endif
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#ifdef SMOOTHIE_WATCHDOG
      "@done bra over;\n"
      "mov.u32 passed, %%globaltimer_hi;\n"
      "sub.u32 passed, passed, begin;\n"
      "setp.gt.u32 late, passed, 1;\n"
      "@late trap;\n"
      "bra again;\n"
      "over:\n"
#else
      "@!done bra again;\n"
#endif
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- box copies from device memory to shared memory; what lies outside the matrix is zero

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(uint64_t(map)) : "memory");
}

__device__ inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(uint64_t(map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same to that address of all blocks named in the mask; each block's own barrier counts the bytes. Only of launches
// with a cluster.
__device__ inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row,
                                uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(to),
      "l"(uint64_t(map)), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// Both of a matrix that describe_strided has described: 64 columns of row 2 ((pair + i / 2) tiles + tile) + i mod 2
// become row i of the TMA tile.
__device__ inline void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile,
                                        int pair) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(uint64_t(map)), "r"(barrier), "r"(column), "r"(0), "r"(tile), "r"(pair)
      : "memory");
}

__device__ inline void load_strided_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int tile,
                                        int pair, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(uint64_t(map)), "r"(barrier), "r"(column), "r"(0), "r"(tile), "r"(pair), "h"(blocks)
      : "memory");
}

// Before matrix products read what this thread has written to shared memory with ordinary stores.
__device__ inline void stores_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Two neighbouring numbers of shared memory, at a multiple of 8 bytes. Each call reads them: the compiler keeps none in
// registers for the next.
__device__ inline void load_pair(const float* from, float& first, float& second) {
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "r"(address_of(from)));
}

// Two words to device memory, at a multiple of 8 bytes.
__device__ inline void store_global(void* to, uint32_t first, uint32_t second) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(first), "r"(second) : "memory");
}

// --- blocks, clusters, registers

__device__ inline uint32_t block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Of some warps of a block; barrier 0 is that of __syncthreads.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts as there, and goes on.
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Which four warps of the block; the compiler knows that it is the same for all threads of a warp.
__device__ inline int warpgroup() { return __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / 128), 0); }

// A number that all threads of a warp have alike: the compiler then keeps it in a uniform register.
__device__ inline uint32_t same_for_warp(uint32_t x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

// x of the thread of this warp whose number differs in these bits; all threads of the warp take part.
template <class X>
__device__ inline X shuffle_xor(X x, int bits) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, bits);
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- products by a warpgroup: four warps, the first at a multiple of four

// Registers written before, and read or written by a product after it.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most so many committed groups are unfinished.
template <int kGroups>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The same, and sums are final: the compiler must not read them before.
template <int kSums>
__device__ inline void products_wait_for(float (&sums)[kSums]) {
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A place in shared memory as products are told it, in steps of 16 bytes: the half of a matrix's description that
// differs.
__device__ inline uint32_t place_of(uint32_t address) {
  constexpr uint32_t kUnused = 1u << 16;
  return kUnused | (address & 0x3FFFF) >> 4;
}

// A matrix in shared memory as boxes of 64 columns leave it, at a multiple of 1,024 bytes: rows of 128 bytes, their
// 16-byte parts swizzled by row mod 8. Products read it along its rows, or down its columns, with the same description.
__device__ inline uint64_t matrix_at_place(uint32_t place) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | place;
}
__device__ inline uint64_t matrix_at(uint32_t address) { return matrix_at_place(place_of(address)); }
constexpr uint64_t kNextColumns = 16 * 2 >> 4;  // added to a description: 16 columns further
constexpr uint64_t kNextRows = 16 * 128 >> 4;   // 16 rows further

// clang-format off
#define SMOOTHIE_FLOATS_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), \
                                "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define SMOOTHIE_FLOATS_16(x, i) SMOOTHIE_FLOATS_8(x, i), SMOOTHIE_FLOATS_8(x, i + 8)
#define SMOOTHIE_FLOATS_32(x) SMOOTHIE_FLOATS_16(x, 0), SMOOTHIE_FLOATS_16(x, 16)
#define SMOOTHIE_FLOATS_64(x) SMOOTHIE_FLOATS_32(x), SMOOTHIE_FLOATS_16(x, 32), SMOOTHIE_FLOATS_16(x, 48)
#define SMOOTHIE_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SMOOTHIE_NAMES_32 SMOOTHIE_NAMES_16 ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SMOOTHIE_NAMES_64 SMOOTHIE_NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// a, b, add: the operands after the sums; down_a: whether K runs down the columns of a
#define SMOOTHIE_PRODUCT(shape, type, names, a, b, add, down_a) \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\n" \
    "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a ", " b ", add, 1, 1, " down_a ", 0;\n}\n"
// That product of numbers of type T, a, b and add being a function's arguments.
#define SMOOTHIE_MULTIPLY(shape, names, at_a, at_b, at_add, down_a, sums)                                             \
  do {                                                                                                                \
    if constexpr (std::is_same_v<T, BFloat16>)                                                                        \
      asm volatile(SMOOTHIE_PRODUCT(shape, "bf16", names, at_a, at_b, at_add, down_a)                                 \
                   : sums : "l"(a), "l"(b), "r"(int(add)));                                                           \
    else                                                                                                              \
      asm volatile(SMOOTHIE_PRODUCT(shape, "f16", names, at_a, at_b, at_add, down_a)                                  \
                   : sums : "l"(a), "l"(b), "r"(int(add)));                                                           \
  } while (false)
// a in four registers, b down its columns; always added
#define SMOOTHIE_PRODUCT_OF_REGISTERS(shape, type) \
    "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" SMOOTHIE_NAMES_32 "}, {%32, %33, %34, %35}, %36, " \
    "1, 1, 1, 1;"
// clang-format on

// sums [64 x 128] (+)= a [64 x 16] . b [128 x 16]^T, both along their rows. A thread's sums: row_of, column_of.
template <class T>
__device__ inline void multiply_64x128(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  SMOOTHIE_MULTIPLY("m64n128k16", SMOOTHIE_NAMES_64, "%64", "%65", "%66", "0", SMOOTHIE_FLOATS_64(sums));
}

// sums [64 x 64] (+)= a [64 x 16] . b [64 x 16]^T, both along their rows.
template <class T>
__device__ inline void multiply_64x64(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  SMOOTHIE_MULTIPLY("m64n64k16", SMOOTHIE_NAMES_32, "%32", "%33", "%34", "0", SMOOTHIE_FLOATS_32(sums));
}

// sums [64 x 64] += a [64 x 16] . b [16 x 64], b down its columns. a lies in registers as sums do, two columns a word:
// rows row_of(0) and 8 more at columns 2 t, then both at 2 t + 8. It must stay there until the product is done.
template <class T>
__device__ inline void multiply_64x64(float (&sums)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(SMOOTHIE_PRODUCT_OF_REGISTERS("m64n64k16", "bf16")
                 : SMOOTHIE_FLOATS_32(sums)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(SMOOTHIE_PRODUCT_OF_REGISTERS("m64n64k16", "f16")
                 : SMOOTHIE_FLOATS_32(sums)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// After a wait: words that its products have read may be written again.
template <int kCount>
__device__ inline void products_have_read(uint32_t (&words)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(words[i])::"memory");
}

// sums [64 x 32] (+)= a [64 x 16] . b [32 x 16]^T; with kDownA a is [16 x 64], and transposed.
template <class T, bool kDownA>
__device__ inline void multiply_64x32(float (&sums)[16], uint64_t a, uint64_t b, bool add) {
  if constexpr (kDownA)
    SMOOTHIE_MULTIPLY("m64n32k16", SMOOTHIE_NAMES_16, "%16", "%17", "%18", "1", SMOOTHIE_FLOATS_16(sums, 0));
  else
    SMOOTHIE_MULTIPLY("m64n32k16", SMOOTHIE_NAMES_16, "%16", "%17", "%18", "0", SMOOTHIE_FLOATS_16(sums, 0));
}

// Where a thread's sums lie in a product's result: element i is row row_of(i), column column_of(i).
//     thread 32 w + 4 g + t:  rows 16 w + g (i mod 4 < 2) and 16 w + g + 8,  columns 8 (i / 4) + 2 t + i mod 2
__device__ inline int row_of(int thread, int i) { return thread % 128 / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
__device__ inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The compiler then knows nothing of the number.
__device__ inline void hide(int& number) { asm volatile("" : "+r"(number)); }
template <class X>
__device__ inline void hide(X*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// --- approximate functions, one instruction each

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace hopper
}  // namespace smoothie
