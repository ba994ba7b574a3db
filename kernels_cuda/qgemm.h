// SPDX-License-Identifier: Apache-2.0
// The border of the CUDA kernels: plain C, so that no tensor type, exception or C++ runtime type
// crosses it.
#pragma once
#include <stdint.h>

namespace hal_cuda {

// HalFloat of csrc/hal_abi.h.
enum Float { FLOAT_F32 = 0, FLOAT_BF16 = 1, FLOAT_F16 = 2 };

// x [m, k] times rows of the weight -> out [m, n]. `shift`: log2 of the columns of a group, or 31
// where a row is one. With experts, whose n rows lie after each other and are whole tiles, `offsets`
// says where the tokens of each begin: e has offsets[e] .. offsets[e + 1].
struct Product {
  const void* x;
  const uint32_t* codes;  // [tiles, chunks, 2 bits, 32] in fragment order (qgemm.cuh)
  const void* scale;      // [tiles, groups, 16], zero padded
  const uint8_t* zero;    // the same, or null
  const void* bias;       // [n] or null
  void* out;
  const int32_t* offsets;  // [experts + 1] or null
  int32_t m, n, k, chunks, groups, shift, tiles, expert_tiles;
  int32_t scale_dtype, bias_dtype;
};

}  // namespace hal_cuda

extern "C" {
// `steps`: products of 16 columns in a group, 8 for wider ones. `dense`: decode into out [n, k]
// instead. Returns a cudaError_t.
int hal_cuda_product(const hal_cuda::Product* p, int dtype, int bits, int steps, int dense,
                     void* stream);
const char* hal_cuda_error(int code);
}
