// SPDX-License-Identifier: Apache-2.0
// A parallel loop over torch's OpenMP pool (one libgomp in the process: torch is imported first).
#pragma once
#include <stdint.h>

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hal {

// Units first .. second - 1, in one word: what is left of a thread's share, which its owner takes from
// the front and others from the back.
struct alignas(64) Share {
  std::atomic<uint64_t> left;

  void set(int64_t first, int64_t second) {
    left.store(static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(second));
  }

  // Takes `most` units; towards the end half of what is left, so that all threads end together. False when
  // there are none.
  bool take(bool own, int64_t most, int64_t& begin, int64_t& end) {
    uint64_t now = left.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = static_cast<int64_t>(now >> 32), second = static_cast<int64_t>(now & 0xffffffff);
      const int64_t half = (second - first + 1) / 2, n = half < most ? half : most;
      if (n <= 0) return false;
      begin = own ? first : second - n;
      end = begin + n;
      const uint64_t units = static_cast<uint64_t>(n), next = own ? now + (units << 32) : now - units;
      if (left.compare_exchange_weak(now, next, std::memory_order_relaxed)) return true;
    }
  }
};

// fn(begin, end) over ranges of 0 .. units. Every thread has a share and goes through it from its front, in
// order: to start reading elsewhere takes 3 us, and products of one row from memory took 1.08 times as long
// when threads drew from one queue. Who is done takes from the ends of others' shares: with fixed shares a
// contended core was measured to hold everyone up 55x. Work below 2^17 elements runs in the caller: fork and
// join cost 2-5 us. Inside another parallel region everything runs serially.
template <class Fn>
void parallel(int64_t units, int64_t elements, int threads, const Fn& fn) {
#ifdef _OPENMP
  const int most_threads = 256;
  if (threads > 1 && units > 1 && elements >= 1 << 17 && units >> 31 == 0 && !omp_in_parallel()) {
    const int team = threads < most_threads ? threads : most_threads;
    const int64_t share = units / (8 * team), chunk = share ? share : 1;
    Share shares[most_threads];
    for (int t = 0; t < team; t++) shares[t].set(units * t / team, units * (t + 1) / team);
#pragma omp parallel num_threads(team)
    for (int i = 0, own = omp_get_thread_num(); i < team; i++) {
      int64_t begin, end;
      while (shares[(own + i) % team].take(i == 0, chunk, begin, end)) fn(begin, end);
    }
    return;
  }
#endif
  fn(0, units);
}

}  // namespace hal
