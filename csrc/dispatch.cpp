// SPDX-License-Identifier: Apache-2.0
// Which instruction sets the processor and the operating system both support. CPUID and XGETBV are
// read directly: __builtin_cpu_supports needs a constructor that clang's runtime lacks in shared
// objects, and knows nothing of tile state.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hal {
namespace {

#if defined(__x86_64__)

struct Features {
  bool avx2, avxvnni, avx512, avx512vnni, amx;
};

bool has(uint32_t word, int first, int second = -1, int third = -1, int fourth = -1) {
  const int bits[] = {first, second, third, fourth};
  for (const int b : bits) {
    if (b >= 0 && !(word >> b & 1)) return false;
  }
  return true;
}

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

// Linux gives the 8 KB of tile state to a process only when asked: arch_prctl(ARCH_REQ_XCOMP_PERM,
// XFEATURE_XTILE_DATA).
bool tiles_granted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Features features() {
  Features f = {};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 12, 27, 28, 29)) return f;  // fma osxsave avx f16c
  const uint64_t state = enabled_state();
  if ((state & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;  // ymm
  f.avx2 = has(b, 5, 8);                                                       // avx2 bmi2
  const bool zmm = (state & 0xe6) == 0xe6 && has(b, 16, 17, 30, 31);  // opmask, zmm; f dq bw vl
  const bool byte_and_dot = has(c, 1, 11);    // vbmi vnni
  const bool tiles = has(d, 22, 23, 24, 25);  // amx bf16, f16 of avx512, amx tile, amx int8
  if (a == 0 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;  // eax: 4 avx vnni, 5 bf16
  f.avxvnni = f.avx2 && has(a, 4);
  f.avx512 = f.avx2 && zmm;
  f.avx512vnni = f.avx512 && byte_and_dot && has(a, 5);
  f.amx = f.avx512vnni && tiles && (state & 0x60000) == 0x60000 && tiles_granted();
  return f;
}

Tables find() {
  const Features f = features();
  Tables t = {{}, 0};
  if (f.amx) t.rows[t.count++] = &hal_table_amx;
  if (f.avx512vnni) t.rows[t.count++] = &hal_table_avx512vnni;
  if (f.avx512) t.rows[t.count++] = &hal_table_avx512;
  if (f.avxvnni) t.rows[t.count++] = &hal_table_avxvnni;
  if (f.avx2) t.rows[t.count++] = &hal_table_avx2;
  t.rows[t.count++] = &hal_table_scalar;
  return t;
}

#elif defined(__aarch64__)

// Linux tells in the auxiliary vector: AT_HWCAP bit 20 dot products, AT_HWCAP2 bit 13 i8mm. Every
// Apple processor that runs arm64 macOS has dot products.
Tables find() {
  Tables t = {{}, 0};
#if defined(__linux__)
  const bool dot = getauxval(16) >> 20 & 1, i8mm = getauxval(26) >> 13 & 1;
#else
  const bool dot = true, i8mm = false;
#endif
  if (dot && i8mm) t.rows[t.count++] = &hal_table_neon_i8mm;
  if (dot) t.rows[t.count++] = &hal_table_neon_dot;
  t.rows[t.count++] = &hal_table_neon;
  return t;
}

#else

Tables find() { return {{&hal_table_scalar}, 1}; }

#endif

}  // namespace

const Tables& tables() {
  static const Tables found = find();
  return found;
}

}  // namespace hal
