// The two 16-bit types of the matrix units, on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace smoothie {
namespace emulator {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
// Multiplies the exponent's bias away, which is right for subnormal numbers as well.
inline float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  uint32_t bits = bits_of(float_of(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return float_of(bits | (x.bits & 0x8000u) << 16);
}

// To the nearest number, ties to even; NaN as a GPU writes it.
inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = std::isnan(x) ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half& to) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) {
    to.bits = 0x7FFF;
  } else if (magnitude >= 65520.0f) {
    to.bits = sign | 0x7C00;
  } else if (magnitude < 0x1p-14f) {
    to.bits = sign | uint16_t(std::lrint(double(magnitude) * 0x1p24));  // 1024 is the smallest normal number
  } else {
    const uint32_t bits = bits_of(magnitude) - (112u << 23);
    to.bits = sign | uint16_t((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
  }
}

}  // namespace emulator
}  // namespace smoothie
