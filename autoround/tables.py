# SPDX-License-Identifier: Apache-2.0
"""Finished results as tables for a terminal, and sizes and times as people read them."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # a run that builds no model imports no transformers
    from autoround.evaluate import Evaluation
    from autoround.outlook import Outlook
    from autoround.run import Run


def outlook_tables(found: "Outlook") -> list[Table | str]:
    """Every kind of weight, then every file."""
    kinds = Table("weights", "count", "shape", "becomes", "size", "kernels, or why kept")
    kinds.columns[0].overflow = "fold"
    for kind in found.kinds:
        shape = " x ".join(map(str, kind.shape))
        nbytes = size(kind.nbytes)
        kinds.add_row(kind.name, str(kind.count), shape, kind.scheme, nbytes, kind.kernels)
    files = Table("file", "bytes")
    for directory, sizes in found.files.items():
        for name, exact in sizes.items():
            files.add_row(str(directory / name), f"{exact:,}")
    files.add_row("all", f"{found.nbytes:,}")
    plan = found.plan
    said = (
        f"{len(plan.layers)} weights quantized at {plan.bits_per_weight:.3f} bits; "
        f"{size(found.free)} free on the disk"
    )
    return [kinds, files, said]


def summary(run: "Run") -> Table:
    """The closing table of a run."""
    table = Table(show_header=False, box=None)
    table.add_row("size", f"{size(run.source_bytes)} -> {size(run.plan.nbytes)}")
    table.add_row(
        "bits a weight", f"{run.plan.bits_per_weight:.3f} in {len(run.plan.layers)} weights"
    )
    tuned = [b for b in run.blocks if not math.isnan(b.loss)]
    if tuned:
        better = sum(b.loss < b.loss_rtn for b in tuned)
        table.add_row("blocks better than RTN", f"{better} of {len(tuned)}")
    table.add_row("time", clock(run.seconds))
    table.add_row("peak memory", size(run.peak_bytes))
    return table


def evaluation_table(result: "Evaluation") -> Table:
    """A quantized model beside its float self."""
    table = Table("", "float", "quantized")
    table.add_row("weights", size(result.float_nbytes), size(result.nbytes))
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


def size(n: float) -> str:
    """``2.1 GB`` (decimal units)."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
