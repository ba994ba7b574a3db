# SPDX-License-Identifier: Apache-2.0
"""``python -m hal [explain | matrix]``: does it work here, which kernels serve what, and why."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from hal import config, registry
from hal import device as devices
from hal.layout import LAYOUTS
from hal.registry import Case, Unsupported
from hal.spec import Act, Spec
from hal.testing import check

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FAMILIES = {
    "symmetric s2-s8": [Spec(f"s{bits}") for bits in range(2, 9)],
    "asymmetric u2-u8": [Spec(f"u{bits}", zero="int") for bits in range(2, 9)],
}
VERBS = ("search", "qdq", "qdq_step", "quantize", "dequantize", "quantize_act")


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
        yield (label, *(_served(case, specs) for specs in FAMILIES.values()))


def _questions(caps: registry.Caps) -> Iterator[tuple[str, Case]]:
    def ask(op: str) -> Case:
        return Case(op, Spec("s4"), torch.bfloat16, 4096, 4096, caps)

    yield from ((verb, ask(verb)) for verb in VERBS)
    for op in ("pack", "unpack"):
        for layout in [name for name in LAYOUTS if name != "plain"]:
            yield f"{op} {layout}", replace(ask(op), layout=layout)
    yield from ((f"qgemm m={m}", replace(ask("qgemm"), m=m)) for m in (8, 64, 256, 512))
    yield "qgemm_grouped", replace(ask("qgemm_grouped"), m=64, experts=8)


def _served(case: Case, specs: Sequence[Spec]) -> str:
    """Names of the rows that serve these specs; with the elements when it is not all of them."""
    names: dict[str, list[str]] = {}
    for spec in specs:
        if LAYOUTS[case.layout].fits(spec, case.n, case.k) is None:
            try:
                names.setdefault(registry.select(replace(case, spec=spec)).name, []).append(
                    spec.elem
                )
            except Unsupported:
                names.setdefault("none", []).append(spec.elem)
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
    """The kernel matrix of every device, as markdown."""
    for found in devices.devices():
        print(f"| {found.torch} | {' | '.join(FAMILIES)} |")
        print("|---|" + "---|" * len(FAMILIES))
        for row in rows(found.caps):
            print(f"| {' | '.join(row)} |")


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hal", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("matrix", help="print the kernel matrix as markdown")
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
    options = parser.parse_args(argv)
    if options.command == "explain":
        explain(options)
    elif options.command == "matrix":
        matrix()
    else:
        return status()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
