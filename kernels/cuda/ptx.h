// SPDX-License-Identifier: Apache-2.0
// The machine under nvcc (device.h says what it is). All inline PTX of the project is here, one instruction a function.
// The emulator's ptx.h says the same in C++; that both agree shows in the tests on a GPU.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "layout.h"

#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ inline
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace quip {
namespace device {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// The thread's warp in its block, in a register that the compiler knows to be the same for all its lanes.
DEVICE int warp_index() { return __shfl_sync(kAllLanes, int(threadIdx.x / 32), 0); }

// The thread's lane in its warp. The machine has it, so the compiler does not compute it again wherever it is used.
DEVICE int lane_index() {
  int d;
  asm("mov.u32 %0, %%laneid;" : "=r"(d));
  return d;
}

// v of lane `from` (modulo 32); every lane of the warp calls it.
DEVICE uint32_t shuffle(uint32_t v, int from) { return __shfl_sync(kAllLanes, v, from); }
DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(kAllLanes, v, mask); }

// Bytes of b:a (byte 0 = the lowest of a), chosen by the four nibbles of the selector.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// The upper 32 bits of high:low shifted left by 0..31.
DEVICE uint32_t funnel_left(uint32_t high, uint32_t low, int shift) { return __funnelshift_l(low, high, shift); }

// base + the four bytes of v.
DEVICE uint32_t sum_bytes(uint32_t v, uint32_t base) { return __dp4a(v, 0x01010101u, base); }

// a b, rounded: never fused with the sum that it meets.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

// Two fp16 sums, each rounded once.
DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Two fp16 a b + c, each rounded once.
DEVICE uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE uint16_t to_half(float v) {
  uint16_t d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(v));
  return d;
}
DEVICE uint32_t to_halves(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE float from_half(uint16_t v) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(v));
  return d;
}
DEVICE uint16_t to_bfloat(float v) {
  uint16_t d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(v));
  return d;
}
DEVICE float from_bfloat(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The nearest integer, halves to even.
DEVICE int to_int(float v) { return __float2int_rn(v); }

// d += a b for the m16n8k16 fragments of fp16 a (four registers) and b (two), sums in fp32.
DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for the m16n8k32 fragments of uint8 a and int8 b, sums modulo 2^32.
DEVICE void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts to copy 16 bytes, both ends aligned to 16, past L1; they are there for this thread after copy_wait.
DEVICE void copy_async(void* to, const void* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Asynchronous products of a warpgroup (four warps; compute capability 9.0 alone, as compute_90a). A warp has 16 rows of a
// in its registers, in the fragments of m16n8k16, and sums for all columns of b. All of this waits for nothing: between
// products_begin and products_wait nobody touches the registers, nor what b is in shared memory.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups are under way.
template <int pending>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Makes what this thread has copied or written visible to asynchronous products; those begin behind a barrier after it.
DEVICE void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// b in shared memory (matrix_of in layout.h).
DEVICE uint64_t describe(const void* b, int leading, int stride) {
  return matrix_of(uint32_t(__cvta_generic_to_shared(b)), leading, stride);
}
// d += a b: 64 rows of fp16 a, 16 columns; b has `rows` columns. Sums in fp32.
template <int rows>
DEVICE void multiply_add_async(float (&d)[rows / 8][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(rows == 64 || rows == 128 || rows == 256);
#define D(c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
  if constexpr (rows == 64)
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
        : D(0), D(1), D(2), D(3), D(4), D(5), D(6), D(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else if constexpr (rows == 128)
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
        : D(0), D(1), D(2), D(3), D(4), D(5), D(6), D(7), D(8), D(9), D(10), D(11), D(12), D(13), D(14), D(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, {%128, %129, %130, %131}, %132, add, 1, 1, 0;\n}"
        : D(0), D(1), D(2), D(3), D(4), D(5), D(6), D(7), D(8), D(9), D(10), D(11), D(12), D(13), D(14), D(15), D(16),
          D(17), D(18), D(19), D(20), D(21), D(22), D(23), D(24), D(25), D(26), D(27), D(28), D(29), D(30), D(31)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#undef D
}

struct Uint4 {
  uint32_t x, y, z, w;
};
// 16 bytes from an address aligned to 16.
DEVICE Uint4 load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
}

// 16 bytes to an address aligned to 16.
DEVICE void store16(void* to, const Uint4& v) { *static_cast<uint4*>(to) = make_uint4(v.x, v.y, v.z, v.w); }

// Loads a lane's `count` words (layout.h) from those of 32 lanes, which begin at a multiple of 16 bytes.
template <int count, int size>
DEVICE void load_words(const void* from, int lane, uint32_t (&words)[size]) {
  const uint32_t* const first = static_cast<const uint32_t*>(from);
#pragma unroll
  for (int i = 0; i + 4 <= count; i += 4) {
    const uint4 v = reinterpret_cast<const uint4*>(first + 32 * i)[lane];
    words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
  }
  if constexpr (count % 4 >= 2) {
    constexpr int i = count / 4 * 4;
    const uint2 v = reinterpret_cast<const uint2*>(first + 32 * i)[lane];
    words[i] = v.x, words[i + 1] = v.y;
  }
  if constexpr (count % 2) words[count - 1] = first[32 * (count - 1) + lane];
}

// Waits until the kernels before this one in its stream have written all. What a kernel does before this overlaps with
// them. GPUs before compute capability 9.0 start a kernel only then.
DEVICE void wait_for_writes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start, once every block of this one has come here or ended.
DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Adds to a number in shared memory that other threads add to, and returns what it was.
DEVICE int add(int* number, int v) { return atomicAdd(number, v); }

// Whether the calling block is the last of `count` to come here; all its threads call it. What the others wrote before
// is then there for it. The counter begins with 0.
DEVICE bool comes_last(uint32_t* counter, uint32_t count) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == count - 1;
    __threadfence();
  }
  return __syncthreads_or(last);
}

using Stream = cudaStream_t;

inline bool overlaps_kernels() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// What went wrong, if anything did.
inline std::string sentence(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // an error that stays would be taken for the next launch's
  return cudaGetErrorString(error);
}

inline std::string clear(void* memory, size_t bytes, Stream stream) {
  return sentence(cudaMemsetAsync(memory, 0, bytes, stream));
}

template <class... Parameters, class... Args>
std::string launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes, Stream stream, Args... args) {
  if (shared_bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{grid,   dim3(block), size_t(shared_bytes),
                                  stream, &overlap,    overlaps_kernels() ? 1u : 0u};
  return sentence(cudaLaunchKernelEx(&config, kernel, Parameters(args)...));
}
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  quip::device::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

}  // namespace device
}  // namespace quip
