# SPDX-License-Identifier: Apache-2.0
"""One run from outside: what it is given, what it leaves. `autoround.run.events`: what it tells."""

import math
import resource
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoround.calib import TokenSet
from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.run.artefact import Artefact
from autoround.run.events import Listener
from autoround.run.plan import ModelPlan
from autoround.run.signature import Signature
from autoround.verify import Verdict, prove


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block's outcome.

    Losses are shares (`autoround.stages.task.relative_error`) over the samples held out of tuning,
    or all where none are; NaN without data. ``sparse_experts``: weights of experts with fewer
    tokens than columns, which lean on the tokens of all experts; ``experts``: how many tokens
    reached each, by weight.
    """

    index: int
    name: str
    loss_rtn: float
    loss: float
    seconds: float
    peak_bytes: int
    sparse_experts: int = 0
    experts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WholeReport:
    """Held-out loss before and after the end-to-end stage; or why it was left out."""

    before: float = math.nan
    after: float = math.nan
    because: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the weights are those of the stage."""
        return self.after < self.before

    def __str__(self) -> str:
        if self.because:
            return f"scales are not tuned end to end: {self.because}"
        change = f"{self.before:.3e} -> {self.after:.3e} ({self.after / self.before - 1:+.1%})"
        kept = "" if self.kept else "; the blocks' own are kept"
        return f"scales tuned end to end, held-out loss {change}{kept}"

    def to_json(self) -> dict[str, Any]:
        """Plain values: NaN would not be JSON."""
        if self.because:
            return {"because": self.because}
        return {"loss_before": self.before, "loss": self.after, "kept": self.kept}


@dataclass(slots=True)
class Run:
    """What a finished run leaves: the artefact's directory and how it came about.

    ``peak_bytes``: the largest resident size of the process until the files were proven.
    ``already``: it was finished before, and has been proven again, no more.
    """

    output: Path
    plan: ModelPlan
    tokens: TokenSet | None
    tell: Listener
    source_bytes: int
    signature: Signature = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)
    whole: WholeReport | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    already: bool = False

    def prove(self, directories: Iterable[Path]) -> None:
        """Read the finished directories back. InputError at a difference; nothing is lost."""
        self.verdicts = prove(directories)
        self.peak_bytes = peak_bytes()
        wrong = [v for v in self.verdicts if not v.ok]
        if wrong:
            raise InputError(
                f"{wrong[0]}, first: {wrong[0].differences[0]}; the run is kept in {self.output}: "
                f"check the disk, then `autoround verify {wrong[0].directory}`"
            )

    def finish(self, artefact: Artefact) -> None:
        """Balance the ledger of the finished weights; then, and only then, describe them."""
        source = Checkpoint(artefact.contents.home)
        artefact.balance(source.unstacked(self.plan.fates), self.plan.fates)
        artefact.describe(self.record(artefact.ledger.fates))

    def record(self, fates: Mapping[str, str]) -> dict[str, Any]:
        """What decided the bytes of the output, what became of the source, the losses; no times."""
        losses = [
            # A block that text never reached has none; NaN would not be JSON.
            {"name": b.name}
            | ({} if math.isnan(b.loss) else {"loss_rtn": b.loss_rtn, "loss": b.loss})
            | ({"sparse_experts": b.sparse_experts} if b.sparse_experts else {})
            | ({"experts": b.experts} if b.experts else {})
            for b in self.blocks
        ]
        return {
            **self.signature,
            "blocks": losses if self.tokens else [],
            **({"end_to_end": self.whole.to_json()} if self.whole else {}),
            "tensors": {key: fates[key] for key in self.plan.fates},
            "kept": self.plan.kept_because,
        }


@dataclass(frozen=True, slots=True)
class Source:
    """The model to quantize, and the device, memory and trust given to it.

    ``low_cpu_mem_usage``: what passes between blocks lies in a file beside the output, not in
    memory. No bit of the result depends on it. ``fresh``: begin anew, whatever run is there.
    """

    model: str | Path
    device: torch.device
    trust_remote_code: bool = False
    low_cpu_mem_usage: bool = False
    fresh: bool = False


def peak_bytes() -> int:
    """Largest resident size of this process so far, mapped file pages included."""
    # ru_maxrss starts at the parent's size after fork and exec; VmHWM is this program's own.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """Resident size of this process now, mapped file pages included; 0 where unknown."""
    return _status("VmRSS")


def _status(key: str) -> int:
    """Bytes of a row of /proc/self/status; 0 without one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def free_bytes(path: Path) -> int:
    """Free space of the disk that a path is or will be on."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free
