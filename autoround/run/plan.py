# SPDX-License-Identifier: Apache-2.0
"""Everything that can be decided from headers alone: each tensor's fate, each file's bytes."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import hal
from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.formats import (
    CANONICAL,
    Contents,
    Format,
    Module,
    Stored,
    Target,
    fit,
    formats_by_names,
    target,
)
from autoround.formats.engines import violations
from autoround.formats.table import choose, in_any_shape
from autoround.models.survey import Part, Survey, WeightView
from autoround.recipe import Recipe
from autoround.scheme import KEEP_BITS, Scheme, assign, pattern


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight to quantize: its view of the parameter and its scheme."""

    view: WeightView
    scheme: Scheme

    @property
    def spec(self) -> hal.Spec:
        spec = self.scheme.spec
        assert spec is not None
        return spec


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What a run will do: ``targets`` are the formats asked for.

    ``fates`` has one row for every tensor of the source checkpoint.
    """

    contents: Contents
    targets: tuple[Target, ...]
    blocks: tuple[tuple[Layer, ...], ...]
    head: Layer | None
    kept_because: dict[str, str]
    fates: dict[str, str]

    @property
    def layers(self) -> list[Layer]:
        return [layer for block in self.blocks for layer in block] + (
            [self.head] if self.head else []
        )

    @property
    def quantized_weights(self) -> int:
        return sum(layer.view.shape[0] * layer.view.shape[1] for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of a quantized weight, scales and zero points included."""
        bits = sum(
            layer.spec.bits_per_weight(layer.view.shape[1])
            * layer.view.shape[0]
            * layer.view.shape[1]
            for layer in self.layers
        )
        return bits / max(self.quantized_weights, 1)

    def because(self, key: str) -> str | None:
        """Why a tensor of the source stays as it is, where there is more to say than that."""
        return self.fates[key].partition(": ")[2] or None

    @property
    def written(self) -> tuple[Target, ...]:
        """Everything a run writes: the formats, and our own files first where none is exact."""
        exact = any(own.exact for own in self.targets)
        return self.targets if exact else (target(CANONICAL, self.contents), *self.targets)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the first format asked for."""
        return self.targets[0].nbytes


def make_plan(survey: Survey, recipe: Recipe) -> ModelPlan:
    """Assign schemes, refuse what cannot be stored, and place every output tensor.

    Raises InputError before anything is read or written.
    """
    base = recipe.weight_scheme
    found, head, kept = survey.blocks, survey.head, dict(survey.kept)
    parts = [part for block in found for view in block for part in view.parts]
    wanted = _assign(recipe, base, parts, head, kept)
    wanted |= dict.fromkeys(_outside(survey, recipe.to_quant_block_names), Scheme(KEEP_BITS))
    formats = formats_by_names(recipe.format)
    _refuse_schemes(formats, set(wanted.values()))
    views = [*found, (head,)] if head is not None and head.parts[0].module in wanted else [*found]
    layers, modules = _settled(views, wanted, formats, kept)
    if recipe.serve:
        adjusted = _adjusted(recipe.serve, formats, modules, survey, kept)
        layers, modules = _settled(views, {**wanted, **adjusted}, formats, kept)
        _adjusted(recipe.serve, formats, modules, survey, None)
    blocks = tuple(layers[: len(found)])
    head_layer = next((layer for own in layers[len(found) :] for layer in own), None)
    if not any(blocks) and head_layer is None:
        raise InputError(_nothing(kept))
    prefix = _prefix(found, survey.prefix)
    entries = survey.checkpoint.entries
    inside = [name for name in kept if name.startswith(prefix + ".") and name not in modules]
    modules |= {name: Scheme(KEEP_BITS) for name in inside if name not in entries}
    contents = _contents(survey, [x for own in layers for x in own], modules, base, prefix)
    fates = _fates(survey, contents, kept)
    targets = tuple(target(format, contents) for format in formats)
    return ModelPlan(contents, targets, blocks, head_layer, dict(sorted(kept.items())), fates)


def _refuse_schemes(formats: Collection[Format], schemes: Collection[Scheme]) -> None:
    """InputError where a format cannot hold one of the schemes, whatever a layer's shape."""
    modules = [module for scheme in schemes if (module := in_any_shape(scheme))]
    for format in formats:
        choose(format, modules)


def _outside(survey: Survey, chosen: tuple[str, ...]) -> list[str]:
    """Modules of the blocks that are not among those chosen (none chosen = all are)."""
    names = [f"{survey.prefix}.{i}" for i in range(len(survey.blocks))]
    inside = {name for key in chosen for name in pattern(key, names)} if chosen else set(names)
    blocks = zip(names, survey.blocks, strict=True)
    found = [view for name, block in blocks for view in block if name not in inside]
    return [part.module for view in found for part in view.parts]


def _assign(
    recipe: Recipe, base: Scheme, parts: list[Part], head: WeightView | None, kept: dict[str, str]
) -> dict[str, Scheme]:
    """Scheme asked for, per module; patterns may also name what is kept anyway."""
    head_name = head.parts[0].module if head else None
    names = [part.module for part in parts]
    universe = [*names, *kept, *([head_name] if head_name else ["lm_head"])]
    assigned = assign(universe, base, recipe.layer_config, recipe.ignore_layers)
    named: set[str] = set()
    for key in recipe.layer_config:
        found = pattern(key, universe)
        named |= set(found)
        # A pattern for a whole block passes over its router; one for the router alone is a mistake.
        if all(n in kept and assigned[n].bits != KEEP_BITS for n in found):
            raise InputError(f"layer_config: {found[0]} cannot be quantized: {kept[found[0]]}")
    wanted = {name: assigned[name] for name in names}
    if recipe.quant_lm_head or (named & {head_name, "lm_head"}):
        if head_name is None:
            raise InputError("lm_head is tied to the embeddings or absent; leave quant_lm_head off")
        wanted[head_name] = assigned[head_name]
    return wanted


def _settled(
    views: Sequence[Sequence[WeightView]],
    wanted: dict[str, Scheme],
    formats: Collection[Format],
    kept: dict[str, str],
) -> tuple[list[tuple[Layer, ...]], dict[str, Scheme]]:
    """The layers to quantize, in the groups of ``views``, and what every module gets."""
    modules: dict[str, Scheme] = {}
    layers = [
        tuple(
            Layer(view, scheme)
            for view in own
            if (scheme := _settle(view, wanted, formats, modules, kept)).bits != KEEP_BITS
        )
        for own in views
    ]
    return layers, modules


def _adjusted(
    engine: str,
    formats: Collection[Format],
    modules: dict[str, Scheme],
    survey: Survey,
    kept: dict[str, str] | None,
) -> dict[str, Scheme]:
    """Schemes that an inference engine wants instead, with the reasons noted in ``kept``.

    Raises InputError for what has no remedy, and for anything at all when ``kept`` is None.
    """
    shapes = {
        part.module: (part.rows[1] - part.rows[0], view.shape[1])
        for own in (*survey.blocks, *([(survey.head,)] if survey.head else []))
        for view in own
        for part in view.parts
    }
    better: dict[str, Scheme] = {}
    for format in formats:
        for broken in violations(engine, format.name, modules, shapes):
            if broken.remedy is None or kept is None:
                raise InputError(
                    f"--serve {engine}: {broken.modules[0]}: {broken.reason}; "
                    "choose another format or scheme"
                )
            better |= broken.remedy
            for name, scheme in broken.remedy.items():
                if scheme != modules[name]:
                    kept[name] = f"{broken.reason}: {scheme} instead"
    return better


def _settle(
    view: WeightView,
    wanted: dict[str, Scheme],
    formats: Collection[Format],
    modules: dict[str, Scheme],
    kept: dict[str, str],
) -> Scheme:
    """The scheme a view gets in the end; all its parts must agree. Records reasons in ``kept``."""
    asked = [wanted[part.module] for part in view.parts]
    schemes = {Scheme(KEEP_BITS) if s.bits == KEEP_BITS else s for s in asked}
    if len(schemes) > 1:
        raise InputError(
            f"the experts of {view.param} are one tensor and need one scheme; "
            f"give {view.parts[0].module} and its siblings the same, e.g. with a pattern"
        )
    scheme = schemes.pop()
    if scheme.bits == KEEP_BITS:
        for part in view.parts:
            kept.setdefault(part.module, "asked for")
    for part in view.parts:
        if scheme.bits == KEEP_BITS:
            break
        scheme, reason = fit((CANONICAL, *formats), _module(part, view, scheme))
        if reason:
            kept.update({p.module: reason for p in view.parts})
    modules.update(dict.fromkeys((part.module for part in view.parts), scheme))
    return scheme


def _nothing(kept: dict[str, str]) -> str:
    reasons = sorted(set(kept.values()))[:2] or ["the model has no linear layers in its blocks"]
    return f"no layer would be quantized ({'; '.join(reasons)}); check --scheme and --ignore-layers"


def _prefix(found: Iterable[Iterable[WeightView]], in_memory: str) -> str:
    """Name of the block list in the checkpoint's own names."""
    modules = [(str(i), p.module) for i, block in enumerate(found) for v in block for p in v.parts]
    if not modules:
        return in_memory
    index, first = modules[0]
    steps = first.split(".")
    for at, step in enumerate(steps):
        prefix = ".".join(steps[:at])
        if step == index and all(m.startswith(f"{prefix}.{i}.") for i, m in modules):
            return prefix
    return in_memory


def _module(part: Part, view: WeightView, scheme: Scheme) -> Module:
    spec = scheme.spec
    assert spec is not None
    shape = (part.rows[1] - part.rows[0], view.shape[1])
    return Module(part.module, part.key, spec, shape, part.transposed)


def _contents(
    survey: Survey,
    layers: Iterable[Layer],
    schemes: dict[str, Scheme],
    base: Scheme,
    prefix: str,
) -> Contents:
    """What the artefact will hold, in the source's order."""
    found = {
        part.key: _module(part, layer.view, layer.scheme)
        for layer in layers
        for part in layer.view.parts
    }
    checkpoint = survey.checkpoint
    keys = [key for key in checkpoint.unstacked(found) if key not in checkpoint.copies]
    tensors = {key: _stored(checkpoint, key) for key in keys}
    modules = {key: found[key] for key in tensors if key in found}
    if len(modules) != len(found):
        raise AssertionError(f"no tensors of the source: {sorted({*found} - {*modules})[:3]}")
    ordered = dict(sorted(schemes.items()))
    split = tuple(key for key in checkpoint.stacks if key not in tensors)
    return Contents(
        checkpoint.path, checkpoint.config, tensors, modules, ordered, base, prefix, split
    )


def _stored(checkpoint: Checkpoint, key: str) -> Stored:
    """A tensor of the source, or one expert's layer of a stack."""
    slab = checkpoint.slabs.get(key)
    if slab is None:
        entry = checkpoint.entries[key]
        return Stored(key, entry.dtype, tuple(entry.shape), entry.nbytes)
    entry, stack = checkpoint.entries[slab.stack], checkpoint.stacks[slab.stack]
    return Stored(key, entry.dtype, stack.layer, entry.nbytes // len(stack.layers))


def _fates(survey: Survey, contents: Contents, kept: dict[str, str]) -> dict[str, str]:
    """What becomes of every source tensor."""
    fates: dict[str, str] = {}
    for key in survey.checkpoint.unstacked(contents.modules):
        if module := contents.modules.get(key):
            fates[key] = f"quantized {module.spec}"
            continue
        if twin := survey.checkpoint.copies.get(key):
            fates[key] = f"left out: {twin} is the same tensor"
            continue
        stack = survey.checkpoint.stacks.get(key)
        own = next(iter(stack.layers)) if stack else key  # all of a stack stays for one reason
        reason = kept.get(own.removesuffix(".weight"), kept.get(key.removesuffix(".weight")))
        unused = "no home in the model" if key in survey.unused else None
        fates[key] = f"copied: {reason or unused}" if reason or unused else "copied"
    return fates
