// SPDX-License-Identifier: Apache-2.0
// Arguments of the group-wise verbs from the integers that hal/groupwise.py passes (addresses, sizes,
// enum codes), for every native module that has these verbs.
#pragma once
#include <pybind11/pybind11.h>

#include "hal_abi.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

HalShape shape(int64_t n, int64_t k, int64_t width, int bits, bool symmetric, int dtype,
               int scale_dtype, float least) {
  const int64_t groups = k ? (k + width - 1) / width : 0;
  return {n, k, width, groups, bits, symmetric, dtype, scale_dtype, least};
}

HalParams params(Address v, Address lo, Address hi, Address amin, Address amax) {
  return {at<float>(v), at<float>(lo), at<float>(hi), at<float>(amin), at<float>(amax)};
}

void bind_arguments(py::module_& m) {
  py::class_<HalShape>(m, "Shape", py::module_local()).def(py::init(&shape));
  py::class_<HalParams>(m, "Params", py::module_local()).def(py::init(&params));
}

HalSearch search_args(const HalShape& s, Address w, Address importance, Address factors,
                      int64_t n_factors, Address amin, Address amax) {
  return {s,         at(w),           at<float>(importance), at<float>(factors),
          n_factors, at<float>(amin), at<float>(amax)};
}

HalPlain plain_args(const HalShape& s, Address codes, Address scale, Address zero) {
  return {s, at<uint8_t>(codes), at(scale), at<uint8_t>(zero), {}, nullptr, nullptr};
}

HalPlain quantize_args(const HalShape& s, Address w, const HalParams& p, Address codes,
                       Address scale, Address zero) {
  HalPlain a = plain_args(s, codes, scale, zero);
  a.w = at(w);
  a.p = p;
  return a;
}

HalPlain dequantize_args(const HalShape& s, Address codes, Address scale, Address zero,
                         Address out) {
  HalPlain a = plain_args(s, codes, scale, zero);
  a.out = at(out);
  return a;
}

}  // namespace
