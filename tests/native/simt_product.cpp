// SPDX-License-Identifier: Apache-2.0
// kernels_cuda/qgemm.cuh on the host, for test_cuda.py.
#include "../../kernels_cuda/qgemm.cuh"

using namespace hal_cuda;

namespace {

template <class T, int BITS, int TILES, int GROUP>
void product_on_host(const Product& p) {
  alignas(16) static Shared<BITS, TILES> shared;
  const int parts = (p.m + 8 * TILES - 1) / (8 * TILES);
  simt::run({p.tiles, p.offsets && parts > 2 ? 2 : parts, 1}, WARPS * LANES,
            [&] { product<T, BITS, TILES, GROUP>(p, shared); });
}

template <class T, int BITS>
void decode_on_host(const Product& p) {
  const int units = p.tiles * p.chunks;
  simt::run({(units + WARPS - 1) / WARPS, 1, 1}, WARPS * LANES, [&] { decode<T, BITS>(p); });
}

template <class T, int BITS, int TILES>
void each_group(const Product& p, int steps) {
  if (steps >= 8) return product_on_host<T, BITS, TILES, 8>(p);
  if (steps == 4) return product_on_host<T, BITS, TILES, 4>(p);
  if (steps == 2) return product_on_host<T, BITS, TILES, 2>(p);
  product_on_host<T, BITS, TILES, 1>(p);
}

template <class T, int BITS>
void each(const Product& p, int steps, bool dense) {
  if (dense) return decode_on_host<T, BITS>(p);
  if (p.m <= 8) return each_group<T, BITS, 1>(p, steps);
  each_group<T, BITS, 2>(p, steps);
}

template <class T>
void each(const Product& p, int bits, int steps, bool dense) {
  switch (bits) {
    case 2: return each<T, 2>(p, steps, dense);
    case 3: return each<T, 3>(p, steps, dense);
    case 4: return each<T, 4>(p, steps, dense);
    case 5: return each<T, 5>(p, steps, dense);
    case 6: return each<T, 6>(p, steps, dense);
    case 7: return each<T, 7>(p, steps, dense);
    case 8: return each<T, 8>(p, steps, dense);
  }
}

}  // namespace

// The border of kernels_cuda/qgemm.cu, here.
int hal_cuda_product(const Product* p, int dtype, int bits, int steps, int dense, void*) {
  if (dtype == FLOAT_BF16) {
    each<Bf16>(*p, bits, steps, dense != 0);
  } else {
    each<F16>(*p, bits, steps, dense != 0);
  }
  return 0;
}

const char* hal_cuda_error(int) { return "none"; }
