// SPDX-License-Identifier: Apache-2.0
// A parallel loop over torch's OpenMP pool (one libgomp in the process: torch is imported first).
#pragma once
#include <stdint.h>

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hal {

// fn(begin, end) over chunks of 0 .. units, taken as threads become free: with a static split a
// contended core was measured to hold everyone up 55x. Work below 2^17 elements runs in the caller:
// fork and join cost 2-5 us. Inside another parallel region everything runs serially.
template <class Fn>
void parallel(int64_t units, int64_t elements, int threads, const Fn& fn) {
#ifdef _OPENMP
  if (threads > 1 && units > 1 && elements >= 1 << 17 && !omp_in_parallel()) {
    const int64_t most = units / (8 * threads), chunk = most ? most : 1;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t i; (i = next.fetch_add(chunk, std::memory_order_relaxed)) < units;) {
      fn(i, i + chunk < units ? i + chunk : units);
    }
    return;
  }
#endif
  fn(0, units);
}

}  // namespace hal
