// SPDX-License-Identifier: Apache-2.0
// hal._sycl: kernels for Intel GPUs. Their source is in the module (cmake/sycl.cmake) and compiled for
// the device, by the SYCL runtime itself, when one of them is first asked for.
#include <sycl/sycl.hpp>

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "bind_groups.h"
#include "products.h"

namespace ex = sycl::ext::oneapi::experimental;

namespace {

struct Source {
  const char *name, *text;
};
const Source SOURCES[] = {
#include "sources.inc"
};

std::string text_of(const std::string& name) {
  for (const Source& s : SOURCES) {
    if (name == s.name) return s.text;
  }
  throw std::runtime_error("no kernel source " + name);
}

using Bundle = sycl::kernel_bundle<sycl::bundle_state::executable>;

// What a bundle of kernels is compiled for: products are for a number of bits and a dtype of x, the
// rest for any (bits = 0). `matrix`: on matrix engines, which not every device has.
struct Kind {
  int bits, dtype;
  bool matrix;
};

Bundle compiled(const sycl::context& context, Kind kind) {
  ex::include_files headers;
  for (const Source& s : SOURCES) headers.add(s.name, s.text);
  const std::vector<std::string> any = {"hal_search",   "hal_qdq",        "hal_qdq_step",
                                        "hal_quantize", "hal_dequantize", "hal_quantize_act",
                                        "hal_round",    "hal_pack",       "hal_unpack",
                                        "hal_pack_awq", "hal_unpack_awq"};
  const std::vector<std::string> products = {"hal_product", "hal_decode"}, matrix = {"hal_matrix"};
  std::string main = text_of(kind.matrix ? "matrix.cpp" : kind.bits ? "products.cpp" : "groups.cpp");
  if (kind.bits) {
    main = "#define HAL_BITS " + std::to_string(kind.bits) + "\n#define HAL_FLOAT " +
           std::to_string(kind.dtype) + "\n" + main;
  }
  auto source = ex::create_kernel_bundle_from_source(context, ex::source_language::sycl, main,
                                                     ex::properties{headers});
  const auto& names = kind.matrix ? matrix : kind.bits ? products : any;
  return ex::build(source, ex::properties{ex::registered_names{names}});
}

sycl::kernel kernel(const sycl::context& context, Kind kind, const std::string& name) {
  static std::mutex one_at_a_time;
  // Never freed: at the end of a process the driver may be gone before them.
  using Key = std::tuple<size_t, int, int, bool>;
  static auto& bundles = *new std::map<Key, Bundle>;
  static auto& kernels = *new std::map<std::pair<Key, std::string>, sycl::kernel>;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Key of(std::hash<sycl::context>()(context), kind.bits, kind.dtype, kind.matrix);
  const auto known = kernels.find({of, name});
  if (known != kernels.end()) return known->second;
  auto bundle = bundles.find(of);
  if (bundle == bundles.end()) bundle = bundles.emplace(of, compiled(context, kind)).first;
  const sycl::kernel found = bundle->second.ext_oneapi_get_kernel("hal_" + name);
  kernels.emplace(std::make_pair(of, name), found);
  return found;
}

const int GROUP = 128;  // work-items: eight teams
const int TEAM = 16;

// A queue of torch's, or, for address 0, one of the host's own that is waited for.
struct Queue {
  sycl::queue queue;
  bool own;

  explicit Queue(Address given) : queue(given ? *at<sycl::queue>(given) : host()), own(!given) {}

  static const sycl::queue& host() {
    static const auto* one =
        new sycl::queue{sycl::cpu_selector_v, sycl::property::queue::in_order{}};
    return *one;
  }

  template <class... Args>
  void launch(const char* name, Kind kind, int64_t items, const Args&... args) {
    submit(name, kind, items, [&](sycl::handler& h) { h.set_args(args...); });
  }

  // `give` sets the kernel's arguments. Without the GIL: the first launch of a kernel compiles it.
  template <class Give>
  void submit(const char* name, Kind kind, int64_t items, Give give) {
    if (items <= 0) return;
    const py::gil_scoped_release unlocked;
    const sycl::kernel fn = kernel(queue.get_context(), kind, name);
    const size_t rounded = static_cast<size_t>((items + GROUP - 1) / GROUP * GROUP);
    queue.submit([&](sycl::handler& h) {
      give(h);
      h.parallel_for(sycl::nd_range<1>(rounded, GROUP), fn);
    });
    if (own) queue.wait_and_throw();
  }
};

// 16 groups share the arithmetic of their scales, one a lane; but a device wants 32 teams for each of
// its processors first. Activations have no such arithmetic: a group a team.
int groups_of_team(bool alone, int64_t count, int units) {
  int per = alone ? 1 : TEAM;
  while (per > 1 && count < static_cast<int64_t>(units) * 32 * per) per /= 2;
  return per;
}

// On a queue of a device with `units` processors.
struct Sycl {
  template <class Args>
  static void run(const Verb<Args>& verb, Address queue, int units, const Args& a) {
    const int64_t count = a.s.n * a.s.groups;
    const int per = groups_of_team(verb.verb == HAL_QUANTIZE_ACT, count, units);
    Queue(queue).launch(verb.name, {0, 0, false}, (count + per - 1) / per * TEAM, a, per);
  }
};

// `awq`: its order of rows; `along` is then from a column of the weight to its next.
void repack(Address queue, bool pack, bool awq, const HalShape& s, Address codes, Address words,
            int64_t along, int64_t across) {
  const HalWords a = {s, at<uint8_t>(codes), at<uint32_t>(words), along, across};
  const char* name = awq ? (pack ? "pack_awq" : "unpack_awq") : (pack ? "pack" : "unpack");
  Queue(queue).launch(name, {0, 0, false}, s.n * s.k / (awq ? 8 : 32), a);
}

// A weight as rows of words. The tensors behind the addresses belong to the hal.Weight that owns this.
struct Words {
  HalProduct p;

  Words(const HalShape& s, Address codes, Address scale, Address zero) : p{} {
    p.s = s;
    p.experts = 1;
    p.codes = at<const uint32_t>(codes);
    p.scale = at(scale);
    p.zero = at<const uint8_t>(zero);
  }

  void product(Address queue, Address x, int64_t m, Address bias, int bias_dtype,
               Address out) const {
    HalProduct a = p;
    a.x = at(x);
    a.m = m;
    a.bias = at(bias);
    a.bias_dtype = bias_dtype;
    a.out = at(out);
    launch(queue, a, m);
  }

  // Rows offsets[e] .. offsets[e + 1] of x [m, k] times the rows of expert e.
  void grouped(Address queue, Address x, int64_t m, Address offsets, int experts,
               Address out) const {
    HalProduct a = p;
    a.x = at(x);
    a.m = m;
    a.out = at(out);
    a.offsets = at<const int32_t>(offsets);
    a.experts = experts;
    launch(queue, a, m / experts);
  }

  // About `rows` of x to every row of the weight.
  static void launch(Address queue, HalProduct& a, int64_t rows) {
    a.blocks = (rows + HAL_X_ROWS - 1) / HAL_X_ROWS;
    a.blocks += !a.blocks;
    Queue(queue).launch("product", {a.s.bits, a.s.dtype, false}, a.blocks * a.s.n * TEAM, a);
  }

  // x [m, k], m a multiple of 32, times the weight on matrix engines: f32 [m, n].
  void matrix(Address queue, Address x, int64_t m, Address sums) const {
    HalProduct a = p;
    a.x = at(x);
    a.m = m;
    Queue(queue).submit("matrix", {a.s.bits, a.s.dtype, true}, m / 32 * a.s.n, [&](sycl::handler& h) {
      const sycl::local_accessor<uint16_t, 1> tiles(GROUP / TEAM * 16 * 32, h);
      h.set_args(a, at<float>(sums), tiles);
    });
  }

  void decode(Address queue, Address out) const {
    HalProduct a = p;
    a.out = at(out);
    Queue(queue).launch("decode", {a.s.bits, a.s.dtype, false}, a.s.n * a.s.k, a);
  }
};

}  // namespace

PYBIND11_MODULE(_sycl, m) {
  bind_verbs<Sycl>(m);
  m.def("repack", repack);
  py::class_<Words>(m, "Words")
      .def(py::init<const HalShape&, Address, Address, Address>())
      .def("product", &Words::product)
      .def("grouped", &Words::grouped)
      .def("matrix", &Words::matrix)
      .def("decode", &Words::decode);
}
