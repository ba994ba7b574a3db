# SPDX-License-Identifier: Apache-2.0
"""Formats as rows: which packings a format may use, what fits, and the config that describes it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import hal
from autoround.errors import InputError
from autoround.scheme import KEEP_BITS, Scheme

#: Tried in this order when a layer's columns are no multiple of its group.
SMALLER_GROUPS = (64, 32)


@dataclass(frozen=True, slots=True)
class Packing:
    """How one kind of file stores integer weights: the name in its config, and the hal layout."""

    name: str
    layout: str

    def refuse(self, scheme: Scheme, n: int, k: int) -> str | None:
        """Why an ``[n, k]`` weight of this scheme cannot be stored, or None."""
        spec = scheme.spec
        assert spec is not None
        if n % 32 or k % 32:
            return f"[{n}, {k}] is not a multiple of 32 in both directions"
        if k % spec.width(k):
            # Readers of these files either refuse a short last group or drop the layer silently.
            return f"{k} columns are not a multiple of group_size {scheme.group_size}"
        return hal.refuse(spec, (n, k), self.layout)


GPTQ = Packing("auto_round:auto_gptq", "gptq")
AWQ = Packing("auto_round:auto_awq", "awq")
RAW = Packing("auto_round", "gptq_raw")


@dataclass(frozen=True, slots=True)
class Format:
    """A row: its packings, best first, and the name loaders know it by."""

    name: str
    quant_method: str
    packings: tuple[Packing, ...]
    about: str

    def choose(self, schemes: Collection[Scheme]) -> Packing:
        """The packing that holds every quantized layer: the first whose rule admits all schemes."""
        for packing in self.packings:
            if all(_admits(packing, scheme) is None for scheme in schemes):
                return packing
        reasons = {_admits(self.packings[-1], scheme) for scheme in schemes} - {None}
        raise InputError(
            f"format {self.name} cannot hold this: {'; '.join(sorted(map(str, reasons)))}; "
            "use --format auto_round, which picks a packing that can"
        )

    def config(
        self, packing: Packing, base: Scheme, layers: Mapping[str, Scheme], blocks: str
    ) -> dict[str, Any]:
        """``quantization_config``: the base scheme, and layers that differ by their exact names."""
        same = {"bits": base.bits, "group_size": base.group_size, "sym": base.sym}
        extra: dict[str, dict[str, Any]] = {}
        for name, scheme in layers.items():
            own = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
            if scheme.bits == KEEP_BITS:
                extra[name] = {"bits": KEEP_BITS, "data_type": "float"}
            elif differs := {k: v for k, v in own.items() if v != same[k]}:
                extra[name] = (
                    differs if name.startswith(blocks + ".") else {**own, "data_type": "int"}
                )
            elif not name.startswith(blocks + "."):
                extra[name] = {**own, "data_type": "int"}
        config: dict[str, Any] = {
            "quant_method": self.quant_method,
            "packing_format": packing.name,
            **same,
            "data_type": "int",
            "block_name_to_quantize": blocks,
        }
        return {**config, "extra_config": extra} if extra else config


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("auto_round", "auto-round", (GPTQ, AWQ, RAW), "picks the packing below that fits"),
        Format(
            "auto_round:auto_gptq", "auto-round", (GPTQ,), "symmetric, GPTQ words, zeros minus one"
        ),
        Format("auto_round:auto_awq", "auto-round", (AWQ,), "4 bits, AWQ words"),
        Format(
            "auto_round:gptqmodel", "auto-round", (RAW,), "any bits, GPTQ words, zeros as they are"
        ),
    )
}


def format_by_name(name: str) -> Format:
    """A row of FORMATS. Raises InputError listing them."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def fit(packing: Packing, scheme: Scheme, n: int, k: int) -> tuple[Scheme, str | None]:
    """The scheme itself, a smaller group, or 16 bits, whichever the packing can store first.

    Returns (scheme, reason it is not the one asked for).
    """
    reason = packing.refuse(scheme, n, k)
    if reason is None:
        return scheme, None
    for group in SMALLER_GROUPS:
        smaller = Scheme(scheme.bits, group, scheme.sym)
        if group < scheme.group_size and packing.refuse(smaller, n, k) is None:
            return smaller, f"{reason}: group_size {group} instead"
    return Scheme(KEEP_BITS), f"{reason}: kept as it is"


@cache
def stored_parts(spec: hal.Spec, n: int, k: int, layout: str) -> tuple[tuple[str, hal.Part], ...]:
    """Local tensor names of a packed ``[n, k]`` weight with dtype and shape."""
    return tuple(hal.describe(spec, (n, k), layout).items())


def _admits(packing: Packing, scheme: Scheme) -> str | None:
    """Whether the packing takes the scheme at all, shapes aside."""
    spec = scheme.spec
    width = 32 * max(scheme.group_size, 1) if scheme.group_size > 0 else 32
    return None if spec is None else hal.refuse(spec, (width, width), packing.layout)
