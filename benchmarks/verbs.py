# SPDX-License-Identifier: Apache-2.0
"""The verbs of tuning and quantizing against memory and against eager torch, paired in one run.

Every verb takes turns with its floor: the time in which this machine copies the bytes that the
verb writes and reads the bytes that it reads beyond those, in buffers of the same size. Times are
medians over the turns, ratios medians of each turn's ratio. Eager is the reference backend: the
same numbers from plain torch.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import hal
from benchmarks.ops import clock
from hal.backends import cpu, reference

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Verb:
    """One thing to measure on ``weights`` numbers: bytes a number read and written."""

    name: str
    spec: str
    weights: int
    read: float
    written: float
    ours: Run
    eager: Run | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One verb, measured. ``of_floor``: the floor's time over ours; ``x_eager``: eager's."""

    verb: str
    spec: str
    threads: int
    ms: float
    gweights_s: float
    ns_weight_thread: float
    of_floor: float
    x_eager: float | None

    def __str__(self) -> str:
        eager = f"{self.x_eager:8.1f}" if self.x_eager else f"{'':8}"
        return (
            f"{self.verb:22} {self.spec:16} {self.threads} {self.ms:9.3f} {self.gweights_s:11.2f} "
            f"{self.ns_weight_thread:12.3f} {self.of_floor:7.2f} {eager}"
        )


HEAD = (
    f"{'verb':22} {'spec':16} T {'ms':>9} {'Gweights/s':>11} {'ns/w/thread':>12} {'/floor':>7} "
    f"{'x eager':>8}"
)


def seconds(run: Run) -> float:
    now = clock(torch.get_num_threads())
    start = now()
    run()
    return now() - start


def measure(verb: Verb, threads: int, budget: float) -> Row:
    """Ours, the floor and eager in turns; eager in the first two turns only: it takes seconds."""
    isa, native = cpu.isa(), cpu.native()
    copied, more = (
        int(verb.written * verb.weights),
        int((verb.read - verb.written) * verb.weights),
    )
    source, target = (torch.zeros(max(copied, 1), dtype=torch.uint8) for _ in range(2))
    other = torch.zeros(max(more, 1), dtype=torch.uint8)

    def floor() -> None:
        if copied:
            target.copy_(source)
        if more > 0:
            native.probe_read(isa, other.data_ptr(), more, threads)

    for run in (verb.ours, floor):
        run()
    times: list[tuple[float, float]] = []
    ratios: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 5:
        times.append((seconds(verb.ours), seconds(floor)))
        if verb.eager and len(ratios) < 2:
            ratios.append(seconds(verb.eager) / seconds(verb.ours))
    ours = statistics.median(own for own, _ in times)
    return Row(
        verb=verb.name,
        spec=verb.spec,
        threads=threads,
        ms=ours * 1e3,
        gweights_s=verb.weights / ours / 1e9,
        ns_weight_thread=ours * 1e9 / verb.weights * threads,
        of_floor=statistics.median(own / mine for mine, own in times),
        x_eager=statistics.median(ratios) if ratios else None,
    )


def eager(op: str) -> Callable[..., object]:
    return next(row.fn for row in reference.KERNELS if row.op == op)


def tuning(w: Tensor, text: str) -> list[Verb]:
    """Verbs over one weight in one encoding."""
    spec, (n, k), size = hal.Spec.parse(text), w.shape, w.numel()
    grad, out = torch.randn(n, k).to(w.dtype), torch.empty_like(w)
    p = hal.search(w, spec)
    p.v = torch.zeros(n, k)
    rtn = dataclasses.replace(p, v=None)
    importance, amin, amax = torch.rand(k), torch.empty_like(p.amin), torch.empty_like(p.amax)
    q = hal.quantize(w, rtn, spec)
    steps = {"lr_v": 1e-3, "lr_range": 1e-3}

    def search(grid: int, weighted: bool) -> Verb:
        i = importance if weighted else None
        name = "search min-max" if grid == 0 else f"search {grid}"
        return Verb(
            name + (" importance" if weighted else ""),
            text,
            size,
            2,
            0,
            lambda: hal.search(w, spec, importance=i, grid=grid),
            lambda: eager("search")(w, spec, i, grid, amin, amax),
        )

    def step() -> None:
        hal.qdq_step_(p, w, grad, spec, **steps)

    def fused() -> None:
        step()
        hal.qdq(w, p, spec, out=out)

    def eager_step() -> None:
        eager("qdq_step")(p, w, grad, spec, 1e-3, 1e-3)

    return [
        search(0, False),
        search(20, False),
        search(20, True),
        Verb(
            "qdq",
            text,
            size,
            6,
            2,
            lambda: hal.qdq(w, p, spec, out=out),
            lambda: eager("qdq")(w, p, spec, out),
        ),
        Verb("qdq_step", text, size, 8, 4, step, eager_step),
        Verb(
            "quantize",
            text,
            size,
            2,
            1,
            lambda: hal.quantize(w, rtn, spec),
            lambda: eager("quantize")(w, rtn, spec, q.parts),
        ),
        Verb(
            "dequantize",
            text,
            size,
            1,
            2,
            lambda: hal.dequantize(q),
            lambda: eager("dequantize")(q.parts, spec, out),
        ),
    ]


def storing(w: Tensor, text: str) -> list[Verb]:
    """Packing for every layout that can hold the encoding, and RTN from weight to packed file."""
    spec, size = hal.Spec.parse(text), w.numel()
    q = hal.quantize(w, hal.search(w, spec), spec)
    found = []
    for layout in ("stream", "gptq_raw", "awq"):
        if hal.refuse(spec, q.shape, layout):
            continue
        packed, b = hal.pack(q, layout), spec.bits / 8
        for name, op, plain, bytes_ in (
            (f"pack {layout}", "pack", q, (1, b)),
            (f"unpack {layout}", "unpack", packed, (b, 1)),
        ):
            found.append(
                Verb(
                    name,
                    text,
                    size,
                    *bytes_,
                    lambda plain=plain, to=layout if op == "pack" else "plain": hal.pack(plain, to),
                    lambda op=op, plain=plain, at=layout: eager(op)(
                        plain.parts, spec, plain.shape, at
                    ),
                )
            )

        def rtn(layout: str = layout) -> None:
            hal.pack(hal.quantize(w, None, spec, layout="stream"), layout)

        found.append(Verb(f"RTN to {layout}", text, size, 2, b, rtn, None))
    ready = hal.prepare(q, dtype=torch.bfloat16)
    found.append(
        Verb(
            "prepare",
            text,
            size,
            1,
            spec.bits / 8,
            lambda: hal.prepare(q, dtype=torch.bfloat16),
            None,
        )
    )
    found.append(Verb("restore", text, size, spec.bits / 8, 1, lambda: hal.restore(ready), None))
    return found


def activations(x: Tensor, group: int) -> list[Verb]:
    act = hal.Act("s8", group)
    return [
        Verb(
            "quantize_act",
            f"s8:g{group}",
            x.numel(),
            2,
            1,
            lambda: hal.quantize_act(x, act),
            lambda: eager("quantize_act")(x, group, None),
        ),
    ]


def call_us() -> float:
    """Microseconds of this thread for a product that is all overhead: m = 1, 64 x 64."""
    w, spec, count = torch.randn(64, 64), hal.Spec("s4", 32), 5000
    ready = hal.prepare(hal.quantize(w, hal.search(w, spec), spec), dtype=torch.bfloat16)
    x, times = torch.randn(1, 64).bfloat16(), []
    with torch.inference_mode():
        for _ in range(5):
            start = time.thread_time()
            for _ in range(count):
                hal.qgemm(x, ready)
            times.append((time.thread_time() - start) / count * 1e6)
    return statistics.median(times)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks verbs", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--spec", nargs="*", default=["s4:g128:f16", "u4:g128:f16:int"])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8], help="of packing")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--seconds", type=float, default=0.5, help="per case, eager not counted")
    parser.add_argument("--only", default="", help="verbs whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    w, rows = torch.randn(*options.shape).bfloat16(), []
    print(HEAD)
    for threads in options.threads:
        torch.set_num_threads(threads)
        verbs = [v for text in options.spec for v in tuning(w, text)]
        verbs += [v for b in options.bits for v in storing(w, f"s{b}:g128:f16")]
        verbs += activations(torch.randn(512, options.shape[1]).bfloat16(), 128)
        for verb in verbs:
            if options.only in verb.name:
                rows.append(measure(verb, threads, options.seconds))
                print(rows[-1], flush=True)
    call = call_us()
    print(f"a call of hal.qgemm: {call:.1f} us")
    if options.json:
        machine = {
            "cpu": cpu.caps(0).name,
            "isa": cpu.isas()[cpu.isa()],
            "torch": torch.__version__,
        }
        found = {
            "machine": machine,
            "call_us": call,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
