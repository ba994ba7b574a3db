# SPDX-License-Identifier: Apache-2.0
"""Kernels against what the machine can do and against torch's own, paired in one run.

Every row takes turns with two probes (csrc/probe.h): reading the same bytes, and multiplying
registers as fast as the instruction set can. Numbers are medians over the turns, ratios medians of
each turn's ratio, so that a neighbour on the machine slows both sides of a ratio. On one thread
they are that thread's own time.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import hal
from benchmarks._peer import ABSENT, Peer, installed
from hal.backends import cpu

#: A run may return its own seconds, measured where it happened.
Run = Callable[[], object]
Torch = Callable[[Tensor, int], Tensor]
Clock = Callable[[], float]


#: 4-bit products of other libraries, whatever our width: groups of 128; Q4_0 and Q4_K have 32.
PEERS = ("auto-round-lib", "ggml Q4_0", "ggml Q4_K")
PEER_GROUP = 128
#: Seconds for which a run is repeated before it is timed: behind torch's dense product 4 bits at
#: m = 1 read at .59 of the probe in their second run, at .89 from the fifth on.
WARM = 0.002
FULL_SHAPES = (
    (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (1024, 4096), (151936, 2048),
    (768, 768), (5120, 13824),
)  # fmt: skip
FULL_M = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 2048)


@dataclasses.dataclass(frozen=True)
class Row:
    """One product: milliseconds, what it is limited by, and how many times faster than peers."""

    spec: str
    n: int
    k: int
    m: int
    threads: int
    place: str
    kernel: str
    ms: float
    gb_s: float
    gflop_s: float
    of_read: float
    of_peak: float
    x_dense: float
    x_int4pack: float
    x_peers: dict[str, float]

    @property
    def of_roofline(self) -> float:
        return max(self.of_read, self.of_peak)

    def __str__(self) -> str:
        return (
            f"{self.spec:16} {self.n:6} {self.k:6} {self.m:5} {self.threads} {self.place:4} "
            f"{self.kernel:15} {self.ms:8.3f} {self.gb_s:6.1f} {self.gflop_s:7.0f} "
            f"{self.of_read:6.2f} {self.of_peak:6.2f} {self.x_dense:8.2f} {self.x_int4pack:10.2f}"
            + "".join(f" {self.x_peers.get(name, math.nan):{len(name) + 2}.2f}" for name in PEERS)
        )


HEAD = (
    f"{'spec':16} {'N':>6} {'K':>6} {'m':>5} T {'':4} {'kernel':15} {'ms':>8} {'GB/s':>6} "
    f"{'GFLOP/s':>7} {'/read':>6} {'/peak':>6} {'x dense':>8} {'x int4pack':>10}"
    + "".join(f" x {name}" for name in PEERS)
)


def clock(threads: int) -> Clock:
    """One thread: its own time, in which neighbours do not count; more: what the wall shows."""
    return time.thread_time if threads == 1 else time.perf_counter


def turns(runs: Sequence[Run], budget: float, clock: Clock) -> list[list[float]]:
    """Seconds of each run in each turn, for ``budget`` seconds in all.

    At least five turns, unless they take more than ten times the budget.
    """
    for run in runs:
        run()
    times: list[list[float]] = []
    began = time.perf_counter()
    while (
        not times
        or (spent := time.perf_counter() - began) < budget
        or (len(times) < 5 and spent < 10 * budget)
    ):
        own: list[float] = []
        for run in runs:
            warm = time.perf_counter() + WARM
            while time.perf_counter() < warm:
                run()
            start = clock()
            told = run()
            seconds = clock() - start
            own.append(told if isinstance(told, float) else seconds)
        times.append(own)
    return times


def int4pack(w: Tensor, group: int) -> Torch:
    """torch's CPU int4 product over ``count`` copies: (x, copy) -> y."""
    codes = torch.randint(0, 16, w.shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.rand(w.shape[1] // group, w.shape[0], 2).to(torch.bfloat16)
    copies = [packed]

    def run(x: Tensor, count: int) -> Tensor:
        while len(copies) < count:
            copies.append(packed.clone())
        copies.append(copies.pop(0))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, copies[0], group, pairs)

    return run


def dense(w: Tensor) -> Torch:
    """torch's bf16 linear over ``count`` copies."""
    copies = [w]

    def run(x: Tensor, count: int) -> Tensor:
        while len(copies) < count:
            copies.append(w.clone())
        copies.append(copies.pop(0))
        return F.linear(x, copies[0])

    return run


#: What tells rows of one file apart: spec, n, k, m, threads, place, whether fast.
Key = tuple[str, int, int, int, int, str, bool]


@dataclasses.dataclass
class Rows:
    """Those measured, in ``file`` (a line each, None = nowhere) as they come: the same command goes
    on where it was stopped. Its first line is the machine; raises SystemExit for another one's."""

    file: Path | None
    known: dict[Key, Row] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        isa = cpu.isas()[cpu.isa()]
        machine = {
            "cpu": cpu.caps(torch.empty(0).device).name,
            "isa": isa,
            "torch": torch.__version__,
        }
        if self.file is None:
            return
        if not self.file.exists():
            self.file.write_text(json.dumps(machine) + "\n")
        first, *lines = self.file.read_text().splitlines()
        if json.loads(first) != machine:
            raise SystemExit(f"{self.file} holds rows of {first}; give another file")
        for line in lines:
            told = json.loads(line)
            self.known[tuple(told["key"])] = Row(**told["row"])

    def add(self, key: Key, row: Row) -> None:
        self.known[key] = row
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps({"key": key, "row": dataclasses.asdict(row)}) + "\n")


def products(options: argparse.Namespace, known: Rows) -> list[Row]:
    """Every shape, spec, place, m and number of threads."""
    rows = []
    with contextlib.ExitStack() as stack:
        # A process each: ggml sets its matrix unit up once, auto-round-lib anew for every product.
        names = PEERS if installed() else ()
        peers = {name: stack.enter_context(Peer("kernels_server.py")) for name in names}
        if not peers:
            print(f"{', '.join(PEERS)} {ABSENT}")
        places = {"hot": 0, "cold": int(options.cold * 1e9)}
        for shape, (place, size) in itertools.product(options.shape, places.items()):
            if place == "hot" or size:
                rows += products_of(tuple(shape), place, size, peers, options, known)
    return rows


def products_of(
    shape: tuple[int, int],
    place: str,
    size: int,
    peers: Mapping[str, Peer],
    options: argparse.Namespace,
    known: Rows,
) -> list[Row]:
    """One shape: hot = one copy, cold = rotating over ``size`` bytes of each weight."""
    n, k = shape
    wanted = [
        (spec, n, k, m, t, place, options.fast)
        for spec, m, t in itertools.product(options.spec, options.m, options.threads)
    ]
    missing = [key for key in wanted if key not in known.known]
    if not missing:
        return [known.known[key] for key in wanted]
    w = torch.randn(n, k).bfloat16()
    linear, four = dense(w), int4pack(w, PEER_GROUP)
    few = max(1, size // (n * k // 2))
    found = {}
    for name, peer in peers.items():
        if reason := peer.ask("weight", name, n, k, PEER_GROUP, few):
            print(f"{name}: {reason}")
        else:
            found[name] = peer
    for text in dict.fromkeys(key[0] for key in missing):
        spec = hal.Spec.parse(text)
        q = hal.quantize(w, hal.search(w, spec), spec)
        act = hal.Act("s8", spec.group) if options.fast else None
        pool = [hal.prepare(q, dtype=torch.bfloat16, act=act)]
        for _ in range(size // pool[0].nbytes - 1):
            pool.append(hal.prepare(q, dtype=torch.bfloat16, act=act))
        others = (max(1, size // (n * k * 2)), few)
        torches = (linear, four, others)
        bench = Bench(text, shape, place, pool, *torches, found, options.seconds)
        for key in (key for key in missing if key[0] == text):
            m, t = key[3], key[4]
            torch.set_num_threads(t)
            known.add(key, product(bench, m, t))
            print(known.known[key], flush=True)
    return [known.known[key] for key in wanted]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One weight, the pool of its copies, and the peers with their numbers of copies."""

    spec: str
    shape: tuple[int, int]
    place: str
    pool: list[hal.Weight]
    linear: Torch
    four: Torch
    copies: tuple[int, int]
    peers: Mapping[str, Peer]
    budget: float


def _seconds(peer: Peer, name: str, m: int, threads: int) -> float:
    """NaN from the call on that a peer died in."""
    try:
        return float(peer.ask("run", name, m, threads))
    except (RuntimeError, BrokenPipeError):
        return math.nan


def product(b: Bench, m: int, threads: int) -> Row:
    """Our product, both probes and both peers, taking turns."""
    pool = b.pool
    (n, k), isa = b.shape, cpu.isa()
    x, native, turn = torch.randn(m, k).bfloat16(), cpu.native(), itertools.count()
    work, nbytes, units = 2 * m * n * k, pool[0].nbytes, 4 * threads

    def ours() -> None:
        hal.qgemm(x, pool[next(turn) % len(pool)])

    def read() -> None:  # a copy that was used long ago
        codes = pool[(next(turn) + len(pool) // 2) % len(pool)].parts["codes"]
        native.probe_read(isa, codes.data_ptr(), codes.numel(), threads)

    peers: list[Run] = [lambda: b.linear(x, b.copies[0]), lambda: b.four(x, b.copies[1])]
    probes: list[Run] = [read, lambda: native.probe_peak(isa, units, threads)]
    ops = native.probe_peak(isa, units, threads)
    codes = pool[0].parts["codes"].numel()
    for name, peer in b.peers.items():
        peers.append(lambda n=name, p=peer: _seconds(p, n, m, threads))  # type: ignore[misc]
    times = turns([ours, *probes, *peers], b.budget, clock(threads))

    def over(of: Callable[[list[float]], float]) -> float:
        return statistics.median(of(own) for own in times)

    seconds = over(lambda own: own[0])
    return Row(
        spec=b.spec,
        n=n,
        k=k,
        m=m,
        threads=threads,
        place=b.place,
        kernel=pool[0].kernel(m).name,
        ms=seconds * 1e3,
        gb_s=nbytes / seconds / 1e9,
        gflop_s=work / seconds / 1e9,
        of_read=over(lambda own: own[1] / own[0]) * nbytes / codes,
        of_peak=over(lambda own: own[2] / own[0]) * work / ops,
        x_dense=over(lambda own: own[3] / own[0]),
        x_int4pack=over(lambda own: own[4] / own[0]),
        x_peers={
            name: over(lambda own, i=i: own[i] / own[0])  # type: ignore[misc]
            for i, name in enumerate(b.peers, 5)
        },
    )


def plot(rows: Sequence[Row]) -> str:
    """An SVG of the fraction of the roofline over m: a line a spec, the first place measured."""
    first = [r for r in rows if (r.threads, r.place) == (rows[0].threads, rows[0].place)]
    ms = sorted({r.m for r in first})
    colours = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf", "#c98a00", "#4a4a4a", "#00a0a0")
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 330" font-family="sans-serif" '
        'font-size="12">',
        f'<text x="60" y="20">fraction of the roofline, {rows[0].n} x {rows[0].k}, '
        f"{rows[0].place}, {rows[0].threads} threads</text>",
    ]

    def at(m: int, y: float) -> tuple[float, float]:
        return 60 + 420 * ms.index(m) / max(1, len(ms) - 1), 290 - 240 * min(y, 1.1)

    for i in range(0, 6):
        y = at(ms[0], i / 5)[1]
        out.append(f'<path d="M60 {y:.0f}H480" stroke="#ddd"/>')
        out.append(f'<text x="30" y="{y + 4:.0f}">{i / 5:.1f}</text>')
    out += [f'<text x="{at(m, 0)[0] - 8:.0f}" y="310">{m}</text>' for m in ms]
    for i, spec in enumerate(dict.fromkeys(r.spec for r in first)):
        colour = colours[i % len(colours)]
        points = [at(r.m, r.of_roofline) for r in first if r.spec == spec]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        out.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="500" y="{60 + 18 * i}" fill="{colour}">{spec}</text>'
        )
    return "\n".join([*out, "</svg>\n"])


def sweeps(n: int, k: int, budget: float) -> None:
    """The verbs of quantization: weights a second, and how many times the torch reference."""
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

            times = turns([run, reference], budget, clock(torch.get_num_threads()))
            t, slow = (statistics.median(own) for own in zip(*times, strict=True))
            print(f"{verb:12} {text:16} {t * 1e3:9.2f} {n * k / t / 1e9:11.2f} {slow / t:12.1f}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--full", action="store_true", help="every shape and m we answer for")
    parser.add_argument(
        "--spec", nargs="*", default=[f"s{bits}:g128:f16" for bits in (2, 3, 4, 5, 6, 8)]
    )
    parser.add_argument("--m", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--cold",
        type=float,
        default=2.0,
        metavar="GB",
        help="rotate over so many GB of each weight beside the hot rows (0: hot rows only); four "
        "times the L3 where that is possible, and what stays cached is in the read probe too",
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--fast", action="store_true", help="allow 8-bit activations per group")
    parser.add_argument("--no-sweeps", action="store_true", help="products only")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="kept as they come; goes on there"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="fraction of the roofline over m")
    options = parser.parse_args(argv)
    options.shape = options.shape or (FULL_SHAPES if options.full else FULL_SHAPES[:1])
    options.m = FULL_M if options.full else options.m
    torch.set_num_threads(options.threads[0])
    with torch.inference_mode():
        if not options.no_sweeps:
            sweeps(*options.shape[0], options.seconds)
        print("\n" + HEAD)
        rows = products(options, Rows(options.rows))
    if options.svg:
        options.svg.write_text(plot(rows))
