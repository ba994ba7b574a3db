# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compile for every GPU they are for: nothing spilled, shared memory that exists."""

import pytest
import torch

import hal
from hal.testing import params, weights

pytest.importorskip("triton")
from offline import TARGETS, Call, build, recorded

from kernels_triton import codec, hadamard, pack, products, quantize

SPECS = ("s4:g128:f16", "u3:g64:f16:int", "s8:g32:bf16", "u5:g0:f16:int", "s2:g128:f16",
         "s6:g16:f16", "u7:g128:f32:int")  # fmt: skip
QUICK = [("sm_90", "s4:g128:f16"), ("sm_86", "u3:g64:f16:int")]
REST = [(target, spec) for target in TARGETS for spec in SPECS if (target, spec) not in QUICK]
ROWS = (1, 8, 32, 64, 512)  # a row or more of every configuration


def calls(spec: hal.Spec) -> list[Call]:
    """Every launch that the verbs make for a weight of 1024 x 1024, in bf16."""
    n = k = 1024
    shape = (n, k, spec.width(k), spec.groups(k))
    e = codec.Encoding(*shape, spec.bits, spec.symmetric, spec.scale_dtype, 1e-5)
    w, p = weights(n, k, 0).bfloat16(), params(weights(n, k, 0), spec, 0)
    codes, scale = torch.zeros(n, k, dtype=torch.uint8), p.lo.to(spec.scale_dtype)
    zero = None if spec.symmetric else torch.zeros(p.lo.shape, dtype=torch.uint8)
    words = torch.zeros(n * k * spec.bits // 32, dtype=torch.int32)
    planes = products.Planes(
        products.to_planes(codes, spec.bits), scale, zero, n, k, spec.width(k), spec.bits
    )
    sizes = (n, k, spec.width(k), spec.groups(k))
    walk = (spec.bits, n, pack.Strides(k, 1, 1, n), False)
    with recorded() as found:
        quantize.search(w, p.amin[0].repeat(k)[:k], [1.0, 0.5], e, p.amin, p.amax)
        quantize.qdq(w, p, e, w)
        quantize.qdq_step_(p, w, w, e, 0.01, 0.01)
        quantize.quantize(w, p, e, codes, scale, zero)
        quantize.dequantize(codes, scale, zero, e, w)
        quantize.quantize_act(w, e, None)
        hadamard.hadamard_(w, max(e.width, 32))
        pack.pack(codes, words, *walk)
        pack.unpack(codes, words, *walk)
        for m in ROWS:
            x = torch.zeros(m, k, dtype=torch.bfloat16)
            table = products.configure(m, *sizes, 132)
            products.product(x, planes, p.amin.flatten()[:n], torch.empty_like(x), table)
        table = products.configure(1024, *sizes, 1)
        products.grouped(w, planes, torch.tensor([0, 1024], dtype=torch.int32), w, table)
        products.decoded(planes, torch.bfloat16)
    return found


def check(target: str, text: str) -> None:
    for call in calls(hal.Spec.parse(text)):
        built = build(call, target)
        assert built.stack == 0, f"{call.name} spills {built.stack} bytes"
        assert built.shared <= TARGETS[target], f"{call.name} wants {built.shared} bytes shared"


@pytest.mark.parametrize(("target", "spec"), QUICK)
def test_compiles(target: str, spec: str) -> None:
    check(target, spec)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "spec"), REST)
def test_compiles_everywhere(target: str, spec: str) -> None:
    check(target, spec)
