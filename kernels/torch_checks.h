// SPDX-License-Identifier: Apache-2.0
// What the bindings of both libraries ask of tensors. It is the only header with torch headers, all of the stable ABI.
#pragma once
#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "dtype.h"

namespace quip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    default: return "int64";
  }
}

// The data of a contiguous tensor of `count` items, which begins at a multiple of `alignment` bytes. Compiled loops
// count on that, and torch.frombuffer does not give it.
inline const void* data_of(const Tensor& t, ScalarType type, int64_t count, int64_t alignment, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name, " has ", t.numel(),
                  " elements: the op wants a contiguous ", name_of(type), " tensor of ", count);
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % alignment == 0, name,
                  " lies at an address that is no multiple of ", alignment, " bytes: give a clone of it");
  return data;
}

inline const float* floats(const Tensor& t, int64_t count, const char* name) {
  return static_cast<const float*>(data_of(t, ScalarType::Float, count, sizeof(float), name));
}

inline Type type_of(const Tensor& x, const char* name = "x") {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBfloat;
    default: STD_TORCH_CHECK(false, name, " has an unsupported dtype: give float32, float16 or bfloat16");
  }
  return Type::kFloat;
}

inline int64_t bytes_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// A rotation in runs of q * p elements must divide a row of `length` elements.
inline void check_rotation(int64_t q, int64_t p, int64_t length) {
  const bool divides = q > 0 && p > 0 && (p & (p - 1)) == 0 && length > 0 && length % q == 0 && length / q % p == 0;
  STD_TORCH_CHECK(divides, "a rotation of ", q, " x ", p, " does not divide the length ", length,
                  ": widths are powers of two whose product with the base does");
}

// The components of a state's value in `values` [components, 65536], which are searched at this rate.
inline int64_t searched_components(const Tensor& values, int64_t bits) {
  const int64_t dim = values.dim() == 2 ? values.size(0) : 0;
  STD_TORCH_CHECK((dim == 1 || dim == 2) && bits >= 1 && bits * dim <= 8, "values of ", dim, " components at ", bits,
                  " bits: 1 or 2 components and at most 8 bits per step are searched");
  return dim;
}

}  // namespace
}  // namespace quip
