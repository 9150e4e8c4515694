// SPDX-License-Identifier: Apache-2.0
// What the torch ops over the launches have in common: the device, checked data, memory.
//
// nvcc registers the ops for CUDA tensors. A C++ compiler, with the emulator, registers the same ops for CPU tensors.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../torch_checks.h"
#include "decode_gemm.h"
#include "kernels.h"

#if defined(__CUDACC__)
// Of libtorch_cuda, which a CPU build of torch lacks: weak, so that the library loads there, too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#define QUIP_DEVICE CUDA
#else
#define QUIP_DEVICE CPU
#endif

namespace quip {
namespace {

// The device of x is the current one while this lives, as launches want it; `stream` is torch's there.
struct OnDevice {
#if defined(__CUDACC__)
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    const auto found = aoti_torch_get_current_cuda_stream;
    STD_TORCH_CHECK(found != nullptr && !found(x.get_device_index(), &current),
                    "torch has no CUDA stream here: install a CUDA build of torch");
    stream = static_cast<device::Stream>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
#else
  explicit OnDevice(const Tensor&) {}
#endif
  device::Stream stream{};
};

// The data of a tensor on the device of x, which loads of 16 bytes read.
inline const void* data_of(const Tensor& t, const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " and x are on different devices: move one");
  return data_of(t, type, count, 16, name);
}
inline const float* floats(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
  return static_cast<const float*>(data_of(t, x, ScalarType::Float, count, name));
}

inline const CodeKernels& kernels_of(const std::string& code) {
  const auto found = codes().find(code);
  if (found != codes().end()) return found->second;
  std::string names;
  for (const auto& one : codes()) names += (names.empty() ? "" : ", ") + one.first;
  STD_TORCH_CHECK(false, "code is ", code, ": it must be one of ", names);
  return found->second;
}

inline GemmEntry entry_of(const CodeKernels& info, const std::string& code, int64_t bits) {
  STD_TORCH_CHECK(bits >= info.first_bits && bits <= info.last_bits, "bits is ", bits, ": ", code, " has ",
                  info.first_bits, " to ", info.last_bits);
  return info.entry(int(bits));
}

// The kernel for many rows: wide_gemm, or wgmma_gemm, whose x lies in columns.
inline WideEntry wide_entry_of(const GemmEntry& entry, const std::string& code, int64_t bits, bool columns) {
  if (!columns) return entry.wide;
  const auto found = wgmma_kernels().find({code, int(bits)});
  return found == wgmma_kernels().end() ? WideEntry{} : found->second;
}

inline int64_t packed_words(int64_t tiles, int64_t chunks, int64_t bits) {
  return (tiles * chunks + kSpare) * kLanes * bits;
}

inline const uint32_t* packed_of(const Tensor& packed, const Tensor& x, int64_t words) {
  return static_cast<const uint32_t*>(data_of(packed, x, ScalarType::Int, words, "packed"));
}

// The tables, if the code has one.
inline const void* table_of(const std::optional<Tensor>& table, const Tensor& x, const std::string& code,
                            int64_t words) {
  if (!words) return nullptr;
  STD_TORCH_CHECK(table.has_value(), "code ", code, " needs its table");
  return data_of(*table, x, ScalarType::Int, words, "table");
}

inline Rotation rotation_of(const Tensor& base, int64_t p, int64_t length, const Tensor& x) {
  const int64_t q = base.size(0);
  check_rotation(q, p, length);
  STD_TORCH_CHECK(q == 1 || q % 4 == 0, "a base of order ", q,
                  ": Hadamard matrices have order 1 or a multiple of 4 here");
  return {floats(base, x, q * q, "base"), int(q), int(p)};
}

// Whether the floats that a row takes fit in shared memory.
inline bool fits(int work) { return (work + 2 * kLanes) * int(sizeof(float)) <= kSharedLimit; }

// Slices of a rotation of m rows: where these fill a GPU, slices only read the row again.
inline int slices_of(int64_t m, bool can) { return can && m <= 128 ? kSlices : 1; }

// The code's unit with a rotation's norm.
inline float unit_of(const CodeKernels& info, const Rotation& r) {
  return info.unit / std::sqrt(float(r.q) * float(r.p));
}

// Floats from torch's allocator for one call.
struct Memory {
  Tensor tensor;
  float* floats;
  Memory(const Tensor& like, int64_t count)
      : tensor(torch::stable::new_empty(like, {std::max<int64_t>(count, 1)}, ScalarType::Float)),
        floats(tensor.mutable_data_ptr<float>()) {}
};

}  // namespace
}  // namespace quip
