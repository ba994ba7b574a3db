# SPDX-License-Identifier: Apache-2.0
"""Weights as numbers: what is wrong with one, and how two differ, in words."""

from collections.abc import Iterator

import torch
from torch import Tensor

from autoround.verify.decode import Numbers, packed
from hal.digest import crc32

#: What a fingerprint is made of, in its order.
PARTS = ("codes", "scales", "zero levels", "groups")


def unsound(numbers: Numbers) -> Iterator[str]:
    """What no weight has."""
    scale, zero = numbers.scale, numbers.zero
    if not bool(torch.isfinite(scale).all()):
        yield "scales that are NaN or infinite"
    elif bool((scale == 0).any()):
        yield "scales of zero"
    if bool((zero >= 1 << numbers.bits).any()) or bool((zero < 0).any()):
        yield f"zero levels outside its {numbers.bits} bits"


def fingerprint(numbers: Numbers) -> list[str]:
    """CRC-32 of PARTS: codes as rows of words, scales as stored, levels u8, groups i32."""
    words = packed(numbers.codes, numbers.bits) if numbers.words is None else numbers.words
    parts = (words, numbers.scale, numbers.zero.to(torch.uint8), numbers.groups.to(torch.int32))
    return [f"{crc32(part.contiguous()):08x}" for part in parts]


def foreign(numbers: Numbers, told: str | None) -> Iterator[str]:
    """Against a fingerprint (`autoround.formats.export.fingerprint`) of the weight as it was before
    it was packed."""
    if told is None or len(told.split()) != len(PARTS):
        yield "the record has no fingerprint of it"
        return
    for what, have, want in zip(PARTS, fingerprint(numbers), told.split(), strict=True):
        if have != want:
            yield f"the {what} are not those that the run found"


def unlike(found: Numbers, expected: Numbers) -> Iterator[str]:
    """Against the same weight of a run."""
    if (found.bits, found.shape) != (expected.bits, expected.shape):
        yield (
            f"{found.bits} bits {list(found.shape)}, "
            f"the run has {expected.bits} bits {list(expected.shape)}"
        )
        return
    if found.scale.shape != expected.scale.shape or not torch.equal(found.groups, expected.groups):
        yield "columns belong to other groups than in the run"
        return
    for what, (have, want) in _pairs(found, expected).items():
        if not torch.equal(have, want):
            wrong = (have != want).nonzero()
            row, column = wrong[0].tolist()
            yield (
                f"{len(wrong)} {what}s differ, first [{row}, {column}]: "
                f"{have[row, column].item():.6g}, the run has {want[row, column].item():.6g}"
            )


def _pairs(found: Numbers, expected: Numbers) -> dict[str, tuple[Tensor, Tensor]]:
    """What must be equal."""
    pairs = {
        "scale": (found.scale, expected.scale.to(found.scale.dtype)),
        "zero level": (found.zero, expected.zero),
    }
    if found.biases is not None and expected.biases is None:
        offset = -expected.scale.float() * expected.zero
        pairs["bias"] = (found.biases, offset.to(found.biases.dtype))
    # Two streams of the same bits in a row are equal where their codes are.
    here, there = found.words, expected.words
    if here is None or there is None or not same_bytes(here, there):
        pairs["code"] = (found.codes, expected.codes)
    return pairs


def apart(found: Numbers, expected: Numbers) -> float:
    """Largest difference of weights of the same codes: linear in a code, so at an end of them.
    0 where they have other shapes."""
    if found.scale.shape != expected.scale.shape:
        return 0.0
    slope = found.scale.float() - expected.scale.float()
    start = found.start() - expected.start()
    end = start + slope * ((1 << found.bits) - 1)
    return max(float(start.abs().max()), float(end.abs().max())) if slope.numel() else 0.0


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """NaN equals itself, and -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    whole = len(x) // 8 * 8  # eight bytes at a time: four times as fast as two
    return torch.equal(x[:whole].view(torch.int64), y[:whole].view(torch.int64)) and torch.equal(
        x[whole:], y[whole:]
    )
