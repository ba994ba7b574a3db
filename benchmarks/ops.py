# SPDX-License-Identifier: Apache-2.0
"""Kernels against torch's own, paired in one run: medians of interleaved repetitions."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

import hal

Run = Callable[[], object]
CACHE = 64 << 20  # rotate over this many bytes of weights, so that no case runs from L2


def interleaved(runs: Sequence[Run], budget: float) -> list[float]:
    """Median seconds of each, taking turns for ``budget`` seconds in all (three turns at least)."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[0]) < 3:
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def rotating(make: Callable[[], Run], nbytes: int) -> Run:
    """A run over enough copies of its weight to leave the cache."""
    copies = [make() for _ in range(max(1, min(8, CACHE // nbytes)))]
    turn = iter(range(10**9))
    return lambda: copies[next(turn) % len(copies)]()


def int4pack(w: torch.Tensor, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's CPU int4 product: [N, K / 2] codes and (scale, zero) of every group in bf16."""
    codes = torch.randint(0, 16, w.shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.rand(w.shape[1] // group, w.shape[0], 2).to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)


def products(n: int, k: int, specs: Sequence[str], ms: Sequence[int], budget: float) -> None:
    """One line a case: ours, and how many times faster than dense bf16 and torch int4."""
    dense = torch.randn(n, k).bfloat16()
    linear = rotating_linear(dense)
    four = int4pack(dense, 128)
    print(f"\n{n} x {k}, {torch.get_num_threads()} threads")
    head = ("spec", "m", "kernel", "ms", "GB/s", "GFLOP/s", "x dense", "x int4pack")
    print("{:16} {:>5} {:24} {:>9} {:>7} {:>8} {:>8} {:>10}".format(*head))
    for text in specs:
        spec = hal.Spec.parse(text)
        q = hal.quantize(dense, hal.search(dense, spec), spec)
        ready = hal.prepare(q, dtype=torch.bfloat16)
        for m in ms:
            x = torch.randn(m, k).bfloat16()
            ours = rotating(lambda w=q, x=x: _ours(w, x), ready.nbytes)  # type: ignore[misc]
            runs = [ours, lambda x=x: linear(x), lambda x=x: four(x)]  # type: ignore[misc]
            t, t_dense, t_four = interleaved(runs, budget)
            print(
                f"{text:16} {m:5} {ready.kernel(m).name:24} {t * 1e3:9.3f} "
                f"{ready.nbytes / t / 1e9:7.1f} {2 * m * n * k / t / 1e9:8.0f} "
                f"{t_dense / t:8.2f} {t_four / t:10.2f}"
            )


def _ours(q: hal.QTensor, x: torch.Tensor) -> Run:
    w = hal.prepare(q, dtype=torch.bfloat16)
    return lambda: hal.qgemm(x, w)


def rotating_linear(w: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    copies = [w.clone() for _ in range(max(1, CACHE // (w.numel() * 2)))]
    turn = iter(range(10**9))
    return lambda x: F.linear(x, copies[next(turn) % len(copies)])


def sweeps(n: int, k: int, budget: float) -> None:
    """The verbs of quantization: weights a second, and how many times the torch reference."""
    import os

    w = torch.randn(n, k).bfloat16()
    grad, out = torch.randn(n, k).bfloat16(), torch.empty_like(w)
    print(f"\n{'verb':12} {'spec':16} {'ms':>9} {'Gweights/s':>11} {'x reference':>12}")
    for text in ("s4:g128:f16", "u4:g128:f16:int"):
        spec = hal.Spec.parse(text)
        p = hal.search(w, spec)
        p.v = torch.zeros(n, k)
        verbs: dict[str, Run] = {
            "search": lambda s=spec: hal.search(w, s),  # type: ignore[misc]
            "search grid 20": lambda s=spec: hal.search(w, s, grid=20),  # type: ignore[misc]
            "qdq": lambda s=spec, p=p: hal.qdq(w, p, s, out=out),  # type: ignore[misc]
            "qdq_step": lambda s=spec, p=p: hal.qdq_step_(  # type: ignore[misc]
                p, w, grad, s, lr_v=1e-4, lr_range=1e-4
            ),
            "quantize": lambda s=spec, p=p: hal.quantize(w, p, s),  # type: ignore[misc]
        }
        for verb, run in verbs.items():

            def reference(run: Run = run) -> None:
                os.environ["HAL_BACKEND"] = "reference"
                run()
                del os.environ["HAL_BACKEND"]

            t, slow = interleaved([run, reference], budget)
            print(f"{verb:12} {text:16} {t * 1e3:9.2f} {n * k / t / 1e9:11.2f} {slow / t:12.1f}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument(
        "--spec",
        nargs="*",
        default=["s4:g128:f16", "u4:g128:f16:int", "s3:g128:f16", "s8:g128:f16"],
    )
    parser.add_argument("--m", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        sweeps(*options.shape, options.seconds)
        products(*options.shape, options.spec, options.m, options.seconds)
