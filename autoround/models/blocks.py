# SPDX-License-Identifier: Apache-2.0
"""Finding the stack of transformer blocks in a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from autoround.errors import InputError


@dataclass(frozen=True, slots=True)
class BlockList:
    """The dotted name of the list and its modules, in order."""

    name: str
    modules: tuple[nn.Module, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted name of every block."""
        return tuple(f"{self.name}.{i}" for i in range(len(self.modules)))

    def owns(self, name: str) -> bool:
        """Whether a parameter or module name lies inside the list."""
        return name.startswith(self.name + ".")


def find_blocks(model: nn.Module, name: str | None = None) -> BlockList:
    """The text tower of `model`, or the list the user named; InputError when there is none."""
    if name is not None:
        return _named(model, name)
    towers = _towers(model) or _by_linears(model)
    if not towers:
        raise InputError(
            f"{type(model).__name__} has no list of blocks; name it with blocks=, e.g. model.layers"
        )
    inside = {id(module) for module in _decoder(model).modules()}
    own = [tower for tower in towers if all(id(block) in inside for block in tower.modules)]
    return max(
        own or towers,
        key=lambda tower: sum(p.numel() for b in tower.modules for p in b.parameters()),
    )


def _named(model: nn.Module, name: str) -> BlockList:
    modules = dict(model.named_modules())
    found = modules.get(name)
    if not isinstance(found, nn.ModuleList | nn.Sequential) or len(found) == 0:
        lists = [
            key
            for key, module in modules.items()
            if isinstance(module, nn.ModuleList) and len(module) > 1
        ]
        raise InputError(
            f"{name} is not a list of blocks; this model has {', '.join(lists[:6]) or 'no lists'}"
        )
    return BlockList(name, tuple(found))


def _lists(model: nn.Module) -> Iterator[tuple[str, Sequence[nn.Module]]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, tuple(module)


def _towers(model: nn.Module) -> list[BlockList]:
    # Jamba and Zamba2 mix two classes in one list, so "all children of one class" would be wrong.
    marked = set(getattr(model, "_no_split_modules", None) or ())
    found: list[BlockList] = []
    for name, modules in _lists(model):
        if any(tower.owns(name) for tower in found):
            continue
        if all(
            isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in marked for m in modules
        ):
            found.append(BlockList(name, tuple(modules)))
    return found


def _by_linears(model: nn.Module) -> list[BlockList]:
    """Remote code: the longest list of modules that each own two or more linears."""
    found = [
        BlockList(name, tuple(modules))
        for name, modules in _lists(model)
        if len(modules) > 1
        and all(sum(isinstance(x, nn.Linear) for x in m.modules()) > 1 for m in modules)
    ]
    longest = max((len(tower.modules) for tower in found), default=0)
    return [tower for tower in found if len(tower.modules) == longest]


def _decoder(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if callable(getter) else model
    return decoder if isinstance(decoder, nn.Module) else model
