# SPDX-License-Identifier: Apache-2.0
"""What a quantized model consists of, whatever the format of its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround.scheme import KEEP_BITS, Scheme
from hal import QTensor, Spec


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: safetensors dtype name, shape, bytes.

    ``pieces`` > 1: it is made of so many parts of equal size, one for each of its first dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class Module:
    """One quantized weight ``[N, K]`` under the name its linear layer has in the checkpoint.

    ``key``: the tensor of the source that it replaces. ``transposed``: that tensor is [K, N].
    ``act_order``: its columns belong to groups in an order of their own (`QTensor.perm`).
    ``least_zero``: no zero level is below it; 0 where nothing is known yet.
    """

    name: str
    key: str
    spec: Spec
    shape: tuple[int, int]
    transposed: bool = False
    act_order: bool = False
    least_zero: int = 0

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.spec.bits, self.spec.group or -1, self.spec.symmetric)

    @classmethod
    def of(cls, name: str, q: QTensor) -> "Module":
        """The module that a quantized weight makes, in a checkpoint of plain linear layers."""
        least = int(q.parts["zero"].min()) if "zero" in q.parts else 0
        return cls(name, f"{name}.weight", q.spec, q.shape, False, q.perm is not None, least)


@dataclass(frozen=True, slots=True)
class Contents:
    """A quantized model: settings, quantized modules, and tensors that stay as they are.

    ``home``: the directory with the companions (tokenizer and the like). ``config``: config.json of
    the float model. ``tensors``: every tensor of the source in its order; quantized ones are the
    keys of ``modules``. ``schemes``: every module that was up for quantization -> what it got;
    16 bits = kept. ``base``: the scheme asked for. ``blocks``: name of the list of blocks.
    ``stacks``: tensors that the float model has in the place of single experts' layers.
    """

    home: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    modules: Mapping[str, Module]
    schemes: Mapping[str, Scheme]
    base: Scheme
    blocks: str
    stacks: tuple[str, ...] = ()

    @property
    def kept(self) -> list[Stored]:
        """Tensors that stay as they are."""
        return [t for key, t in self.tensors.items() if key not in self.modules]

    @property
    def kept_matrices(self) -> list[str]:
        """Names of modules whose weight has rows and columns and stays: linear layers among them,
        for a reader that must be told which are not quantized."""
        wide = [t.name.removesuffix(".weight") for t in self.kept if len(t.shape) > 1]
        kept = [name for name, scheme in self.schemes.items() if scheme.bits == KEEP_BITS]
        tied = "lm_head.weight" not in self.tensors and not self.heads
        head = ["lm_head"] if tied else []  # in memory only
        return list(dict.fromkeys([*wide, *kept, *head]))

    @property
    def heads(self) -> list[str]:
        """Quantized modules outside the blocks: the output projection, where it was asked for."""
        return [m.name for m in self.modules.values() if not self.inside(m.name)]

    def inside(self, name: str) -> bool:
        """Whether a module belongs to the list of blocks."""
        return name.startswith(self.blocks + ".")
