# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the caller are named before any kernel sees a pointer."""

from dataclasses import replace

import pytest
import torch

import hal
from hal.testing import TOLERANCE, params, quantized, relative_error, same, weights

SPEC = hal.Spec("u4", 32, zero="int")
W = weights(64, 96, 1)


def test_weight_must_be_a_contiguous_float_matrix() -> None:
    for wrong in (W[0], W.t(), W.int(), W.double()):
        with pytest.raises(ValueError, match="contiguous f32, bf16 or f16 matrix"):
            hal.search(wrong, SPEC)


def test_importance() -> None:
    for wrong in (torch.ones(95), torch.ones(96, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"importance must be f32 \[96\]"):
            hal.search(W, SPEC, importance=wrong)
    strided = torch.rand(192)[::2]
    same_values = hal.search(W, SPEC, importance=strided.contiguous(), grid=8)
    assert same(hal.search(W, SPEC, importance=strided, grid=8).amin, same_values.amin)


@pytest.mark.parametrize("name", ["lo", "hi", "amin", "amax"])
def test_parameters_of_the_wrong_shape(name: str) -> None:
    for wrong in (torch.ones(64, 4), torch.ones(64, 3).double(), torch.ones(3, 64).t()):
        with pytest.raises(ValueError, match=f"{name} must be contiguous f32"):
            hal.qdq(W, replace(params(W, SPEC, 1), **{name: wrong}), SPEC)


def test_offsets_of_the_rounding() -> None:
    for wrong in (torch.zeros(64, 95), torch.zeros(64, 96).half(), torch.zeros(96, 64).t()):
        with pytest.raises(ValueError, match="v must be contiguous f32"):
            hal.qdq(W, replace(params(W, SPEC, 1), v=wrong), SPEC)


def test_out_and_grad() -> None:
    p = params(W, SPEC, 1)
    with pytest.raises(ValueError, match="out must match"):
        hal.qdq(W, p, SPEC, out=torch.empty(64, 96, dtype=torch.bfloat16))
    out = torch.empty_like(W)
    assert hal.qdq(W, p, SPEC, out=out) is out
    with pytest.raises(ValueError, match="grad must match"):
        hal.qdq_step_(p, W, W[:32].contiguous(), SPEC, lr_v=0.1, lr_range=0.1)


def test_layouts() -> None:
    q = quantized(W, SPEC)
    with pytest.raises(ValueError, match="unknown layout 'gguf'"):
        hal.pack(q, "gguf")
    with pytest.raises(hal.Unsupported, match="use gptq_raw or awq"):
        hal.pack(q, "gptq")
    assert hal.pack(q, "plain") is q


def test_products() -> None:
    q = quantized(W, SPEC)
    with pytest.raises(ValueError, match="activations of"):
        hal.prepare(q, dtype=torch.float64)
    w = hal.prepare(q, dtype=torch.float32)
    for wrong in (torch.ones(3, 95), torch.ones(3, 96).half()):
        with pytest.raises(ValueError, match="x must be"):
            hal.qgemm(wrong, w)
    for bias in (torch.ones(63), torch.ones(64).int()):
        with pytest.raises(ValueError, match="bias must be"):
            hal.qgemm(torch.ones(3, 96), w, bias)


def test_product_shapes() -> None:
    w = hal.prepare(quantized(W, SPEC), dtype=torch.float32)
    assert hal.qgemm(torch.ones(0, 96), w).shape == (0, 64)
    assert hal.qgemm(torch.ones(2, 3, 96), w).shape == (2, 3, 64)
    x = torch.randn(8, 96)
    assert same(hal.qgemm(x[::2], w), hal.qgemm(x[::2].contiguous(), w))


def act_order(k: int, group: int, seed: int) -> torch.Tensor:
    """A ``g_idx`` as GPTQ's desc_act writes it: columns of a group anywhere."""
    g_idx = torch.arange(k, dtype=torch.int32) // group
    return g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("text", ["s4:g32:f16", "u3:g20:f16:int", "s8:g64:bf16", "u4:g128:f32:int"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_act_order(text: str, dtype: torch.dtype) -> None:
    """W[:, i] = scale[g_idx[i]] * (code[:, i] - zero[g_idx[i]]), as GPTQ's readers compute it."""
    spec, (n, k) = hal.Spec.parse(text), (70, 300)
    stored = quantized(weights(n, k, 1), spec)
    g_idx = act_order(k, spec.width(k), 2)
    zero = (
        stored.parts["zero"].double() if "zero" in stored.parts else torch.full((n, 1), spec.half)
    )
    zero = zero.expand(n, spec.groups(k))[:, g_idx]
    want = stored.parts["scale"].double()[:, g_idx] * (stored.parts["codes"].double() - zero)
    q = stored.ordered(g_idx)
    assert relative_error(hal.dequantize(q, dtype=torch.float32), want) < 1e-6
    ready = hal.prepare(q, dtype=dtype)
    back = hal.restore(ready)
    assert q.perm is not None
    assert back.perm is not None
    assert torch.equal(back.perm, q.perm)
    assert all(same(back.parts[name], q.parts[name]) for name in q.parts)
    for m in (0, 1, 3, 40):
        x = weights(m, k, m).to(dtype) if m else torch.empty(0, k, dtype=dtype)
        got = hal.qgemm(x, ready)
        assert got.shape == (m, n)
        assert m == 0 or relative_error(got, x.double() @ want.T) < TOLERANCE[dtype]


def test_act_order_mistakes() -> None:
    q = quantized(W, SPEC)
    with pytest.raises(ValueError, match="g_idx must give 32 of the 96 columns"):
        q.ordered(torch.zeros(96, dtype=torch.int32))
    sorted_ = q.ordered(act_order(96, 32, 1))
    with pytest.raises(hal.Unsupported, match="has no column order"):
        hal.pack(sorted_, "gptq_raw")
    with pytest.raises(ValueError, match="without perm"):
        sorted_.ordered(act_order(96, 32, 1))
    with pytest.raises(ValueError, match="perm must be a permutation"):
        hal.prepare(replace(q, perm=torch.zeros(96, dtype=torch.int32)), dtype=torch.float32)


def test_grouped_offsets() -> None:
    q = quantized(W, SPEC)
    q.experts = 2
    w, x = hal.prepare(q, dtype=torch.float32), torch.randn(5, 96)
    for wrong in (torch.tensor([0, 5]), torch.tensor([0, 2, 5])):
        with pytest.raises(ValueError, match=r"offsets must be i32 \[3\]"):
            hal.qgemm_grouped(x, w, wrong)


def test_grouped_offsets_are_not_trusted_by_native_code() -> None:
    q = quantized(W, SPEC)
    q.experts = 2
    w, x = hal.prepare(q, dtype=torch.float32), torch.randn(5, 96)
    if not w.kernels[0][1].name.startswith("cpu."):
        pytest.skip("no native CPU kernels")
    for wrong in ([0, 7, 5], [0, 2, 6], [1, 2, 5], [-1, 2, 5]):
        with pytest.raises(ValueError, match="offsets must rise from 0 to 5"):
            hal.qgemm_grouped(x, w, torch.tensor(wrong, dtype=torch.int32))


def test_spec_round_trip_and_mistakes() -> None:
    for text in ("s4:g128:f16", "u2:g0:f32:int", "s8:g32:bf16"):
        assert str(hal.Spec.parse(text)) == text
    for wrong in ("s4", "s4:g-1:f16", "s9:g128:f16", "u4:g128:f16", "s4:g128:f16:int", "s4:g1:f8"):
        with pytest.raises(ValueError, match=r".+"):
            hal.Spec.parse(wrong)


def test_linear_module_follows_its_input() -> None:
    q = quantized(weights(64, 96, 2), SPEC)
    layer = hal.QLinear(64, 96, bias=True, dtype=torch.float32)
    layer.load(q, torch.float32)
    torch.nn.init.ones_(layer.get_parameter("bias"))
    x, dense = torch.randn(3, 96), hal.dequantize(q, dtype=torch.float32)
    assert torch.allclose(layer(x), x @ dense.T + 1, atol=1e-4)
    half = layer(x.half())
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), x @ dense.T + 1, atol=5e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hadamard_in_place_is_its_own_inverse_and_leaves_products(dtype: torch.dtype) -> None:
    x = weights(9, 192, 2).to(dtype)
    w, turned = weights(33, 192, 4).to(dtype), x.clone()
    hal.hadamard_(turned, 64)
    assert not same(turned, x)
    rotated = w.clone()
    hal.hadamard_(rotated, 64)
    want = x.double() @ w.double().T
    assert relative_error(turned.double() @ rotated.double().T, want) < 2 * TOLERANCE[dtype]
    hal.hadamard_(turned, 64)
    assert relative_error(turned, x) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("block", [0, -2, 3, 24, 128])
def test_hadamard_blocks(block: int) -> None:
    with pytest.raises(ValueError, match=f"power of two that divides 96, not {block}"):
        hal.hadamard_(W.clone(), block)
