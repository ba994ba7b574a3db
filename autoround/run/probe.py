# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, from its first blocks with few samples.

The run itself is started in a directory of its own, with few samples (and few steps), and stopped
after its second block. A block's time is taken as linear in samples and in steps: two numbers of
each are tried, and what was asked for lies on the line through them.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoround.recipe import Recipe
from autoround.run import pipeline
from autoround.run.events import BlockDone, BlockStarted, Event, Planned, Resumed, Step
from autoround.run.record import Source

SAMPLES, STEPS = (8, 24), (4, 12)
#: Share by which a run may differ where the blocks tried did not: other blocks, other neighbours.
LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds before the first block, of one block, and how many blocks; ``spread``: the share by
    which the blocks that were tried differ, at least LEAST. ``probing``: what the trial took."""

    before: float
    block: float
    blocks: int
    spread: float
    probing: float

    @property
    def seconds(self) -> float:
        """Of the whole run; the proof at the end reads about what the beginning read."""
        return 2 * self.before + self.blocks * self.block

    @property
    def range(self) -> tuple[float, float]:
        """Least and most seconds of the whole run."""
        return self.seconds * (1 - self.spread), self.seconds * (1 + self.spread)


class _Enough(Exception):
    """Ends a trial."""


@dataclass(slots=True)
class _Watch:
    """A listener that notes when blocks end, and ends the run after the second."""

    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    ends: list[float] = field(default_factory=list)
    blocks: int = 0
    stepped: bool = False

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        match event:
            case Planned(plan):
                self.blocks = len(plan.blocks)
            case BlockStarted() | Resumed() if not self.first:
                self.first = now
            case Step():
                self.stepped = True
            case BlockDone():
                self.ends.append(now)
                if len(self.ends) == 2:
                    raise _Enough

    @property
    def times(self) -> list[float]:
        """Seconds of each block tried."""
        starts = [self.first or self.started, *self.ends]
        return [end - start for start, end in zip(starts, self.ends, strict=False)]


def pace(
    recipe: Recipe, source: Source, output: Path, dataset: str | Iterable[Any] | None = None
) -> Pace:
    """Try the first blocks. Raises InputError as `pipeline.quantize`."""
    started = time.perf_counter()
    least, *more = few(recipe)
    tried = [_tried(least, source, output, dataset)]
    block = tried[0].times[-1]
    for one in more:
        steps, samples = one.iters - least.iters, one.nsamples - least.nsamples
        if steps and not tried[0].stepped:  # only what the closed form leaves is tuned in steps
            continue
        tried.append(_tried(one, source, output, dataset))
        share = (
            (recipe.iters - least.iters) / steps
            if steps
            else (recipe.nsamples - least.nsamples) / samples
        )
        block += max(0.0, tried[-1].times[-1] - tried[0].times[-1]) * share
    first, last = tried[-1].times[0], tried[-1].times[-1]
    spread = min(0.5, max(LEAST, abs(first - last) / max(first, last)))
    before = max(0.0, tried[-1].first - tried[-1].started)
    return Pace(before, block, tried[0].blocks, spread, time.perf_counter() - started)


def few(recipe: Recipe) -> list[Recipe]:
    """Runs to try: the first is the smallest, each other has more of one thing."""
    if not recipe.calibrates:
        return [recipe]
    samples = sorted({min(n, recipe.nsamples) for n in SAMPLES})
    steps = sorted({min(n, recipe.iters) for n in STEPS})
    least = replace(recipe, nsamples=samples[0], iters=steps[0], end_to_end=0)
    more = [replace(least, nsamples=n) for n in samples[1:]]
    return [least, *more, *(replace(least, iters=n) for n in steps[1:])]


def _tried(
    recipe: Recipe, source: Source, output: Path, dataset: str | Iterable[Any] | None
) -> _Watch:
    where = output.absolute().parent
    where.mkdir(parents=True, exist_ok=True)
    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix=".autoround-probe-", dir=where) as work:
        trial = Path(work) / "trial"
        with contextlib.suppress(_Enough):
            pipeline.quantize(recipe, source, trial, dataset=dataset, listener=watch)
    return watch
