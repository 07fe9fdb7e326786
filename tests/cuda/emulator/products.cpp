// Asynchronous matrix products (wgmma): how a warpgroup issues them, when they happen, where operands and sums lie.
#include <algorithm>
#include <limits>

#include "machine.h"
#include "matrix_unit.h"

namespace smoothie {
namespace emulator {
namespace {

constexpr uint32_t kSumsPoison = 0x7FC0BAD0;  // a NaN that no arithmetic makes

// --- Operands

// A matrix in shared memory, 8 rows of 128 swizzled bytes after the other.
struct Descriptor {
  uint32_t start, stride;
  int eights;  // of rows
};

bool decode(const Block& block, uint64_t word, bool transposed, int rows, Descriptor& to) {
  to.start = uint32_t(word & 0x3FFF) << 4, to.stride = uint32_t(word >> 32 & 0x3FFF) << 4;
  if (word >> 62 != 1) return wrong(&block, "a matrix descriptor without the 128-byte swizzle");
  if (word & 0x3FFFC000C000C000u)
    return wrong(&block, "a matrix descriptor 0x%016llx with unknown bits", static_cast<unsigned long long>(word));
  if (to.start & 0x380) return wrong(&block, "a matrix that begins at %u, amid eight swizzled rows", to.start);
  if (transposed ? to.start & 0x70 : (to.start & 0x70) > 0x60)
    return wrong(&block, "a matrix that begins at %u, and goes beyond its 128 bytes", to.start);
  to.eights = transposed ? 2 : rows / 8;
  const uint32_t end = (to.start & ~127u) + uint32_t(to.eights - 1) * to.stride + 1024;
  if (to.start < kSharedBegin || end > kSharedBegin + machine.shared)
    return wrong(&block, "a matrix %u..%u that lies outside shared memory", to.start, end);
  return true;
}

void widen_eight(const uint8_t* from, bool half, float* to) {
  uint16_t numbers[8];
  std::memcpy(numbers, from, 16);
  if (half)
    for (int i = 0; i < 8; ++i) to[i] = widen(Half{numbers[i]});
  else
    for (int i = 0; i < 8; ++i) to[i] = widen(BFloat16{numbers[i]});
}

// The 16 numbers of a row.
void read_row(const Block& block, const Descriptor& from, int row, bool half, float* to) {
  const uint32_t at = from.start + uint32_t(row / 8) * from.stride + uint32_t(row % 8) * 128;
  for (int part = 0; part < 2; ++part)
    widen_eight(block.view.get() + (swizzled(at + uint32_t(part) * 16) - kSharedBegin), half, to + 8 * part);
}

// 64 numbers of each of 16 rows: a transposed matrix.
template <class To>
void read_transposed(const Block& block, const Descriptor& from, bool half, const To& to) {
  for (int k = 0; k < kDepth; ++k)
    for (int part = 0; part < 8; ++part) {
      float numbers[8];
      const uint32_t at = from.start + uint32_t(k / 8) * from.stride + uint32_t(k % 8) * 128 + uint32_t(part) * 16;
      widen_eight(block.view.get() + (swizzled(at) - kSharedBegin), half, numbers);
      for (int i = 0; i < 8; ++i) to(8 * part + i, k, numbers[i]);
    }
}

float half_of_word(uint32_t word, int upper, bool half) {
  const uint16_t bits = uint16_t(word >> 16 * upper);
  return half ? widen(Half{bits}) : widen(BFloat16{bits});
}

// --- A product

template <int kColumns>
void multiply_warps(const Block& block, const Product& in, const Descriptor& a, const Descriptor& b, unsigned warps) {
  Operand<kDepth, kColumns> right;
  Operand<16, kDepth> left[4];  // a warp's 16 rows each
  if (in.in_registers) {
    if constexpr (kColumns == 64)
      read_transposed(block, b, in.half, [&](int n, int k, float x) { right.values[k][n] = x; });
  } else {
    for (int n = 0; n < kColumns; ++n) {
      float row[kDepth];
      read_row(block, b, n, in.half, row);
      for (int k = 0; k < kDepth; ++k) right.values[k][n] = row[k];
    }
  }
  if (in.in_registers) {
    // A thread has rows g and g + 8 of its warp; word i: row + 8 (i mod 2), columns + 8 (i / 2).
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < 8 && (warps >> thread / 32 & 1); ++i)
        left[thread / 32].values[thread % 32 / 4 + i / 2 % 2 * 8][thread % 4 * 2 + i % 2 + i / 4 * 8] =
            half_of_word(in.registers[thread][i / 2], i % 2, in.half);
  } else if (in.transposed_a) {
    read_transposed(block, a, in.half, [&](int m, int k, float x) { left[m / 16].values[m % 16][k] = x; });
  } else {
    for (int r = 0; r < 64; ++r)
      if (warps >> r / 16 & 1) read_row(block, a, r, in.half, left[r / 16].values[r % 16]);
  }
  right.find_exponents(in.half);
  for (int w = 0; w < 4; ++w)
    if (warps >> w & 1) {
      left[w].find_exponents(in.half);
      multiply_and_add(in.accumulator->sums + 16 * w * kColumns, left[w], right, in.add, machine.extra_bits);
    }
}

bool is_executed(const Warpgroup& group, uint64_t covered) {
  return *std::min_element(group.executed, group.executed + 4) >= covered;
}

bool is_issued(const Product& in) { return *std::min_element(in.issued, in.issued + 4) == 32; }

// --- Sums: in registers, or with the matrix units

Accumulator* take_accumulator(int columns) {
  if (machine.free_accumulators.empty()) {
    machine.accumulators.push_back(std::make_unique<Accumulator>());
    machine.free_accumulators.push_back(machine.accumulators.back().get());
  }
  Accumulator* taken = machine.free_accumulators.back();
  machine.free_accumulators.pop_back();
  taken->columns = columns, taken->users = 0;
  std::fill_n(taken->sums, 64 * columns, std::numeric_limits<float>::quiet_NaN());
  return taken;
}

float& element(Accumulator& accumulator, int thread, int i) {
  return accumulator.sums[row_of(thread, i) * accumulator.columns + column_of(thread, i)];
}

bool are_poisoned(const float* sums, int n) {
  uint32_t differ = 0;
  for (int i = 0; i < n; ++i) differ |= bits_of(sums[i]) ^ kSumsPoison;
  return !differ;
}

// Gives the thread the registers of products that are done.
void land(Fiber& fiber, uint64_t covered) {
  for (int i = 0; i < fiber.n_flights;) {
    Flight& flight = fiber.flights[i];
    if (flight.last >= covered) {
      ++i;
      continue;
    }
    Accumulator& accumulator = *flight.accumulator;
    const int n = accumulator.columns / 2;
    if (!are_poisoned(flight.sums, n)) FAIL("sums were written while their product was under way");
    for (int j = 0; j < n; ++j) flight.sums[j] = element(accumulator, fiber.thread, j);
    if (++accumulator.users == 128) machine.free_accumulators.push_back(&accumulator);
    flight = fiber.flights[--fiber.n_flights];
  }
}

// Gives the product the thread's registers: new ones, or those that an earlier product already has.
void take_off(Product& in, uint64_t number, float* sums) {
  Fiber& me = *machine.current;
  const int n = in.columns / 2;
  Flight* flight = nullptr;
  for (int i = 0; i < me.n_flights; ++i) {
    Flight& other = me.flights[i];
    if (other.sums == sums && other.accumulator->columns == in.columns)
      flight = &other;
    else if (other.sums < sums + n && sums < other.sums + other.accumulator->columns / 2)
      FAIL("a product into some of the sums of another that is under way");
  }
  if (flight) {
    if (!are_poisoned(sums, n)) FAIL("sums were written while their product was under way");
    if (!in.accumulator) in.accumulator = flight->accumulator;
    if (in.fresh || in.accumulator != flight->accumulator)
      FAIL("threads of the warpgroup waited for different products");
    flight->last = number;
    return;
  }
  if (!in.accumulator) in.accumulator = take_accumulator(in.columns), in.fresh = true;
  if (!in.fresh) FAIL("threads of the warpgroup waited for different products");
  if (me.n_flights == kMaxFlights) FAIL("more than %d sums under way", kMaxFlights);
  me.flights[me.n_flights++] = {sums, in.accumulator, number};
  if (in.add)
    for (int i = 0; i < n; ++i) element(*in.accumulator, me.thread, i) = sums[i];
  for (int i = 0; i < n; ++i) sums[i] = float_of(kSumsPoison);
}

Warpgroup& my_group() {
  Fiber& me = *machine.current;
  const size_t group = size_t(me.thread / 128);
  if (group >= me.block->groups.size())
    FAIL("products need a whole warpgroup; the block has %d threads", machine.n_threads);
  return me.block->groups[group];
}

void issue(float* sums, int columns, bool half, bool transposed_a, const uint32_t* registers, uint64_t a, uint64_t b,
           bool add) {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  if (!me.begun) FAIL("a product without products_begin");
  const uint64_t number = me.products++;
  if (number == group.first + group.products.size()) {
    Descriptor unused;
    if (!registers && !decode(*me.block, a, transposed_a, 64, unused)) give_up();
    if (!decode(*me.block, b, registers, columns, unused)) give_up();
    Product product{};
    product.a = a, product.b = b, product.columns = columns;
    product.half = half, product.transposed_a = transposed_a, product.in_registers = registers, product.add = add;
    group.products.push_back(product);
  }
  Product& in = group.products[number - group.first];
  if (in.a != a || in.b != b || in.columns != columns || in.half != half || in.transposed_a != transposed_a ||
      in.add != add || in.in_registers != (registers != nullptr))
    FAIL("product %llu is another one than the rest of the warpgroup has issued",
         static_cast<unsigned long long>(number));
  in.registers[me.thread % 128] = registers;
  take_off(in, number, sums);
  ++me.uncommitted;
  const int warp = me.thread % 128 / 32;
  if (++in.issued[warp] == 32) {
    ++group.issued[warp];
    if (!group.queued) group.queued = true, machine.ready.push_back(&group);
  }
  if (random_bits() % 32 == 0) yield();
}

}  // namespace

bool is_ready(const Warpgroup& group) {
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] < group.issued[w]) return true;
  return false;
}

// For the warps that have issued the product: each has its own 16 rows.
bool execute(Warpgroup& group) {
  uint64_t number = std::numeric_limits<uint64_t>::max();
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] < group.issued[w]) number = std::min(number, group.executed[w]);
  unsigned warps = 0;
  for (int w = 0; w < 4; ++w)
    if (group.executed[w] == number && number < group.issued[w]) warps |= 1u << w, ++group.executed[w];
  Product& in = group.products[number - group.first];
  Block& block = *group.block;
  refresh(block);
  Descriptor a{}, b{};
  if (!in.in_registers && !decode(block, in.a, in.transposed_a, 64, a)) return false;
  if (!decode(block, in.b, in.in_registers, in.columns, b)) return false;
  for (const Descriptor* read : {&a, &b})
    for (int i = 0; i < read->eights; ++i)
      mark(machine.product_pages, (read->start & ~127u) + uint32_t(i) * read->stride, 1024);
  const auto multiply = in.columns == 128  ? multiply_warps<128>
                        : in.columns == 64 ? multiply_warps<64>
                                           : multiply_warps<32>;
  multiply(block, in, a, b, warps);
  in.done |= uint8_t(warps);
  if (in.done == 15) ++machine.counts.products;
  while (!group.products.empty() && group.products.front().done == 15 && is_issued(group.products.front()))
    group.products.pop_front(), ++group.first;
  auto& waiting = group.waiting;
  for (size_t i = 0; i < waiting.size();)
    if (is_executed(group, waiting[i]->covered)) {
      wake(waiting[i]);
      waiting[i] = waiting.back(), waiting.pop_back();
    } else {
      ++i;
    }
  return true;
}

// --- What a thread calls

void products_begin() {
  my_group();
  machine.current->begun = true;
}

void products_commit() {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  me.ends[me.groups % kMaxGroups] = me.products;
  const uint64_t number = me.groups++ - group.first_group;
  if (number == group.ends.size()) group.ends.push_back(me.products), group.commits.push_back(0);
  if (group.ends[number] != me.products) FAIL("threads of the warpgroup committed different products");
  ++group.commits[number];
  while (!group.ends.empty() && group.commits.front() == 128)
    group.ends.pop_front(), group.commits.pop_front(), ++group.first_group;
  me.uncommitted = 0;
  me.begun = false;
  yield();
}

void products_wait(int groups) {
  Fiber& me = *machine.current;
  Warpgroup& group = my_group();
  if (me.uncommitted) FAIL("a wait for products that are not committed");
  me.begun = false;
  yield();
  if (me.groups > uint64_t(groups))
    me.covered = std::max(me.covered, me.ends[(me.groups - uint64_t(groups) - 1) % kMaxGroups]);
  if (!is_executed(group, me.covered)) {
    group.waiting.push_back(&me);
    wait_for(Wait::kProducts);
  }
  land(me, me.covered);
}

void multiply(float* sums, int columns, bool half, bool transposed_a, uint64_t a, uint64_t b, bool add) {
  issue(sums, columns, half, transposed_a, nullptr, a, b, add);
}
void multiply(float* sums, int columns, bool half, const uint32_t* a, uint64_t b, bool add) {
  issue(sums, columns, half, false, a, 0, b, add);
}

}  // namespace emulator
}  // namespace smoothie
