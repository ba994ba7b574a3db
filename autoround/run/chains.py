# SPDX-License-Identifier: Apache-2.0
"""What passes between blocks, verbatim on the disk; and what blocks are given, in a few bytes.

Values are tensors in nested tuples, lists and dicts with plain values between. Anything else is
`Opaque`: it can be neither kept nor compared, and who asked must do without.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround import digest

ALIGN = 64  # bytes
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
    )
}  # fmt: skip


class Opaque(Exception):
    """A value of a kind that is not known here."""


class Digests:
    """Digests of tensors, each memory read once.

    Tensors seen are held on to: their memory cannot become another's in the meantime.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Tensor, int, str]] = {}

    def of(self, x: Tensor) -> str:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride())
        held = self._seen.get(key)
        if held is None or held[1] != held[0]._version:
            text = f"{_name(x.dtype)} {[*x.shape]} {digest.of_tensor(x)}"
            held = self._seen[key] = (x, x._version, text)
        return held[2]

    def value(self, value: Any) -> str:
        """One digest of a nested value. Raises Opaque."""
        tree = json.dumps(_tree(value, self.of))
        return hashlib.sha256(tree.encode()).hexdigest()


class Spool:
    """Outputs of blocks going to a file in ``directory``, which is named by its content in the end.

    ``trees``: number of the forward -> its output as JSON; the tensors are in the file.
    """

    def __init__(self, directory: Path, digests: Digests) -> None:
        self._path, self._digests = directory / "chains.partial", digests
        self._path.unlink(missing_ok=True)  # it may be a link, or a pipe
        self._file = self._path.open("wb")
        self._places: dict[tuple[int, str], int] = {}
        self._content = hashlib.sha256()
        self._opaque = False
        self.trees: dict[int, Any] = {}

    def add(self, outputs: Mapping[int, Any]) -> None:
        """Write what is not there yet."""
        try:
            for i, output in outputs.items():
                self.trees[i] = _tree(output, self._put)
        except Opaque:
            self._opaque = True

    def _put(self, x: Tensor) -> list[Any]:
        found = self._digests.of(x)
        place = (x.data_ptr(), found)  # one memory stays one memory, two alike stay two
        if place not in self._places:
            self._places[place] = self._file.tell()
            for piece in digest.pieces(x):
                self._file.write(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            self._file.write(bytes(-self._file.tell() % ALIGN))
            self._content.update(found.encode())
        far = x.device != torch.empty(0).device
        return [_name(x.dtype), [*x.shape], self._places[place], found, far]

    def close(self) -> str | None:
        """The file's name, or None where something was opaque.

        Not synced to the disk: what a power cut leaves unwritten is noticed, and computed again.
        """
        if self._opaque:
            self.discard()
            return None
        self._file.close()
        name = f"{self._content.hexdigest()[:16]}.chains"
        self._path.replace(self._path.with_name(name))
        return name

    def discard(self) -> None:
        """Without the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def read(path: Path, trees: Mapping[int, Any], device: torch.device) -> dict[int, Any]:
    """Values as they were given to `Spool.add`, their memory the file's, private to the reader.

    Raises ValueError or OSError where the file is not what was written.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file")
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors: dict[int, Tensor] = {}
    return {i: _value(tree, held, tensors, device) for i, tree in trees.items()}


def _tree(value: Any, of_tensor: Any) -> Any:
    """Plain values as they are, tensors as ``of_tensor`` has them, containers as [kind, items]."""
    if isinstance(value, Tensor):
        return ["tensor", of_tensor(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (tuple, list):
        return [type(value).__name__, [_tree(item, of_tensor) for item in value]]
    if type(value) is dict and all(isinstance(key, str | int) for key in value):
        return ["dict", [[key, _tree(item, of_tensor)] for key, item in value.items()]]
    raise Opaque(type(value).__name__)


def _value(tree: Any, held: mmap.mmap, tensors: dict[int, Tensor], device: torch.device) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, inner = tree
    if kind == "tensor":
        dtype, shape, at, wanted, far = inner
        if at not in tensors:
            x = _tensor(held, DTYPES[dtype], shape, at)
            if Digests().of(x) != wanted:
                raise ValueError(f"the digest of bytes {at} and on differs")
            tensors[at] = x.to(device) if far else x
        return tensors[at]
    if kind == "dict":
        return {key: _value(item, held, tensors, device) for key, item in inner}
    items = [_value(item, held, tensors, device) for item in inner]
    return tuple(items) if kind == "tuple" else items


def _tensor(held: mmap.mmap, dtype: torch.dtype, shape: list[int], at: int) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(held, dtype=dtype, count=count, offset=at).view(shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
