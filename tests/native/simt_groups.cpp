// SPDX-License-Identifier: Apache-2.0
// kernels_cuda/groups.cuh on the host: the launch of groups.cu, with two groups a team.
#include "../../kernels_cuda/groups.cuh"

using namespace hal_cuda;

namespace {

template <int VERB, class Args>
int launch(const void* args, int64_t count) {
  const int per = 2, blocks = (int)((count + per * TEAMS - 1) / (per * TEAMS));
  const Args& a = *static_cast<const Args*>(args);
  simt::run({blocks, 1, 1}, TEAM * TEAMS, [&] { groups<VERB>(a, count, per); });
  return 0;
}

}  // namespace

int hal_cuda_groups(int verb, const void* args, int64_t count, int, void*) {
  switch (verb) {
    case HAL_SEARCH: return launch<HAL_SEARCH, HalSearch>(args, count);
    case HAL_QDQ: return launch<HAL_QDQ, HalQdq>(args, count);
    case HAL_QDQ_STEP: return launch<HAL_QDQ_STEP, HalStep>(args, count);
    case HAL_QUANTIZE: return launch<HAL_QUANTIZE, HalPlain>(args, count);
    case HAL_DEQUANTIZE: return launch<HAL_DEQUANTIZE, HalPlain>(args, count);
    case HAL_ROUND: return launch<HAL_ROUND, HalRound>(args, count);
    default: return launch<HAL_QUANTIZE_ACT, HalAct>(args, count);
  }
}
