// SPDX-License-Identifier: Apache-2.0
// What is taken from SYCL: kernels as free functions, sub-groups as the teams of csrc/team.h.
#pragma once
#include <sycl/sycl.hpp>

#define HAL_TEAM

// Results have the bits of hal/codec.py; fused multiply-adds are written out where they are wanted.
#pragma clang fp contract(off)

namespace {

namespace item = sycl::ext::oneapi::this_work_item;

inline int team_lane() { return (int)item::get_sub_group().get_local_linear_id(); }
inline float team_at(float x, int lane) {
  return sycl::select_from_group(item::get_sub_group(), x, lane);
}
inline float team_xor(float x, int bit) {
  return sycl::permute_group_by_xor(item::get_sub_group(), x, bit);
}
inline float fmaf(float a, float b, float c) { return sycl::fma(a, b, c); }
inline float rintf(float x) { return sycl::rint(x); }
inline bool team_any(bool x) { return sycl::any_of_group(item::get_sub_group(), x); }

// Which team of the launch this is.
inline int64_t team_index() {
  const auto place = item::get_nd_item<1>();
  return (int64_t)place.get_group_linear_id() * (place.get_local_range(0) / 16) +
         place.get_sub_group().get_group_linear_id();
}

inline int64_t item_index() { return (int64_t)item::get_nd_item<1>().get_global_linear_id(); }

}  // namespace

// A kernel over a range of one dimension; a team is a sub-group.
#define HAL_KERNEL                                                                             \
  SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))     \
  SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::sub_group_size<16>)) void
