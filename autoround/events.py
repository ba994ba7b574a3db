# SPDX-License-Identifier: Apache-2.0
"""What a run tells on its way. A listener is a callable that takes these, in this order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoround.calib import TokenSet
    from autoround.plan import ModelPlan
    from autoround.run import BlockReport, Run


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
class BlockDone:
    """A block is tuned and written."""

    report: "BlockReport"


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is written and read back."""

    run: "Run"


Event = Planned | Calibrated | Resumed | BlockStarted | Step | BlockDone | Finished
Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """The listener of a run that nobody watches."""
