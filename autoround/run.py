# SPDX-License-Identifier: Apache-2.0
"""One run from outside: what it is given, what it leaves. `autoround.events`: what it tells."""

import math
import resource
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoround.calib import TokenSet
from autoround.errors import InputError
from autoround.events import Listener
from autoround.plan import ModelPlan
from autoround.recipe import Recipe
from autoround.verify import Verdict, prove


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block's outcome.

    Losses are mean squared errors over the samples held out of tuning, or all where none are; NaN
    without data. ``sparse_experts``: weights of experts with fewer tokens than columns, which lean
    on the tokens of all experts.
    """

    index: int
    name: str
    loss_rtn: float
    loss: float
    seconds: float
    peak_bytes: int
    sparse_experts: int = 0


@dataclass(slots=True)
class Run:
    """What a finished run leaves: the artefact's directory and how it came about."""

    output: Path
    plan: ModelPlan
    tokens: TokenSet | None
    tell: Listener
    source_bytes: int
    blocks: list[BlockReport] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    def prove(self, directories: Iterable[Path]) -> None:
        """Read the finished directories back. InputError at a difference; nothing is lost."""
        self.verdicts = prove(directories)
        wrong = [v for v in self.verdicts if not v.ok]
        if wrong:
            raise InputError(
                f"{wrong[0]}, first: {wrong[0].differences[0]}; the run is kept in {self.output}: "
                f"check the disk, then `autoround verify {wrong[0].directory}`"
            )

    def record(self, recipe: Recipe) -> dict[str, Any]:
        """What decided the bytes of the output, and the losses; no times."""
        used = self.tokens and {"digest": self.tokens.digest, "shape": [*self.tokens.ids.shape]}
        losses = [
            # A block that text never reached has none; NaN would not be JSON.
            {"name": b.name}
            | ({} if math.isnan(b.loss) else {"loss_rtn": b.loss_rtn, "loss": b.loss})
            | ({"sparse_experts": b.sparse_experts} if b.sparse_experts else {})
            for b in self.blocks
        ]
        return {
            "recipe": recipe.to_json(),
            "calibration": used,
            "blocks": losses if self.tokens else [],
        }


@dataclass(frozen=True, slots=True)
class Source:
    """The model to quantize, and the device, memory and trust given to it.

    ``low_cpu_mem_usage``: what passes between blocks lies in a file beside the output, not in
    memory. No bit of the result depends on it.
    """

    model: str | Path
    device: torch.device
    trust_remote_code: bool = False
    low_cpu_mem_usage: bool = False


def peak_bytes() -> int:
    """Largest resident size of this process so far, mapped file pages included."""
    try:
        # ru_maxrss starts at the parent's size after fork and exec; VmHWM is this program's own.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
