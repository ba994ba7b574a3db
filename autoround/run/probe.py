# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, from its first blocks with few samples.

The run itself is started in a directory of its own, with few samples (and few steps), and stopped
after its second block, or second unit of blocks tuned together. Its time is taken as linear
in samples and in steps: two numbers of each are tried, and what was asked for lies on the line
through them. The end-to-end stage has all blocks in every step: it is tried on the whole model,
which is rounded to nearest for that.
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
from autoround.run.events import (
    BlockDone,
    BlockStarted,
    Event,
    Listener,
    Planned,
    Resumed,
    Step,
    WholeDone,
    WholeStarted,
)
from autoround.run.record import Source
from autoround.run.whole import chosen
from autoround.stages.end_to_end import SHARES, EndToEnd

SAMPLES, STEPS = (8, 24), (4, 12)
#: Steps of the end-to-end stage that are tried; all samples take part in them.
WHOLE = 6
#: Share by which a run may differ where the blocks tried did not: other blocks, other neighbours.
LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds before the first block, of one block (or unit), and how many there are; ``whole``: of
    the end-to-end stage. ``spread``: the share by which the blocks that were tried differ, at least
    LEAST. ``probing``: what the trial took."""

    before: float
    block: float
    blocks: int
    whole: float
    spread: float
    probing: float

    @property
    def seconds(self) -> float:
        """Of the whole run; the proof at the end reads about what the beginning read."""
        return 2 * self.before + self.blocks * self.block + self.whole

    @property
    def range(self) -> tuple[float, float]:
        """Least and most seconds of the whole run."""
        return self.seconds * (1 - self.spread), self.seconds * (1 + self.spread)


class _Enough(Exception):
    """Ends a trial."""


@dataclass(slots=True)
class _Watch:
    """A listener that notes when units of blocks end, and ends the run after the second."""

    unit: int
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    ends: list[float] = field(default_factory=list)
    of: set[int] = field(default_factory=set)
    blocks: int = 0
    stepped: bool = False

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        match event:
            case Planned(plan):
                self.blocks = -(-len(plan.blocks) // self.unit)
            case BlockStarted() | Resumed() if not self.first:
                self.first = now
            case Step():
                self.stepped = True
            case BlockDone(report):  # all of a unit at once
                self.of.add(report.index // self.unit)
                self.ends[len(self.of) - 1 :] = [now]
                if len(self.of) == 2:
                    raise _Enough

    @property
    def times(self) -> list[float]:
        """Seconds of each block tried."""
        starts = [self.first or self.started, *self.ends]
        return [end - start for start, end in zip(starts, self.ends, strict=False)]


@dataclass(slots=True)
class _Whole:
    """A listener that notes when the end-to-end stage begins, when its steps end, and ends the run
    with it."""

    started: float = 0.0
    steps: list[float] = field(default_factory=list)
    ended: float = 0.0

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        match event:
            case WholeStarted():
                self.started = now
            case Step():
                self.steps.append(now)
            case WholeDone():
                self.ended = now
                raise _Enough

    @property
    def step(self) -> float:
        """Seconds of one; the first is not counted, it draws in code."""
        gaps = len(self.steps) - 1
        return (self.steps[-1] - self.steps[0]) / gaps if gaps > 0 else 0.0

    @property
    def rest(self) -> float:
        """Seconds of all but the steps."""
        return self.ended - self.started - len(self.steps) * self.step


def pace(
    recipe: Recipe, source: Source, output: Path, dataset: str | Iterable[Any] | None = None
) -> Pace:
    """Try the first blocks. Raises InputError as `pipeline.quantize`."""
    started = time.perf_counter()
    least, *more = few(recipe)
    tried = [_watched(least, source, output, dataset)]
    block = tried[0].times[-1]
    for one in more:
        steps, samples = one.iters - least.iters, one.nsamples - least.nsamples
        if steps and not tried[0].stepped:  # only what the closed form leaves is tuned in steps
            continue
        tried.append(_watched(one, source, output, dataset))
        share = (
            (recipe.iters - least.iters) / steps
            if steps
            else (recipe.nsamples - least.nsamples) / samples
        )
        block += max(0.0, tried[-1].times[-1] - tried[0].times[-1]) * share
    first, last = tried[-1].times[0], tried[-1].times[-1]
    spread = min(0.5, max(LEAST, abs(first - last) / max(first, last)))
    before = max(0.0, tried[-1].first - tried[-1].started)
    whole = _whole(recipe, source, output, dataset) if recipe.end_to_end else 0.0
    return Pace(before, block, tried[0].blocks, whole, spread, time.perf_counter() - started)


def _whole(
    recipe: Recipe, source: Source, output: Path, dataset: str | Iterable[Any] | None
) -> float:
    """Seconds of the end-to-end stage: its steps, and what goes with the samples that take part."""
    plain = replace(
        recipe, feedback=False, search=False, iters=0, nblocks=1, enable_quanted_input=False
    )
    found: list[tuple[int, _Whole]] = []
    for n in sorted({min(n, recipe.nsamples) for n in SAMPLES}):
        watch = _Whole()
        _tried(replace(plain, nsamples=n, end_to_end=WHOLE), source, output, dataset, watch)
        found.append((passes(n, WHOLE), watch))
    (least, first), (most, last) = found[0], found[-1]
    each = max(0.0, (last.rest - first.rest) / (most - least)) if most > least else 0.0
    more = passes(recipe.nsamples, recipe.end_to_end) - least
    return first.rest + each * more + recipe.end_to_end * last.step


def passes(nsamples: int, steps: int) -> int:
    """How many samples go through the model beside the steps: once for what the float model says,
    and those that judge before and after, with every share of the change."""
    rows, held = chosen(nsamples, EndToEnd(steps, lambda t, loss: None, 0))
    return len(rows) + (1 + len(SHARES)) * len(held)


def few(recipe: Recipe) -> list[Recipe]:
    """Runs to try: the first is the smallest, each other has more of one thing."""
    if not recipe.calibrates:
        return [recipe]
    samples = sorted({min(n, recipe.nsamples) for n in SAMPLES})
    steps = sorted({min(n, recipe.iters) for n in STEPS})
    least = replace(recipe, nsamples=samples[0], iters=steps[0], end_to_end=0)
    more = [replace(least, nsamples=n) for n in samples[1:]]
    return [least, *more, *(replace(least, iters=n) for n in steps[1:])]


def _watched(
    recipe: Recipe, source: Source, output: Path, dataset: str | Iterable[Any] | None
) -> _Watch:
    watch = _Watch(recipe.nblocks)
    _tried(recipe, source, output, dataset, watch)
    return watch


def _tried(
    recipe: Recipe,
    source: Source,
    output: Path,
    dataset: str | Iterable[Any] | None,
    watch: Listener,
) -> None:
    where = output.absolute().parent
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".autoround-probe-", dir=where) as work:
        trial = Path(work) / "trial"
        with contextlib.suppress(_Enough):
            pipeline.quantize(recipe, source, trial, dataset=dataset, listener=watch)
