# SPDX-License-Identifier: Apache-2.0
"""Rounding a matrix with least quadratic error: min over codes of tr((Q - T) H (Q - T)^T).

``t [N, K]`` f32 is what to round, ``h [K, K]`` f32 the second moment of the inputs, and a `Grid`
the levels each row may take.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import hal

#: Columns worked on before the rest of the matrix hears of it.
BLOCK = 128
#: How firmly new scales are tied to the old ones, as a share of the mean diagonal.
REFIT_RIDGE = 0.01


@dataclass(slots=True)
class Grid:
    """Scales and zero levels ``[N, G]`` f32 of a matrix."""

    scale: Tensor
    zero: Tensor
    spec: hal.Spec
    k: int

    @classmethod
    def of(cls, w: Tensor, params: hal.Params, spec: hal.Spec) -> "Grid":
        """The grid that parameters mean."""
        parts = hal.quantize(w, params, spec).parts
        scale = parts["scale"].float()
        zero = parts["zero"].float() if "zero" in parts else torch.full_like(scale, spec.half)
        return cls(scale, zero, spec, w.shape[1])

    def params(self) -> hal.Params:
        """Parameters that mean exactly this grid: all products below are exact in f32."""
        s, most = self.scale, float(self.spec.max_level)
        if self.spec.symmetric:
            half = float(self.spec.half)
            low, high = (s * half).clamp(min=0), (s * -half).clamp(min=0)
        else:
            low, high = self.zero * s, (most - self.zero) * s
        ones = torch.ones(s.shape, device=s.device)
        return hal.Params(None, ones, ones.clone(), -low, high)

    def round(self, x: Tensor, column: int) -> Tensor:
        """The nearest level's value of one column ``[N]``."""
        g = column // self.spec.width(self.k)
        s, z = self.scale[:, g], self.zero[:, g]
        return (((x / s).round_() + z).clamp_(0, self.spec.max_level) - z).mul_(s)

    def codes(self, q: Tensor) -> Tensor:
        """``[N, K]``: levels above zero of values on the grid."""
        return (q / self.spread(self.scale)).round_()

    def spread(self, x: Tensor) -> Tensor:
        """``[N, G] -> [N, K]``."""
        return x.repeat_interleave(self.spec.width(self.k), 1)[:, : self.k]


def damped(h: Tensor, share: float) -> Tensor:
    """``h`` in f64 with a share of its mean diagonal added: safe to invert."""
    h = h.double()
    lift = share * h.diagonal().mean().clamp(min=1e-8)
    return h + lift * torch.eye(len(h), dtype=h.dtype, device=h.device)


def feedback(t: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """Column after column, each one's error spread over those to come (GPTQ, Frantar 2022)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left, q = t.clone(), torch.empty_like(t)
    for start in range(0, t.shape[1], BLOCK):
        stop = min(start + BLOCK, t.shape[1])
        errors = torch.empty_like(t[:, start:stop])
        for j in range(start, stop):
            q[:, j] = grid.round(left[:, j], j)
            error = (left[:, j] - q[:, j]) / upper[j, j]
            left[:, j + 1 : stop].addr_(error, upper[j, j + 1 : stop], alpha=-1)
            errors[:, j - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return q


def descend(q: Tensor, t: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent: each column in turn moves to its best level."""
    q, slope, curvature = q.clone(), (q - t) @ h, h.diagonal().clamp(min=1e-12)
    for start in range(0, t.shape[1], BLOCK):
        stop = min(start + BLOCK, t.shape[1])
        before = q[:, start:stop].clone()
        for j in range(start, stop):
            new = grid.round(q[:, j] - slope[:, j] / curvature[j], j)
            slope[:, j:stop].addr_(new - q[:, j], h[j, j:stop])
            q[:, j] = new
        slope[:, stop:] += (q[:, start:stop] - before) @ h[start:stop, stop:]
        slope[:, :start] += (q[:, start:stop] - before) @ h[start:stop, :start]
    return q


def refit(q: Tensor, t: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Scales of least error for the codes as they are; returns the matrix on its new grid."""
    n, k = q.shape
    width, groups = grid.spec.width(k), grid.spec.groups(k)
    codes = grid.codes(q)
    a = torch.empty(n, groups, groups, dtype=torch.float64, device=q.device)
    b = torch.empty(n, groups, dtype=torch.float64, device=q.device)
    want = t @ h
    for g in range(groups):
        part = slice(g * width, min((g + 1) * width, k))
        rows = codes[:, part] @ h[part]
        for other in range(groups):
            cut = slice(other * width, min((other + 1) * width, k))
            a[:, g, other] = (rows[:, cut] * codes[:, cut]).sum(1)
        b[:, g] = (want[:, part] * codes[:, part]).sum(1)
    ridge = REFIT_RIDGE * a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    a += ridge[:, None, None] * torch.eye(groups, dtype=a.dtype, device=a.device)
    found = torch.linalg.solve(a, b + ridge[:, None] * grid.scale).float()
    found = found.to(grid.spec.scale_dtype).float()
    found = torch.where(found * grid.scale > 0, found, grid.scale).contiguous()
    new = Grid(found, grid.zero, grid.spec, k)
    return codes * new.spread(found), new
