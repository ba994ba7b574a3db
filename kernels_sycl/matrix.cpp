// SPDX-License-Identifier: Apache-2.0
// Products of many rows on matrix engines (XMX; AMX where a processor plays the device), the weight
// decoded on the way: rounded to the dtype of x, as a dense model holds it.
//
// A sub-group makes 32 rows by 16 columns of the output. x has a multiple of 32 rows, the weight of 16
// rows and of 32 columns.
#include "device.hpp"
#include "weight.hpp"

namespace {

namespace mx = sycl::ext::oneapi::experimental::matrix;

// Numbers are made from bits: SYCL's own conversion to bfloat16 is a library of its own, and the
// runtime's cache on disk (2026.1.2) crashes on kernels of two parts.
//
// Tiles of the engines of Xe2 and of Ponte Vecchio, for 16-bit numbers.
const int M = 8, N = 16, K = 16, TALL = 4;

#if HAL_FLOAT == 1
typedef sycl::ext::oneapi::bfloat16 Number;
#else
typedef sycl::half Number;
#endif

using A = mx::joint_matrix<sycl::sub_group, Number, mx::use::a, M, K, mx::layout::row_major>;
using B = mx::joint_matrix<sycl::sub_group, Number, mx::use::b, K, N, mx::layout::col_major>;
using C = mx::joint_matrix<sycl::sub_group, float, mx::use::accumulator, M, N>;

template <class T>
auto global(T* p) {
  return sycl::address_space_cast<sycl::access::address_space::global_space,
                                  sycl::access::decorated::no>(p);
}

}  // namespace

// `sums` f32 [m, n]; `tiles`: 16 weight rows by CHUNK columns for every sub-group of the work-group.
HAL_KERNEL hal_matrix(HalProduct a, float* sums, sycl::local_accessor<Number, 1> tiles) {
  const auto team = item::get_sub_group();
  const int64_t across = a.s.n / N, column = team_index() % across * N;
  const int64_t first = team_index() / across * TALL * M;
  if (first >= a.m) return;
  const auto tile = tiles.template get_multi_ptr<sycl::access::decorated::no>() +
                    team.get_group_linear_id() * N * CHUNK;
  Number* x = (Number*)a.x;
  C c[TALL];
  for (int t = 0; t < TALL; t++) mx::joint_matrix_fill(team, c[t], 0.0f);
  for (int64_t k = 0; k < a.s.k; k += CHUNK) {
    // Every work-item decodes a chunk of its own row of the weight.
    const int64_t row = column + team_lane();
    for (int i = 0; i < CHUNK; i++) {
      const uint16_t bits = narrowed(weight_at(a, row, k + i), HAL_FLOAT);
      tile[team_lane() * CHUNK + i] = sycl::bit_cast<Number>(bits);
    }
    sycl::group_barrier(team);
    for (int step = 0; step < CHUNK; step += K) {
      B b;
      mx::joint_matrix_load(team, b, tile + step, CHUNK);
      for (int t = 0; t < TALL; t++) {
        A part;
        mx::joint_matrix_load(team, part, global(x + (first + t * M) * a.s.k + k + step), a.s.k);
        mx::joint_matrix_mad(team, c[t], part, b, c[t]);
      }
    }
    sycl::group_barrier(team);
  }
  for (int t = 0; t < TALL; t++) {
    mx::joint_matrix_store(team, c[t], global(sums + (first + t * M) * a.s.n + column), a.s.n,
                           mx::layout::row_major);
  }
}
