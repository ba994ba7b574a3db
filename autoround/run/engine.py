# SPDX-License-Identifier: Apache-2.0
"""The block loop: read one block, tune it, write it packed, free it, commit."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor

import hal
from autoround.calib import TokenSet
from autoround.errors import InputError, blamed
from autoround.files import AGAIN
from autoround.models import (
    Call,
    PausedForwards,
    Pool,
    Samples,
    Store,
    StreamedModel,
    keep_freed,
    moved,
    split,
    trim,
    verify,
)
from autoround.recipe import Recipe
from autoround.run import chains
from autoround.run.artefact import Artefact
from autoround.run.course import held_out, samples_at_once, stages_of
from autoround.run.events import BlockDone, BlockFailed, BlockStarted, Resumed, Step
from autoround.run.journal import Journal
from autoround.run.plan import Layer
from autoround.run.record import BlockReport, Run, peak_bytes
from autoround.run.units import Unit, differs, joined_call, unfit
from autoround.run.whole import Whole
from autoround.stages import BlockTask, LayerTask, Search
from autoround.stages.task import hidden, relative_error


class Engine:
    """One run over all blocks, from where the journal ends."""

    def __init__(
        self,
        recipe: Recipe,
        streamed: StreamedModel,
        artefact: Artefact,
        run: Run,
        journal: Journal,
        spill: bool,
    ) -> None:
        self.recipe, self.streamed, self.plan = recipe, streamed, run.plan
        self.artefact, self.out, self.journal = artefact, run, journal
        tokens = run.tokens.ids.shape[1] if run.tokens else 1
        self.at_once = samples_at_once(recipe, tokens, streamed.device)
        self.stages = stages_of(recipe, self.at_once, lambda t, loss: run.tell(Step(t, loss)))
        self.pool = Pool(run.output, spill, streamed.device)
        self.last = len(streamed.blocks.modules) - 1

    def run(self, tokens: TokenSet | None) -> None:
        if self.journal.rows:
            self.out.blocks += _reports(self.journal)
            self.out.tell(Resumed(tuple(self.out.blocks)))
        else:
            for tensor in self.plan.contents.kept:
                raw = self.streamed.checkpoint.get(tensor.name)
                self.artefact.keep(tensor.name, raw, self.plan.because(tensor.name))
            for key in self.streamed.checkpoint.copies:
                self.artefact.leave(key, self.plan.fates[key])
            if self.plan.head is not None:
                self._head(self.plan.head)
        if tokens is not None:
            self._drive(tokens)
            self.streamed.drop(self.streamed.model)  # nothing needs the embeddings any more
        for index in range(self.last + 1):
            if index not in self.done:  # no data, or text alone never reaches it: cross-attention
                with self._unit(range(index, index + 1)) as unit:
                    Search().run(unit.task)
                if tokens is not None or self.journal.due():
                    self._commit({"received": {}})
        if tokens is not None and self.recipe.end_to_end:
            Whole(self).run(tokens)

    @property
    def done(self) -> set[int]:
        return {report.index for report in self.out.blocks}

    def _drive(self, tokens: TokenSet) -> None:
        """All blocks that text reaches, in the order in which the model calls them."""
        state = self.journal.rows[-1]["chains"] if self.journal.rows else None
        if state is not None and state["received"] == {}:
            return
        self.streamed.load_outside_blocks()
        rows = [row[None].to(self.streamed.home) for row in tokens.ids]
        inputs = [
            {"input_ids": row} for row in rows * (2 if self.recipe.enable_quanted_input else 1)
        ]
        if state is not None and state.get("file"):
            with self.forwards(inputs, len(rows)) as forwards:
                if self._placed(forwards, state):
                    self._blocks(forwards, len(rows), None)
                    return
        with self.forwards(inputs, len(rows)) as forwards:
            self._blocks(forwards, len(rows), state and state["received"])

    @contextlib.contextmanager
    def forwards(self, inputs: list[dict[str, Tensor]], n: int) -> Iterator[PausedForwards]:
        """All forwards, each at its first block."""
        model, modules = self.streamed.model, self.streamed.blocks.modules
        forwards = PausedForwards(model, modules, inputs, self._adopt(n))
        with contextlib.ExitStack() as stack:
            with self._own_code(type(model).__name__):
                stack.enter_context(forwards)
            yield forwards

    def _placed(self, forwards: PausedForwards, state: Mapping[str, Any]) -> bool:
        """Bring every forward to where it stood when the state was committed.

        What the last block put out stands for the outputs of all before it. That will do for models
        that hand blocks nothing else; it is proven by the digests of all that the forwards hand
        over now. False for other models, and where the file is not what was written.
        """
        trees = {int(i): tree for i, (_, tree) in state["outputs"].items()}
        path = self.journal.directory / state["file"]
        try:
            outputs = chains.read(path, trees, self.streamed.device)
            for i, (replies, _) in state["outputs"].items():
                for _ in range(replies):
                    forwards.resume({int(i): outputs[int(i)]})
        except Exception:  # the file is damaged, or the model wants what it does not get here
            return False
        return bool(_received(forwards, chains.Digests()) == state["received"])

    def _blocks(self, forwards: PausedForwards, n: int, expected: Mapping[str, Any] | None) -> None:
        """Every block that the forwards come to; what is done already, from its written weights.

        ``expected``: what the first one that is not done must be given.
        """
        keep_freed()
        trim()
        for index, calls in forwards:
            if index in self.done:
                self._replay(index, calls, forwards, n)
                continue
            digests = chains.Digests()
            if expected and _received(forwards, digests) != expected:
                raise InputError(
                    f"{self.streamed.blocks.names[index]} is given other inputs than before the "
                    f"run in {self.out.output} stopped: this model or machine does not repeat "
                    "itself; start over with --fresh"
                )
            expected = None
            spool = chains.Spool(self.journal.directory, digests)
            end = min(index + self.recipe.nblocks, self.last + 1)
            with self._unit(range(index, end)) as unit:
                for outputs in self._tune(unit, calls, n, forwards):
                    if unit.last < self.last:  # the model's head adds nothing that tuning needs
                        spool.add(outputs)
                        forwards.resume(outputs)
            if unit.last == self.last:
                spool.discard()
                self._commit({"received": {}})
                return
            received = _received(forwards, digests)
            trees = {str(i): [forwards.replies[i], tree] for i, tree in spool.trees.items()}
            file = spool.close() if received else None
            self._commit({"file": file, "outputs": trees if file else {}, "received": received})

    def _replay(self, index: int, calls: dict[int, Call], forwards: PausedForwards, n: int) -> None:
        """A block that is done: both chains go on with the weights that are written."""
        with self.task(index) as task:
            for outputs in self._tune(Unit([task]), calls, n, forwards, written=True):
                if index < self.last:
                    forwards.resume(outputs)

    def _commit(self, state: dict[str, Any]) -> None:
        """One row: the tensors on the disk, the block's outcome, what passes to the next."""
        fresh = self.out.blocks[len(_reports(self.journal)) :]
        reports = [asdict(report) for report in fresh]
        self.journal.commit({**self.artefact.settle(), "blocks": reports, "chains": state})
        for report in fresh:
            self.out.tell(BlockDone(report))

    @contextlib.contextmanager
    def _unit(self, indices: range) -> Iterator[Unit]:
        """Materialised blocks as one task; packed, written and reported on leaving."""
        started, names = time.perf_counter(), self.streamed.blocks.names
        with contextlib.ExitStack() as stack:
            parts: list[BlockTask] = []
            for index in indices:
                self.out.tell(BlockStarted(index, names[index]))
                parts.append(stack.enter_context(self.task(index)))
            unit = Unit(parts)
            try:
                yield unit
            except Exception as error:
                found = tuple(names[index] for index in indices)
                self.out.tell(BlockFailed(indices.start, found, unit.task, error))
                raise
            for part in parts:
                for layer in self.plan.blocks[part.index]:
                    self._write(layer, part.layers[_inside(layer, names[part.index])])
        trim()
        task, seconds = unit.task, (time.perf_counter() - started) / len(parts)
        rtn, loss = (task.report.get(key, math.nan) for key in ("loss_rtn", "loss"))
        sparse = int(task.report.get("sparse_experts", 0))
        self.out.blocks += [
            BlockReport(i, names[i], rtn, loss, seconds, peak_bytes(), sparse, task.tokens)
            for i in indices
        ]

    @contextlib.contextmanager
    def task(self, index: int) -> Iterator[BlockTask]:
        """A block with its parameters, proven to be the checkpoint's."""
        name = self.streamed.blocks.names[index]
        with self.streamed.block(index) as module:
            layers = {
                _inside(x, name): _layer_task(x, self.streamed) for x in self.plan.blocks[index]
            }
            yield BlockTask(index, module, layers, self.computing)

    def _run_stages(self, task: BlockTask) -> None:
        for stage in self.stages:
            stage.run(task)

    def _adopt(self, n: int) -> Callable[[int, Call], None]:
        """Puts the first block's inputs in a store, both chains' of a sample in one row.

        In place: a paused forward holds on to its embeddings until its end.
        """
        stores: list[Store] = []
        rows: list[Tensor] = []

        def adopt(i: int, call: Call) -> None:
            if not stores:
                stores.append(self.pool.take(n, call.hidden))
            if i < n:
                rows.append(stores[0].put(i, call.hidden))
            if torch.equal(call.hidden, rows[i % n]):
                call.hidden.set_(rows[i % n])  # type: ignore[call-overload]
            self.pool.rest()

        return adopt

    def _tune(
        self,
        unit: Unit,
        calls: dict[int, Call],
        n: int,
        forwards: PausedForwards,
        *,
        written: bool = False,
    ) -> Iterator[Mapping[int, Any]]:
        """Tune on the quantized chain's inputs toward the float chain's outputs.

        Inputs ``0 .. n-1`` are the float chain, ``n ..`` the quantized one (where there is one).
        Yields what each forward that waits gets as the last block's output, float chain first: by
        then its inputs are needed no more, and the rounded block's outputs take their place.
        ``written``: tuned by an earlier process, the weights are in the files.
        """
        task, device = unit.task, self.streamed.device
        floats = {i: call for i, call in calls.items() if i < n}
        quants = {i - n: call for i, call in calls.items() if i >= n}
        calls.clear()
        outputs, given = self._reached(unit, floats, forwards)

        def joined(chain: dict[int, Call]) -> Samples:
            all_of = {i: [call, *(own[i] for own in given)] for i, call in chain.items()}
            return Samples({i: joined_call(own) for i, own in all_of.items()}, device)

        task.floats = joined(floats)
        floats.clear()
        task.x = joined(quants) if quants else task.floats
        if not written:
            task.y = {i: hidden(out) for i, out in outputs.items()}
            task.held = held_out(self.recipe, task.x.indices)
            if task.layers:
                self._run_stages(task)
        yield outputs
        weights = self._written if written else _dequantized
        if quants:
            task.floats = None
            rounded = self._rounded(unit, quants, given, forwards, n, weights)
        else:
            rounded = self._forward_all(task, task.x, weights(task))
        if task.y is not None:
            task.report["loss"] = _mean_loss({i: rounded[i] for i in task.judged}, task.y)
        if task.x is not task.floats:
            yield {i + n: out for i, out in rounded.items()}

    def _reached(
        self, unit: Unit, calls: Mapping[int, Call], forwards: PausedForwards
    ) -> tuple[dict[int, Any], list[dict[int, Call]]]:
        """The float chain up to the end of a unit: the last block's outputs, and what the model
        gives each block but the first, without the hidden state."""
        first, *others = unit.parts
        outputs = self.float_outputs(first, Samples(calls, self.streamed.device))
        given: list[dict[int, Call]] = []
        for part in others:
            forwards.resume(outputs)
            found = self._next(forwards, part, [*calls])
            if reason := unfit(outputs, found, calls):
                self._apart(part, reason)
            outputs = self.float_outputs(part, Samples(found, self.streamed.device))
            given.append({i: call.with_hidden(torch.empty(0)) for i, call in found.items()})
        return outputs, given

    def _rounded(
        self,
        unit: Unit,
        calls: dict[int, Call],
        given: Sequence[Mapping[int, Call]],
        forwards: PausedForwards,
        n: int,
        weights: Callable[[BlockTask], dict[str, Tensor]],
    ) -> dict[int, Any]:
        """The quantized chain to the end of a unit: the last block's outputs."""
        for at, part in enumerate(unit.parts):
            samples = Samples(calls, self.streamed.device)
            calls.clear()
            rounded = self._forward_all(part, samples, weights(part))
            if at < len(given):
                forwards.resume({i + n: out for i, out in rounded.items()})
                then = unit.parts[at + 1]
                found = self._next(forwards, then, [i + n for i in rounded])
                calls = {i - n: call for i, call in found.items()}
                if name := differs(calls, given[at]):
                    self._apart(then, f"{name} depends on what one of them puts out")
        return rounded

    def _next(
        self, forwards: PausedForwards, part: BlockTask, inputs: Sequence[int]
    ) -> dict[int, Call]:
        """The calls of a unit's next block."""
        found = forwards.at(part.index, inputs)
        if found is None:
            self._apart(part, "text does not go straight from one to the other")
        return found

    def _apart(self, part: BlockTask, reason: str) -> NoReturn:
        before, name = self.streamed.blocks.names[part.index - 1 : part.index + 1]
        raise InputError(
            f"nblocks={self.recipe.nblocks}: {before} and {name} of {self.streamed.checkpoint.path}"
            f" cannot be tuned as one: {reason}; leave nblocks at 1"
        )

    def _written(self, task: BlockTask) -> dict[str, Tensor]:
        """The weights as the artefact has them."""
        name, modules = self.streamed.blocks.names[task.index], self.plan.contents.modules
        return {
            _inside(layer, name): torch.cat(
                [
                    hal.dequantize(
                        self.artefact.read(modules[part.key]),
                        dtype=task.layers[_inside(layer, name)].dtype,
                    )
                    for part in layer.view.parts
                ]
            ).to(self.streamed.device)
            for layer in self.plan.blocks[task.index]
        }

    def _forward_all(
        self,
        task: BlockTask,
        samples: Samples,
        weights: dict[str, Tensor],
        check: Callable[[BlockTask, Tensor], None] = lambda task, out: None,
    ) -> dict[int, Any]:
        """Block output of every sample, in the container the block returns."""
        outputs: dict[int, Any] = {}
        store: Store | None = None
        with torch.no_grad():
            for batch in samples.batches(samples.indices, self.at_once):
                out = task.forward(samples.gather(batch), weights)
                check(task, hidden(out))
                out = moved(out, self.streamed.home)
                for i, piece in zip(batch, split(out, len(batch)), strict=True):
                    store = store or self.pool.take(len(samples.indices), hidden(piece))
                    row = store.put(samples.indices.index(i), hidden(piece))
                    outputs[i] = (row, *piece[1:]) if isinstance(piece, tuple) else row
        return outputs

    def float_outputs(self, task: BlockTask, floats: Samples) -> dict[int, Any]:
        """Raises InputError for a block that does not run as its config has it."""
        try:
            return self._forward_all(task, floats, {}, self._finite)
        except InputError:
            raise
        except Exception:
            call = floats.gather(floats.indices[:1])
            with torch.no_grad(), self._own_code(self.streamed.blocks.names[task.index]):
                task.module(*call.args, **call.kwargs)  # alone, and nothing of ours around it
            raise

    def _own_code(self, name: str) -> AbstractContextManager[None]:
        """Where nothing but the model's own code runs, on what it is given: settings that
        contradict each other fail anywhere in there."""
        file = self.streamed.checkpoint.path / "config.json"
        return blamed(f"{file}: {name} does not run with it", AGAIN)

    def _finite(self, task: BlockTask, out: Tensor) -> None:
        if not torch.isfinite(out).all():
            raise InputError(
                f"{self.streamed.checkpoint.path}: "
                f"{self.streamed.blocks.names[task.index]} puts out NaN or infinity in "
                f"{self.streamed.dtype} before anything is quantized; save the model in bfloat16 "
                "first, or use --recipe rtn"
            )

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """bf16 arithmetic for f32 models; other models compute in their own dtype.

        Afterwards the samples' memory is given back where they lie in files.
        """
        kind = self.streamed.device.type
        try:
            with torch.autocast(kind, torch.bfloat16, self.streamed.dtype == torch.float32):
                yield
        finally:
            self.pool.rest()

    def _head(self, layer: Layer) -> None:
        """The output projection: rounded to nearest, for want of a block to tune it in."""
        name = layer.view.param.rpartition(".")[0]
        self.streamed.load([name], self.streamed.device)
        task = _layer_task(layer, self.streamed)
        task.params = hal.search(task.w, layer.spec)
        self._write(layer, task)
        self.streamed.drop(self.streamed.model.get_submodule(name))

    def _write(self, layer: Layer, task: LayerTask) -> None:
        """Codes of one weight, cut into the checkpoint's modules, packed and put in the file."""
        q = hal.quantize(task.w, task.ready, layer.spec)
        if not torch.isfinite(q.parts["scale"]).all():
            raise InputError(
                f"{self.streamed.checkpoint.path}: {layer.view.param}: a scale exceeds "
                f"{layer.spec.scale}; "
                "leave the layer out with --ignore-layers"
            )
        for part in layer.view.parts:
            self.artefact.put(self.plan.contents.modules[part.key], q.rows(*part.rows))


def _layer_task(layer: Layer, streamed: StreamedModel) -> LayerTask:
    """The float weight ``[N, K]``, proven to be the checkpoint's own bytes."""
    verify(layer.view, streamed)
    parameter = streamed.model.get_parameter(layer.view.param).detach()
    return LayerTask(layer.spec, layer.view.matrix(parameter).contiguous(), layer.view.restore)


def _inside(layer: Layer, block: str) -> str:
    return layer.view.param.removeprefix(block + ".")


def _dequantized(task: BlockTask) -> dict[str, Tensor]:
    """The weights as the artefact will have them."""
    return {
        name: hal.dequantize(hal.quantize(layer.w, layer.ready, layer.spec), dtype=layer.dtype)
        for name, layer in task.layers.items()
    }


def _received(forwards: PausedForwards, digests: chains.Digests) -> dict[str, list[Any]] | None:
    """Where every forward waits, and the digest of what it hands over; None = not to be told."""
    try:
        return {
            str(i): [block, digests.value((call.args, call.kwargs))]
            for i, (block, call) in forwards.waiting.items()
        }
    except chains.Opaque:
        return None


def _reports(journal: Journal) -> list[BlockReport]:
    """Outcomes of all blocks that are committed."""
    return [BlockReport(**report) for row in journal.rows for report in row["blocks"]]


def _mean_loss(outputs: Mapping[int, Any], targets: Mapping[int, Tensor]) -> float:
    errors = [relative_error(hidden(out), targets[i]) for i, out in outputs.items()]
    return float(torch.stack(errors).mean())
