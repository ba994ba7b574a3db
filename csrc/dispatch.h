// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "hal_abi.h"

namespace hal {

// The tables this machine can run, best first.
struct Tables {
  const HalTable* rows[6];
  int count;
};

const Tables& tables();

}  // namespace hal
