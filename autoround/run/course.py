# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what is done to each block."""

import functools
from collections.abc import Callable

import torch

from autoround.recipe import Recipe
from autoround.stages import (
    Feedback,
    Kept,
    Measure,
    Search,
    Signed,
    SignRound,
    Stage,
    Steps,
    WeightedSearch,
    adam,
    momentum,
)
from hal.device import tokens_at_once

#: One sample in so many only judges what the closed form makes of the others.
HELD_OUT = 8


def held_out(recipe: Recipe, indices: tuple[int, ...]) -> tuple[int, ...]:
    """The samples that only judge."""
    return indices[1:][-max(1, len(indices) // HELD_OUT) :] if recipe.feedback else ()


def samples_at_once(recipe: Recipe, tokens: int, device: torch.device) -> int:
    """Samples of ``tokens`` that go through a block together where no gradient is taken."""
    return max(1, min(recipe.batch_size, tokens_at_once(device) // tokens))


def stages_of(
    recipe: Recipe, size: int, on_step: Callable[[int, float], None]
) -> tuple[Stage, ...]:
    """What a recipe does to each block, in order; ``size``: samples at once."""
    stages: list[Stage] = [Search()]
    if recipe.calibrates:
        stages.append(Measure("loss_rtn", size))
    if recipe.search:
        stages.append(WeightedSearch(size))
    if recipe.feedback:
        stages.append(Kept(Feedback(size), "loss_rtn", size))
    if recipe.iters:
        stages.append(_signround(recipe, on_step))
    return tuple(stages)


def _signround(recipe: Recipe, on_step: Callable[[int, float], None]) -> SignRound:
    def minmax_lr(bits: int) -> float:
        if not recipe.enable_minmax_tuning:
            return 0.0
        return recipe.learning_rate(bits) if recipe.minmax_lr is None else recipe.minmax_lr

    return SignRound(
        recipe.iters,
        recipe.batch_size,
        recipe.gradient_accumulate_steps,
        recipe.learning_rate,
        minmax_lr,
        recipe.seed,
        on_step,
        widest=2.0 if recipe.search else 1.0,
        trim=lambda bits: 1e-3 if recipe.search and bits < 4 else 0.0,
        keep_last=recipe.not_use_best_mse,
        patience=recipe.dynamic_max_gap,
        steps=_steps(recipe),
    )


def _steps(recipe: Recipe) -> Callable[[], Steps]:
    if recipe.enable_adam:
        return adam
    return functools.partial(momentum, recipe.momentum) if recipe.momentum else Signed
