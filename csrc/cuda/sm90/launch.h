// Launching a kernel, and describing a matrix to its box copies; tests/cuda/launch.h is the twin of this file on a CPU.
// Functions return nullptr, or what went wrong.
#pragma once

#include <cuda_runtime.h>
#include <hopper.h>

#include <type_traits>

namespace smoothie {
namespace hopper {

using Stream = cudaStream_t;

struct Grid {
  int x, y, threads, cluster;  // blocks, threads of a block, blocks of a cluster (along x)
  size_t shared;               // bytes of shared memory of a block
};

inline const char* check(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  if (auto wrong = check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared))))
    return wrong;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y), config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared, config.stream = stream;
  config.attrs = &cluster, config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return check(cudaLaunchKernelEx(&config, kernel, params));
}

// Rows of `columns` numbers of type T, row_stride numbers apart; boxes are box_rows x 64, swizzled in shared memory.
// The matrix begins at a multiple of 16 bytes, as do its rows.
template <class T>
const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows) {
  // From the driver, by name: then the library asks for no libcuda when it is loaded.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) ||
        result != cudaDriverEntryPointSuccess)
      found = nullptr;
    return Encode(found);
  }();
  if (!encode) return "the driver knows no tensor maps";
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(row_stride) * sizeof(T)};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
  constexpr auto type =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

}  // namespace hopper
}  // namespace smoothie
