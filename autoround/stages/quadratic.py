# SPDX-License-Identifier: Apache-2.0
"""Rounding a matrix with least quadratic error: min over codes of tr((Q - T)^T H (Q - T)).

Matrices lie transposed here, a column of the weight in a row of memory: ``t [K, N]`` f32 is what to
round, ``h [K, K]`` f32 the second moment of the inputs, and a `Grid` the levels of each output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import hal
from autoround.stages.products import short_factors

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

    def levels(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of columns, a row for each: scales, and the least and the most level above zero."""
        g = torch.arange(start, stop, device=self.scale.device) // self.spec.width(self.k)
        zero = self.zero.t()[g]
        return self.scale.t()[g], -zero, self.spec.max_level - zero

    def codes(self, q: Tensor) -> Tensor:
        """``[K, N]``: levels above zero of values on the grid."""
        return (q / self.spread(self.scale)).round_()

    def spread(self, x: Tensor) -> Tensor:
        """``[N, G] -> [K, N]``."""
        return x.t().repeat_interleave(self.spec.width(self.k), 0)[: self.k]


def damped(h: Tensor, share: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy of ``h`` with a share of its mean diagonal added: safe to invert."""
    h = h.to(dtype, copy=True)
    h.diagonal().add_(share * h.diagonal().mean().clamp(min=1e-8))
    return h


def cholesky_(a: Tensor) -> Tensor | None:
    """The lower factor of ``a [K, K]``, which is symmetric and overwritten; None where it has none.
    In place, since at K = 14336 each copy takes 1.6 GB."""
    info = torch.empty((), dtype=torch.int32, device=a.device)
    factor: Tensor = a.mT
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return None if info else factor


def solved(h: Tensor, share: float, rows: Tensor) -> Tensor | None:
    """``rows (h + r I)^-1 [R, K]`` in f32, solved in f64, with r a share of the mean diagonal; None
    where one direction is so strong that f32 sums bury a small ridge."""
    factor = cholesky_(damped(h, share))
    if factor is None:
        return None
    x: Tensor = torch.linalg.solve_triangular(factor, rows.double().t(), upper=False)
    x = torch.linalg.solve_triangular(factor.mT, x, upper=True)
    return x.t().float()


def feedback(t: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """Column after column, each one's error spread over those to come (GPTQ, Frantar 2022).

    With H = R R^T, R upper triangular, that is to round t_j + sum_{i < j} (t_i - q_i) R_ij / R_jj
    (Chee 2023, theorem 6): no inverse is needed.
    """
    factor = cholesky_(h.flip(0, 1))
    if factor is None:  # f32 was too short
        factor = cholesky_(h.double().flip(0, 1))
    assert factor is not None
    factor = factor.float().mT.flip(0, 1)
    lacking = torch.zeros_like(t)
    _sweep(t, lacking, factor, grid)
    return t - lacking


def descend(q: Tensor, t: Tensor, h: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Sweeps of coordinate descent: each column in turn moves to its best level, which is the one
    nearest to q_j + sum_i h_ji (t_i - q_i) / h_jj."""
    lacking = t - q
    for _ in range(sweeps):
        _sweep(t, lacking, h, grid)
    return t - lacking


def _sweep(t: Tensor, lacking: Tensor, h: Tensor, grid: Grid) -> None:
    """Each column in turn takes the level nearest to q_j + sum_i h_ji lacking_i / h_jj.

    ``lacking``: t - q of every column, in place; with a lower triangular ``h``, t itself counts as
    q of the columns to come.
    """
    for start in range(0, len(t), BLOCK):
        stop = min(start + BLOCK, len(t))
        own = h[start:stop, start:stop]
        curvature = own.diagonal().clamp(min=1e-12)[:, None]
        old = t[start:stop] - lacking[start:stop]
        with short_factors():  # noise of a hundredth of a level, where rounding has half of one
            best = (h[start:stop] @ lacking).div_(curvature).add_(old)
        scale, least, most = grid.levels(start, stop)
        inverse, near = 1 / scale, own / curvature
        moved = torch.empty_like(best)  # of the columns before, since the product was taken
        rows = zip(*(x.unbind() for x in (best, old, scale, inverse, least, most)), strict=True)
        for j, (x, was, step, steps, low, high) in enumerate(rows):
            if j:
                x.addmv_(moved[:j].t(), near[j, :j])
            x.mul_(steps).round_().clamp_(low, high).mul_(step)
            torch.sub(was, x, out=moved[j])
        torch.sub(t[start:stop], best, out=lacking[start:stop])


def refit(q: Tensor, want: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Scales of least error for the codes as they are; returns the matrix on its new grid.

    ``want``: ``h`` times the target.
    """
    k, n = q.shape
    width, groups = grid.spec.width(k), grid.spec.groups(k)
    codes = grid.codes(q)
    a = torch.empty(groups, groups, n, dtype=torch.float64, device=q.device)
    for g in range(groups):
        part = slice(g * width, min((g + 1) * width, k))
        rest = slice(part.start, k)
        a[g, g:] = _by_group((h[rest, part] @ codes[part]).mul_(codes[rest]), width)
        a[g + 1 :, g] = a[g, g + 1 :]
    a, b = a.permute(2, 0, 1), _by_group(want * codes, width).t().double()
    ridge = REFIT_RIDGE * a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    a.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found = torch.linalg.solve(a, b + ridge[:, None] * grid.scale).float()
    found = found.to(grid.spec.scale_dtype).float()
    found = torch.where(found * grid.scale > 0, found, grid.scale).contiguous()
    new = Grid(found, grid.zero, grid.spec, k)
    return codes.mul_(new.spread(found)), new


def _by_group(x: Tensor, width: int) -> Tensor:
    """Sums over ``width`` columns, the last of them fewer: ``[K, N] -> [G, N]``."""
    k, n = x.shape
    whole = k // width * width
    sums = [x[:whole].view(-1, width, n).sum(1)]
    if whole < k:
        sums.append(x[whole:].sum(0, keepdim=True))
    return torch.cat(sums)
