// SPDX-License-Identifier: Apache-2.0
// hal._cuda: products of weights in fragment order, over integers (addresses, sizes, codes). The CUDA
// runtime is linked statically: the module loads on machines without a driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "qgemm.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

// Holds addresses only; whoever makes one keeps the tensors alive.
struct Weight {
  hal_cuda::Product p;
  int bits, steps;

  Weight(Address codes, Address scale, Address zero, int n, int k, int chunks, int groups, int shift,
         int scale_dtype, int bits, int steps)
      : p{}, bits(bits), steps(steps) {
    p.codes = reinterpret_cast<const uint32_t*>(codes);
    p.scale = reinterpret_cast<const void*>(scale);
    p.zero = reinterpret_cast<const uint8_t*>(zero);
    p.n = n;
    p.k = k;
    p.chunks = chunks;
    p.groups = groups;
    p.shift = shift;
    p.scale_dtype = scale_dtype;
  }

  void run(const hal_cuda::Product& given, int dtype, bool dense, Address stream) const {
    const int code = hal_cuda_product(&given, dtype, bits, steps, dense,
                                      reinterpret_cast<void*>(stream));
    if (code != 0) throw std::runtime_error(std::string("CUDA: ") + hal_cuda_error(code));
  }

  void product(Address x, int m, Address bias, int bias_dtype, Address out, int dtype,
               Address stream) const {
    hal_cuda::Product given = p;
    given.x = reinterpret_cast<const void*>(x);
    given.bias = reinterpret_cast<const void*>(bias);
    given.out = reinterpret_cast<void*>(out);
    given.m = m;
    given.bias_dtype = bias_dtype;
    run(given, dtype, false, stream);
  }

  void decode(Address out, int dtype, Address stream) const {
    hal_cuda::Product given = p;
    given.out = reinterpret_cast<void*>(out);
    run(given, dtype, true, stream);
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::class_<Weight>(m, "Weight")
      .def(py::init<Address, Address, Address, int, int, int, int, int, int, int, int>())
      .def("product", &Weight::product)
      .def("decode", &Weight::decode);
}
