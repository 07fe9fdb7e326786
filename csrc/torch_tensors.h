// Tensors of the LibTorch stable ABI as the pointers that kernels take. A pointer says nothing of what it points to, so
// type, sizes and layout are checked where it is made: a mistake in Python is an error here, and never a write.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace smoothie {

using Sizes = std::initializer_list<int64_t>;

template <class T>
inline constexpr torch::headeronly::ScalarType kTypeOf = torch::headeronly::ScalarType::Undefined;
template <>
inline constexpr auto kTypeOf<float> = torch::headeronly::ScalarType::Float;
template <>
inline constexpr auto kTypeOf<int64_t> = torch::headeronly::ScalarType::Long;
template <>
inline constexpr auto kTypeOf<int32_t> = torch::headeronly::ScalarType::Int;
template <>
inline constexpr auto kTypeOf<bool> = torch::headeronly::ScalarType::Bool;

inline bool has_sizes(const torch::stable::Tensor& t, Sizes sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes)
    if (t.size(d++) != size) return false;
  return true;
}

inline std::string text_of(Sizes sizes) {
  std::ostringstream text;
  for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "[") << size;
  return (text.tellp() > 0 ? text.str() : "[") + "]";
}

// Of any type.
inline void* data(const torch::stable::Tensor& t, const char* name, Sizes sizes) {
  STD_TORCH_CHECK(has_sizes(t, sizes), name, " must have sizes ", text_of(sizes));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.data_ptr();
}

template <class T>
T* pointer(const torch::stable::Tensor& t, const char* name, Sizes sizes) {
  STD_TORCH_CHECK(t.scalar_type() == kTypeOf<T>, name, " has another type than its kernel reads");
  return static_cast<T*>(data(t, name, sizes));
}

template <class T>
T* pointer(const std::optional<torch::stable::Tensor>& t, const char* name, Sizes sizes) {
  return t ? pointer<T>(*t, name, sizes) : nullptr;
}

// A matrix whose rows are contiguous, and any number of elements apart.
inline void* rows(const torch::stable::Tensor& t, const char* name, Sizes sizes) {
  STD_TORCH_CHECK(has_sizes(t, sizes), name, " must have sizes ", text_of(sizes));
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have contiguous rows");
  return t.data_ptr();
}

}  // namespace smoothie
