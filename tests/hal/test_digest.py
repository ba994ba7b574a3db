# SPDX-License-Identifier: Apache-2.0
"""Sums that tell memory apart: native as the reference, the reference as its formula."""

import pytest
import torch

from hal import digest


@pytest.mark.parametrize("n", [0, 1, 3, 4, 8191, 8192, 8193, 50_000])
def test_native_is_the_reference(n: int) -> None:
    x = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(digest.sums(x), digest.reference(x))


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
        assert not torch.equal(digest.sums(x), digest.sums(y))
