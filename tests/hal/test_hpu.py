# SPDX-License-Identifier: Apache-2.0
"""Gaudi's row with a double of the operator that it calls; not run on hardware."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hal
from hal.backends import hpu
from hal.plan import Weight
from hal.registry import Case, described
from hal.testing import quantized, relative_error, same, weights


def convert_from_uint4(words: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """What the operator's own documentation says: eight codes a word along N, lowest bits first."""

    def nibbles(packed: Tensor) -> Tensor:
        return torch.stack([packed >> 4 * i & 15 for i in range(8)], -1).flatten(1)

    rows = len(words) // len(scale)
    steps = nibbles(words) - nibbles(zero).repeat_interleave(rows, 0)
    return (steps * scale.repeat_interleave(rows, 0)).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def operator() -> Iterator[None]:
    library = torch.library.Library("hpu", "DEF")
    library.define("convert_from_uint4(Tensor a, Tensor s, Tensor z, ScalarType t) -> Tensor")
    library.impl("convert_from_uint4", convert_from_uint4, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("text", ["s4:g128:bf16", "u4:g32:f16:int", "s4:g0:f16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products(text: str, dtype: torch.dtype) -> None:
    q = quantized(weights(64, 256, 1), hal.Spec.parse(text))
    case = Case("qgemm", q.spec, dtype, *q.shape, described(torch.device("cpu")), m=8)
    assert hpu.KERNELS[0].when(case) is None
    parts = hpu.LAYOUTS[0].pack(q.parts, q.spec)
    back = hpu.LAYOUTS[0].unpack(parts, q.spec, q.shape)
    assert all(same(back[name], q.parts[name]) for name in q.parts)
    weight = Weight(q.spec, q.shape, 1, dtype, "hpu.uint4", parts, ((1024, hpu.KERNELS[0]),))
    dense = hal.dequantize(q, dtype=torch.float32).double()
    for m, bias in ((1, None), (7, torch.randn(64))):
        x, out = weights(m, 256, m).to(dtype), torch.empty(m, 64, dtype=dtype)
        hpu.KERNELS[0].fn(x, weight, bias, out)
        want = x.double() @ dense.T + (0 if bias is None else bias.double())
        assert relative_error(out, want) < 8e-3  # scale and weight are rounded to the dtype


@pytest.mark.parametrize(
    ("text", "n", "k", "why"),
    [
        ("s3:g128:f16", 64, 256, "4 bits"),
        ("s4:g128:f16", 60, 256, "N % 32"),
        ("s4:g128:f16", 64, 200, "multiple of the group"),
    ],
)
def test_says_what_it_cannot(text: str, n: int, k: int, why: str) -> None:
    facts = described(torch.device("cpu"))
    case = Case("qgemm", hal.Spec.parse(text), torch.bfloat16, n, k, facts, m=8)
    assert why in str(hpu.KERNELS[0].when(case))
