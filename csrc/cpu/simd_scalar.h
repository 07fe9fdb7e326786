// Four fp32 lanes in the compiler's portable vectors (GCC, Clang): any processor, no intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace smoothie {

struct Scalar {
  static constexpr int kLanes = 4;
  static constexpr int kBroadcasts = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  struct Wide {
    uint64_t v[2];
  };
  using Mask = I;  // all ones or all zeros

  static F set(float v) { return F{v, v, v, v}; }
  template <class V, class T>
  static V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static F load(const float* p) { return load_as<F>(p); }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  template <int n>  // n neighbouring floats, again and again
  static F broadcast(const float* p) {
    return F{p[0], p[1 % n], p[2 % n], p[3 % n]};
  }
  template <int n>  // every n neighbouring lanes take their sum
  static F sum_groups(F v) {
    if constexpr (n >= 2) v = add(v, F{v[1], v[0], v[3], v[2]});
    if constexpr (n >= 4) v = add(v, F{v[2], v[3], v[0], v[1]});
    return v;
  }
  static float widen_bf16(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
  static float widen_f16(uint16_t h) {
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    float v;
    if (exponent == 0) {
      v = float(mantissa) * 0x1p-24f;  // subnormals and zero
    } else {
      const uint32_t bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
      std::memcpy(&v, &bits, 4);
    }
    return h >> 15 ? -v : v;
  }
  static F load_bf16(const uint16_t* p) {
    return F{widen_bf16(p[0]), widen_bf16(p[1]), widen_bf16(p[2]), widen_bf16(p[3])};
  }
  static F load_f16(const uint16_t* p) { return F{widen_f16(p[0]), widen_f16(p[1]), widen_f16(p[2]), widen_f16(p[3])}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  // Fused where the processor can, by -ffp-contract=fast: a function of the C library would take its place elsewhere.
  static F fma(F a, F b, F c) { return a * b + c; }
  static float fma(float a, float b, float c) { return a * b + c; }
  static double fma(double a, double b, double c) { return a * b + c; }
  static F max_or_nan(F bound, F v) { return select(bound > v, bound, v); }  // NaN compares false and comes through
  static F min_or_nan(F bound, F v) { return select(bound < v, bound, v); }
  static F greater_or_second(F a, F b) { return select(a > b, a, b); }
  static F sqrt(F v) { return F{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])}; }
  static Mask greater(F a, F b) { return a > b; }
  static uint32_t bits(Mask m) { return uint32_t((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }  // bit i: lane i
  static Mask negative(I v) { return v >> 31; }
  static F select(Mask m, F yes, F no) { return as_float(select(m, as_int(yes), as_int(no))); }
  static I select(Mask m, I yes, I no) { return (m & yes) | (~m & no); }

  static I set_int(int32_t v) { return I{v, v, v, v}; }
  static I load_int(const int32_t* p) { return load_as<I>(p); }
  static void store_int(int32_t* p, I v) { std::memcpy(p, &v, sizeof(v)); }
  static I add_int(I a, I b) { return I(U(a) + U(b)); }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_or(I a, I b) { return a | b; }
  static I bit_xor(I a, I b) { return a ^ b; }
  template <int n>
  static I shift_left(I v) {
    return I(U(v) << n);
  }
  template <int n>  // zeros come in
  static I shift_right(I v) {
    return I(U(v) >> n);
  }
  template <int n>
  static I shift_right_sign(I v) {
    return v >> n;
  }
  static F to_float(I v) { return F{float(v[0]), float(v[1]), float(v[2]), float(v[3])}; }
  static F as_float(I v) { return load_as<F>(&v); }
  static I as_int(F v) { return load_as<I>(&v); }

  // 32-bit values in 64-bit lanes; what stands in the upper halves is never read.
  static Wide even(I v) { return {{uint32_t(v[0]), uint32_t(v[2])}}; }
  static Wide odd(I v) { return {{uint32_t(v[1]), uint32_t(v[3])}}; }
  static I interleave(Wide even, Wide odd) {
    return I(U{uint32_t(even.v[0]), uint32_t(odd.v[0]), uint32_t(even.v[1]), uint32_t(odd.v[1])});
  }
  static Wide multiply(Wide a, Wide b) {
    return {{uint64_t(uint32_t(a.v[0])) * uint32_t(b.v[0]), uint64_t(uint32_t(a.v[1])) * uint32_t(b.v[1])}};
  }
  static Wide upper(Wide v) { return {{v.v[0] >> 32, v.v[1] >> 32}}; }
  static Wide xor3(Wide a, Wide b, Wide c) { return {{a.v[0] ^ b.v[0] ^ c.v[0], a.v[1] ^ b.v[1] ^ c.v[1]}}; }
};

}  // namespace smoothie
