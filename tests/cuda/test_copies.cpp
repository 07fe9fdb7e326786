// TMA copies byte by byte: where a number of the matrix lands, and what lies outside of it; what a driver refuses.
#include "testing.h"

namespace {

using namespace smoothie::hopper;
using smoothie::emulator::encode_tiled;

enum How { kPlain, kStrided, kMulticast, kStridedMulticast };

struct CopyParams {
  TensorMap map;
  How how;
  int column, row, tile, rows;  // rows of the tile
  uint16_t* out;                // [rows, 64]
};

constexpr size_t kCopyShared = 256 * 128 + 8;

__global__ void copy(const __grid_constant__ CopyParams p) {
  const uint32_t base = address_of(shared_memory()), barrier = base + 256 * 128;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
    barrier_expect(barrier, p.rows * 128);
    if (p.how == kPlain)
      load_box(base, &p.map, barrier, p.column, p.row);
    else if (p.how == kStrided)
      load_strided_box(base, &p.map, barrier, p.column, p.tile, p.row / 2);
    else if (p.how == kMulticast)
      load_box(base, &p.map, barrier, p.column, p.row, 1);
    else
      load_strided_box(base, &p.map, barrier, p.column, p.tile, p.row / 2, 1);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = int(threadIdx.x); i < p.rows * 64; i += 32) {
    const int row = i / 64, column = i % 64;
    std::memcpy(p.out + i, shared_memory() + row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2, 2);
  }
}

// The numbers of a tile, whose row i is the matrix's row row_of(i).
template <class RowOf>
void check_copy(const Matrix<Half>& matrix, CopyParams p, const RowOf& row_of) {
  std::vector<uint16_t> out(size_t(p.rows) * 64, 0xFFFF);
  p.out = out.data();
  CHECK_NO_ERROR(launch(copy, {1, 1, 32, 1, kCopyShared}, nullptr, p));
  for (int i = 0; i < p.rows; ++i)
    for (int j = 0; j < 64; ++j) {
      const int64_t r = row_of(i), c = int64_t(p.column) + j;
      const bool inside = r >= 0 && r < matrix.rows && c >= 0 && c < matrix.columns;
      CHECK_EQUAL(out[size_t(i * 64 + j)], (inside ? matrix.data[r * matrix.stride + c].bits : 0));
    }
}

void test_plain() {
  const Matrix<Half> matrix(100, 88, 8, 5);
  for (int rows : {1, 8, 37, 64, 256})
    for (int row : {-70, -3, 0, 60, 99, 100, 1 << 30})
      for (int column : {-128, -5, 0, 8, 64, 87, 88, 1 << 30}) {
        context = "tile of " + std::to_string(rows) + " rows at " + std::to_string(row) + ", " + std::to_string(column);
        CopyParams p{{}, kPlain, column, row, 0, rows, nullptr};
        CHECK_NO_ERROR(describe<Half>(&p.map, matrix.data, matrix.rows, matrix.columns, matrix.stride, rows));
        check_copy(matrix, p, [&](int i) { return int64_t(row) + i; });
      }
}

void test_strided() {
  const int tiles = 3;
  const Matrix<Half> matrix(128 * tiles, 88, 8, 5);
  for (int pairs : {1, 16, 64})
    for (int pair : {-1, 0, 16, 60, 64})
      for (int tile : {-1, 0, 2, 3}) {
        context = "strided tile " + std::to_string(tile) + ", " + std::to_string(pairs) + " pairs from " +
                  std::to_string(pair);
        CopyParams p{{}, kStrided, 64, 2 * pair, tile, 2 * pairs, nullptr};
        CHECK_NO_ERROR(describe_strided<Half>(&p.map, matrix.data, tiles, matrix.columns, matrix.stride, pairs));
        check_copy(matrix, p, [&](int i) {
          const int64_t at = pair + i / 2;
          return tile < 0 || tile >= tiles || at < 0 || at >= 64 ? -1 : 2 * (at * tiles + tile) + i % 2;
        });
      }
  CopyParams p{{}, kStrided, 0, 0, 0, 64, nullptr};
  CHECK_NO_ERROR(describe<Half>(&p.map, matrix.data, matrix.rows, matrix.columns, matrix.stride, 64));
  CHECK_ERROR(launch(copy, {1, 1, 32, 1, kCopyShared}, nullptr, p), "4 dimensions by a tensor map of 2");
}

void test_multicasts_need_a_cluster() {
  context = "multicast alone";
  const Matrix<Half> matrix(128, 64, 0, 5);
  static uint16_t out[64 * 64];
  for (How how : {kMulticast, kStridedMulticast}) {
    CopyParams p{{}, how, 0, 0, 0, 64, out};
    CHECK_NO_ERROR(how == kMulticast ? describe<Half>(&p.map, matrix.data, 128, 64, matrix.stride, 64)
                                     : describe_strided<Half>(&p.map, matrix.data, 1, 64, matrix.stride, 32));
    CHECK_ERROR(launch(copy, {1, 1, 32, 1, kCopyShared}, nullptr, p), "without a cluster");
  }
}

// Each of a tensor map's rules, broken alone.
void test_refusals() {
  context = "tensor maps";
  alignas(64) static uint8_t memory[2 * sizeof(TensorMap)];
  alignas(16) static BFloat16 numbers[8];
  auto* const map = reinterpret_cast<TensorMap*>(memory);
  struct Shape {
    int64_t sizes[4] = {64, 2, 5, 64}, strides[3] = {128, 256, 1280}, tile[4] = {64, 2, 1, 32};
    int rank = 4;
  };
  const auto refused = [&](void (*change)(Shape&), const char* part) {
    Shape shape;
    change(shape);
    CHECK_ERROR(encode_tiled(map, numbers, shape.rank, shape.sizes, shape.strides, shape.tile), part);
  };
  const auto taken = [&](void (*change)(Shape&)) {
    Shape shape;
    change(shape);
    CHECK_NO_ERROR(encode_tiled(map, numbers, shape.rank, shape.sizes, shape.strides, shape.tile));
  };
  taken([](Shape&) {});
  taken([](Shape& s) { s.rank = 2; });
  taken([](Shape& s) { s.strides[0] += 16, s.strides[1] = 2 * s.strides[0], s.strides[2] = 7 * s.strides[1]; });
  taken([](Shape& s) { s.sizes[3] = int64_t(1) << 32; });
  taken([](Shape& s) { s.rank = 2, s.strides[0] = (int64_t(1) << 40) - 16; });
  taken([](Shape& s) { s.tile[3] = 256; });

  const Shape shape;
  auto* const shifted = reinterpret_cast<TensorMap*>(memory + 32);
  CHECK_ERROR(encode_tiled(shifted, numbers, 4, shape.sizes, shape.strides, shape.tile), "multiple of 64");
  CHECK_ERROR(encode_tiled(map, numbers + 1, 4, shape.sizes, shape.strides, shape.tile), "does not begin");
  CHECK_ERROR(encode_tiled(map, nullptr, 4, shape.sizes, shape.strides, shape.tile), "does not begin");
  refused([](Shape& s) { s.rank = 1; }, "2 to 4 dimensions");
  refused([](Shape& s) { s.rank = 5; }, "2 to 4 dimensions");
  refused([](Shape& s) { s.sizes[3] = 0; }, "a size is not");
  refused([](Shape& s) { s.sizes[3] = (int64_t(1) << 32) + 1; }, "a size is not");
  refused([](Shape& s) { s.tile[3] = 0; }, "size of the tile");
  refused([](Shape& s) { s.tile[3] = 257; }, "size of the tile");
  refused([](Shape& s) { s.rank = 2, s.strides[0] = 136; }, "multiple of 16 bytes");
  refused([](Shape& s) { s.rank = 2, s.strides[0] = -128; }, "multiple of 16 bytes");
  refused([](Shape& s) { s.rank = 2, s.strides[0] = int64_t(1) << 40; }, "less than 2^40");
  refused([](Shape& s) { s.rank = 2, s.strides[0] = 0; }, "steps over");
  refused([](Shape& s) { s.rank = 2, s.strides[0] = 112; }, "steps over");
  refused([](Shape& s) { s.strides[1] = 128; }, "steps over");
  refused([](Shape& s) { s.strides[1] = 272; }, "multiple of the one before");
  refused([](Shape& s) { s.tile[0] = 4; }, "row of the tile is not a multiple");
  refused([](Shape& s) { s.tile[0] = 72; }, "longer than the swizzle's 128 bytes");
  refused([](Shape& s) { s.tile[0] = 32; }, "tiles with rows of 128 bytes");
}

}  // namespace

void test_copies() {
  test_plain();
  test_strided();
  test_multicasts_need_a_cluster();
  test_refusals();
}
