# SPDX-License-Identifier: Apache-2.0
"""``python -m hal [explain | matrix | tune]``: does it work here, what serves what, why, how."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from hal import config, registry
from hal import device as devices
from hal.backends import backends
from hal.layout import LAYOUTS
from hal.registry import Caps, Case, Kernel, Unsupported
from hal.spec import Act, Spec
from hal.testing import check

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FAMILIES = {
    "symmetric s2-s8": [Spec(f"s{bits}") for bits in range(2, 9)],
    "asymmetric u2-u8": [Spec(f"u{bits}", zero="int") for bits in range(2, 9)],
}
VERBS = ("search", "qdq", "qdq_step", "quantize", "dequantize", "quantize_act", "hadamard")


def status() -> int:
    """Devices with PASS or FAIL, backends that are missing, kernels. Exit code 1 on a FAIL."""
    failed = False
    for found in devices.devices():
        results = list(check(found.torch))
        wrong = [what for what, right in results if not right]
        failed |= bool(wrong)
        verdict = f"FAIL: {', '.join(wrong)}" if wrong else f"PASS ({len(results)} checks)"
        print(f"{found.torch!s:8} {found.caps.name}  {verdict}")
        print(f"{'':8} served by {', '.join(found.served_by)}; {_facts(found.caps)}")
    for kind, reason in devices.unavailable():
        print(f"{kind:8} unavailable: {reason}")
    for found in devices.devices():
        print()
        _aligned([("", *FAMILIES), *rows(found.caps)])
    return int(failed)


def _facts(caps: registry.Caps) -> str:
    isa = config.isa() or caps.arch or "no native kernels"
    features = f" (of {', '.join(sorted(caps.features))})" if caps.features else ""
    return f"{isa}{features}; {caps.units} units, {caps.memory / 2**30:.0f} GiB"


def rows(caps: registry.Caps) -> Iterator[tuple[str, ...]]:
    """The kernel matrix of a device: one verb, then the kernels that serve each family."""
    for label, case in _questions(caps):
        yield (label, *(_cell(_served(case, specs), specs) for specs in FAMILIES.values()))


def _questions(caps: registry.Caps) -> Iterator[tuple[str, Case]]:
    def ask(op: str) -> Case:
        return Case(op, Spec("s4"), torch.bfloat16, 4096, 4096, caps)

    yield from ((verb, ask(verb)) for verb in VERBS)
    yield "round stream", replace(ask("round"), layout="stream")
    for op in ("pack", "unpack"):
        for layout in [name for name in LAYOUTS if name != "plain"]:
            yield f"{op} {layout}", replace(ask(op), layout=layout)
    yield from ((f"qgemm m={m}", replace(ask("qgemm"), m=m)) for m in (8, 64, 256, 512))
    yield "qgemm_grouped", replace(ask("qgemm_grouped"), m=64, experts=8)


Choice = Callable[[Case], Kernel | None]


def _select(case: Case) -> Kernel | None:
    try:
        return registry.select(case)
    except Unsupported:
        return None


def _served(case: Case, specs: Sequence[Spec], choose: Choice = _select) -> dict[str, list[str]]:
    """Names of the rows that serve these specs, each with the elements it serves."""
    names: dict[str, list[str]] = {}
    for spec in specs:
        if LAYOUTS[case.layout].fits(spec, case.n, case.k) is None:
            row = choose(replace(case, spec=spec))
            names.setdefault(row.name if row else "none", []).append(spec.elem)
    return names


def _cell(names: dict[str, list[str]], specs: Sequence[Spec]) -> str:
    """With the elements where it is not all of them."""
    cells = [
        name if len(elems) == len(specs) else f"{name} ({' '.join(elems)})"
        for name, elems in names.items()
    ]
    return ", ".join(cells) or "-"


def _aligned(table: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def matrix() -> None:
    """Verb by kind of device, as markdown: the rows that serve it there, were their parts at hand,
    and how each backend is shown to work."""
    kinds = [kind for b in backends() for kind in b.KINDS]
    asked = {kind: Caps(kind, "", *EXAMPLES[kind]) for kind in dict.fromkeys(kinds)}
    print(f"| | {' | '.join(asked)} |")
    print("|---|" + "---|" * len(asked))
    specs = [spec for family in FAMILIES.values() for spec in family]
    questions = zip(*(_questions(caps) for caps in asked.values()), strict=True)
    for cases in questions:
        cells = [_names(_served(case, specs, _written)) for _, case in cases]
        print(f"| {cases[0][0]} | {' | '.join(cells)} |")
    print()
    for b in backends():
        others = "".join(f"; `{row.name}`: {row.label}" for row in b.KERNELS if row.label)
        for kind, label in b.KINDS.items():
            print(f"- `{b.NAME}` on {kind}: {label}{others}")


def _names(names: dict[str, list[str]]) -> str:
    """Kernels; those that serve a part of all elements after the others."""
    return ", ".join(names) or "-"


def _written(case: Case) -> Kernel | None:
    """The first row that would serve a case on a machine that has all its parts.

    Rows of the host ask it for its instruction sets, so its module must be built.
    """
    host = torch.empty(0).device.type
    serving = [b for b in backends() if not b.KINDS or case.caps.kind in b.KINDS]
    asked = [b for b in serving if host not in b.KINDS or b.probe() is None]
    rows = (row for b in asked for row in b.KERNELS if row.op == case.op)
    return next((row for row in rows if row.when(case) is None), None)


#: A device of each kind, as far as rows look at one: arch, features, units, memory.
EXAMPLES: dict[str, tuple[str, frozenset[str], int, int]] = {
    "cpu": ("amx", frozenset({"amx"}), 8, 1 << 35),
    "cuda": ("sm_90", frozenset(), 132, 1 << 37),
    "xpu": ("", frozenset({"xmx"}), 160, 1 << 34),
    "hpu": ("", frozenset(), 24, 1 << 37),
    "mps": ("", frozenset(), 16, 1 << 35),
}


def explain(options: argparse.Namespace) -> None:
    """Every kernel asked for one case, in order, and its answer."""
    caps = devices.caps(devices.resolve(options.device))
    case = Case(
        options.op,
        Spec.parse(options.spec),
        DTYPES[options.dtype],
        options.n,
        options.k,
        caps,
        m=registry.bucket(options.m) if options.op.startswith("qgemm") else 0,
        act=Act("s8", Spec.parse(options.spec).group) if options.fast else None,
        experts=options.experts,
        layout=options.layout,
    )
    answers = [(row.name, reason) for row, reason in registry.explain(case)]
    chosen = next((name for name, reason in answers if reason is None), None)
    marks = [
        (name, "serves" if name == chosen else reason or "can, but comes later")
        for name, reason in answers
    ]
    _aligned(marks or [(options.op, "no kernel of this name")])
    for row, reason in registry.explain(case):
        if row.launches and reason is None:
            print(f"{row.name}: {row.launches.explain(case)}")


def tune(options: argparse.Namespace) -> int:
    """Measure the launches of every kernel that has several, and keep the fastest. Exit code 1
    where no kernel has."""
    device = devices.resolve(options.device)
    caps, op = devices.caps(device), "qgemm" if options.experts == 1 else "qgemm_grouped"
    print(f"{caps.name}: {config.cache() / 'launches'}")
    done = 0
    for text, (n, k), m in itertools.product(options.specs, options.shapes, options.rows):
        of = Case(op, Spec.parse(text), DTYPES[options.dtype], n, k, caps)
        case = replace(of, m=registry.bucket(m), experts=options.experts)
        for row, reason in registry.explain(case):
            if row.launches and reason is None:
                done += 1
                found = row.launches.tune(case, device)
                print(f"{row.name} {text} {n}x{k} m={case.m}: {found}", flush=True)
    if not done:
        print("no kernel here has launches to choose from: that takes a GPU that triton can use")
    return int(not done)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hal", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("matrix", help="print verb by device as markdown")
    why = commands.add_parser("explain", help="which kernels can serve a case, and why not")
    why.add_argument("spec", help="e.g. s4:g128:f16 or u4:g128:f16:int")
    why.add_argument("--op", default="qgemm")
    why.add_argument("--n", type=int, default=4096)
    why.add_argument("--k", type=int, default=4096)
    why.add_argument("--m", type=int, default=1)
    why.add_argument("--fast", action="store_true", help="activations in 8 bits are allowed")
    why.add_argument("--experts", type=int, default=1)
    why.add_argument("--layout", default="plain", choices=LAYOUTS)
    why.add_argument("--dtype", default="bf16", choices=DTYPES)
    why.add_argument("--device", default="auto")
    measure = commands.add_parser("tune", help="measure launches on this GPU, keep the fastest")
    measure.add_argument("--specs", nargs="+", default=["s4:g128:f16"])
    measure.add_argument("--shapes", type=_shape, nargs="+", default=[(4096, 4096)], help="NxK")
    measure.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    measure.add_argument("--experts", type=int, default=1)
    measure.add_argument("--dtype", default="bf16", choices=DTYPES)
    measure.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    if options.command == "tune":
        return tune(options)
    if options.command == "explain":
        explain(options)
    elif options.command == "matrix":
        matrix()
    else:
        return status()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
