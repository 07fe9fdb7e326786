// The three input types, widened to fp32 and rounded back (to nearest, ties to even).
#pragma once

#include <cstdint>
#include <cstring>

#include "step_params.h"

namespace smoothie {
namespace {  // one copy per tier

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const void* at(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

template <class S>
inline typename S::F load_lanes(const void* p, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return S::load_bf16(static_cast<const uint16_t*>(p));
    case DType::kFloat16: return S::load_f16(static_cast<const uint16_t*>(p));
    default: return S::load(static_cast<const float*>(p));
  }
}

// out[0, count) = p[0, count) in fp32.
template <class S>
inline void widen(const void* p, DType dtype, int64_t count, float* out) {
  int64_t d = 0;
  for (; d + S::kLanes <= count; d += S::kLanes) S::store(out + d, load_lanes<S>(at(p, dtype, d), dtype));
  if (d == count) return;
  alignas(64) float raw[S::kLanes] = {}, wide[S::kLanes];  // the tail through a buffer: never read past the end
  std::memcpy(raw, at(p, dtype, d), size_t((count - d) * size_of(dtype)));
  S::store(wide, load_lanes<S>(raw, dtype));
  std::memcpy(out + d, wide, size_t(count - d) * sizeof(float));
}

inline uint16_t round_to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t(bits >> 16 | 0x40);  // a quiet NaN stays one
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t round_to_f16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and above: infinity
  if (magnitude < 0x38800000u) {                                  // below 2^-14: subnormal steps of 2^-24
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;  // the mantissa of [1/2, 1) counts in steps of 2^-24: the addition rounds
    std::memcpy(&bits, &m, 4);
    return uint16_t(sign | (bits - 0x3F000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1)) >> 13));
}

inline void narrow(float v, DType dtype, void* p, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<uint16_t*>(p)[index] = round_to_bf16(v); break;
    case DType::kFloat16: static_cast<uint16_t*>(p)[index] = round_to_f16(v); break;
    default: static_cast<float*>(p)[index] = v;
  }
}

}  // namespace
}  // namespace smoothie
