# SPDX-License-Identifier: Apache-2.0
"""Single products of other libraries: questions in JSON lines on stdin, answers on stdout.

["weight", engine, n, k, group, copies] -> null or why not; ["run", engine, m, threads] -> seconds
of one product, the next copy each time: of the process on one thread, of the wall on more. Engines,
one a process: auto-round-lib, ggml Q4_0, ggml Q4_K. ggml may keep a weight in several forms in
memory; the one that was fastest for (m, threads) is used.
"""

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch

Pointer = ctypes.c_void_p
GGML_TYPES = {"ggml Q4_0": 2, "ggml Q4_K": 12}


class AutoRoundLib:
    """Its linear layer for CPUs: 4 bits, symmetric, f32 activations (what it makes of others)."""

    def __init__(self, n: int, k: int, group: int, copies: int) -> None:
        import auto_round_kernel

        self.ark, self.n, self.k, self.group = auto_round_kernel, n, k, group
        codes = torch.randint(-8, 8, (k, n), dtype=torch.int8)
        scales, zeros = torch.rand(k // group, n), torch.zeros(k // group, n, dtype=torch.int8)
        blob = auto_round_kernel.repack_quantized_weight(
            codes, scales, zeros, group, "auto", "int4", "fp32", False
        )
        self.blobs = [blob, *(blob.clone() for _ in range(copies - 1))]
        self.bias = torch.empty(0)

    def run(self, m: int, threads: int) -> float:
        torch.set_num_threads(threads)
        set_threads = getattr(self.ark, "set_threads", None)
        if set_threads:
            set_threads(threads)
        x = torch.randn(m, self.k)
        self.blobs.append(self.blobs.pop(0))
        clock = time.process_time if threads == 1 else time.perf_counter
        start = clock()
        self.ark.woqgemm(
            x, self.blobs[0], self.bias, self.n, self.k, self.group, "auto", "int4", "fp32", False
        )
        return clock() - start


class Context(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", Pointer), ("no_alloc", ctypes.c_bool))


class Library:
    """The few functions of ggml that a product needs, from the libraries of llama-cpp-python."""

    def __init__(self) -> None:
        import llama_cpp

        where = Path(llama_cpp.__file__).parent / "lib"
        self.base = ctypes.CDLL(str(where / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(where / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self.init = self._of(self.base.ggml_init, Pointer, Context)
        self.tensor = self._of(
            self.base.ggml_new_tensor_2d, Pointer, Pointer, int, ctypes.c_int64, ctypes.c_int64
        )
        self.mul_mat = self._of(self.base.ggml_mul_mat, Pointer, *[Pointer] * 3)
        self.graph = self._of(self.base.ggml_new_graph, Pointer, Pointer)
        self.expand = self._of(self.base.ggml_build_forward_expand, None, Pointer, Pointer)
        self.place = self._of(
            self.base.ggml_backend_alloc_ctx_tensors_from_buft, Pointer, Pointer, Pointer
        )
        self.set = self._of(
            self.base.ggml_backend_tensor_set, None, Pointer, Pointer, *[ctypes.c_size_t] * 2
        )
        self.compute = self._of(self.base.ggml_backend_graph_compute, int, Pointer, Pointer)
        self.quantize = self._of(
            self.base.ggml_quantize_chunk,
            ctypes.c_size_t,
            int,
            *[Pointer] * 2,
            *[ctypes.c_int64] * 3,
            Pointer,
        )
        self.row_size = self._of(self.base.ggml_row_size, ctypes.c_size_t, int, ctypes.c_int64)
        self.supports = self._of(
            self.base.ggml_backend_dev_supports_op, ctypes.c_bool, Pointer, Pointer
        )
        self.threads = self._of(self.cpu.ggml_backend_cpu_set_n_threads, None, Pointer, int)
        self.backend = self._of(self.cpu.ggml_backend_cpu_init, Pointer)()
        self.device = self._of(self.base.ggml_backend_get_device, Pointer, Pointer)(self.backend)

    @staticmethod
    def _of(function: object, result: object, *arguments: object) -> object:
        kinds = [ctypes.c_int if a is int else a for a in arguments]
        function.restype = ctypes.c_int if result is int else result
        function.argtypes = kinds
        return function

    def forms(self) -> list[int]:
        """Buffer types: plain memory, then those that lay weights out anew (AMX, row groups)."""
        base = self.base
        plain = self._of(base.ggml_backend_dev_buffer_type, Pointer, Pointer)(self.device)
        registry = self._of(base.ggml_backend_dev_backend_reg, Pointer, Pointer)(self.device)
        find = self._of(base.ggml_backend_reg_get_proc_address, Pointer, Pointer, ctypes.c_char_p)
        address = find(registry, b"ggml_backend_dev_get_extra_bufts")
        more = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(self.device)
        found = [plain]
        while more[len(found) - 1]:
            found.append(more[len(found) - 1])
        return found

    def context(self) -> int:
        return self.init(Context(1 << 20, None, True))


class Ggml:
    """mul_mat with a weight of one type."""

    library: Library | None = None

    def __init__(self, kind: int, n: int, k: int, copies: int) -> None:
        Ggml.library = lib = Ggml.library or Library()
        self.kind, self.n, self.k, self.best = kind, n, k, {}
        size = lib.row_size(kind, k) * n
        blocks, w = ctypes.create_string_buffer(size), torch.randn(n, k)
        lib.quantize(kind, w.data_ptr(), ctypes.addressof(blocks), 0, n, k, None)
        self.forms = []
        for form in lib.forms():
            weights = [self._weight(lib, form, blocks, size) for _ in range(copies)]
            if self._product(weights[0], 1) is not None:
                self.forms.append(weights)

    def _weight(self, lib: Library, form: int, blocks: object, size: int) -> int:
        context = lib.context()
        w = lib.tensor(context, self.kind, self.k, self.n)
        assert lib.place(context, form)
        lib.set(w, ctypes.addressof(blocks), 0, size)
        return w

    def _product(self, w: int, m: int) -> int | None:
        """A graph of one product, or None where this form of the weight has none."""
        lib = self.library
        context = lib.context()
        x = lib.tensor(context, 0, self.k, m)
        y = lib.mul_mat(context, w, x)
        if not lib.supports(lib.device, y):
            return None
        assert lib.place(context, lib.forms()[0])
        values = torch.randn(m, self.k)
        lib.set(x, values.data_ptr(), 0, values.nbytes)
        graph = lib.graph(context)
        lib.expand(graph, y)
        return graph

    def run(self, m: int, threads: int) -> float:
        self.library.threads(self.library.backend, threads)
        self.clock = time.process_time if threads == 1 else time.perf_counter
        if (m, threads) not in self.best:
            made = [[self._product(w, m) for w in weights] for weights in self.forms]
            times = [self._typical(graphs) for graphs in made]
            self.best[m, threads] = made[times.index(min(times))]
        graphs = self.best[m, threads]
        graphs.append(graphs.pop(0))
        return self._time(graphs[0])

    def _typical(self, graphs: list[int]) -> float:
        """The median of up to nine runs, in about half a second."""
        times: list[float] = []
        while len(times) < 9 and sum(times) < 0.5:
            times.append(self._time(graphs[len(times) % len(graphs)]))
        return statistics.median(times)

    def _time(self, graph: int) -> float:
        start = self.clock()
        assert self.library.compute(self.library.backend, graph) == 0
        return self.clock() - start


def main() -> None:
    """Serve until stdin ends."""
    engines = {}
    for line in sys.stdin:
        what, engine, *values = json.loads(line)
        answer = None
        if what == "run":
            answer = engines[engine].run(*values)
        else:
            n, k, group, copies = values
            engines.pop(engine, None)
            try:
                if engine in GGML_TYPES:
                    engines[engine] = Ggml(GGML_TYPES[engine], n, k, copies)
                else:
                    engines[engine] = AutoRoundLib(n, k, group, copies)
            except Exception as error:
                answer = str(error)[:200] or type(error).__name__
        print(json.dumps(answer), flush=True)


main()
