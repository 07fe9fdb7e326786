// What all C++ tests check with.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

inline int checks = 0, failures = 0;
inline std::string context;  // what is under test, for messages

inline void check(bool ok, const char* file, int line, const char* what, double got, double wanted, double bound) {
  ++checks;
  if (ok) return;
  if (++failures <= 20)
    std::printf("%s:%d: %s: got %.9g, wanted %.9g, bound %.3g (%s)\n", file, line, what, got, wanted, bound,
                context.c_str());
}

#define CHECK_EQUAL(got, wanted) check((got) == (wanted), __FILE__, __LINE__, #got, double(got), double(wanted), 0.0)
// False for NaN.
#define CHECK_CLOSE(got, wanted, bound) \
  check(std::fabs((got) - (wanted)) <= (bound), __FILE__, __LINE__, #got, double(got), double(wanted), double(bound))
