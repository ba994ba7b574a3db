# SPDX-License-Identifier: Apache-2.0
"""How the numbers of one weight matrix are encoded: elements, groups, scales, zero points."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Elem:
    """One element code. Integers are stored as unsigned levels 0 .. 2**bits - 1."""

    bits: int
    signed: bool

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def half(self) -> int:
        """The level that stands for zero when there is no stored zero point."""
        return 1 << (self.bits - 1)


ELEMS: dict[str, Elem] = {
    **{f"s{b}": Elem(b, True) for b in range(2, 9)},
    **{f"u{b}": Elem(b, False) for b in range(2, 9)},
}

SCALES: dict[str, torch.dtype] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}

#: Smallest |scale|, as stored. Keeps w / scale finite for all-zero groups.
MIN_SCALE: dict[str, float] = {"f16": 1e-5, "bf16": 1e-5, "f32": 1e-8}


@dataclass(frozen=True, slots=True)
class Spec:
    """Encoding of an ``[N, K]`` weight; prints and parses as e.g. ``u4:g128:f16:int``.

    ``elem``: ``s2..s8`` (symmetric: level ``2**(b-1)`` is zero, the scale carries a sign so that
    the extreme of a group always reaches the lowest level) or ``u2..u8`` (a zero point per group).
    ``group``: columns that share a scale; 0 = the whole row. ``scale``: storage dtype of the
    scales. ``zero``: ``int`` for stored integer zero points, empty for symmetric codes.
    """

    elem: str
    group: int = 128
    scale: str = "f16"
    zero: Literal["", "int"] = ""

    def __post_init__(self) -> None:
        if self.elem not in ELEMS:
            raise ValueError(f"unknown element {self.elem!r}; known: {', '.join(ELEMS)}")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; known: {', '.join(SCALES)}")
        if self.group < 0:
            raise ValueError(f"group {self.group} is negative; use 0 for one group per row")
        if ELEMS[self.elem].signed == bool(self.zero):
            raise ValueError(
                f"{self.elem} with zero={self.zero!r}: s* has no zero point, u* has one"
            )

    @property
    def bits(self) -> int:
        return ELEMS[self.elem].bits

    @property
    def symmetric(self) -> bool:
        return ELEMS[self.elem].signed

    @property
    def half(self) -> int:
        return ELEMS[self.elem].half

    @property
    def max_level(self) -> int:
        return ELEMS[self.elem].levels - 1

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALES[self.scale]

    @property
    def min_scale(self) -> float:
        return MIN_SCALE[self.scale]

    def width(self, k: int) -> int:
        """Columns of one group in a row of ``k`` columns; a shorter row is one group."""
        return k if self.group == 0 or k < self.group else self.group

    def groups(self, k: int) -> int:
        """Groups in a row of ``k`` columns; the last one may be short."""
        return -(-k // self.width(k)) if k else 0

    def bits_per_weight(self, k: int) -> float:
        """Stored bits of a weight, with its share of scale and zero point."""
        extra = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + extra * self.groups(k) / k

    def __str__(self) -> str:
        return f"{self.elem}:g{self.group}:{self.scale}" + (f":{self.zero}" if self.zero else "")

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Inverse of ``str``. Raises ValueError on anything else."""
        fields = text.split(":")
        if (
            len(fields) not in (3, 4)
            or not fields[1].startswith("g")
            or not fields[1][1:].isdigit()
        ):
            raise ValueError(f"{text!r} is not a spec such as s4:g128:f16 or u4:g128:f16:int")
        zero = fields[3] if len(fields) == 4 else ""
        if zero not in ("", "int"):
            raise ValueError(f"{text!r}: zero {zero!r} is not 'int'")
        return cls(fields[0], int(fields[1][1:]), fields[2], zero)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Act:
    """Encoding of activations ``[M, K]``: signed 8-bit codes, one f32 scale per group."""

    elem: str = "s8"
    group: int = 0

    def __post_init__(self) -> None:
        if self.elem != "s8":
            raise ValueError(f"activation element {self.elem!r} is not supported; known: s8")
