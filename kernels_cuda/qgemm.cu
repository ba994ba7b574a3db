// SPDX-License-Identifier: Apache-2.0
// Instances of the products and their launch.
#include "qgemm.cuh"

#include <cuda_runtime.h>

namespace hal_cuda {

// Blocks of an SM: registers that do not spill, and 32 to 48 KB of codes under way.
template <class T, int BITS, int TILES, int GROUP>
__global__ void __launch_bounds__(WARPS* LANES, TILES == 4 ? 1 : 2) product_kernel(Product p) {
  __shared__ __align__(16) Shared<BITS, TILES> shared;
  product<T, BITS, TILES, GROUP>(p, shared);
}

template <class T, int BITS>
__global__ void __launch_bounds__(WARPS* LANES) decode_kernel(Product p) {
  decode<T, BITS>(p);
}

// How many tokens go to which expert is known on the device only: blocks for all of them would
// mostly find nothing to do.
constexpr int MOST_PARTS = 4;

template <class T, int BITS, int TILES>
void launch(const Product& p, int steps, cudaStream_t stream) {
  const int parts = (p.m + 8 * TILES - 1) / (8 * TILES);
  const dim3 grid(p.tiles, p.offsets && parts > MOST_PARTS ? MOST_PARTS : parts);
  const int threads = WARPS * LANES;
  if (steps >= 8) {
    product_kernel<T, BITS, TILES, 8><<<grid, threads, 0, stream>>>(p);
  } else if (steps == 4) {
    product_kernel<T, BITS, TILES, 4><<<grid, threads, 0, stream>>>(p);
  } else if (steps == 2) {
    product_kernel<T, BITS, TILES, 2><<<grid, threads, 0, stream>>>(p);
  } else {
    product_kernel<T, BITS, TILES, 1><<<grid, threads, 0, stream>>>(p);
  }
}

template <class T, int BITS>
void launch(const Product& p, int steps, bool dense, cudaStream_t stream) {
  if (dense) {
    const int64_t units = (int64_t)p.tiles * p.chunks;
    decode_kernel<T, BITS><<<(unsigned)((units + WARPS - 1) / WARPS), WARPS * LANES, 0, stream>>>(p);
  } else if (p.m <= 8) {
    launch<T, BITS, 1>(p, steps, stream);
  } else if (p.m <= 16) {
    launch<T, BITS, 2>(p, steps, stream);
  } else {
    launch<T, BITS, 4>(p, steps, stream);
  }
}

template <class T>
void launch(const Product& p, int bits, int steps, bool dense, cudaStream_t stream) {
  switch (bits) {
    case 2: return launch<T, 2>(p, steps, dense, stream);
    case 3: return launch<T, 3>(p, steps, dense, stream);
    case 4: return launch<T, 4>(p, steps, dense, stream);
    case 5: return launch<T, 5>(p, steps, dense, stream);
    case 6: return launch<T, 6>(p, steps, dense, stream);
    case 7: return launch<T, 7>(p, steps, dense, stream);
    case 8: return launch<T, 8>(p, steps, dense, stream);
  }
}

}  // namespace hal_cuda

int hal_cuda_product(const hal_cuda::Product* p, int dtype, int bits, int steps, int dense,
                     void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == hal_cuda::FLOAT_BF16) {
    hal_cuda::launch<Bf16>(*p, bits, steps, dense != 0, s);
  } else {
    hal_cuda::launch<F16>(*p, bits, steps, dense != 0, s);
  }
  return (int)cudaGetLastError();
}

const char* hal_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }
