# SPDX-License-Identifier: Apache-2.0
"""What a run tells on its way. A listener is a callable that takes these, in this order."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoround.calib import TokenSet
    from autoround.run.plan import ModelPlan
    from autoround.run.record import BlockReport, Run, WholeReport
    from autoround.stages import BlockTask


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything is decided, nothing done."""

    plan: "ModelPlan"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The calibration text is chosen and in tokens."""

    tokens: "TokenSet"


@dataclass(frozen=True, slots=True)
class Resumed:
    """An earlier run of the same signature goes on: what it had finished."""

    blocks: "tuple[BlockReport, ...]"


@dataclass(frozen=True, slots=True)
class BlockStarted:
    """A block is in memory."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Step:
    """A step of SignRound: its number from 0, the loss before it."""

    t: int
    loss: float


@dataclass(frozen=True, slots=True)
class BlockFailed:
    """An exception leaves blocks that are tuned as one (usually it is one), whose tensors are still
    there; nothing of them is written. ``index``: of the first."""

    index: int
    names: tuple[str, ...]
    task: "BlockTask"
    error: Exception


@dataclass(frozen=True, slots=True)
class BlockDone:
    """A block is tuned and written."""

    report: "BlockReport"


@dataclass(frozen=True, slots=True)
class WholeStarted:
    """All blocks are done, and the model is tuned as a whole; steps are told as `Step`."""

    steps: int


@dataclass(frozen=True, slots=True)
class WholeDone:
    """What came of that; the weights are written."""

    report: "WholeReport"


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is written and read back."""

    run: "Run"


Event = (
    Planned | Calibrated | Resumed | BlockStarted | Step | BlockFailed | BlockDone | WholeStarted
    | WholeDone | Finished
)  # fmt: skip
Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """The listener of a run that nobody watches."""


def together(*listeners: Listener) -> Listener:
    """One listener that passes on to all."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def to_json(event: Event) -> dict[str, Any]:
    """Plain values; ``event`` says which it is. Losses that do not exist are null.

    planned: blocks, weights, bits_per_weight, nbytes, formats, quantized, kept;
    calibrated: tokens (rows, columns), digest, description;
    resumed: blocks; block_started: index, name; step: t, loss; block_failed: index, name,
    error;
    block_done: index, name, loss_rtn, loss, seconds, peak_bytes, sparse_experts, experts;
    whole_started: steps; whole_done: loss_before, loss, kept, or because;
    finished: output, seconds, peak_bytes, nbytes, directories (each with its proof).
    """
    return {"event": _name(event)} | _fields(event)


def _name(event: Event) -> str:
    """``BlockDone`` -> ``block_done``"""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def _fields(event: Event) -> dict[str, Any]:
    match event:
        case Planned(plan):
            return {
                "blocks": len(plan.blocks),
                "weights": plan.quantized_weights,
                "bits_per_weight": plan.bits_per_weight,
                "nbytes": plan.nbytes,
                "formats": [target.packing.name for target in plan.targets],
                "quantized": len(plan.layers),
                "kept": dict(Counter(plan.kept_because.values())),
            }
        case Calibrated(tokens):
            shape, digest = [*tokens.ids.shape], tokens.digest
            return {"tokens": shape, "digest": digest, "description": tokens.description}
        case Resumed(blocks):
            return {"blocks": len(blocks)}
        case BlockStarted(index, name):
            return {"index": index, "name": name}
        case Step(t, loss):
            return {"t": t, "loss": loss if math.isfinite(loss) else None}
        case BlockFailed(index, names, _, error):
            return {"index": index, "name": names[0], "error": f"{type(error).__name__}: {error}"}
        case BlockDone(report):
            values = asdict(report)
            return {k: None if v != v else v for k, v in values.items()}  # NaN is no JSON
        case WholeStarted(steps):
            return {"steps": steps}
        case WholeDone(whole):
            return whole.to_json()
        case Finished(run):
            proofs = {str(v.directory): str(v) for v in run.verdicts}
            return {
                "output": str(run.output),
                "seconds": run.seconds,
                "peak_bytes": run.peak_bytes,
                "nbytes": run.plan.nbytes,
                "directories": proofs,
            }
