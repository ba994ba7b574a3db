# SPDX-License-Identifier: Apache-2.0
"""Finished results as tables for a terminal, and sizes and times as people read them."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # a run that builds no model imports no transformers
    from autoround.doctor import Diagnosis
    from autoround.evaluate import Evaluation
    from autoround.run.estimate import Needs
    from autoround.run.outlook import Outlook
    from autoround.run.record import Run


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
    plan, need = found.plan, found.needs
    held = ", ".join(f"{what} {size(n)}" for what, n in need.memory.items())
    device = f"; {size(need.device)} on the device" if need.device else ""
    lines = [
        f"{len(plan.layers)} weights quantized at {plan.bits_per_weight:.3f} bits",
        f"memory: {size(need.ram)} at most ({held}){device}",
        f"disk: {size(need.disk)} at most, {size(found.free)} free",
    ]
    if found.pace:
        least, most = found.pace.range
        lines.append(
            f"time: {clock(found.pace.seconds)} ({clock(least)} to {clock(most)}), "
            f"{found.pace.block:.1f} s a block"
            + (f", {clock(found.pace.whole)} for all scales" if found.pace.whole else "")
        )
    if found.fit.refused:
        lines.append(f"does not fit: {found.fit.refused}")
        if change := found.fit.change:
            words, then = change
            lines.append(f"cheapest change: {words} (memory {size(then.ram)}, "
                         f"disk {size(then.disk)})")  # fmt: skip
        else:
            lines.append("no option makes it fit: take a smaller model or a larger machine")
    return [kinds, files, *lines]


def summary(run: "Run", needs: "Needs | None" = None) -> Table:
    """The closing table of a run; with ``needs``, what was planned beside what it took."""
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
    planned = (
        f" (planned {size(needs.ram)}, {run.peak_bytes / needs.ram - 1:+.0%})" if needs else ""
    )
    table.add_row("peak memory", size(run.peak_bytes) + planned)
    if needs:
        written = sum(f.stat().st_size for f in run.output.rglob("*.safetensors"))
        exact = "as planned" if written == needs.files else f"planned {needs.files:,}"
        table.add_row("files of weights", f"{written:,} bytes, {exact}")
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
        percentiles = f"{c.kl_median:.5f} / {c.kl_p90:.5f} / {c.kl_p99:.4f}"
        table.add_row("KL, median / p90 / p99", "", percentiles)
        table.add_row("same top token", "", f"{c.same_top:.2%}")
        table.add_row("flips: lost / won", "", f"{c.lost:.2%} / {c.won:.2%}")
    if result.cosine is not None:
        table.add_row("embedding cosine", "", f"{result.cosine:.5f}")
    if result.speed and result.float_speed:
        table.add_row("decoding, tokens/s", f"{result.float_speed:.1f}", f"{result.speed:.1f}")
    return table


def doctor_parts(found: "Diagnosis") -> list[Table | str]:
    """What `autoround doctor` found, the verdict last."""
    about = Table(show_header=False, box=None)
    for d in found.devices:
        if "unavailable" in d:
            about.add_row(d["device"], f"unavailable: {d['unavailable']}")
            continue
        features = ", ".join(d["features"]) or "no native kernels"
        about.add_row(d["device"], f"{d['name']}; {d['threads']} of {d['units']} threads")
        about.add_row("", f"{d['arch']} ({features}); served by {', '.join(d['served_by'])}")
        if d["read_bytes_s"]:
            speed = f"{size(d['read_bytes_s'])}/s read, {d['peak_ops_s'] / 1e9:.0f} GFLOP/s"
            about.add_row("", f"one thread at best: {speed}")
    about.add_row("memory", f"{size(found.memory['free'])} of {size(found.memory['total'])} free")
    disk = found.disk
    rates = [f"{verb}s {size(disk[f'{verb}_bytes_s'])}/s" for verb in ("write", "read")
             if f"{verb}_bytes_s" in disk]  # fmt: skip
    told = ", ".join([*rates, *([disk["problem"]] if "problem" in disk else [])])
    about.add_row("disk", f"{size(disk['free'])} free; {told}")
    about.add_row("versions", ", ".join(f"{k} {v}" for k, v in found.versions.items()))
    proofs = Table("device", "proven against the reference", "checks", "largest error", "")
    for p in found.proofs:
        verdict = f"WRONG: {', '.join(p.wrong)}" if p.wrong else "right"
        worst = f"{p.worst:.1e}" if p.worst else "none"
        proofs.add_row(p.device, p.family, str(p.checks), worst, verdict)
    timed = Table(
        "device", "4 bits, 4096 x 4096, rows", "kernel", "ms, one thread", "of the roofline"
    )
    for t in found.timed:
        share = f"{t.of_roofline:.0%} ({t.bound})"
        timed.add_row(t.device, str(t.m), t.kernel, f"{t.milliseconds:.2f}", share)
    missing = [
        f"missing {name}: no {what}; {command}" for name, (what, command) in found.missing.items()
    ]
    verdict = "every kernel is right" if found.sound else "WRONG answers: use HAL_BACKEND=reference"
    return [about, proofs, timed, *missing, verdict]


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
