# SPDX-License-Identifier: Apache-2.0
"""What every kernel is tried with: (spec, n, k, kind of weight), the awkward ones first."""

from collections.abc import Callable

import torch
from torch import Tensor

from hal import Spec

Kind = Callable[[int, int, torch.Generator], Tensor]


def _gauss(n: int, k: int, rng: torch.Generator) -> Tensor:
    return torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng)


def _ties(n: int, k: int, rng: torch.Generator) -> Tensor:
    """Halves of a power-of-two scale: every quotient is an integer or lies between two."""
    w = torch.randint(-16, 16, (n, k), generator=rng) / 2
    w[:, 0] = -8
    return w


KINDS: dict[str, Kind] = {
    "zeros": lambda n, k, rng: torch.zeros(n, k),
    "constant": lambda n, k, rng: torch.full((n, k), -0.37),
    "positive": lambda n, k, rng: _gauss(n, k, rng).abs(),
    "negative": lambda n, k, rng: -_gauss(n, k, rng).abs(),
    "ties": _ties,
    "tiny": lambda n, k, rng: _gauss(n, k, rng) * 1e-7,  # scales below the smallest allowed
    "denormal": lambda n, k, rng: _gauss(n, k, rng) * 1e-40,
    "huge": lambda n, k, rng: _gauss(n, k, rng) * 6e4,  # scales near the end of f16
    "gauss": _gauss,
}

#: (n, k, group): K not a multiple of the group or of 16, one row, one group, whole rows.
SHAPES = [
    (1, 37, 0),
    (3, 100, 32),
    (5, 90, 20),
    (1, 640, 64),
    (7, 16, 128),
    (4, 300, 128),
    (2, 1000, 0),
    (33, 64, 16),
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def specs(bits: range = range(2, 9)) -> list[tuple[Spec, int, int]]:
    """Every width, both kinds of zero point, with shapes and scale dtypes taking turns."""
    found = []
    for b in bits:
        for i, (n, k, group) in enumerate(SHAPES):
            scale = ("f16", "bf16", "f32")[(b + i) % 3]
            found.append((Spec(f"s{b}", group, scale), n, k))
            found.append((Spec(f"u{b}", group, scale, "int"), n, k))
    return found


def weight(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    w = KINDS[kind](n, k, torch.Generator().manual_seed(seed))
    return w.clamp(-6.5e4, 6.5e4).to(dtype)  # finite in f16
