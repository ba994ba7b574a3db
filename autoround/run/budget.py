# SPDX-License-Identifier: Apache-2.0
"""Spending a given time, or reaching a given KL: the run is repeated with more and more samples.

What time buys in the closed form is samples (docs/tuning.md: signed steps after it never gained).
Each run is complete; the last, or the one of least KL, stays. Its record names the number of its
samples, so that a plain run with ``nsamples`` gives the same bytes again, whatever the clock said.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.evaluate import evaluate
from autoround.recipe import Recipe
from autoround.run import pipeline
from autoround.run.artefact import places
from autoround.run.directory import check_output
from autoround.run.events import Listener, unheard
from autoround.run.record import Run, Source

FIRST, MOST, FACTOR = 32, 4096, 4  # samples, and how their number grows
LEAST_GAIN = 1.25  # a run with fewer samples more than that is not worth its time
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Goal:
    """What ends the search for a better run: seconds spent, or a mean KL on held-out text."""

    seconds: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Rung:
    """One complete run: its samples, what it took, its KL where one was measured."""

    nsamples: int
    seconds: float
    kl: float | None

    def __str__(self) -> str:
        measured = "" if self.kl is None else f", KL {self.kl:.5f}"
        return f"{self.nsamples} samples: {self.seconds:.1f} s{measured}"


def goal(budget: str | None, target_kl: float | None) -> Goal:
    """``30m``, ``90s``, ``2h`` and a KL, either None. Raises InputError naming the form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget) if budget else None
    if budget and (found is None or float(found[1]) == 0):
        raise InputError(f"budget={budget!r}: write it like 90s, 30m or 2h")
    if target_kl is not None and not target_kl > 0:
        raise InputError(f"target_kl={target_kl}: give a number above 0")
    return Goal(float(found[1]) * UNITS[found[2]] if found else None, target_kl)


def quantize(
    recipe: Recipe,
    source: Source,
    output: Path,
    goal: Goal,
    *,
    dataset: str | Iterable[Any] | None = None,
    listener: Listener = unheard,
) -> tuple[Run, list[Rung]]:
    """The best run that the goal allows, in ``output``, and all runs that were made.

    At least one run is made, however long it takes. A further one starts only if it is expected to
    end in time: at most in proportion to its samples. Raises InputError as `pipeline.quantize`.
    """
    if not recipe.feedback:
        raise InputError("budget and target_kl grow the samples of the closed form; use autoround")
    check_output(output)
    started, rungs = time.perf_counter(), list[Rung]()
    best: tuple[float, Run] | None = None
    n = FIRST
    where = output.absolute().parent
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".autoround-", dir=where) as work:
        while True:
            began, made = time.perf_counter(), Path(work) / str(n)
            grown = replace(recipe, nsamples=n)
            try:
                run = pipeline.quantize(grown, source, made, dataset=dataset, listener=listener)
            except InputError:
                if best is None:
                    raise
                break  # what the first run was given is right: the text has no more samples
            took = time.perf_counter() - began
            kl = _kl(made, source) if goal.kl is not None else None
            rungs.append(Rung(n, took, kl))
            if best is None or kl is None or kl < best[0]:
                best = (kl or 0.0, run)
            n = _next(n, took, time.perf_counter() - started, goal)
            if n == 0 or (goal.kl is not None and best[0] <= goal.kl):
                break
        run = best[1]
        output.mkdir(exist_ok=True)
        for path in sorted(run.output.iterdir()):
            shutil.move(path, output / path.name)
    run.output, run.seconds = output, time.perf_counter() - started
    run.prove(places(run.plan.targets, output))
    return run, rungs


def _next(n: int, took: float, spent: float, goal: Goal) -> int:
    """Samples of the next run; 0 where none would end in time or gain enough."""
    most = n * FACTOR
    if goal.seconds is not None:
        most = min(most, int((goal.seconds - spent) * n / took) // 8 * 8)
    most = min(most, MOST)
    return most if most >= LEAST_GAIN * n else 0


def _kl(made: Path, source: Source) -> float:
    found = evaluate(str(made), str(source.model)).comparison
    if found is None:
        raise InputError("target_kl needs a model that predicts tokens; give a budget instead")
    return found.kl
