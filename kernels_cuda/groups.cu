// SPDX-License-Identifier: Apache-2.0
// Instances of the group-wise verbs and their launch. Compiled with -fmad=false: results have the bits
// of hal/codec.py.
#include "groups.cuh"

#include <cuda_runtime.h>

namespace hal_cuda {

// One block of a processor at least: left to itself the compiler spills for the sake of three.
template <int VERB, class Args>
__global__ void __launch_bounds__(TEAM* TEAMS, 1)
    groups_kernel(const __grid_constant__ Args a, int64_t count, int per) {
  groups<VERB>(a, count, per);
}

// 16 groups share the arithmetic of their scales, one a lane; but a device wants 128 teams for each of
// its processors first. Activations have no such arithmetic: a group a team.
inline int groups_of_team(int verb, int64_t count, int units) {
  if (verb == HAL_QUANTIZE_ACT) return 1;
  int per = 16;
  while (per > 1 && count < (int64_t)units * 128 * per) per /= 2;
  return per;
}

template <int VERB, class Args>
int launch(const void* args, int64_t count, int units, cudaStream_t stream) {
  const int per = groups_of_team(VERB, count, units);
  const int64_t teams = (count + per - 1) / per, blocks = (teams + TEAMS - 1) / TEAMS;
  if (blocks == 0) return cudaSuccess;
  groups_kernel<VERB><<<(unsigned)blocks, TEAM * TEAMS, 0, stream>>>(*static_cast<const Args*>(args),
                                                                     count, per);
  return (int)cudaGetLastError();
}

}  // namespace hal_cuda

int hal_cuda_groups(int verb, const void* args, int64_t count, int units, void* stream) {
  using namespace hal_cuda;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (verb) {
    case HAL_SEARCH: return launch<HAL_SEARCH, HalSearch>(args, count, units, s);
    case HAL_QDQ: return launch<HAL_QDQ, HalQdq>(args, count, units, s);
    case HAL_QDQ_STEP: return launch<HAL_QDQ_STEP, HalStep>(args, count, units, s);
    case HAL_QUANTIZE: return launch<HAL_QUANTIZE, HalPlain>(args, count, units, s);
    case HAL_DEQUANTIZE: return launch<HAL_DEQUANTIZE, HalPlain>(args, count, units, s);
    case HAL_ROUND: return launch<HAL_ROUND, HalRound>(args, count, units, s);
    default: return launch<HAL_QUANTIZE_ACT, HalAct>(args, count, units, s);
  }
}
