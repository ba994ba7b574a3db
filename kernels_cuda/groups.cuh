// SPDX-License-Identifier: Apache-2.0
// The group-wise verbs: the bodies of csrc/group_ops.h and round_ops.h, whose 16 lanes are half a warp.
#pragma once
#define HAL_TEAM
#include "device.cuh"

#include "../csrc/round_ops.h"
#include "groups.h"

namespace hal_cuda {

constexpr int TEAM = 16, TEAMS = 16;  // threads of a team, teams of a block

// Every team has `per` groups in a row.
template <int VERB, class Args>
HAL_DEVICE void groups(const Args& a, int64_t count, int per) {
  const int64_t from = ((int64_t)blockIdx.x * TEAMS + threadIdx.x / TEAM) * per;
  const int64_t end = from + per < count ? from + per : count;
  if (from >= end) return;
  if constexpr (VERB == HAL_SEARCH) search_groups(&a, from, end);
  if constexpr (VERB == HAL_QDQ) qdq_groups(&a, from, end);
  if constexpr (VERB == HAL_QDQ_STEP) step_groups(&a, from, end);
  if constexpr (VERB == HAL_QUANTIZE) quantize_groups(&a, from, end);
  if constexpr (VERB == HAL_DEQUANTIZE) dequantize_groups(&a, from, end);
  if constexpr (VERB == HAL_QUANTIZE_ACT) quantize_act_groups(&a, from, end);
  if constexpr (VERB == HAL_ROUND) round_groups(&a, from, end);
}

}  // namespace hal_cuda
