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

// A matrix of so many dimensions, the first of numbers of type T one after the other; strides in numbers, of the
// others.
template <class T, int kDimensions>
const char* describe(TensorMap* map, const void* matrix, const int64_t (&sizes)[kDimensions],
                     const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions]) {
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
  cuuint64_t all[kDimensions], bytes[kDimensions - 1];
  cuuint32_t boxes[kDimensions], steps[kDimensions];
  for (int i = 0; i < kDimensions; ++i) all[i] = cuuint64_t(sizes[i]), boxes[i] = cuuint32_t(box[i]), steps[i] = 1;
  for (int i = 0; i + 1 < kDimensions; ++i) bytes[i] = cuuint64_t(strides[i]) * sizeof(T);
  constexpr auto type =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, kDimensions, const_cast<void*>(matrix), all, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

// Rows of `columns` numbers, row_stride numbers apart; boxes are box_rows x 64, swizzled in shared memory. The matrix
// begins at a multiple of 16 bytes, as do its rows.
template <class T>
const char* describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int box_rows) {
  return describe<T, 2>(map, matrix, {columns, rows}, {row_stride}, {64, box_rows});
}

// The first 128 tiles rows of such a matrix in `tiles` tiles of 64 pairs of rows: pair p of tile t is pair p tiles + t.
// Boxes have one tile's next box_pairs pairs.
template <class T>
const char* describe_strided(TensorMap* map, const void* matrix, int64_t tiles, int64_t columns, int64_t row_stride,
                             int box_pairs) {
  return describe<T, 4>(map, matrix, {columns, 2, tiles, 64}, {row_stride, 2 * row_stride, 2 * tiles * row_stride},
                        {64, 2, 1, box_pairs});
}

}  // namespace hopper
}  // namespace smoothie
