# SPDX-License-Identifier: Apache-2.0
"""A GPU's products and verbs beside its copy bandwidth and dense matmul, measured in the same run.

Launches are captured in a graph and timed by device events; weights take turns in a pool larger
than the second-level cache. Fractions: of the bytes a second that a large copy reads and writes,
and of torch's dense bf16 product of the same shape. `tools/gpu_check.sh` calls it.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import hal
from hal import config
from hal import device as devices
from hal.backends import REFERENCE, serving
from hal.testing import params, weights

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192))
ROWS = (1, 4, 16, 32, 64, 256, 1024, 4096)
SPECS = ("s4:g128:f16", "u4:g32:f16:int", "s2:g128:f16", "s3:g128:f16", "s8:g128:f16")
POOL = 256 << 20  # bytes of weights in turn: four times the largest second-level cache
ROUNDS = 7

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """``of_copy``: bytes a second over the copy's; ``x_dense``: dense product's time over ours."""

    what: str
    kernel: str
    spec: str
    n: int
    k: int
    m: int
    us: float
    of_copy: float
    x_dense: float | None

    def __str__(self) -> str:
        dense = "" if self.x_dense is None else f"{self.x_dense:8.2f}"
        return (
            f"{self.what:12} {self.kernel:22} {self.spec:16} {self.n:6} {self.k:6} {self.m:5} "
            f"{self.us:10.1f} {self.of_copy:7.2f} {dense}"
        )


HEAD = (
    f"{'verb':12} {'kernel':22} {'spec':16} {'n':>6} {'k':>6} {'m':>5} {'us':>10} {'/copy':>7} "
    f"{'x dense':>8}"
)


class Clock:
    """Seconds of one pass over some calls, a graph of them where the device has graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.graphs = device, device.type == "cuda"

    def seconds(self, calls: Sequence[Run]) -> float:
        """Median over rounds, for one call."""
        for call in calls[:2]:  # compiles, and warms allocators
            call()
        if not self.graphs:
            return statistics.median(self._pass(calls) for _ in range(ROUNDS)) / len(calls)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(calls)

    @staticmethod
    def _pass(calls: Sequence[Run]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start


def copy_rate(clock: Clock, nbytes: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.seconds([lambda: target.copy_(source)] * 4)


def products(clock: Clock, copy: float, options: argparse.Namespace) -> Iterator[Row]:
    """Every spec, shape and number of rows; the first spec by every backend."""
    for (n, k), text in itertools.product(options.shapes, options.specs):
        backends = names(clock.device)[: None if text == options.specs[0] else 1]
        dense = [weights(n, k, 0).bfloat16().to(clock.device)]
        dense += [dense[0].clone() for _ in range(options.pool // (2 * n * k))]
        theirs: dict[int, float] = {}
        for m in options.rows:
            x = weights(m, k, m).bfloat16().to(clock.device)
            theirs[m] = clock.seconds([_dense(x, each) for each in dense])
        for backend in backends:
            with config.only(backend):
                pool = _pool(hal.Spec.parse(text), dense[0], options.pool)
            for m in options.rows:
                x = weights(m, k, m).bfloat16().to(clock.device)
                ours = clock.seconds([_product(x, each) for each in pool])
                moved = pool[0].nbytes + 2 * m * (n + k)
                yield Row(
                    "qgemm", pool[0].kernel(m).name, text, n, k, m, ours * 1e6,
                    moved / ours / copy, theirs[m] / ours,
                )  # fmt: skip


def names(device: torch.device) -> list[str]:
    """Backends with kernels of their own for a device, best first."""
    return [b.NAME for b in serving(device.type) if b.NAME != REFERENCE]


def _pool(spec: hal.Spec, w: Tensor, nbytes: int) -> list[hal.Weight]:
    q = hal.quantize(w, hal.search(w, spec), spec)
    pool = [hal.prepare(q, dtype=torch.bfloat16)]
    count = max(2, min(64, nbytes // pool[0].nbytes))
    return pool + [hal.prepare(q, dtype=torch.bfloat16) for _ in range(count - 1)]


def _product(x: Tensor, w: hal.Weight) -> Run:
    return lambda: hal.qgemm(x, w)


def _dense(x: Tensor, w: Tensor) -> Run:
    return lambda: torch.nn.functional.linear(x, w)


def verbs(clock: Clock, copy: float, options: argparse.Namespace) -> Iterator[Row]:
    """Tuning's and quantizing's verbs on the last shape, by every backend that has them; bytes that
    each must read and write."""
    n, k = options.shapes[-1]
    for text in options.specs[:2]:
        for name, (run, moved) in _verbs(hal.Spec.parse(text), n, k, clock.device).items():
            for backend in names(clock.device):
                with config.only(backend), contextlib.suppress(hal.Unsupported):
                    taken = clock.seconds([run] * 3)
                    kernel, share = f"{backend}.{name}", moved / taken / copy
                    yield Row(name, kernel, text, n, k, 0, taken * 1e6, share, None)


def _verbs(spec: hal.Spec, n: int, k: int, device: torch.device) -> dict[str, tuple[Run, int]]:
    w = weights(n, k, 0).bfloat16().to(device)
    p, grad, out = params(w, spec, 1), torch.randn_like(w), torch.empty_like(w)
    size, groups = w.numel(), p.lo.numel()
    q, rate = hal.quantize(w, p, spec), {"lr_v": 1e-3, "lr_range": 1e-3}
    return {
        "qdq": (lambda: hal.qdq(w, p, spec, out=out), 8 * size + 16 * groups),
        "qdq_step": (lambda: hal.qdq_step_(p, w, grad, spec, **rate), 12 * size + 24 * groups),
        "search": (lambda: hal.search(w, spec, grid=20), 2 * size + 8 * groups),
        "quantize": (lambda: hal.quantize(w, p, spec), 7 * size + 18 * groups),
        "round": (
            lambda: hal.quantize(w, None, spec, layout="stream"),
            2 * size + size * spec.bits // 8 + 2 * groups,
        ),
        "dequantize": (lambda: hal.dequantize(q), 3 * size + 2 * groups),
        "pack": (lambda: hal.pack(q, "stream"), size + size * spec.bits // 8),
    }


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--pool", type=int, default=POOL, help="bytes of weights in turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    clock = Clock(devices.resolve(options.device))
    copy = copy_rate(clock, 4 * options.pool)
    facts = devices.caps(clock.device)
    print(f"{facts.name} ({facts.arch}): a copy moves {copy / 1e9:.0f} GB/s")
    print(HEAD)
    rows: list[Row] = []
    for row in itertools.chain(products(clock, copy, options), verbs(clock, copy, options)):
        rows.append(row)
        print(row, flush=True)
        if options.json:  # after every row: a run that is cut short leaves what it has
            found = {
                "device": facts.name,
                "arch": facts.arch,
                "torch": torch.__version__,
                "copy_gb_s": copy / 1e9,
                "rows": [dataclasses.asdict(r) for r in rows],
            }
            options.json.write_text(json.dumps(found, indent=1) + "\n")
