# SPDX-License-Identifier: Apache-2.0
"""The block loop: read one block, tune it, write it packed, free it."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import mse_loss

import hal
from autoround import stream
from autoround.artefact import Artefact, check_output, output_directory, places, run_record
from autoround.calib import TokenSet, load_tokens
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.events import (
    BlockDone,
    BlockFailed,
    BlockStarted,
    Calibrated,
    Finished,
    Listener,
    Planned,
    Step,
    unheard,
)
from autoround.models import (
    Call,
    PausedForwards,
    Pool,
    Samples,
    Store,
    StreamedModel,
    split,
    survey_of,
    trim,
    verify,
)
from autoround.plan import Layer, ModelPlan, make_plan
from autoround.recipe import Recipe, shard_bytes
from autoround.run import BlockReport, Run, Source, peak_bytes
from autoround.stages import (
    BlockTask,
    Feedback,
    Kept,
    LayerTask,
    Measure,
    Search,
    Signed,
    SignRound,
    Stage,
    Steps,
    WeightedSearch,
    adam,
    momentum,
)
from autoround.stages.task import hidden

#: One sample in so many only judges what the closed form makes of the others.
HELD_OUT = 8


def quantize(
    recipe: Recipe,
    source: Source,
    output: Path,
    *,
    tokenizer: Any = None,
    dataset: str | Iterable[Any] | None = None,
    listener: Listener = unheard,
) -> Run:
    """Quantize a checkpoint into ``output`` (a new or empty directory).

    ``dataset`` overrides the recipe's with Python objects; ``tokenizer`` the checkpoint's own.
    Raises InputError before any work for input that cannot succeed; an exception later leaves
    ``output`` as it was.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint(resolve(str(source.model)))
    check_output(output)
    if stream.refuse(recipe, checkpoint) is None:
        return stream.quantize(recipe, checkpoint, output, listener)
    streamed = StreamedModel(
        checkpoint, device=source.device, trust_remote_code=source.trust_remote_code
    )
    plan = make_plan(survey_of(streamed), recipe)
    listener(Planned(plan))
    given = recipe.dataset if dataset is None else dataset
    tokens = _tokens(recipe, streamed, tokenizer, given) if recipe.calibrates else None
    if tokens:
        listener(Calibrated(tokens))
    checkpoint.scan_finite()
    run = Run(output, plan, tokens, listener, checkpoint.total_bytes)
    shard = shard_bytes(recipe.max_shard_size)
    with output_directory(output):
        with Artefact(plan.contents, plan.written, output, shard) as artefact:
            for tensor in plan.contents.kept:
                artefact.keep(tensor.name, checkpoint.get(tensor.name))
            _Engine(recipe, streamed, plan, artefact, run, source.low_cpu_mem_usage).run(tokens)
        artefact.describe(run_record(plan, run.record(recipe)))
    run.prove(places(plan.targets, output))
    run.seconds = time.perf_counter() - started
    listener(Finished(run))
    return run


class _Engine:
    """One run over all blocks."""

    def __init__(
        self,
        recipe: Recipe,
        streamed: StreamedModel,
        plan: ModelPlan,
        artefact: Artefact,
        run: Run,
        spill: bool,
    ) -> None:
        self.recipe, self.streamed, self.plan = recipe, streamed, plan
        self.artefact, self.out = artefact, run
        self.stages = stages_of(recipe, lambda t, loss: run.tell(Step(t, loss)))
        self.pool = Pool(run.output, spill)

    def run(self, tokens: TokenSet | None) -> None:
        if self.plan.head is not None:
            self._head(self.plan.head)
        if tokens is None:
            for index in range(len(self.streamed.blocks.modules)):
                with self._block(index) as task:
                    self._run_stages(task)
            return
        self.streamed.load_outside_blocks()
        rows = [row[None].to(self.streamed.device) for row in tokens.ids]
        chains = 2 if self.recipe.enable_quanted_input else 1
        inputs = [{"input_ids": row} for row in rows * chains]
        last = len(self.streamed.blocks.modules) - 1
        modules, adopt = self.streamed.blocks.modules, self._adopt(len(rows))
        with PausedForwards(self.streamed.model, modules, inputs, adopt) as forwards:
            trim()
            for index, calls in forwards:
                with self._block(index) as task:
                    for outputs in self._tune(task, calls, len(rows)):
                        if index < last:  # the model's head adds nothing that tuning needs
                            forwards.resume(outputs)
                if index == last:
                    break
        for index in sorted(set(range(last + 1)) - {report.index for report in self.out.blocks}):
            with self._block(index) as task:  # text alone never reaches it: cross-attention
                Search().run(task)

    @contextlib.contextmanager
    def _block(self, index: int) -> Iterator[BlockTask]:
        """A materialised block as a task; packed, written and reported on leaving."""
        started, name = time.perf_counter(), self.streamed.blocks.names[index]
        self.out.tell(BlockStarted(index, name))
        layers = {_inside(layer, name): layer for layer in self.plan.blocks[index]}
        with self.streamed.block(index) as module:
            tasks = {key: _layer_task(layer, self.streamed) for key, layer in layers.items()}
            task = BlockTask(index, module, tasks, self._computing)
            try:
                yield task
            except Exception as error:
                self.out.tell(BlockFailed(index, name, task, error))
                raise
            for key, layer in layers.items():
                self._write(layer, tasks[key])
        trim()
        rtn, loss = (task.report.get(key, math.nan) for key in ("loss_rtn", "loss"))
        seconds = time.perf_counter() - started
        sparse = int(task.report.get("sparse_experts", 0))
        report = BlockReport(index, name, rtn, loss, seconds, peak_bytes(), sparse)
        self.out.blocks.append(report)
        self.out.tell(BlockDone(report))

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

    def _tune(self, task: BlockTask, calls: dict[int, Call], n: int) -> Iterator[Mapping[int, Any]]:
        """Tune on the quantized chain's inputs toward the float chain's outputs.

        Inputs ``0 .. n-1`` are the float chain, ``n ..`` the quantized one (where there is one).
        Yields what each waiting forward gets as its block's output, float chain first: by then its
        inputs are needed no more, and the rounded block's outputs take their place.
        """
        floats = Samples({i: call for i, call in calls.items() if i < n})
        quants = Samples({i - n: call for i, call in calls.items() if i >= n})
        calls.clear()
        task.x, task.floats = quants if quants.indices else floats, floats
        outputs = self._forward_all(task, floats, {}, self._finite)
        task.y = {i: hidden(out) for i, out in outputs.items()}
        task.held = held_out(self.recipe, task.x.indices)
        if task.layers:
            self._run_stages(task)
        yield outputs
        if quants.indices:
            del floats
            task.floats = None
        rounded = self._forward_all(task, task.x, _dequantized(task))
        task.report["loss"] = _mean_loss({i: rounded[i] for i in task.judged}, task.y)
        if quants.indices:
            yield {i + n: out for i, out in rounded.items()}

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
            for batch in samples.batches(samples.indices, self.recipe.batch_size):
                out = task.forward(samples.gather(batch), weights)
                check(task, hidden(out))
                for i, piece in zip(batch, split(out, len(batch)), strict=True):
                    store = store or self.pool.take(len(samples.indices), hidden(piece))
                    row = store.put(samples.indices.index(i), hidden(piece))
                    outputs[i] = (row, *piece[1:]) if isinstance(piece, tuple) else row
        return outputs

    def _finite(self, task: BlockTask, out: Tensor) -> None:
        if not torch.isfinite(out).all():
            raise InputError(
                f"{self.streamed.blocks.names[task.index]} puts out NaN or infinity in "
                f"{self.streamed.dtype} before anything is quantized; save the model in bfloat16 "
                "first, or use --recipe rtn"
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
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
        self.streamed.load([name])
        task = _layer_task(layer, self.streamed)
        task.params = hal.search(task.w, layer.spec)
        self._write(layer, task)
        self.streamed.drop(self.streamed.model.get_submodule(name))

    def _write(self, layer: Layer, task: LayerTask) -> None:
        """Codes of one weight, cut into the checkpoint's modules, packed and put in the file."""
        q = hal.quantize(task.w, task.ready, layer.spec)
        if not torch.isfinite(q.parts["scale"]).all():
            raise InputError(
                f"{layer.view.param}: a scale exceeds {layer.spec.scale}; "
                "leave the layer out with --ignore-layers"
            )
        for part in layer.view.parts:
            self.artefact.put(self.plan.contents.modules[part.key], q.rows(*part.rows))


def held_out(recipe: Recipe, indices: tuple[int, ...]) -> tuple[int, ...]:
    """The samples that only judge."""
    return indices[1:][-max(1, len(indices) // HELD_OUT) :] if recipe.feedback else ()


def stages_of(recipe: Recipe, on_step: Callable[[int, float], None]) -> tuple[Stage, ...]:
    """What a recipe does to each block, in order."""
    stages: list[Stage] = [Search()]
    size = recipe.batch_size
    if recipe.calibrates:
        stages.append(Measure("loss_rtn", size))
    if recipe.search:
        stages.append(WeightedSearch(size))
    if recipe.feedback:
        stages.append(Kept(Feedback(size), "loss_rtn", size))
    if recipe.iters:
        stages.append(_signround(recipe, on_step))
    return tuple(stages)


def _signround(recipe: Recipe, on_step: Callable[[int, float], None]) -> SignRound:
    def minmax_lr(bits: int) -> float:
        if not recipe.enable_minmax_tuning:
            return 0.0
        return recipe.learning_rate(bits) if recipe.minmax_lr is None else recipe.minmax_lr

    return SignRound(
        recipe.iters,
        recipe.batch_size,
        recipe.gradient_accumulate_steps,
        recipe.learning_rate,
        minmax_lr,
        recipe.seed,
        on_step,
        widest=2.0 if recipe.search else 1.0,
        trim=lambda bits: 1e-3 if recipe.search and bits < 4 else 0.0,
        keep_last=recipe.not_use_best_mse,
        patience=recipe.dynamic_max_gap,
        steps=_steps(recipe),
    )


def _steps(recipe: Recipe) -> Callable[[], Steps]:
    if recipe.enable_adam:
        return adam
    return functools.partial(momentum, recipe.momentum) if recipe.momentum else Signed


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


def _mean_loss(outputs: Mapping[int, Any], targets: Mapping[int, Tensor]) -> float:
    errors = [mse_loss(hidden(out).float(), targets[i].float()) for i, out in outputs.items()]
    return float(torch.stack(errors).mean())


def _tokens(
    recipe: Recipe, streamed: StreamedModel, tokenizer: Any, dataset: str | Iterable[Any] | None
) -> TokenSet:
    if streamed.model.main_input_name != "input_ids" or streamed.model.config.is_encoder_decoder:
        raise InputError(
            f"{type(streamed.model).__name__} does not run on text alone, so it cannot be tuned; "
            "use --recipe rtn"
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(streamed.checkpoint.path)
    config = streamed.model.config.get_text_config()
    limits = (
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    seqlen = min([recipe.seqlen, *(n for n in limits if isinstance(n, int) and n > 0)])
    tokens = load_tokens(
        dataset, tokenizer, nsamples=recipe.nsamples, seqlen=seqlen, seed=recipe.seed
    )
    rows = streamed.model.get_input_embeddings().weight.shape[0]
    if int(tokens.ids.max()) >= rows:
        raise InputError(
            f"token {int(tokens.ids.max())} is outside the model's {rows} embeddings; "
            "the tokenizer or the token ids belong to another model"
        )
    return tokens


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's own tokenizer, or None when it has none that loads."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception:  # every way a tokenizer can be missing; load_tokens says so if it is needed
        return None
    # Without any files transformers makes up a tokenizer of special tokens alone.
    return tokenizer if len(tokenizer) > 16 else None
