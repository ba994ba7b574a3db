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

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scales and zero levels of columns, a row for each: ``[columns, N]``."""
        g = torch.arange(start, stop, device=self.scale.device) // self.spec.width(self.k)
        return self.scale.t()[g], self.zero.t()[g]

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
        x = _turned(left[:, start:stop])
        errors = torch.empty_like(x)
        scale, zero = grid.columns(start, stop)
        factor = upper[start:stop, start:stop]
        for j in range(stop - start):
            near = _nearest(x[j], scale[j], zero[j], grid.spec.max_level)
            torch.div(x[j] - near, factor[j, j], out=errors[j])
            x[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
            x[j] = near
        q[:, start:stop] = x.t()
        left[:, stop:] -= errors.t() @ upper[start:stop, stop:]
    return q


def descend(q: Tensor, t: Tensor, h: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Sweeps of coordinate descent: each column in turn moves to its best level."""
    q, slope, curvature = q.clone(), (q - t) @ h, h.diagonal().clamp(min=1e-12)
    for sweep in range(sweeps):
        for start in range(0, t.shape[1], BLOCK):
            stop = min(start + BLOCK, t.shape[1])
            x, slopes = _turned(q[:, start:stop]), _turned(slope[:, start:stop])
            scale, zero = grid.columns(start, stop)
            own = h[start:stop, start:stop]
            for j in range(stop - start):
                best = x[j] - slopes[j] / curvature[start + j]
                new = _nearest(best, scale[j], zero[j], grid.spec.max_level)
                slopes[j:].addr_(own[j, j:], new - x[j])
                x[j] = new
            change = x.t() - q[:, start:stop]
            q[:, start:stop] = x.t()
            # Columns behind are not looked at again before the next sweep.
            first = stop if sweep == sweeps - 1 else 0
            slope[:, first:] += change @ h[start:stop, first:]
    return q


def _turned(x: Tensor) -> Tensor:
    """Columns as rows of their own: in place, those of 4096 columns would fall on the same lines
    of the cache."""
    return x.t().contiguous()


def _nearest(x: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """The nearest level's value."""
    return (((x / scale).round_() + zero).clamp_(0, most) - zero).mul_(scale)


def refit(q: Tensor, want: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Scales of least error for the codes as they are; returns the matrix on its new grid.

    ``want``: the target times ``h``.
    """
    n, k = q.shape
    width, groups = grid.spec.width(k), grid.spec.groups(k)
    codes = grid.codes(q)
    a = torch.empty(n, groups, groups, dtype=torch.float64, device=q.device)
    for g in range(groups):
        part = slice(g * width, min((g + 1) * width, k))
        rest = slice(part.start, k)
        a[:, g, g:] = _by_group((codes[:, part] @ h[part, rest]).mul_(codes[:, rest]), width)
        a[:, g:, g] = a[:, g, g:]
    b = _by_group(want * codes, width).double()
    ridge = REFIT_RIDGE * a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    a += ridge[:, None, None] * torch.eye(groups, dtype=a.dtype, device=a.device)
    found = torch.linalg.solve(a, b + ridge[:, None] * grid.scale).float()
    found = found.to(grid.spec.scale_dtype).float()
    found = torch.where(found * grid.scale > 0, found, grid.scale).contiguous()
    new = Grid(found, grid.zero, grid.spec, k)
    return codes * new.spread(found), new


def _by_group(x: Tensor, width: int) -> Tensor:
    """Sums over ``width`` columns, the last of them fewer: ``[N, K] -> [N, G]``."""
    n, k = x.shape
    whole = k // width * width
    sums = [x[:, :whole].reshape(n, -1, width).sum(2)]
    if whole < k:
        sums.append(x[:, whole:].sum(1, keepdim=True))
    return torch.cat(sums, 1)
