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

HalRound round_args(const HalShape& s, Address w, Address words, Address scale, Address zero) {
  return {s, at(w), at<uint8_t>(words), at(scale), at<uint8_t>(zero)};
}

// One of the group-wise verbs, as every module knows it.
template <class Args>
struct Verb {
  HalVerb verb;
  const char* name;
  void (*HalTable::*fn)(const Args*, int64_t, int64_t);
};

const Verb<HalSearch> SEARCH = {HAL_SEARCH, "search", &HalTable::search};
const Verb<HalQdq> QDQ = {HAL_QDQ, "qdq", &HalTable::qdq};
const Verb<HalStep> QDQ_STEP = {HAL_QDQ_STEP, "qdq_step", &HalTable::qdq_step};
const Verb<HalPlain> QUANTIZE = {HAL_QUANTIZE, "quantize", &HalTable::quantize};
const Verb<HalPlain> DEQUANTIZE = {HAL_DEQUANTIZE, "dequantize", &HalTable::dequantize};
const Verb<HalAct> QUANTIZE_ACT = {HAL_QUANTIZE_ACT, "quantize_act", &HalTable::quantize_act};
const Verb<HalRound> ROUND = {HAL_ROUND, "round", &HalTable::round};

// The seven verbs. `Device::run(verb, where, how, arguments)` takes the two integers that lead every
// call: instruction set and threads, or stream and processors.
template <class Device>
void bind_verbs(py::module_& m) {
  py::class_<HalShape>(m, "Shape", py::module_local()).def(py::init(&shape));
  py::class_<HalParams>(m, "Params", py::module_local()).def(py::init(&params));
  m.def(SEARCH.name, [](Address where, int how, const HalShape& s, Address w, Address importance,
                        Address factors, int64_t n_factors, Address amin, Address amax) {
    Device::run(SEARCH, where, how,
                search_args(s, w, importance, factors, n_factors, amin, amax));
  });
  m.def(QDQ.name, [](Address where, int how, const HalShape& s, Address w, const HalParams& p,
                     Address out) { Device::run(QDQ, where, how, HalQdq{s, at(w), p, at(out)}); });
  m.def(QDQ_STEP.name, [](Address where, int how, const HalShape& s, Address w, Address grad,
                          int grad_dtype, const HalParams& p, float lr_v, float lr_range) {
    Device::run(QDQ_STEP, where, how, HalStep{s, at(w), at(grad), grad_dtype, p, lr_v, lr_range});
  });
  m.def(QUANTIZE.name, [](Address where, int how, const HalShape& s, Address w, const HalParams& p,
                          Address codes, Address scale, Address zero) {
    Device::run(QUANTIZE, where, how, quantize_args(s, w, p, codes, scale, zero));
  });
  m.def(DEQUANTIZE.name, [](Address where, int how, const HalShape& s, Address codes, Address scale,
                            Address zero, Address out) {
    Device::run(DEQUANTIZE, where, how, dequantize_args(s, codes, scale, zero, out));
  });
  m.def(QUANTIZE_ACT.name, [](Address where, int how, const HalShape& s, Address x, Address codes,
                              Address scale, bool given) {
    Device::run(QUANTIZE_ACT, where, how,
                HalAct{s, at(x), at<int8_t>(codes), at<float>(scale), given});
  });
  m.def(ROUND.name, [](Address where, int how, const HalShape& s, Address w, Address words,
                       Address scale, Address zero) {
    Device::run(ROUND, where, how, round_args(s, w, words, scale, zero));
  });
}

}  // namespace
