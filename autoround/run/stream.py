# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest straight from file to file: no model, one tensor at a time.

The outcome is the pipeline's own, byte for byte; see `autoround.models.survey` for the checkpoints
whose names say enough.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import hal
from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.models.survey import EXPERT, by_names, computed_in, refuse_names
from autoround.recipe import Recipe, shard_bytes
from autoround.run.artefact import Artefact, places
from autoround.run.directory import claim
from autoround.run.events import BlockDone, Finished, Listener, Planned, Resumed
from autoround.run.journal import Journal
from autoround.run.plan import Layer, ModelPlan, make_plan
from autoround.run.record import BlockReport, Run, peak_bytes
from autoround.run.signature import Signature, signature


def refuse(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """Why this run needs a model, or None."""
    if recipe.calibrates:
        return "tuning runs the model"
    singled_out = recipe.layer_config or recipe.ignore_layers
    if singled_out and any(EXPERT.search(key) for key in checkpoint.entries):
        return "experts that the model fuses must share a scheme"
    return refuse_names(checkpoint)


def quantize(
    recipe: Recipe, checkpoint: Checkpoint, output: Path, listener: Listener, *, fresh: bool = False
) -> Run:
    """`pipeline.quantize` for a run that `refuse` has no objection to."""
    started = time.perf_counter()
    with claim(output, fresh=fresh) as journal:
        plan = make_plan(by_names(checkpoint), recipe)
        listener(Planned(plan))
        run = Run(output, plan, None, listener, checkpoint.total_bytes)
        # Before a tensor is read only its name is known; what rows were made of is in the rows.
        run.already = journal.record is not None
        digests = checkpoint.scan_finite() if run.already else dict.fromkeys(checkpoint.entries, "")
        journal.begin(_signed(recipe, checkpoint, digests), len(plan.blocks))
        if not run.already:
            # Not synced to the disk: what takes seconds is made anew after a power cut.
            shard = shard_bytes(recipe.max_shard_size)
            with Artefact(
                plan.contents, plan.written, output, shard, durable=False, rows=journal.rows
            ) as artefact:
                digests = _Rounding(checkpoint, plan, artefact, run, journal).all()
            run.signature = _signed(recipe, checkpoint, digests)
            run.finish(artefact)
        run.prove(places(plan.targets, output))
        journal.close()
    run.seconds = time.perf_counter() - started
    listener(Finished(run))
    return run


def _signed(recipe: Recipe, checkpoint: Checkpoint, digests: Mapping[str, str]) -> Signature:
    return signature(recipe, checkpoint.content(digests), None, None, False)


class _Rounding:
    """Every tensor of the source in its order, each read once; a report per block."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ModelPlan,
        artefact: Artefact,
        run: Run,
        journal: Journal,
    ) -> None:
        self.checkpoint, self.plan, self.artefact = checkpoint, plan, artefact
        self.out, self.journal = run, journal
        self.layers = {layer.view.param: layer for layer in plan.layers}

    def all(self) -> dict[str, str]:
        """Digests of the source's tensors as they were read."""
        digests = self._resumed()
        blocks = self.plan.blocks
        last = {block[-1].view.param: i for i, block in enumerate(blocks) if block}
        started, told = time.perf_counter(), len(digests)
        for key in [key for key in self.checkpoint.entries if key not in digests]:
            digests[key] = self._write(key)
            if key in last:
                index, now = last[key], time.perf_counter()
                name = f"{self.plan.contents.blocks}.{index}"
                report = BlockReport(index, name, math.nan, math.nan, now - started, peak_bytes())
                self.out.blocks.append(report)
                self.out.tell(BlockDone(report))
                started = now
            if self.journal.due():
                new = dict(islice(digests.items(), told, None))
                told = len(digests)
                reports = self.out.blocks[len(self.journal.reports) :]
                row = {**self.artefact.settle(), "blocks": [asdict(r) for r in reports]}
                self.journal.commit({**row, "source": new})
        return digests

    def _resumed(self) -> dict[str, str]:
        """What is written already, proven to be of the source as it is now."""
        found = {key: d for row in self.journal.rows for key, d in row["source"].items()}
        for key, now in self.checkpoint.scan_finite(found).items():
            if now != found[key]:
                raise InputError(
                    f"{key} of {self.checkpoint.path} is not what the run in {self.out.output} was "
                    "begun with; start over with --fresh, or choose another -o"
                )
        if found:
            self.out.blocks += [BlockReport(**report) for report in self.journal.reports]
            self.out.tell(Resumed(tuple(self.out.blocks)))
        return found

    def _write(self, key: str) -> str:
        stored = self.checkpoint.get(key)
        digest = self.checkpoint.examined(key, stored)
        if key in self.checkpoint.copies:
            self.artefact.leave(key, self.plan.fates[key])
        elif layer := self.layers.get(key):
            _round(layer, stored, self.checkpoint, self.artefact)
        else:
            self.artefact.keep(key, stored, self.plan.because(key))
        return digest


def _round(layer: Layer, stored: Tensor, checkpoint: Checkpoint, artefact: Artefact) -> None:
    """One tensor of the source; experts that lie in one, each by itself."""
    for part in layer.view.parts:
        slab = checkpoint.slabs.get(part.key)
        own = stored if slab is None else slab.of(stored[slab.expert]).contiguous()
        w = own.to(computed_in(checkpoint))
        # Codes as our own files hold them, where they can: a byte for each would go through memory.
        layout = "plain" if hal.refuse(layer.spec, (w.shape[0], w.shape[1]), "stream") else "stream"
        q = hal.quantize(w, None, layer.spec, layout=layout)
        if not torch.isfinite(q.parts["scale"]).all():
            raise InputError(
                f"{checkpoint.path}: {layer.view.param}: a scale exceeds {layer.spec.scale}; "
                "leave the layer out with --ignore-layers"
            )
        artefact.put(artefact.contents.modules[part.key], q)
