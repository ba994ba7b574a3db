# SPDX-License-Identifier: Apache-2.0
"""The reference against truths that share no code with it: autograd, numpy in f64, hand counts."""

import numpy as np
import pytest
import torch
from cases import specs, weight

from hal import Params, Spec, codec
from hal.testing import params, weights


def one_group(values: list[float], spec: Spec) -> tuple[list[int], float, float]:
    """Levels, scale and zero level of a row that is one group, range = min-max."""
    w = torch.tensor([values])
    amin, amax = codec.value_range(w, spec)
    ones = torch.ones_like(amin)
    q, _, scale, zero = codec.levels(w, Params(None, ones, ones, amin, amax), spec)
    return q.flatten().int().tolist(), scale.item(), zero.item()


def test_symmetric_by_hand() -> None:
    # -8 is the larger side: scale +1, level 0 is -8; 0.5 and 1.5 are ties and go to even
    assert one_group([-8, 7, 0.5, 1.5], Spec("s4", 0)) == ([0, 15, 8, 10], 1.0, 8.0)
    # +8 is the larger side: the scale turns negative so that +8 reaches the lowest level
    assert one_group([8, -7, 0.5, 1.5], Spec("s4", 0)) == ([0, 15, 8, 6], -1.0, 8.0)
    # both sides equal: the positive one wins
    assert one_group([8, -8], Spec("s4", 0)) == ([0, 15], -1.0, 8.0)


def test_asymmetric_by_hand() -> None:
    assert one_group([-5, 10], Spec("u4", 0, zero="int")) == ([0, 15], 1.0, 5.0)
    assert one_group([15, 3.5, 4.5], Spec("u4", 0, zero="int")) == ([15, 4, 4], 1.0, 0.0)
    assert one_group([-15, -2.5], Spec("u4", 0, zero="int")) == ([0, 13], 1.0, 15.0)


@pytest.mark.parametrize("text", ["s4:g0:f16", "u4:g0:f16:int", "s4:g0:f32"])
def test_a_group_of_zeros_is_finite_and_decodes_to_zero(text: str) -> None:
    spec = Spec.parse(text)
    levels, scale, zero = one_group([0.0, 0.0], spec)
    assert levels == [zero, zero]
    assert abs(scale) == pytest.approx(spec.min_scale, rel=0.01)


@pytest.mark.parametrize("spec", [s for s, n, k in specs() if n == 5], ids=str)
def test_levels_are_the_nearest_ones(spec: Spec) -> None:
    """With the scale given, brute force over every level in f64 finds no closer value."""
    w = weight("gauss", 5, 90, torch.float32)
    p = params(w, spec, 1)
    p.v = None
    q, _, scale, zero = codec.levels(w, p, spec)
    x = codec.grouped(w, spec).double().numpy()
    s, z = (t.double().numpy()[..., None, None] for t in (scale, zero))
    errors = np.abs(s * (np.arange(spec.max_level + 1) - z) - x[..., None])
    chosen = np.take_along_axis(errors, q.numpy().astype(int)[..., None], -1)[..., 0]
    assert (chosen <= errors.min(-1) * (1 + 1e-5) + 1e-12).all()


def straight_through(w: torch.Tensor, p: Params, spec: Spec) -> torch.Tensor:
    """The paper's formula with autograd: rounding passes gradients, max and clamp as torch's do."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    low, high = -(p.amin * p.lo), p.amax * p.hi
    g, offset = codec.grouped(w, spec), codec.grouped(p.v, spec) if p.v is not None else 0
    g = g.to(p.lo.dtype)
    if spec.symmetric:
        exact = torch.where(high < low, low, -high) / spec.half
        zero = torch.full_like(exact, spec.half)
    else:
        exact = (high + low) / spec.max_level
    scale = exact + (exact.to(spec.scale_dtype).to(exact.dtype) - exact).detach()
    if not spec.symmetric:
        zero = rounded(low / scale).clamp(0, spec.max_level)
    level = rounded(g / scale[..., None] + offset) + zero[..., None]
    q = level.clamp(0, spec.max_level)
    return codec.ungrouped(scale[..., None] * (q - zero[..., None]), w.shape[1])


@pytest.mark.parametrize(
    "text", ["s4:g32:f16", "s2:g64:f16", "u4:g32:f16:int", "u3:g128:f32:int", "s8:g0:bf16"]
)
def test_qdq_step_follows_autograd(text: str) -> None:
    spec, w = Spec.parse(text), weights(40, 200, 1)
    w[0, : w.shape[1] // 2] += 0.01  # no group of zeros: its scale is pinned and has no gradient
    p, grad = params(w, spec, 2), weights(40, 200, 3)
    leaves = [t.clone().double().requires_grad_() for t in (p.v, p.lo, p.hi) if t is not None]
    exact = Params(*leaves, p.amin.double(), p.amax.double())
    (straight_through(w, exact, spec) * grad.double()).sum().backward()
    before = Params(*(t.clone() for t in (p.v, p.lo, p.hi, p.amin, p.amax) if t is not None))
    codec.qdq_step_(p, w, grad, spec, 0.01, 0.01)
    for leaf, old, new in zip(
        leaves, (before.v, before.lo, before.hi), (p.v, p.lo, p.hi), strict=True
    ):
        assert leaf.grad is not None
        assert old is not None
        assert new is not None
        moved = torch.sign(old - new)
        sure = (leaf.grad.abs() > 1e-4 * leaf.grad.abs().mean()) & ~_at_bound(leaf, old)
        assert sure.float().mean() > 0.3
        agree = (moved == leaf.grad.sign().float())[sure].float().mean()
        assert agree == 1.0


@pytest.mark.parametrize("text", ["s4:g4:f16", "u4:g4:f16:int"])
def test_the_offset_moves_by_signs_of_scale_and_gradient(text: str) -> None:
    """algorithms.md 1.3: against sign(scale) sign(gradient), and not at all where it is clipped."""
    spec = Spec.parse(text)
    w = torch.tensor([[-8.0, 7.0, 1.0, 2.0], [8.0, -7.0, 1.0, 2.0]])
    amin, amax = codec.value_range(w, spec)
    half = torch.full_like(amin, 0.5)  # of the range: the first two of each row are cut off
    p = Params(torch.zeros_like(w), half.clone(), half.clone(), amin, amax)
    _, _, scale, _ = codec.levels(w, p, spec)
    assert scale.sign().flatten().tolist() == ([1.0, -1.0] if spec.symmetric else [1.0, 1.0])
    grad = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    codec.qdq_step_(p, w, grad, spec, 0.25, 0.0)
    assert p.v is not None
    moved = -scale.sign() * grad * 0.25
    moved[:, :2] = 0
    assert torch.equal(p.v, moved)


def _at_bound(leaf: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Range multipliers that the clamp to [0, 1] may have kept from moving."""
    return (old > 0.985) & (old <= 1) if leaf.shape[1] < 100 else torch.zeros_like(old).bool()


def numpy_error(x: np.ndarray, low: float, high: float, weight: np.ndarray, spec: Spec) -> float:
    """Weighted squared error of one group with range [low, high], in f64 but the stored scale."""
    if spec.symmetric:
        exact = np.float32(-low if high < -low else -high) / np.float32(spec.half)
    else:
        exact = np.float32(np.float32(high - low) / np.float32(spec.max_level))
    stored = float(torch.tensor(float(exact)).to(spec.scale_dtype))
    scale = np.sign(stored or 1) * max(abs(stored), spec.min_scale)
    zero = spec.half if spec.symmetric else np.clip(np.round(-low / scale), 0, spec.max_level)
    q = np.clip(np.round(x / scale) + zero, 0, spec.max_level)
    return float((weight * (scale * (q - zero) - x) ** 2).sum())


@pytest.mark.parametrize("text", ["s4:g32:f16", "u3:g20:f16:int", "s2:g0:f32"])
def test_search_finds_the_best_candidate(text: str) -> None:
    spec, grid = Spec.parse(text), 12
    w, importance = weights(6, 100, 5), torch.rand(100, generator=torch.Generator().manual_seed(6))
    amin, amax = codec.search(w, spec, importance, grid)
    plain = codec.value_range(w, spec)
    width = spec.width(100)
    for r in range(6):
        for g in range(spec.groups(100)):
            part = slice(g * width, (g + 1) * width)
            x, omega = w[r, part].double().numpy(), importance[part].double().numpy()
            low, high = plain[0][r, g].item(), plain[1][r, g].item()
            errors = [
                numpy_error(x, low * f, high * f, omega, spec) for f in codec.search_factors(grid)
            ]
            found = numpy_error(x, amin[r, g].item(), amax[r, g].item(), omega, spec)
            assert found <= errors[0] * (1 + 1e-5)  # never worse than min-max
            assert found == pytest.approx(min(errors), rel=1e-4, abs=1e-12)


def test_lane_sum_adds_in_the_order_it_promises() -> None:
    x = torch.randn(37, generator=torch.Generator().manual_seed(1)) * 1e3
    lanes = np.zeros(16, dtype=np.float32)
    for i, value in enumerate(x.numpy()):
        lanes[i % 16] = np.float32(lanes[i % 16] + value)
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    assert codec.lane_sum(x[None]).item() == lanes[0]


def test_every_element_decodes_to_scale_times_level_minus_zero() -> None:
    for bits in range(2, 9):
        codes = torch.arange(1 << bits, dtype=torch.uint8)[None]
        scale, zero = torch.tensor([[-0.25]]), torch.tensor([[3]], dtype=torch.uint8)
        signed = codec.decode(codes, scale, None, Spec(f"s{bits}", 0))
        assert signed[0].tolist() == [-0.25 * (i - (1 << bits - 1)) for i in range(1 << bits)]
        offset = codec.decode(codes, scale, zero, Spec(f"u{bits}", 0, zero="int"))
        assert offset[0].tolist() == [-0.25 * (i - 3) for i in range(1 << bits)]


@pytest.mark.parametrize("block", [1, 2, 32, 256])
def test_hadamard_multiplies_by_the_signs_of_shared_bits(block: int) -> None:
    """Sylvester's matrix has -1 where the numbers of row and column share an odd number of bits."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = np.array(signs) / np.sqrt(block)
    x = weights(7, 512, 3)
    got = codec.hadamard(x, block).numpy().reshape(-1, block)
    assert np.allclose(got, x.double().numpy().reshape(-1, block) @ matrix, rtol=0, atol=2e-6)
