# SPDX-License-Identifier: Apache-2.0
"""What a run looks like in a terminal, and in a log file: one line per finished block."""

import math
import re
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from autoround.events import BlockDone, BlockStarted, Calibrated, Event, Planned, Step

if TYPE_CHECKING:  # a run that builds no model imports no transformers
    from autoround.evaluate import Evaluation
    from autoround.outlook import Outlook
    from autoround.plan import ModelPlan
    from autoround.run import BlockReport, Run


class Terminal:
    """Shows a run's progress. Without a terminal the live bar is left out, the lines stay."""

    def __init__(self, console: Console, iters: int) -> None:
        self.console, self.iters = console, iters
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            console=console,
            transient=True,
            disable=not console.is_terminal or iters == 0,
        )
        self._task = self._bar.add_task("", total=max(iters, 1), visible=False)
        self._blocks, self._started = 0, 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        match event:
            case Planned(plan):
                self._planned(plan)
            case Calibrated(tokens):
                self.console.print(f"calibration: {tokens.description}", soft_wrap=True)
            case BlockStarted(_, name):
                self._bar.reset(self._task, description=name, visible=False)
            case Step(t, _):
                self._bar.update(self._task, completed=t + 1, visible=True)
            case BlockDone(report):
                self._block_done(report)

    def _planned(self, plan: "ModelPlan") -> None:
        self._blocks, self._started = len(plan.blocks), time.perf_counter()
        kept = {name: why for name, why in plan.kept_because.items() if "instead" not in why}
        packings = ", ".join(target.packing.name for target in plan.targets)
        self.console.print(
            f"{len(plan.layers)} weights in {self._blocks} blocks -> {packings}, "
            f"{plan.bits_per_weight:.2f} bits a weight, {_bytes(plan.nbytes)} in all",
            soft_wrap=True,
        )
        changed = [
            re.sub(r"\.\d+\.", ".*.", why) for why in plan.kept_because.values() if "instead" in why
        ]
        for reason in sorted(set(changed)):
            self.console.print(
                f"  changed {changed.count(reason)}: {reason}", style="yellow", soft_wrap=True
            )
        for reason in sorted(set(kept.values())):
            count = sum(why == reason for why in kept.values())
            self.console.print(f"  kept {count}: {reason}", style="dim", soft_wrap=True)

    def _block_done(self, report: "BlockReport") -> None:
        done = report.index + 1
        left = (time.perf_counter() - self._started) / done * (self._blocks - done)
        losses = (
            "" if math.isnan(report.loss) else f"loss {_change(report.loss_rtn, report.loss)}  "
        )
        self.console.print(
            f"[{done}/{self._blocks}] {report.name}  {losses}{report.seconds:.1f} s  "
            f"ETA {_clock(left)}  peak {_bytes(report.peak_bytes)}",
            highlight=False,
            soft_wrap=True,
        )


def outlook_tables(found: "Outlook") -> list[Table | str]:
    """Every kind of weight, then every file."""
    kinds = Table("weights", "count", "shape", "becomes", "size", "kernels, or why kept")
    kinds.columns[0].overflow = "fold"
    for kind in found.kinds:
        shape = " x ".join(map(str, kind.shape))
        size = _bytes(kind.nbytes)
        kinds.add_row(kind.name, str(kind.count), shape, kind.scheme, size, kind.kernels)
    files = Table("file", "bytes")
    for directory, sizes in found.files.items():
        for name, nbytes in sizes.items():
            files.add_row(str(directory / name), f"{nbytes:,}")
    files.add_row("all", f"{found.nbytes:,}")
    plan = found.plan
    said = (
        f"{len(plan.layers)} weights quantized at {plan.bits_per_weight:.3f} bits; "
        f"{_bytes(found.free)} free on the disk"
    )
    return [kinds, files, said]


def summary(run: "Run", source_bytes: int) -> Table:
    """The closing table of a run."""
    table = Table(show_header=False, box=None)
    table.add_row("size", f"{_bytes(source_bytes)} -> {_bytes(run.plan.nbytes)}")
    table.add_row(
        "bits a weight", f"{run.plan.bits_per_weight:.3f} in {len(run.plan.layers)} weights"
    )
    tuned = [b for b in run.blocks if not math.isnan(b.loss)]
    if tuned:
        better = sum(b.loss < b.loss_rtn for b in tuned)
        table.add_row("blocks better than RTN", f"{better} of {len(tuned)}")
    table.add_row("time", _clock(run.seconds))
    table.add_row("peak memory", _bytes(max((b.peak_bytes for b in run.blocks), default=0)))
    return table


def evaluation_table(result: "Evaluation") -> Table:
    """A quantized model beside its float self."""
    table = Table("", "float", "quantized")
    table.add_row("weights", _bytes(result.float_nbytes), _bytes(result.nbytes))
    table.add_row("layers on hal.qgemm", "", str(result.quantized_layers))
    table.add_row("bits a weight", "", f"{result.bits_per_weight:.3f}")
    table.add_row("products", "", result.compute)
    if c := result.comparison:
        table.add_row("perplexity", f"{c.float_perplexity:.4f}", f"{c.perplexity:.4f}")
        table.add_row("KL, mean", "", f"{c.kl:.5f}")
        table.add_row("KL, median / p99", "", f"{c.kl_median:.5f} / {c.kl_p99:.4f}")
        table.add_row("same top token", "", f"{c.same_top:.2%}")
    if result.cosine is not None:
        table.add_row("embedding cosine", "", f"{result.cosine:.5f}")
    if result.speed and result.float_speed:
        table.add_row("decoding, tokens/s", f"{result.float_speed:.1f}", f"{result.speed:.1f}")
    return table


def _change(before: float, after: float) -> str:
    share = f" ({after / before - 1:+.0%})" if before else ""
    return f"{before:.3e} -> {after:.3e}{share}"


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
