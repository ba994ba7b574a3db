# SPDX-License-Identifier: Apache-2.0
"""The survey of a streamed model: the 2-D face [N, K] of its weights, and their tensors."""

import torch
from torch import nn

from autoround.errors import InputError
from autoround.models import compat
from autoround.models.loader import StreamedModel
from autoround.models.survey import Part, Survey, WeightView, stacked, tied_to
from autoround.scheme import KEPT

# Subclasses of nn.Linear that compute y = x W^T + b and nothing else. Routers subclass it too,
# hence a list.
PLAIN_LINEARS = frozenset({"FalconLinear"})


def survey_of(streamed: StreamedModel) -> Survey:
    """What a plan needs to know of the model."""
    surveyed = [views_of(streamed, name) for name in streamed.blocks.names]
    # Two blocks with one weight: rounded for the first, it would be wrong for the later one.
    shared = [view for block in surveyed for view in block if view.tied]
    return Survey(
        streamed.checkpoint,
        tuple(tuple(view for view in block if not view.tied) for block in surveyed),
        _kept_modules(streamed, shared),
        head_view(streamed),
        streamed.blocks.name,
        frozenset(streamed.unused),
    )


def _kept_modules(streamed: StreamedModel, shared: list[WeightView]) -> dict[str, str]:
    """Weights of the blocks that are never quantized, by checkpoint module or key -> why."""
    aliases = [name.removesuffix(".weight") for view in shared for name in view.tied]
    owners = [part.module for view in shared for part in view.parts]
    kept = {
        key.removesuffix(".weight"): tied_to(other)
        for other, owner in streamed.ties.items()
        for key in streamed.sources.get(owner, ())
        if not streamed.blocks.owns(owner)
    }
    kept |= dict.fromkeys([*owners, *aliases], "shared between blocks")
    for block in streamed.blocks.names:
        for param, reason in skipped(streamed, block).items():
            for key in streamed.sources.get(param, ()):
                kept[key.removesuffix(".weight")] = reason
    return kept


def views_of(streamed: StreamedModel, block_name: str) -> list[WeightView]:
    """All quantizable weights under a module, in model order; nothing need be materialised."""
    return _survey(streamed, block_name)[0]


def skipped(streamed: StreamedModel, block_name: str) -> dict[str, str]:
    """Parameters of two or more dimensions under a module that are never quantized -> why."""
    return _survey(streamed, block_name)[1]


def head_view(streamed: StreamedModel) -> WeightView | None:
    """The output projection, or None where there is none or it is the embedding (tied)."""
    getter = getattr(streamed.model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if type(head) is not nn.Linear:
        return None
    name = (
        next(name for name, module in streamed.model.named_modules() if module is head) + ".weight"
    )
    view = _view(streamed, name, head)
    return view if isinstance(view, WeightView) and not view.tied else None


def verify(view: WeightView, streamed: StreamedModel) -> None:
    """Compare a materialised parameter with the raw checkpoint bit for bit, part by part.

    InputError at a difference: an export would write under a name what is not stored there."""
    p = streamed.model.get_parameter(view.param)
    matrix = view.matrix(p.detach())
    raw = streamed.checkpoint.tensors([part.key for part in view.parts])
    covered = 0
    for part in view.parts:
        stored = raw[part.key].t() if part.transposed else raw[part.key]
        begin, end = part.rows
        if begin != covered or not torch.equal(
            matrix[begin:end], stored.to(matrix.device, matrix.dtype)
        ):
            raise InputError(
                f"{view.param} rows {begin}:{end} are not {part.key} of "
                f"{streamed.checkpoint.path}; this architecture is not supported yet: exclude the "
                "layer, and report it"
            )
        covered = end
    if covered != view.shape[0]:
        raise InputError(
            f"{streamed.checkpoint.path}: {view.param} rows {covered}:{view.shape[0]} come from "
            "nowhere; exclude it, report it"
        )


def _survey(streamed: StreamedModel, prefix: str) -> tuple[list[WeightView], dict[str, str]]:
    found: list[WeightView] = []
    skips: dict[str, str] = {}
    for path, module in streamed.model.get_submodule(prefix).named_modules(prefix=prefix):
        for leaf, p in module._parameters.items():
            if p is None or p.ndim < 2:
                continue
            name = f"{path}.{leaf}"
            made = _refusal(path, leaf, module) or _view(streamed, name, module)
            if isinstance(made, WeightView):
                found.append(made)
            else:
                skips[name] = made
    return found, skips


def _refusal(path: str, leaf: str, module: nn.Module) -> str | None:
    """Why this parameter is no candidate by its kind and name, or None."""
    kind = type(module).__name__
    p = module._parameters[leaf]
    if KEPT.search(path):
        return f"{path.rpartition('.')[2]} keeps the checkpoint's precision (router or state)"
    if isinstance(module, nn.Linear):
        plain = type(module) is nn.Linear or kind in PLAIN_LINEARS
        return None if plain and leaf == "weight" else f"{kind} is not a plain linear layer"
    if compat.is_conv1d(module):
        return None if leaf == "weight" else f"{leaf} is not the weight"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if p is not None and p.ndim == 3 and not leaf.endswith("bias"):
        return None  # an expert stack if its source says so
    return f"{kind}.{leaf} is not the weight of a linear layer"


def _view(streamed: StreamedModel, name: str, module: nn.Module) -> WeightView | str:
    if name in streamed.ties:
        return f"tied to {streamed.ties[name]}"
    home = streamed.recipe(name)
    if home is None:
        return "not in the checkpoint"
    shape = tuple(streamed.model.get_parameter(name).shape)
    if len(shape) == 3 and not home.recipe.startswith("experts"):
        return _stacked(streamed, name, home, shape)
    flip = compat.is_conv1d(module)
    experts = shape[0] if len(shape) == 3 else 1
    n, k = (shape[1], shape[0]) if flip else (shape[-2] * experts, shape[-1])
    parts = _parts(streamed, home, experts, flip)
    if isinstance(parts, str) or parts[-1].rows[1] != n:
        return (
            parts if isinstance(parts, str) else f"made of {parts[-1].rows[1]} rows, {n} expected"
        )
    tied = tuple(sorted(other for other, owner in streamed.ties.items() if owner == name))
    return WeightView(name, (n, k), experts, parts, shape, flip, tied)


def _stacked(
    streamed: StreamedModel, name: str, home: compat.Source, shape: tuple[int, ...]
) -> WeightView | str:
    """Experts that are one tensor in the checkpoint too, in rows or columns."""
    key = home.keys[0]
    stack = streamed.checkpoint.stacks.get(key)
    if stack is None or len(home.keys) > 1:
        return f"{key} has {len(shape)} dimensions, and no experts are known to be stored so"
    # Converted on the way, or as it is stored; `verify` proves it.
    return stacked(stack, name, shape, stack.transposed == (shape == stack.shape))


def _parts(
    streamed: StreamedModel, home: compat.Source, experts: int, flip: bool
) -> tuple[Part, ...] | str:
    """Row ranges in view order: expert after expert, within one as the converter (gate, up)."""
    if home.recipe == "other":
        return "the checkpoint stores it in a form whose rows are not its rows"
    if any(len(group) != experts for group in home.groups):
        return f"{len(home.keys)} checkpoint tensors for {experts} experts"
    parts: list[Part] = []
    at = 0
    for expert in range(experts):
        for group in home.groups:
            key = group[expert]
            if not key.endswith(".weight"):
                return f"checkpoint key {key} is not a module's weight"
            stored = streamed.checkpoint.entries[key].shape
            if len(stored) != 2:
                return f"checkpoint tensor {key} has {len(stored)} dimensions"
            rows = stored[1] if flip else stored[0]
            parts.append(Part(key.removesuffix(".weight"), key, (at, at + rows), flip))
            at += rows
    return tuple(parts)
