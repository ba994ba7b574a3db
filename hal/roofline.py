# SPDX-License-Identifier: Apache-2.0
"""What a device can do at best, measured: reading memory and multiplying, and a product's share.

On one thread and by that thread's own clock: a neighbour on the machine does not count.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hal import ops
from hal.backends import serving
from hal.registry import Probes
from hal.spec import Spec

#: A share is measured on as many copies of the weight as fill this, in turn: none stays cached.
POOL = 64 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """One product: the kernel, seconds, and its shares of reading and of multiplying at best.

    ``read``: bytes of the weight a second over those of a bare read; ``peak``: multiplications and
    additions a second over the most that registers allow. The larger is the share of the roofline.
    """

    kernel: str
    seconds: float
    read: float
    peak: float


def probes(device: torch.device) -> Probes | None:
    """The device's probes; None where its backend has none."""
    return serving(device.type)[0].probes()


def limits(device: torch.device, seconds: float = 0.3) -> tuple[float, float] | None:
    """Bytes a second read and operations a second, as fast as kernels could; None without probes.

    Of one thread.
    """
    probe = probes(device)
    if probe is None:
        return None
    data = torch.ones(POOL, dtype=torch.uint8, device=device)
    with _one_thread():
        done = probe.peak()
        read, peak = _turns([lambda: probe.read(data), probe.peak], seconds)
    return POOL / min(read), done / min(peak)


def share(spec: Spec, m: int, shape: tuple[int, int], device: torch.device) -> Share | None:
    """A bf16 product of ``m`` rows with a weight ``[N, K]``, in turns with both probes."""
    probe = probes(device)
    if probe is None:
        return None
    w = torch.randn(shape, device=device).bfloat16()
    q = ops.quantize(w, ops.search(w, spec), spec)
    first = ops.prepare(q, dtype=torch.bfloat16)
    pool = [first, *(ops.prepare(q, dtype=torch.bfloat16) for _ in range(POOL // first.nbytes))]
    x, turn = torch.randn(m, shape[1], device=device).bfloat16(), itertools.count()
    codes = pool[0].parts["codes"].flatten().view(torch.uint8)

    def product() -> object:
        return ops.qgemm(x, pool[next(turn) % len(pool)])

    def read() -> object:  # a copy that was used long ago
        old = pool[(next(turn) + len(pool) // 2) % len(pool)]
        probe.read(old.parts["codes"].flatten().view(torch.uint8))
        return None

    with _one_thread():
        done = probe.peak()
        ours, reading, peak = _turns([product, read, probe.peak], 0.4)
    work = 2 * m * shape[0] * shape[1]
    return Share(
        first.kernel(m).name,
        statistics.median(ours),
        _median_ratio(reading, ours) * first.nbytes / codes.numel(),
        _median_ratio(peak, ours) * work / done,
    )


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _turns(runs: list[Callable[[], object]], budget: float) -> list[list[float]]:
    """Seconds of each run, turn by turn, for ``budget`` seconds and at least five turns."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    began = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - began < budget:
        for own, run in zip(times, runs, strict=True):
            start = time.thread_time()
            run()
            own.append(time.thread_time() - start)
    return times
