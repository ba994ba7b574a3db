# SPDX-License-Identifier: Apache-2.0
"""A model whose parameters come and go: blocks materialised from the checkpoint, and dropped."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError, about
from autoround.files import AGAIN
from autoround.models import compat
from autoround.models.blocks import BlockList, find_blocks

#: What blocks can be computed in.
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class StreamedModel:
    """The checkpoint's model with all parameters on meta and buffers real.

    model    the unmodified transformers module, in eval mode, nothing requires grad
    blocks   its list of blocks
    sources  in-memory tensor name -> the checkpoint keys it is made of
    unused   checkpoint keys without a home in the model (MTP layers, old buffers)
    ties     tied parameter -> the parameter that is read from the checkpoint in its stead
    device   where blocks are computed; what lies around them, and what passes between them, stays
             at ``home``, in the host's memory
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
        blocks: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        config = compat.load_config(str(checkpoint.path), trust_remote_code)
        self.dtype = dtype or _own_dtype(config, checkpoint)
        if self.dtype not in COMPUTE:
            raise InputError(
                f"{checkpoint.path} is in {self.dtype}; save it in bfloat16 or float32 first, "
                "e.g. model.to(torch.bfloat16).save_pretrained(...)"
            )
        self.home = torch.empty(0).device
        self.device = device or self.home
        try:
            with about(checkpoint.path):
                self.model: Any = compat.skeleton(config, self.dtype, trust_remote_code)
                self.blocks: BlockList = find_blocks(self.model, blocks)
                compat.refuse_choices(self.model)
        except InputError:
            raise
        except Exception as error:  # whatever a model makes of settings that nobody meant
            raise InputError(
                f"{checkpoint.path / 'config.json'} makes no {config.model_type} "
                f"({type(error).__name__}: {str(error)[:200]}); {AGAIN}"
            ) from error
        self._homes, self.unused = compat.sources(self.model, checkpoint.entries)
        self.sources = {name: home.keys for name, home in self._homes.items()}
        self._targets = self.model.state_dict()
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.ties = self._resolve_ties()
        self._check()
        for name, buffer in self.model.named_buffers():
            self._slot(name)._buffers[_leaf(name)] = buffer.to(self._place(name))

    def recipe(self, name: str) -> compat.Source | None:
        """How a tensor is made; None where the checkpoint does not hold it (tied, or computed)."""
        return self._homes.get(name)

    def _place(self, name: str) -> torch.device:
        return self.device if self.blocks.owns(name) else self.home

    def load(self, prefixes: Iterable[str], device: torch.device) -> None:
        """Read every parameter and persistent buffer at or under the given names ("" = all).

        Parameters tied to one elsewhere alias it; one elsewhere that was not here stays on meta."""
        wanted = [name for name in self._targets if _under(name, tuple(prefixes))]
        owners = {name: self.ties.get(name, name) for name in wanted}
        # A tied partner that is already here (the embedding, for a head) is not read again.
        read = [o for n, o in owners.items() if n == o or self._tensor(o).is_meta]
        keys = dict.fromkeys(key for name in read for key in self.sources.get(name, ()))
        with self.checkpoint.open(keys) as tensors, about(self.checkpoint.path):
            compat.materialise(self.model, tensors, self.dtype, device)
        for name, owner in owners.items():
            if name != owner:
                self._slot(name)._parameters[_leaf(name)] = self._tensor(owner)
        for owner in set(read) - set(wanted):
            self._slot(owner)._parameters[_leaf(owner)] = compat.to_meta(self._tensor(owner))
        for name in wanted:
            self._tensor(name).requires_grad_(False)

    def drop(self, module: nn.Module) -> None:
        """Free every parameter of a module; buffers stay."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    part._parameters[name] = compat.to_meta(parameter)

    def load_outside_blocks(self) -> None:
        """Materialise embeddings, final norm, head and other towers; they stay."""
        self.load([name for name in self._targets if not self.blocks.owns(name)], self.home)

    def load_around(self, weights: Collection[str]) -> None:
        """Materialise everything but some parameters, where blocks are computed; buffers too."""
        self.load([name for name in self._targets if name not in weights], self.device)
        for name, buffer in self.model.named_buffers():
            self._slot(name)._buffers[_leaf(name)] = buffer.to(self.device)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its parameters, freed on leaving."""
        module = self.blocks.modules[index]
        try:
            self.load([self.blocks.names[index]], self.device)
            yield module
        finally:
            self.drop(module)

    @property
    def vectors(self) -> dict[str, str]:
        """Parameters of one dimension that are a tensor of the checkpoint as it is -> its key."""
        tied = {*self.ties, *self.ties.values()}
        return {
            name: home.keys[0]
            for name, home in self._homes.items()
            if name in self._parameters
            and name not in tied
            and home.recipe == "copy"
            and len(self._targets[name].shape) == 1
            and DTYPES.get(self.checkpoint.entries[home.keys[0]].dtype) == self.dtype
        }

    def resident_bytes(self) -> int:
        """Bytes of all parameters that are materialised now, shared ones counted once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.is_meta)

    def _slot(self, name: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return module

    def _tensor(self, name: str) -> Any:
        return getattr(self._slot(name), _leaf(name))

    def _resolve_ties(self) -> dict[str, str]:
        """The same outcome as transformers' tie_weights, from names: whoever is in the checkpoint
        is read, the others alias it; two that are both stored stay apart unless their bytes
        agree."""
        groups: dict[str, list[str]] = {}
        for target, source in compat.tied(self.model).items():
            groups.setdefault(source, [source]).append(target)
        ties: dict[str, str] = {}
        for members in groups.values():
            present = [name for name in members if name in self._homes]
            if present:
                owner = present[0]
                ties.update(
                    {
                        m: owner
                        for m in members
                        if m != owner and (m not in present or self._same(m, owner))
                    }
                )
        return ties

    def _same(self, a: str, b: str) -> bool:
        one, two = self.sources[a], self.sources[b]
        if len(one) != 1 or len(two) != 1:
            return False
        found = self.checkpoint.tensors([*one, *two])
        return torch.equal(found[one[0]], found[two[0]])

    def _check(self) -> None:
        """Before any work: every parameter has a source, every plain copy the right shape."""
        where = self.checkpoint.path
        lost = [n for n in self._parameters if n not in self._homes and n not in self.ties]
        if lost:
            raise InputError(
                f"{where} lacks {min(lost)} and {len(lost) - 1} more tensors of "
                f"{type(self.model).__name__}; download it again, or correct config.json"
            )
        for name, home in self._homes.items():
            shape = tuple(self._targets[name].shape)
            if reason := self._misfit(home, shape):
                raise InputError(f"{where}: {name} wants shape {shape}, but {reason}; {AGAIN}")

    def _misfit(self, home: compat.Source, shape: tuple[int, ...]) -> str | None:
        """Why these checkpoint tensors cannot make a tensor of this shape, as far as names tell."""
        if home.recipe == "other":
            return None
        count = shape[0] if home.recipe.startswith("experts") else 1
        for group in home.groups:
            if len(group) != count:
                return f"the checkpoint has {len(group)} tensors such as {home.keys[0]} for it"
        got = self.checkpoint.entries[home.keys[0]].shape
        if home.recipe == "copy" and got != shape:
            return f"{home.keys[0]} has {got}"
        return None


def _own_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next(
        (DTYPES[e.dtype] for e in checkpoint.entries.values() if e.dtype in DTYPES), torch.float32
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(not p or name == p or name.startswith(p + ".") for p in prefixes)
