# SPDX-License-Identifier: Apache-2.0
"""Sums that tell memory apart: native as the reference, the reference as its formula."""

import zlib

import pytest
import torch

from hal import digest
from hal.backends import cpu


@pytest.mark.parametrize("n", [0, 1, 3, 4, 8191, 8192, 8193, 50_000])
def test_native_is_the_reference(n: int) -> None:
    x = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(digest.sums(x)[0], digest.reference(x))


@pytest.mark.parametrize("n", [*range(0, 150, 7), 64, 128, 4096, 100_003])
@pytest.mark.parametrize("start", [0, 3])
def test_crc32_is_that_of_zlib(n: int, start: int) -> None:
    x = torch.randint(0, 256, (n + start,), dtype=torch.uint8)
    assert digest.crc32(x[start:]) == zlib.crc32(bytes(x[start:].tolist()))
    assert digest.crc32(x[start:], 77) == zlib.crc32(bytes(x[start:].tolist()), 77)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", cpu.isas() if cpu.probe() is None else ["none"])
def test_what_is_not_finite_is_seen(
    dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_ISA", isa)
    x = torch.linspace(-6e4, 6e4, 9001).to(dtype)
    x[7], x[8] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    found, finite = digest.sums(x)
    assert finite
    assert torch.equal(found, digest.reference(x.view(torch.uint8)))
    for at in (0, 1, 4095, 9000):
        for bad in (float("inf"), float("-inf"), float("nan")):
            y = x.clone()
            y[at] = bad
            assert not digest.sums(y)[1], (at, bad)
    assert digest.sums(torch.full((64,), -1, dtype=torch.int32))[1]  # no floats


def test_the_reference_is_its_formula() -> None:
    x = torch.randint(0, 256, (3 * 8192 - 5,), dtype=torch.uint8)
    data = bytes(x.tolist()) + bytes(5)
    words = [
        int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)
    ]
    for lane in (0, 1, 2047):
        own = words[lane :: digest.LANES]
        found = sum(w * digest.FACTOR ** (2 - i) for i, w in enumerate(own)) % 2**64
        assert int(digest.reference(x)[lane]) % 2**64 == found


@pytest.mark.parametrize("bits", [1, 128])
@pytest.mark.parametrize("apart", [1, 4, 8192, 16384])
def test_two_changes_do_not_make_up_for_each_other(bits: int, apart: int) -> None:
    """Signs of two weights, a lane's own words among them."""
    x = torch.zeros(5 * 8192, dtype=torch.uint8)
    for first in range(0, 8192, 1023):
        y = x.clone()
        y[first] ^= bits
        y[first + apart] ^= bits
        assert not torch.equal(digest.sums(x)[0], digest.sums(y)[0])
