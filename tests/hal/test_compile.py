# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` keeps products whole, and compiled modules give the same bits."""

import shutil

import pytest
import torch
from torch import nn

import hal
from hal.nn import QLinear
from hal.plan import WEIGHTS
from hal.testing import quantized, same, weights

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler"),
        ],
    ),
]


def two_layers(dtype: torch.dtype) -> nn.Sequential:
    spec = hal.Spec.parse("u4:g32:f16:int")
    model = nn.Sequential()
    for seed, (n, k) in enumerate(((96, 64), (64, 96))):
        layer = QLinear(n, k, bias=True, dtype=dtype)
        layer.load(quantized(weights(n, k, seed), spec), dtype)
        assert layer.bias is not None
        layer.bias.data.normal_()
        model.append(layer)
        model.append(nn.ReLU())
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_compile_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    model = two_layers(torch.bfloat16)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for m in (1, 3, 70):
        x = torch.randn(2, m, 64).bfloat16()
        with torch.inference_mode():
            assert same(compiled(x), model(x)), m


def test_experts_compile() -> None:
    torch._dynamo.reset()
    q = quantized(weights(96, 64, 1), hal.Spec.parse("s4:g32:f16"))
    q.experts = 3
    ready, x = hal.prepare(q, dtype=torch.float32), torch.randn(7, 64)
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    compiled = torch.compile(
        lambda x: hal.qgemm_grouped(x, ready, offsets) * 2, backend="aot_eager", fullgraph=True
    )
    assert same(compiled(x), hal.qgemm_grouped(x, ready, offsets) * 2)


def test_act_order_compiles() -> None:
    torch._dynamo.reset()
    q = quantized(weights(40, 64, 1), hal.Spec("s4", 16))
    ready = hal.prepare(q.ordered(torch.arange(64, dtype=torch.int32) % 4), dtype=torch.float32)
    compiled = torch.compile(lambda x: hal.qgemm(x, ready), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64)
    assert same(compiled(x), hal.qgemm(x, ready))


def test_a_weight_is_forgotten_with_its_owner() -> None:
    ready = hal.prepare(quantized(weights(8, 16, 1), hal.Spec("s4", 16)), dtype=torch.float32)
    token, x = ready.token, torch.randn(1, 16)
    assert WEIGHTS[token] is ready
    assert same(torch.ops.hal.qgemm(x, token, None), hal.qgemm(x, ready))
    del ready
    with pytest.raises(RuntimeError, match="outlived"):
        torch.ops.hal.qgemm(x, token, None)
