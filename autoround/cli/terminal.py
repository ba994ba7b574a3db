# SPDX-License-Identifier: Apache-2.0
"""What a run looks like in a terminal, and in a file that its output is sent to.

Every finished block is one row that stays, in a terminal and in a file alike. Below the rows a
terminal shows what goes on: the block, its steps, the time left, memory and disk.
"""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autoround.cli.tables import clock, size
from autoround.run.events import (
    BlockDone,
    BlockStarted,
    Calibrated,
    Event,
    Planned,
    Resumed,
    Step,
    WholeDone,
    WholeStarted,
)
from autoround.run.record import free_bytes, peak_bytes, resident_bytes

if TYPE_CHECKING:  # a run that builds no model imports no transformers
    from autoround.run.plan import ModelPlan
    from autoround.run.record import BlockReport

#: Column -> its width and how soon a narrow terminal goes without it (0 = never).
COLUMNS = {
    "": (7, 0), "block": (20, 4), "rounded": (10, 2), "tuned": (10, 3), "change": (7, 0),
    "time": (8, 0), "left": (8, 0), "peak": (9, 1),
}  # fmt: skip
#: Those of runs that measure losses.
LOSSES = ("rounded", "tuned", "change")


class Terminal:
    """Shows a run on a console; a listener. Without a terminal the live part is left out."""

    def __init__(self, console: Console, iters: int, output: Path) -> None:
        self.console, self._iters, self._output = console, iters, output
        self._shows = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._pace = Pace([])
        self._columns: list[str] = []
        self._name, self._step = "", (0, math.nan)
        self._live = Live(console=console, transient=True, get_renderable=self._now)

    def __enter__(self) -> Self:
        if self._shows:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        match event:
            case Planned(plan):
                self._planned(plan)
            case Calibrated(tokens):
                self.console.print(f"calibration: {tokens.description}", soft_wrap=True)
            case Resumed(blocks):
                for report in blocks:
                    self._pace.done(report.index, report.seconds)
                count = f"{len(blocks)} of {len(self._pace.weights)} blocks"
                self.console.print(f"continued: {count} were finished before", soft_wrap=True)
            case BlockStarted(_, name):
                self._name, self._step = name, (0, math.nan)
                self._pace.start()
            case Step(t, loss):
                self._step = (t + 1, loss)
            case BlockDone(report):
                self._block_done(report)
            case WholeStarted(steps):
                self._name, self._iters, self._step = "all scales", steps, (0, math.nan)
                self._pace.start()
            case WholeDone(whole):
                self._name = ""
                self._say(str(whole), "" if whole.because is None else "yellow")

    def _planned(self, plan: "ModelPlan") -> None:
        self._pace = Pace([sum(math.prod(x.view.shape) for x in b) for b in plan.blocks])
        self._columns = []
        packings = ", ".join(target.packing.name for target in plan.targets)
        self._say(
            f"{len(plan.layers)} weights in {len(plan.blocks)} blocks -> {packings}, "
            f"{plan.bits_per_weight:.2f} bits a weight, {size(plan.nbytes)} in all"
        )
        reasons = [re.sub(r"\.\d+\.", ".*.", why) for why in plan.kept_because.values()]
        for reason in sorted(set(reasons), key=lambda why: ("instead" not in why, why)):
            verb, style = ("changed", "yellow") if "instead" in reason else ("kept", "dim")
            self._say(f"  {verb} {reasons.count(reason)}: {reason}", style)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)

    def _block_done(self, report: "BlockReport") -> None:
        self._pace.done(report.index, report.seconds)
        if not self._columns:
            self._columns = self._chosen(measured=not math.isnan(report.loss))
            self._row({name: name for name in self._columns}, "dim")
        before, after = report.loss_rtn, report.loss
        change = f"{after / before - 1:+.0%}" if before > 0 else ""
        cells = {
            "": f"{report.index + 1}/{len(self._pace.weights)}",
            "block": report.name,
            "rounded": "" if math.isnan(before) else f"{before:.3e}",
            "tuned": "" if math.isnan(after) else f"{after:.3e}",
            "change": change,
            "time": clock(report.seconds) if report.seconds >= 60 else f"{report.seconds:.1f} s",
            "left": clock(self._pace.left()),
            "peak": size(report.peak_bytes),
        }
        self._row(cells)
        self._name = ""

    def _chosen(self, *, measured: bool) -> list[str]:
        """Columns that the width has room for; a file has room for all."""
        names = [name for name in COLUMNS if measured or name not in LOSSES]
        for name in sorted(names, key=lambda n: COLUMNS[n][1]):
            total = sum(COLUMNS[n][0] + 1 for n in names)
            if COLUMNS[name][1] and self.console.is_terminal and total > self.console.width:
                names.remove(name)
        return names

    def _row(self, cells: dict[str, str], style: str = "") -> None:
        line = ""
        for name in self._columns:
            width = COLUMNS[name][0]
            if name == "block":
                spare = self.console.width - sum(COLUMNS[n][0] + 1 for n in self._columns) - 1
                width += max(0, min(spare, 20)) if self.console.is_terminal else 20
                cut = self.console.is_terminal and len(cells[name]) > width
                text = "…" + cells[name][-width + 1 :] if cut else cells[name]
                line += f" {text:<{width}}"
            else:
                line += f" {cells[name]:>{width}}"
        self._say(line.rstrip(), style)

    def _now(self) -> RenderableType:
        """The live part: the block at work with its steps, then the whole."""
        pace = self._pace
        if not pace.weights:
            return Text("reading headers", style="dim")
        lines: list[RenderableType] = []
        if self._name:
            t, loss = self._step
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=max(self._iters, 1), completed=t, width=20)
            steps = f"{t}/{self._iters}  loss {loss:.3e}" if t else clock(pace.spent())
            row.add_row(Text(self._name, style="bold"), bar if t else Text("…"), Text(steps))
            lines.append(row)
        left = f", about {clock(pace.left())} left" if pace.finished else ""
        lines.append(
            Text(
                f"{pace.finished}/{len(pace.weights)} blocks, {clock(pace.gone())} gone{left}; "
                f"memory {size(resident_bytes())}, peak {size(peak_bytes())}; "
                f"disk {size(free_bytes(self._output))} free",
                style="dim",
            )
        )
        return Group(*lines)


class Pace:
    """How long the rest takes: as long a weight as the blocks that are done, whoever did them."""

    def __init__(self, weights: list[int], clock: Callable[[], float] = time.perf_counter) -> None:
        """``weights``: of every block."""
        self.weights, self._clock = weights, clock
        self._seconds: dict[int, float] = {}
        self._began = self._started = clock()

    def start(self) -> None:
        """A block begins."""
        self._started = self._clock()

    def done(self, index: int, seconds: float) -> None:
        """A block has taken so long, in this run or before it was resumed."""
        self._seconds[index] = seconds
        self._started = self._clock()

    @property
    def finished(self) -> int:
        """Blocks that are done."""
        return len(self._seconds)

    def gone(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def spent(self) -> float:
        """Seconds since the block at work began."""
        return self._clock() - self._started

    def left(self) -> float:
        """Seconds until the last block is done; 0 where nothing tells."""
        # Blocks without a weight to quantize take as long as the smallest share that counts.
        sizes = [max(n, 1) for n in self.weights]
        done = sum(sizes[i] for i in self._seconds if i < len(sizes))
        if not done:
            return 0.0
        rest = sum(n for i, n in enumerate(sizes) if i not in self._seconds)
        return max(0.0, sum(self._seconds.values()) / done * rest - (self.spent() if rest else 0))
