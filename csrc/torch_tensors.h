// Tensors of the LibTorch stable ABI as the pointers that kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace smoothie {

template <class T>
T* pointer(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* pointer_or_null(const std::optional<torch::stable::Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

}  // namespace smoothie
