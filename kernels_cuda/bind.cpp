// SPDX-License-Identifier: Apache-2.0
// hal._cuda: group-wise verbs, and products of weights in fragment order, over integers (addresses,
// sizes, codes). The CUDA runtime is linked statically: the module loads on machines without a driver.
#include <stdexcept>
#include <string>

#include "../csrc/bind_groups.h"
#include "groups.h"
#include "qgemm.h"

namespace {

void check(int code) {
  if (code != 0) throw std::runtime_error(std::string("CUDA: ") + hal_cuda_error(code));
}

struct Cuda {
  template <class Args>
  static void run(const Verb<Args>& verb, Address stream, int units, const Args& a) {
    check(hal_cuda_groups(verb.verb, &a, a.s.n * a.s.groups, units, at(stream)));
  }
};

// Holds addresses only; whoever makes one keeps the tensors alive.
struct Weight {
  hal_cuda::Product p;
  int bits, steps;

  Weight(Address codes, Address scale, Address zero, int n, int experts, int k, int chunks,
         int groups, int shift, int scale_dtype, int bits, int steps)
      : p{}, bits(bits), steps(steps) {
    p.codes = at<const uint32_t>(codes);
    p.scale = at(scale);
    p.zero = at<const uint8_t>(zero);
    p.n = n / experts;
    p.tiles = (n + 15) / 16;
    p.expert_tiles = p.tiles / experts;
    p.k = k;
    p.chunks = chunks;
    p.groups = groups;
    p.shift = shift;
    p.scale_dtype = scale_dtype;
  }

  void run(const hal_cuda::Product& given, int dtype, bool dense, Address stream) const {
    check(hal_cuda_product(&given, dtype, bits, steps, dense, at(stream)));
  }

  void product(Address x, int m, Address bias, int bias_dtype, Address out, int dtype,
               Address stream) const {
    hal_cuda::Product given = p;
    given.x = at(x);
    given.bias = at(bias);
    given.out = at(out);
    given.m = m;
    given.bias_dtype = bias_dtype;
    run(given, dtype, false, stream);
  }

  void grouped(Address x, int m, Address offsets, Address out, int dtype, Address stream) const {
    hal_cuda::Product given = p;
    given.x = at(x);
    given.offsets = at<const int32_t>(offsets);
    given.out = at(out);
    given.m = m;
    run(given, dtype, false, stream);
  }

  void decode(Address out, int dtype, Address stream) const {
    hal_cuda::Product given = p;
    given.out = at(out);
    run(given, dtype, true, stream);
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  bind_verbs<Cuda>(m);
  py::class_<Weight>(m, "Weight")
      .def(py::init<Address, Address, Address, int, int, int, int, int, int, int, int, int>())
      .def("product", &Weight::product)
      .def("grouped", &Weight::grouped)
      .def("decode", &Weight::decode);
}
