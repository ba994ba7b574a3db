# SPDX-License-Identifier: Apache-2.0
"""What stands between products, against float64 arithmetic and against the reference's rounding."""

import dataclasses

import pytest
import torch
from torch import Tensor

import hal
from hal.backends import cpu
from hal.block import Attention, Block, BlockOps, Linear, block_ops
from hal.testing import quantized, weights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ISAS = cpu.isas() if cpu.probe() is None else ()
HOST = torch.empty(0).device


@pytest.fixture(params=("reference", *ISAS))
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockOps:
    """The reference, and the native functions on every instruction set of this machine."""
    if request.param == "reference":
        monkeypatch.setenv("HAL_BACKEND", "reference")
    else:
        monkeypatch.setenv("HAL_ISA", request.param)
    return block_ops(HOST)


def close(got: Tensor, want: Tensor) -> None:
    bound = BOUND[got.dtype]
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert got.isfinite().all()
    assert error < bound, float(error)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 17, 64, 1000])
def test_norm(ops: BlockOps, dtype: torch.dtype, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, more, weight = (torch.randn(n, k, generator=g).to(dtype) for n in (3, 3, 1))
    total = (x + more).double()  # the sum is rounded to the dtype, as in the model
    want = weight.double() * total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    kept = x.clone()
    close(ops.norm(x, more, weight[0], 1e-6), want)
    assert torch.equal(x, kept + more)
    total = kept.double()
    want = weight.double() * total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    close(ops.norm(kept, None, weight[0], 1e-6), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 24, 640])
def test_gate(ops: BlockOps, dtype: torch.dtype, n: int) -> None:
    x = torch.linspace(-30, 30, 2 * 2 * n).view(2, 2 * n).to(dtype)
    gate, up = x.double().chunk(2, -1)
    close(ops.gate(x), gate / (1 + (-gate).exp()) * up)


def test_gate_far_out(ops: BlockOps) -> None:
    """No overflow in exp: silu is 0 or x there."""
    x = torch.tensor([[-3e38, -1e4, 1e4, 3e38, 1, 1, 1, 1]])
    assert torch.equal(ops.gate(x), torch.tensor([[-0.0, -0.0, 1e4, 3e38]]))


def attention(heads: int, kv: int, dim: int, normed: bool, dtype: torch.dtype) -> Attention:
    g = torch.Generator().manual_seed(dim)
    angle = torch.arange(96)[:, None] / 100 ** (torch.arange(dim // 2) / (dim / 2))
    cos, sin = (f(torch.cat((angle, angle), -1)).to(dtype) for f in (torch.cos, torch.sin))
    q, k = (torch.rand(dim, generator=g).to(dtype) + 0.5 for _ in range(2))
    norms = (q, k) if normed else (None, None)
    return Attention(heads, kv, dim, dim**-0.5, cos, sin, *norms, eps=1e-6)


def truth(x: Tensor, a: Attention) -> Tensor:
    """All rows at once in float64, position after position: no cache, no blocks."""
    rows = x.double().view(len(x), a.heads + 2 * a.kv_heads, a.dim)
    q, k, v = rows.split([a.heads, a.kv_heads, a.kv_heads], 1)

    def placed(y: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            y = weight.double() * y / (y.pow(2).mean(-1, keepdim=True) + a.eps).sqrt()
        first, second = y.chunk(2, -1)
        cos, sin = (t[: len(x), None].double() for t in (a.cos, a.sin))
        return y * cos + torch.cat((-second, first), -1) * sin

    q, k = placed(q, a.q_norm), placed(k, a.k_norm)
    k, v = (y.repeat_interleave(a.heads // a.kv_heads, 1) for y in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * a.scale
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "normed"),
    [(4, 2, 64, True), (7, 1, 32, False), (3, 3, 96, True), (8, 1, 256, False)],
)
def test_attend(
    ops: BlockOps, heads: int, kv: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:
    """A long prompt, a short piece, then token after token: one answer, whatever the pieces."""
    a = attention(heads, kv, dim, normed, dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70, (heads + 2 * kv) * dim, generator=g).to(dtype)
    at, got = 0, []
    for m in (30, 5, *[1] * 35):
        got.append(ops.attend(x[at : at + m].clone(), a, at))
        at += m
    close(torch.cat(got), truth(x, a))


@pytest.mark.skipif(not ISAS, reason="needs hal._cpu")
def test_threads_do_not_matter() -> None:
    x = torch.randn(16, 20 * 128).bfloat16()
    got = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append(block_ops(HOST).attend(x, attention(16, 2, 128, True, torch.bfloat16), 0))
    torch.set_num_threads(before)
    assert torch.equal(*got)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        attention(2, 1, 48, False, torch.float32)


# ---- a token through blocks in one call


def linear(n: int, k: int, dtype: torch.dtype, act: hal.Act | None, bias: bool) -> Linear:
    q = quantized(weights(n, k, n), hal.Spec.parse("u3:g64:f16:int" if bias else "s4:g64:f16"))
    given = torch.randn(n, generator=torch.Generator().manual_seed(k)).to(dtype) if bias else None
    return hal.prepare(q, dtype=dtype, act=act), given


def blocks(dtype: torch.dtype, act: hal.Act | None, count: int = 2) -> list[Block]:
    """Hidden 128, 4 heads and 2 of keys of 32 columns, 192 inside; the products of the first ones
    with biases and zero levels."""
    g = torch.Generator().manual_seed(3)
    norms = torch.rand(2 * count, 128, generator=g).to(dtype) + 0.5
    return [
        Block(
            linear(256, 128, dtype, act, i == 0),
            attention(4, 2, 32, i > 0, dtype),
            linear(128, 128, dtype, act, i == 0),
            norms[2 * i],
            linear(384, 128, dtype, act, i == 0),
            linear(128, 192, dtype, act, i == 0),
            norms[2 * i + 1],
        )
        for i in range(count)
    ]


def token_by_steps(ops: BlockOps, made: list[Block], stream: Tensor, x: Tensor, at: int) -> Tensor:
    for b in made:
        y = hal.qgemm(ops.attend(hal.qgemm(x, *b.qkv), b.attention, at), *b.out)
        x = ops.norm(stream, y, b.norm, 1e-6)
        y = hal.qgemm(ops.gate(hal.qgemm(x, *b.gate_up)), *b.down)
        x = ops.norm(stream, y, b.next_norm, 1e-6)
    return x


@pytest.mark.skipif(not ISAS, reason="needs hal._cpu")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", [None, hal.Act("s8", 64)], ids=["exact", "fast"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_in_one_call_has_the_same_bits(
    isa: str, act: hal.Act | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_ISA", isa)
    ops, made, apart = block_ops(HOST), blocks(dtype, act), blocks(dtype, act)
    chain = ops.chain(made, 1e-6)
    assert chain is not None
    streams = torch.randn(5, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
    for at, start in enumerate(streams):
        if at == 3:  # weights that move leave the chain where it was
            hal.settle([w for b in made for w, _ in (b.qkv, b.out, b.gate_up, b.down)])
        stream, other = start[None].clone(), start[None].clone()
        x = ops.norm(stream, None, made[0].norm, 1e-6)
        want = token_by_steps(ops, apart, other, x.clone(), at)
        chain(stream, x, at)
        assert torch.equal(x, want)
        assert torch.equal(stream, other)


def test_blocks_that_do_not_fit_take_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = blocks(torch.float32, None)
    for other in (
        dataclasses.replace(last, next_norm=last.next_norm.half()),
        dataclasses.replace(last, down=linear(128, 256, torch.float32, None, False)),
        dataclasses.replace(last, out=linear(128, 128, torch.bfloat16, None, False)),
    ):
        assert block_ops(HOST).chain([first, other], 1e-6) is None
    monkeypatch.setenv("HAL_BACKEND", "reference")
    assert block_ops(HOST).chain([first, last], 1e-6) is None
