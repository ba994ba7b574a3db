# SPDX-License-Identifier: Apache-2.0
"""After the blocks: the rounded model as a whole, its scales tuned and written anew.

The new scales go to the journal first, in a row of their own; then the files are written over, and
another row says so. Whatever is stopped in between goes on from the first row, whose scales and the
codes, which stay, make all the bytes again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from autoround.calib import TokenSet
from autoround.errors import InputError
from autoround.files import read_bytes
from autoround.models import Samples, Store
from autoround.run.artefact import TUNED
from autoround.run.events import Step, WholeDone, WholeStarted
from autoround.run.journal import AGAIN, write_whole
from autoround.run.plan import Layer
from autoround.run.record import WholeReport
from autoround.stages import EndToEnd, ModelTask, Scaled, Vector, stride
from hal import QTensor

if TYPE_CHECKING:
    from autoround.run.engine import Engine

#: What moves, by its parameter's name.
Moving = dict[str, Scaled | Vector]
#: Samples that judge, at most.
JUDGES = 16


class Whole:
    """The end-to-end stage of an engine's run."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.streamed, self.artefact = engine, engine.streamed, engine.artefact
        self.out, self.plan, self.journal = engine.out, engine.plan, engine.journal
        self.vectors = engine.streamed.vectors
        self.stage = EndToEnd(
            engine.recipe.end_to_end, lambda t, loss: self.out.tell(Step(t, loss)),
            engine.recipe.seed,
        )  # fmt: skip

    def run(self, tokens: TokenSet) -> None:
        """Tune and write, as far as an earlier process has not."""
        row = next((row["scales"] for row in self.journal.rows if "scales" in row), None)
        if row is None:
            self.out.tell(WholeStarted(self.stage.steps))
            report, values = self._tuned(tokens.ids)
            found = {name: None if x != x else x for name, x in asdict(report).items()}  # no NaN
            tuned = [key for name, key in self.vectors.items() if name in values]
            file = self._keep(values) if report.kept else None
            row = {"file": file, "tuned": tuned, "report": found}
            self._commit({"scales": row})
        if row["file"]:
            self.plan.fates.update(dict.fromkeys(row["tuned"], TUNED))
            if "scales" in self.journal.rows[-1]:
                self._write(self._kept(row["file"]), row["tuned"])
                self._commit({})
        self.out.whole = WholeReport(**{k: v for k, v in row["report"].items() if v is not None})
        self.out.tell(WholeDone(self.out.whole))

    def _commit(self, more: dict[str, Any]) -> None:
        row = {**self.artefact.settle(), "blocks": [], "chains": {"received": {}}, **more}
        self.journal.commit(row)

    # ---- tuning ---------------------------------------------------------------------------------

    def _tuned(self, ids: Tensor) -> tuple[WholeReport, dict[str, Tensor]]:
        """What came of it, and what moved by its parameter's name: scales of weights, vectors."""
        rows, held = chosen(len(ids), self.stage)
        if not held:
            return WholeReport(because="one sample cannot be tuned on and judge"), {}
        try:
            moving, task = self._task(ids[rows], held)
            reason = self.stage.refuse(task)
            if reason is not None:
                return WholeReport(because=reason), {}
            report = WholeReport(*self.stage.run(task))
        finally:
            self.streamed.drop(self.streamed.model)
        return report, {name: value.stored().cpu() for name, value in moving.items()}

    def _task(self, ids: Tensor, held: tuple[int, ...]) -> tuple[Moving, ModelTask]:
        """The work, and all that moves by its parameter's name."""
        model, head = self.streamed.model, self.streamed.model.get_output_embeddings()
        teacher = self._teacher(ids, head)
        layers = {layer.view.param: layer for layer in self.plan.layers}
        self.streamed.load_around({x.view.param for own in self.plan.blocks for x in own})
        moving: Moving = {name: self._scaled(layer) for name, layer in layers.items()}
        for name in self.vectors:
            module = model.get_submodule(name.rpartition(".")[0])
            if self.streamed.blocks.owns(name) or not ({*module.children()} or module is head):
                moving[name] = Vector(model.get_parameter(name).detach())
        projection = moving.get(self.plan.head.view.param) if self.plan.head else None
        owners = self._owners({k: v for k, v in moving.items() if v is not projection})
        assert not isinstance(projection, Vector)
        amp = self.engine.computing
        return moving, ModelTask(model, owners, head, projection, ids, teacher, held, amp)

    def _owners(self, moving: Moving) -> list[tuple[nn.Module, Moving]]:
        """Blocks, and modules outside them, with what moves in each by its name inside it."""
        found: dict[str, Moving] = {name: {} for name in self.streamed.blocks.names}
        for name, value in moving.items():
            within = (block for block in self.streamed.blocks.names if name.startswith(f"{block}."))
            owner = next(within, name.rpartition(".")[0])
            found.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = value
        model = self.streamed.model
        return [(model.get_submodule(name), own) for name, own in found.items() if own]

    def _teacher(self, ids: Tensor, head: nn.Module | None) -> list[Tensor]:
        """What the float model hands to its head, or its last hidden state, of every sample."""
        self.streamed.load_outside_blocks()
        every = 1 if head is None else stride(ids.shape[1], head)
        found: list[Tensor] = []
        stores: list[Store] = []

        def keep(x: Tensor) -> None:
            stores[:] = stores or [self.engine.pool.take(len(ids), x)]
            found.append(stores[0].put(len(found), x))

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            keep(args[0][:, ::every])
            return (args[0][:, :1],)  # nobody asks for the product itself

        inputs = [{"input_ids": row[None].to(self.streamed.home)} for row in ids]
        with ExitStack() as stack:
            if head is not None:
                stack.callback(head.register_forward_pre_hook(before).remove)
            forwards = stack.enter_context(self.engine.forwards(inputs, len(inputs)))
            for index, calls in forwards:
                floats = Samples(calls, self.streamed.device)
                calls.clear()
                with self.engine.task(index) as task:
                    forwards.resume(self.engine.float_outputs(task, floats))
            if head is None:
                for i in range(len(inputs)):
                    keep(forwards.results[i][0])
        self.streamed.drop(self.streamed.model)
        self.engine.pool.release()
        return found

    def _scaled(self, layer: Layer) -> Scaled:
        start = self._read(layer).parts["scale"].float()
        return Scaled(
            layer.spec, layer.view.shape, self.streamed.dtype, start,
            lambda: self._read(layer), layer.view.restore,
        )  # fmt: skip

    def _read(self, layer: Layer) -> QTensor:
        """A weight as our own files have it; while they are written anew, but for its scales."""
        modules = self.plan.contents.modules
        found = [self.artefact.read(modules[part.key]).parts for part in layer.view.parts]
        parts = {
            name: torch.cat([own[name] for own in found]) if len(found) > 1 else whole
            for name, whole in found[0].items()
        }
        parts = {name: part.to(self.streamed.device) for name, part in parts.items()}
        return QTensor(layer.spec, layer.view.shape, "plain", parts)

    # ---- writing --------------------------------------------------------------------------------

    def _keep(self, values: dict[str, Tensor]) -> str:
        """Into the journal; the file's name is its digest."""
        data = save(values)
        name = f"{hashlib.sha256(data).hexdigest()}.scales"
        write_whole(self.journal.directory / name, data)
        return name

    def _kept(self, name: str) -> dict[str, Tensor]:
        path = self.journal.directory / name
        data = read_bytes(path, AGAIN)
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise InputError(f"{path} is not as it was written; {AGAIN}")
        return load(data)

    def _write(self, values: Mapping[str, Tensor], tuned: Sequence[str]) -> None:
        """All weights once more, with these scales, and the vectors."""
        self.artefact.withdraw(tuned)
        for name, key in self.vectors.items():
            if key in tuned:
                self.artefact.tune(key, values[name])
        for layer in self.plan.layers:
            q = self._read(layer)
            q.parts["scale"] = values[layer.view.param].to(q.device)
            for part in layer.view.parts:
                self.artefact.put(self.plan.contents.modules[part.key], q.rows(*part.rows))


def chosen(n: int, stage: EndToEnd) -> tuple[list[int], tuple[int, ...]]:
    """Which of ``n`` samples take part, and which rows of these only judge: one in eight."""
    count = min(JUDGES, max(1, n // 8)) if n > 1 else 0
    used = min(n - count, stage.steps * stage.batch)
    return [*range(used), *range(n - count, n)], tuple(range(used, used + count))
