# SPDX-License-Identifier: Apache-2.0
"""What a run will need, from headers alone: memory by what holds it, disk to the byte.

Memory is arithmetic over what a run really holds; the factors were fitted to the peaks of runs on
models of 0.01 to 0.27 G weights; docs/planning.md has where they hold and where not. What is
alive at one time: the process, the embeddings, one block, waiting forwards, hidden states of all
samples, and the larger of what forwards of a batch and what the work on one matrix take. Before
the end, the proof maps pieces of the tensors of the source and of the files that hold them.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from autoround.errors import InputError
from autoround.formats.contents import Contents
from autoround.models.store import COPIES, available_bytes
from autoround.models.survey import WeightView
from autoround.recipe import Recipe
from autoround.run.plan import Layer, ModelPlan
from autoround.stages.end_to_end import BATCH, LOGITS, TOKENS
from autoround.verify.check import PIECE

#: What a run adds to a process that has made its plan: code and pools of kernels, the tokenizer.
PROCESS = 40_000_000
#: Bytes of activations alive in the forwards of a batch, over those that the layers of a block put
#: out: while moments are taken, while a matrix is worked on, and with gradients. First for outputs
#: that the C library gives back to the system at once, then for smaller ones, which it keeps.
MOMENTS, KEPT, GRADIENTS = (2.6, 4.3), (1.1, 3.5), (4.3, 5.6)
AT_ONCE = 32 << 20
#: The same in f32 models, whose products are bf16 and whose residual stream is not.
WIDE = 1.3
#: Bytes per K^2 of a matrix [N, K] in closed form: moments and what is lacking, of samples tuned
#: on and of those that judge, in f32; a factor and two right sides in f64.
SYSTEM = 37
#: Bytes per weight of one matrix in closed form: what is rounded, codes, slopes, in f32.
MATRIX = 24
#: Bytes per weight of a block after the closed form: f32 on the grid, and as the model has it.
ROUNDED = {2: 6, 4: 8}
#: Bytes per weight of a block under SignRound: v and its best in f32, rounded weights, gradients.
STEPS = {2: 12, 4: 16}
#: Bytes of a scale while all are tuned (value, change, gradient, two of Adam's); of a logit with
#: its gradient, as the model puts it out and in f32.
SCALE, LOGIT = 20, 14
#: Hidden states of all samples that are held at most while a block is worked on.
HELD = 4
#: Bytes of a forward that waits between blocks: its stack, what its thread keeps, its arguments.
FORWARD = 250_000
#: Bytes of the moments of experts gathered in one pass (stages/feedback.py).
EXPERTS_AT_ONCE = 1 << 30


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes. ``memory``: what holds it -> how much, the whole being their sum. ``device``: of an
    accelerator, 0 without one. ``files``: of the result; ``scratch``: beside them while it runs."""

    memory: dict[str, int]
    device: int
    files: int
    scratch: int

    @property
    def ram(self) -> int:
        """Largest resident size of the process."""
        return sum(self.memory.values())

    @property
    def disk(self) -> int:
        """Largest room on the disk."""
        return self.files + self.scratch


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the memory of the largest of `units`: bytes an element, tokens a sample and a
    batch.

    ``hidden``: bytes of one copy of all samples' hidden states. ``outputs``: bytes that each layer
    puts out for a batch, in bf16; experts count as often as a token visits them.
    """

    itemsize: int
    seqlen: int
    tokens: int
    hidden: int
    outputs: tuple[float, ...]
    weights: int
    stored: int


def needs(
    plan: ModelPlan, recipe: Recipe, base: int, *, files: int, low_memory: bool, accelerated: bool
) -> Needs:
    """``base``: resident size of the process now; ``files``: bytes of all files of weights.

    Hidden states lie in a file with ``low_memory``, and where half the memory that is free on this
    machine would not hold them, as in the run.
    """
    shape = shape_of(plan, recipe)
    kept, every = _largest(plan.contents)
    proof = min(3 * kept[0] + kept[1], 2 * PIECE * (os.cpu_count() or 1))
    if not recipe.calibrates:
        return Needs({"process": base + PROCESS, "tensors": max(proof, sum(every))}, 0, files, 0)
    held = HELD if recipe.enable_quanted_input else HELD // 2
    held += recipe.nblocks > 1  # what passes from one block of a unit to the next
    low_memory = low_memory or COPIES * shape.hidden > available_bytes() // 2
    states = 0 if low_memory else held * shape.hidden
    work = max(_work(plan, recipe, shape), _whole(plan, replace(recipe, nblocks=1)))
    forwards = FORWARD * recipe.nsamples * (2 if recipe.enable_quanted_input else 1)
    tables = _outside(plan.contents)
    block = shape.stored + work + tables
    memory = {"process": base + PROCESS, "waiting forwards": forwards}
    if accelerated:  # what passes between blocks stays with the host
        memory |= {"hidden states": states, "largest tensors": max(proof, sum(every))}
    elif proof > block + states:
        memory["largest tensors, read back"] = proof
    else:
        memory |= {"embeddings": tables, "block": shape.stored, "hidden states": states}
        memory["work on a block"] = work
    scratch = (2 + (HELD + 1) * low_memory + 2) * shape.hidden
    return Needs(memory, block if accelerated else 0, files, scratch)


def units(plan: ModelPlan, nblocks: int) -> list[tuple[Layer, ...]]:
    """Layers of the blocks that are in memory together."""
    starts = range(0, len(plan.blocks), nblocks)
    return [tuple(chain(*plan.blocks[at : at + nblocks])) for at in starts]


def shape_of(plan: ModelPlan, recipe: Recipe) -> Shape:
    """Of the largest unit."""
    contents = plan.contents
    config = contents.config.get("text_config") or contents.config
    largest = max(units(plan, recipe.nblocks), key=_weights, default=())
    itemsize = _itemsize(contents, largest)
    limit = config.get("max_position_embeddings")
    seqlen = min(recipe.seqlen, limit) if isinstance(limit, int) and limit > 0 else recipe.seqlen
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    if not isinstance(width, int):
        width = max((layer.view.shape[1] for layer in largest), default=0)
    seen = recipe.nsamples - max(1, recipe.nsamples // 8) * recipe.feedback
    tokens = max(1, min(recipe.batch_size, seen)) * seqlen
    outputs = (layer.view.shape[0] * visits(layer.view, config) for layer in largest)
    return Shape(
        itemsize,
        seqlen,
        tokens,
        recipe.nsamples * seqlen * width * itemsize,
        tuple(2 * tokens * n for n in outputs),
        _weights(largest),
        _weights(largest) * itemsize,
    )


def visits(view: WeightView, config: Mapping[str, Any]) -> float:
    """How often a token passes through a weight's rows: fused experts see their share."""
    if view.experts < 2:
        return 1.0
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_selected_experts")
    chosen = next((config[n] for n in names if isinstance(config.get(n), int)), 2)
    return float(min(1.0, chosen / view.experts))


def _work(plan: ModelPlan, recipe: Recipe, shape: Shape) -> int:
    """Bytes that come and go while one block is worked on."""
    wide = WIDE if shape.itemsize == 4 else 1.0
    small = wide * sum(n for n in shape.outputs if n < AT_ONCE)
    large = wide * sum(n for n in shape.outputs if n >= AT_ONCE)

    def alive(factors: tuple[float, float]) -> float:
        return factors[0] * large + factors[1] * small

    size = shape.itemsize if shape.itemsize in ROUNDED else 4
    if not recipe.feedback:
        steps = STEPS[size] * shape.weights if recipe.iters else ROUNDED[size] * shape.weights
        return int(alive(GRADIENTS if recipe.iters else MOMENTS) + steps)
    largest = max(plan.blocks, key=_weights, default=())
    systems = max((_system(group) for group in groups(largest)), default=0.0)
    work = max(alive(MOMENTS), alive(KEPT) + systems)
    return int(work + ROUNDED[size] * shape.weights)


def _whole(plan: ModelPlan, recipe: Recipe) -> int:
    """Bytes that come and go in the end-to-end stage; one block's weights are there at a time."""
    if not recipe.end_to_end:
        return 0
    shape = shape_of(plan, recipe)
    config = plan.contents.config.get("text_config") or plan.contents.config
    seqlen = shape.seqlen
    samples = max(1, min(BATCH, TOKENS // seqlen))
    wide = WIDE if shape.itemsize == 4 else 1.0
    forwards = GRADIENTS[1] * wide * sum(shape.outputs) * samples * seqlen / shape.tokens
    inputs = len(plan.blocks) * samples * shape.hidden / recipe.nsamples
    logits = LOGIT * min(LOGITS, 2 * samples * seqlen * int(config.get("vocab_size") or 0))
    scales = SCALE * sum(x.view.shape[0] * x.spec.groups(x.view.shape[1]) for x in plan.layers)
    largest = max((math.prod(x.view.shape) for x in plan.layers), default=0)
    block = (shape.itemsize + 1) * shape.weights + 2 * shape.itemsize * largest
    return int(forwards + inputs + logits + scales + block)


def groups(block: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that are rounded as one matrix: neighbours in one module with inputs of one width,
    as q, k and v are, or gate and up; each fused weight is one of its own."""
    found: list[list[Layer]] = []
    for layer in block:
        last = found[-1][-1] if found else None
        together = (
            last is not None
            and layer.view.experts == last.view.experts == 1
            and layer.spec == last.spec
            and layer.view.shape[1] == last.view.shape[1]
            and layer.view.param.rsplit(".", 2)[0] == last.view.param.rsplit(".", 2)[0]
            and not layer.view.param.rsplit(".", 2)[1].startswith(("o_", "out", "dense", "down"))
        )
        if together:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _system(group: Sequence[Layer]) -> float:
    """Bytes of the work on one matrix in closed form."""
    view, k = group[0].view, group[0].view.shape[1]
    n = sum(layer.view.shape[0] for layer in group)
    if view.experts < 2:
        return SYSTEM * k * k + MATRIX * n * k
    # The fused weight twice in f32, one expert at a time, the moments of as many as fit.
    some = min(4 * k * k * view.experts, max(EXPERTS_AT_ONCE, 4 * k * k))
    return 8 * n * k + some + SYSTEM * k * k + MATRIX * n * k / view.experts


def _largest(contents: Contents) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of the two largest tensors that stay, and of the two largest of all."""
    kept = sorted((t.nbytes for k, t in contents.tensors.items() if k not in contents.modules))
    every = sorted(t.nbytes for t in contents.tensors.values())
    kept, every = [0, 0, *kept], [0, 0, *every]
    return (kept[-1], kept[-2]), (every[-1], every[-2])


def _outside(contents: Contents) -> int:
    """Bytes of what the forwards read outside the blocks: all but the output projection."""
    kept = (t for t in contents.kept if not contents.inside(t.name) and "head" not in t.name)
    return sum(t.nbytes for t in kept)


def _itemsize(contents: Contents, block: Sequence[Layer]) -> int:
    """Bytes of an element of the block's weights."""
    keys = [part.key for layer in block for part in layer.view.parts]
    sizes = [contents.tensors[key].nbytes / math.prod(contents.tensors[key].shape) for key in keys]
    return round(max(sizes, default=2))


def _weights(block: Sequence[Layer]) -> int:
    return sum(math.prod(layer.view.shape) for layer in block)


def bytes_of(text: str, name: str) -> int:
    """``16GB`` -> bytes (decimal). Raises InputError naming the option."""
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(f"--{name} {text}: write it like 16GB or 800MB")
    return size


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that there are, None = whatever it takes."""

    ram: int | None = None
    vram: int | None = None
    disk: int | None = None

    def refuse(self, needs: Needs) -> str | None:
        """What does not fit, in words, or None."""
        asked = (("ram", self.ram, needs.ram), ("vram", self.vram, needs.device),
                 ("disk", self.disk, needs.disk))  # fmt: skip
        for name, limit, need in asked:
            if limit is not None and need > limit:
                return f"{name}: needs {need / 1e9:.2f} GB of {limit / 1e9:.2f} GB"
        return None


#: Options that make a run need less, those that cost least first: time, then samples, then all that
#: calibration gives. Each is tried alone, then with those before it.
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--low-cpu-mem-usage", {"low_memory": True}),
    ("--batch-size 4", {"batch_size": 4}),
    ("--batch-size 1", {"batch_size": 1}),
    ("--nblocks 1", {"nblocks": 1}),
    ("--end-to-end 0", {"end_to_end": 0}),
    ("--nsamples 32", {"nsamples": 32}),
    ("--seqlen 512", {"seqlen": 512}),
    ("--nsamples 8", {"nsamples": 8}),
)


def savings(recipe: Recipe, low_memory: bool) -> Iterator[tuple[str, Recipe, bool]]:
    """Options, and what they make of a recipe and of ``low_memory``, the cheapest first."""
    useful = []
    for words, change in SAVINGS if recipe.calibrates else ():
        (name, value), *_ = change.items()
        now = low_memory if name == "low_memory" else getattr(recipe, name)
        if (not now) if name == "low_memory" else value < now:
            useful.append((words, change))
    ways = [[one] for one in useful]
    ways += [useful[:n] for n in range(2, len(useful) + 1)]
    for way in ways:
        merged = {key: value for _, change in way for key, value in change.items()}
        low = merged.pop("low_memory", low_memory)
        used = {next(iter(change)): words for words, change in way}  # the last of a kind counts
        yield " ".join(used.values()), replace(recipe, **merged), low
    formats = recipe.format.split(",")
    if len(formats) > 1:
        yield (
            f"--format {formats[0]}, the others later by export",
            replace(recipe, format=formats[0]),
            low_memory,
        )
    if recipe.calibrates:
        plain = replace(recipe, feedback=False, search=False, iters=0, end_to_end=0, nblocks=1)
        yield "--recipe rtn", plain, False
