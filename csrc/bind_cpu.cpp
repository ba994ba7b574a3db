// SPDX-License-Identifier: Apache-2.0
// hal._cpu: the tables as Python functions that take integers (addresses, sizes, enum codes) and
// release the GIL. No torch headers, so one build serves every torch version.
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "bind_groups.h"
#include "crc32.h"
#include "dispatch.h"
#include "threads.h"

namespace {

const HalTable& table(int isa) {
  const hal::Tables& t = hal::tables();
  if (isa < 0 || isa >= t.count) throw py::index_error("isa " + std::to_string(isa));
  return *t.rows[isa];
}

py::list isas() {
  py::list names;
  for (int i = 0; i < hal::tables().count; i++) names.append(hal::tables().rows[i]->name);
  return names;
}

// A table function over the pool; the GIL is not held.
template <class Args>
void spread(void (*fn)(const Args*, int64_t, int64_t), const Args& args, int64_t units,
            int64_t elements, int threads) {
  hal::parallel(units, elements, threads, [&](int64_t i, int64_t end) { fn(&args, i, end); });
}

template <class Args>
void run(void (*fn)(const Args*, int64_t, int64_t), const Args& args, int64_t units,
         int64_t elements, int threads) {
  py::gil_scoped_release unlocked;
  spread(fn, args, units, elements, threads);
}

// How often a verb goes over the weight.
int64_t passes(const HalSearch& a) { return 1 + a.n_factors; }
template <class Args>
int64_t passes(const Args&) {
  return 1;
}

struct Cpu {
  template <class Args>
  static void run(const Verb<Args>& verb, Address isa, int threads, const Args& a) {
    ::run(table((int)isa).*verb.fn, a, a.s.n * a.s.groups, a.s.n * a.s.k * passes(a), threads);
  }
};

void repack(int isa, bool pack, const HalShape& s, int layout, Address codes, Address words,
            int threads) {
  const HalRepack a = {s, layout, at<uint8_t>(codes), at<uint32_t>(words)};
  const HalTable& t = table(isa);
  run(pack ? t.pack : t.unpack, a, (s.k + 31) / 32, s.n * s.k, threads);
}

// Reads `bytes` (whole units of 16 KB of them).
void probe_read(int isa, Address data, int64_t bytes, int threads) {
  run(table(isa).read, HalProbe{at<const uint8_t>(data)}, bytes >> 14, bytes, threads);
}

// Multiplies registers; returns the number of operations.
int64_t probe_peak(int isa, int64_t units, int threads) {
  run(table(isa).peak, HalProbe{nullptr}, units, units << 17, threads);
  return units * table(isa).peak_ops;
}

// Adds what `bytes` at `data` come to into sums; whether they are finite numbers of `dtype`.
bool digest(int isa, Address data, int64_t bytes, int dtype, Address sums) {
  const HalTable& t = table(isa);
  const py::gil_scoped_release unlocked;
  bool finite = true;
  const HalDigest a = {at<const uint8_t>(data), bytes, dtype, at<uint64_t>(sums), &finite};
  t.digest(&a);
  return finite;
}

uint32_t crc32(uint32_t before, Address data, int64_t bytes) {
  const py::gil_scoped_release unlocked;
  return hal::crc32(before, at<const uint8_t>(data), bytes);
}

// Memory for prepared activations: one buffer per calling thread, grown and kept.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)));
    size = bytes;
  }
  return memory.get();
}

void norm_rows(const HalTable& f, const HalNorm& a, int64_t m, int threads) {
  spread(f.norm, a, m, m * a.k, threads);
}

void norm(int isa, int64_t m, int64_t k, int dtype, Address x, Address more, Address weight,
          float eps, Address out, int threads) {
  const HalTable& f = table(isa);
  py::gil_scoped_release unlocked;
  norm_rows(f, {k, dtype, eps, at(x), at(more), at(weight), at(out)}, m, threads);
}

void gate_rows(const HalTable& f, const HalGate& a, int64_t m, int threads) {
  spread(f.gate, a, m, m * a.n * 8, threads);
}

void gate(int isa, int64_t m, int64_t n, int dtype, Address x, Address out, int threads) {
  const HalTable& f = table(isa);
  py::gil_scoped_release unlocked;
  gate_rows(f, {n, dtype, at(x), at(out)}, m, threads);
}

// What stays the same from token to token in the attention of one layer.
struct Attention {
  HalAttend a;

  Attention(int64_t heads, int64_t kv_heads, int64_t dim, int64_t length, int dtype, float eps,
            float scale, Address q_norm, Address k_norm, Address cos, Address sin, Address keys,
            Address values)
      : a{0,          heads,      kv_heads, dim,     0,        length,     dtype,   eps,    scale,
          nullptr,    at(q_norm), at(k_norm), at(cos), at(sin), at(keys), at(values), nullptr,
          nullptr} {}

  void rows(const HalTable& f, const void* qkv, int64_t m, int64_t position, void* out,
            int threads) const {
    HalAttend b = a;
    b.m = m;
    b.at = position;
    b.qkv = qkv;
    b.out = out;
    b.scores = static_cast<float*>(scratch(a.kv_heads * 4 * a.length * 4));
    spread(f.attend, b, a.kv_heads, m * a.heads * (position + m) * a.dim * 2, threads);
  }

  void attend(int isa, Address qkv, int64_t m, int64_t position, Address out, int threads) const {
    const HalTable& f = table(isa);
    py::gil_scoped_release unlocked;
    rows(f, at(qkv), m, position, at(out), threads);
  }
};

// A weight in tiles. The tensors behind the addresses belong to the hal.Weight that owns this.
struct Tiles {
  HalTiles t;

  Tiles(const HalShape& s, Address codes, Address scale, Address zero)
      : t{s, inputs(s), (s.n + 63) / 64, at<uint8_t>(codes), at(scale), at<uint8_t>(zero)} {}

  static int64_t inputs(const HalShape& s) {
    const auto padded = [](int64_t n) { return (n + 7) / 8 * 8; };
    if (!s.groups) return 0;
    return (s.groups - 1) * padded(s.width) + padded(s.k - (s.groups - 1) * s.width);
  }

  int64_t code_bytes() const { return t.tiles * 64 * t.kp / 8 * t.s.bits; }

  void fill(int isa, Address codes, Address scale, Address zero, int threads) {
    relay(table(isa).tile, codes, scale, zero, threads);
  }

  void read(int isa, Address codes, Address scale, Address zero, int threads) {
    relay(table(isa).untile, codes, scale, zero, threads);
  }

  void relay(void (*fn)(const HalTiles*, const HalPlain*, int64_t, int64_t), Address codes,
             Address scale, Address zero, int threads) {
    const HalPlain p = plain_args(t.s, codes, scale, zero);
    py::gil_scoped_release unlocked;
    hal::parallel(t.tiles, t.s.n * t.s.k, threads,
                  [&](int64_t i, int64_t end) { fn(&t, &p, i, end); });
  }

  HalGemm gemm_args(Address x, int64_t m, int64_t first, int64_t n, Address out) const {
    return {t, m, first, n, at(x), nullptr, nullptr, 0, at(out), n, 0};
  }

  // Without the GIL. 1024 rows at a time: the prepared form of x then stays below 26 MB at K = 4096.
  static void multiply(const HalTable& f, const HalGemm& all, int threads) {
    const int64_t size = all.w.s.dtype == HAL_F32 ? 4 : 2;
    for (int64_t row = 0; row < all.m; row += 1024) {
      HalGemm a = all;
      a.m = all.m - row < 1024 ? all.m - row : 1024;
      a.x = static_cast<const char*>(all.x) + row * all.w.s.k * size;
      a.out = static_cast<char*>(all.out) + row * all.ldo * size;
      multiply_rows(f, a, threads);
    }
  }

  static void multiply_rows(const HalTable& f, HalGemm a, int threads) {
    const int64_t first = a.first / 64, last = (a.first + a.n + 63) / 64, work = a.m * a.n * a.w.s.k;
    a.prepared = scratch(f.prepared_bytes(&a));
    const int helpers = work < 1 << 20 ? 1 : threads;
    hal::parallel(a.m, a.m * a.w.kp, helpers,
                  [&](int64_t i, int64_t end) { f.prepare_x(&a, i, end); });
    hal::parallel(last - first, work, helpers,
                  [&](int64_t i, int64_t end) { f.gemm(&a, first + i, first + end); });
  }

  void gemm(int isa, Address x, int64_t m, Address bias, int bias_dtype, Address out, int threads,
            int way) const {
    HalGemm a = gemm_args(x, m, 0, t.s.n, out);
    a.bias = at(bias);
    a.bias_dtype = bias_dtype;
    a.way = way;
    const HalTable& f = table(isa);
    py::gil_scoped_release unlocked;
    multiply(f, a, threads);
  }

  // Rows offsets[e] .. offsets[e + 1] of x times rows e * n .. (e + 1) * n of the weight.
  void gemm_grouped(int isa, Address x, Address offsets, int64_t experts, Address out, int threads,
                    int way) const {
    const HalTable& f = table(isa);
    const int32_t* ends = at<int32_t>(offsets);
    const int64_t n = t.s.n / experts, size = t.s.dtype == HAL_F32 ? 4 : 2;
    py::gil_scoped_release unlocked;
    for (int64_t e = 0; e < experts; e++) {
      const int64_t row = ends[e], m = ends[e + 1] - row;
      if (m <= 0) continue;
      HalGemm a = gemm_args(x + row * t.s.k * size, m, e * n, n, out + row * n * size);
      a.way = way;
      multiply(f, a, threads);
    }
  }
};

// One of the products of a block: its weight, bias or null, and how to multiply.
struct Product {
  HalTiles t;
  int way, bias_dtype;
  const void* bias;

  Product(const Tiles& w, int how, Address b, int dtype)
      : t(w.t), way(how), bias_dtype(dtype), bias(at(b)) {}

  void row(const HalTable& f, const void* x, void* out, int threads) const {
    const int64_t n = t.s.n;
    Tiles::multiply(f, {t, 1, 0, n, x, nullptr, bias, bias_dtype, out, n, way}, threads);
  }
};

// One token through decoder blocks in one call: a token of 28 blocks has 224 steps, each of which costs
// 27 us in Python once weights have swept the caches. The steps are those of norm, Tiles::gemm,
// Attention::attend and gate, to the same bits.
struct Chain {
  struct Block {
    Product qkv;
    HalNorm norm;
    Attention attention;
    Product out, gate_up, down;
    HalNorm next;
  };
  float eps;
  std::vector<Block> blocks;
  std::vector<char> wide, narrow, added;  // qkv or gate and up; what the next product reads; its result

  explicit Chain(float e) : eps(e) {}

  static void reserve(std::vector<char>& buffer, int64_t numbers) {
    if (numbers * 4 > static_cast<int64_t>(buffer.size())) buffer.resize(static_cast<size_t>(numbers) * 4);
  }

  void add(const Product& qkv, const Attention& attention, const Product& out, Address norm,
           const Product& gate_up, const Product& down, Address next) {
    const auto step = [&](Address weight) {
      return HalNorm{down.t.s.n, down.t.s.dtype, eps, nullptr, nullptr, at(weight), nullptr};
    };
    reserve(wide, qkv.t.s.n > gate_up.t.s.n ? qkv.t.s.n : gate_up.t.s.n);
    reserve(narrow, out.t.s.k > down.t.s.k ? out.t.s.k : down.t.s.k);
    reserve(added, down.t.s.n);
    blocks.push_back({qkv, step(norm), attention, out, gate_up, down, step(next)});
  }

  // The row `stream` and x, its norm; both become what they are after the last block.
  void row(int isa, Address stream, Address x, int64_t position, int threads) {
    const HalTable& f = table(isa);
    py::gil_scoped_release unlocked;
    const auto norm = [&](HalNorm a) {
      a.x = at(stream);
      a.more = added.data();
      a.out = at(x);
      norm_rows(f, a, 1, threads);
    };
    for (const Block& b : blocks) {
      b.qkv.row(f, at(x), wide.data(), threads);
      b.attention.rows(f, wide.data(), 1, position, narrow.data(), threads);
      b.out.row(f, narrow.data(), added.data(), threads);
      norm(b.norm);
      b.gate_up.row(f, at(x), wide.data(), threads);
      const HalShape& s = b.down.t.s;
      gate_rows(f, {s.k, s.dtype, wide.data(), narrow.data()}, 1, threads);
      b.down.row(f, narrow.data(), added.data(), threads);
      norm(b.next);
    }
  }
};

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of hal: addresses and sizes in, nothing out. Checked by hal.ops.";
  m.def("isas", isas, "Instruction sets this machine can run, best first.");
  bind_verbs<Cpu>(m);
  m.def("repack", repack);
  m.def("probe_read", probe_read);
  m.def("probe_peak", probe_peak);
  m.def("digest", digest);
  m.def("crc32_folds", hal::crc32_folds, "Whether this machine has the instructions of crc32.");
  m.def("crc32", crc32);
  m.def("norm", norm);
  m.def("gate", gate);
  py::class_<Attention>(m, "Attention")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int, float, float, Address, Address,
                    Address, Address, Address, Address>())
      .def("attend", &Attention::attend);
  py::class_<Tiles>(m, "Tiles")
      .def(py::init<const HalShape&, Address, Address, Address>())
      .def("code_bytes", &Tiles::code_bytes)
      .def("fill", &Tiles::fill)
      .def("read", &Tiles::read)
      .def("gemm", &Tiles::gemm)
      .def("gemm_grouped", &Tiles::gemm_grouped);
  py::class_<Product>(m, "Product").def(py::init<const Tiles&, int, Address, int>());
  py::class_<Chain>(m, "Chain").def(py::init<float>()).def("add", &Chain::add).def("row", &Chain::row);
}
