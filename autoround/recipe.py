# SPDX-License-Identifier: Apache-2.0
"""One frozen value holds every choice of a run: command line flags, constructor arguments, JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autoround.errors import InputError
from autoround.scheme import Scheme, override, scheme_by_name


def shard_bytes(text: str) -> int:
    """``5GB`` -> bytes (decimal units)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise InputError(f"max_shard_size={text!r}: write it like 5GB or 500MB") from None
    if not math.isfinite(size):
        raise InputError(f"max_shard_size={text!r}: write it like 5GB or 500MB")
    if size < 10**6:
        raise InputError(f"max_shard_size={text!r} is below 1MB")
    return int(size)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every choice of a quantization run. Names and defaults are the field's usual ones.

    ``bits``, ``group_size``, ``sym`` override the scheme where not None. What is done: ``search``
    ranges, columns weighted by their inputs; ``feedback``: round in closed form; ``iters`` steps of
    SignRound, with ``feedback`` only on the weights that it cannot reach (fused experts);
    ``end_to_end`` steps of all scales after the last block. None of
    them = round to nearest, no data needed. ``lr`` None = 1 / iters (2 / iters from 1000 iterations
    on at 3 bits and below); ``minmax_lr`` None = ``lr``. ``dynamic_max_gap``: end a block
    after that many steps without a better one. ``nblocks``: blocks in a row whose steps are taken
    together, toward the last one's output. ``dataset`` None = the bundled pack. ``format``: one
    or several, comma between. ``serve``: an inference engine that must be able to load the result.
    """

    scheme: str = "W4A16"
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    layer_config: Mapping[str, Any] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] = ()
    to_quant_block_names: tuple[str, ...] = ()
    quant_lm_head: bool = False
    format: str = "auto_round"
    serve: str | None = None
    search: bool = False
    feedback: bool = True
    iters: int = 200
    end_to_end: int = 0
    lr: float | None = None
    minmax_lr: float | None = None
    enable_minmax_tuning: bool = True
    not_use_best_mse: bool = False
    dynamic_max_gap: int | None = None
    momentum: float = 0.0
    enable_adam: bool = False
    nblocks: int = 1
    enable_quanted_input: bool = True
    dataset: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    seed: int = 42
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        least = {"iters": 0, "end_to_end": 0, "nsamples": 1, "seqlen": 2, "batch_size": 1}
        for name, minimum in {**least, "gradient_accumulate_steps": 1, "nblocks": 1}.items():
            if getattr(self, name) < minimum:
                raise InputError(
                    f"{name}={getattr(self, name)} is too small; use {minimum} or more"
                )
        if self.dynamic_max_gap is not None and self.dynamic_max_gap < 1:
            raise InputError(
                f"dynamic_max_gap={self.dynamic_max_gap}: give 1 or more, or leave out"
            )
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value}: give a number of 0 or more")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum}: give 0 or more, below 1")
        if self.momentum and self.enable_adam:
            raise InputError("momentum and enable_adam exclude each other: Adam has its own")
        if self.nblocks > 1 and self.feedback:
            raise InputError(
                f"nblocks={self.nblocks}: the closed form takes layers one by one, and knows no "
                "blocks that are tuned together; use --recipe signround or signround2, or leave "
                "nblocks at 1"
            )
        if self.nblocks > 1 and self.nsamples < 2:
            raise InputError(f"nblocks={self.nblocks} needs 2 samples or more; see nsamples")
        shard_bytes(self.max_shard_size)
        _ = self.weight_scheme  # unknown names and illegal overrides fail here

    @property
    def weight_scheme(self) -> Scheme:
        """The scheme with the overrides laid over it."""
        fields = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        return override(scheme_by_name(self.scheme), fields, "scheme")

    @property
    def calibrates(self) -> bool:
        """Whether the run needs data."""
        return self.search or self.feedback or self.iters > 0 or self.end_to_end > 0

    def learning_rate(self, bits: int) -> float:
        """Initial step of the rounding offset for a layer of ``bits``."""
        if self.lr is not None:
            return self.lr
        return (2 if self.iters >= 1000 and bits <= 3 else 1) / max(self.iters, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; equal recipes give equal JSON."""
        values = asdict(self)
        plain: dict[str, Any] = json.loads(json.dumps(values, default=list, sort_keys=True))
        return plain


#: The first is the default.
RECIPES: dict[str, Recipe] = {
    "autoround": Recipe(),
    "best": Recipe(nsamples=512, end_to_end=200),
    "light": Recipe(nsamples=32),
    "signround": Recipe(feedback=False),
    "signround-best": Recipe(feedback=False, iters=1000, nsamples=512),
    "signround-light": Recipe(feedback=False, iters=50, lr=5e-3),
    "signround2": Recipe(feedback=False, search=True),
    "rtn-searched": Recipe(feedback=False, iters=0, search=True),
    "rtn": Recipe(feedback=False, iters=0),
}


def recipe_by_name(name: str, changes: Mapping[str, Any]) -> Recipe:
    """A named recipe with the given fields replaced (None = leave)."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **{k: v for k, v in changes.items() if v is not None})
