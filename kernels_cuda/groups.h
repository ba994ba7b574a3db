// SPDX-License-Identifier: Apache-2.0
// The border of the group-wise verbs: plain C, arguments as in csrc/hal_abi.h.
#pragma once
#include <stdint.h>

// `verb`: HalVerb. `args`: HalSearch, HalQdq, HalStep, HalPlain (both directions), HalAct or HalRound.
// `count`: groups of the matrix; `units`: processors of the device. Returns a cudaError_t.
extern "C" int hal_cuda_groups(int verb, const void* args, int64_t count, int units, void* stream);
