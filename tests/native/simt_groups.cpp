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
    case SEARCH: return launch<SEARCH, HalSearch>(args, count);
    case QDQ: return launch<QDQ, HalQdq>(args, count);
    case QDQ_STEP: return launch<QDQ_STEP, HalStep>(args, count);
    case QUANTIZE: return launch<QUANTIZE, HalPlain>(args, count);
    case DEQUANTIZE: return launch<DEQUANTIZE, HalPlain>(args, count);
    default: return launch<QUANTIZE_ACT, HalAct>(args, count);
  }
}
